// SPDX-License-Identifier: Apache-2.0
// matmul_fold.h for elements of 6 bits.
#include "matmul_fold.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel fold6_kernel(const ElementSpec& e, bool x_e5m2) {
  if (e == elements::e3m2) return fold_kernel<e3m2_element>(x_e5m2);
  if (e == elements::e2m3) return fold_kernel<e2m3_element>(x_e5m2);
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
