// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for e2m3 and e3m2.
#include "matmul_wide.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel fp6_kernel(const FormatSpec& f) {
  if (is_mx(f, elements::e2m3)) return kernel_of<Weights<e2m3_element, Scale::kE8M0>>();
  if (is_mx(f, elements::e3m2)) return kernel_of<Weights<e3m2_element, Scale::kE8M0>>();
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
