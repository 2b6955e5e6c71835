// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for integers with an E8M0 scale.
#include "matmul_wide.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel mxint_kernel(const FormatSpec& f) {
  if (is_mx(f, elements::int8q6)) return kernel_of<Weights<int8q6_element, Scale::kE8M0>>();
  if (is_mx(f, elements::int6q4)) return kernel_of<Weights<int6q4_element, Scale::kE8M0>>();
  if (is_mx(f, elements::int4q2)) return kernel_of<Weights<int4q2_element, Scale::kE8M0>>();
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
