// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for integers with an E4M3 scale, and groups of integers.
#include "matmul_wide.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel int_kernel(const FormatSpec& f) {
  if (is_nv(f, elements::int4)) return kernel_of<Weights<int4_element, Scale::kE4M3>>();
  if (has_groups(f, elements::int4)) return kernel_of<Weights<int4_element, Scale::kBF16>>();
  if (has_groups(f, elements::int8)) return kernel_of<Weights<int8_element, Scale::kBF16>>();
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
