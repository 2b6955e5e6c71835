// SPDX-License-Identifier: Apache-2.0
// matmul_fold.h for elements of 4 bits.
#include "matmul_fold.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel fold4_kernel(const ElementSpec& e, bool x_e5m2) {
  if (e == elements::e2m1) return fold_kernel<e2m1_element>(x_e5m2);
  if (e == elements::int4q2) return fold_kernel<int4q2_element>(x_e5m2);
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
