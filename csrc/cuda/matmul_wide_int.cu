// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for integers with an E4M3 scale, and groups of integers.
#include "matmul_wide_forms.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel int_kernel(const FormatSpec& f, Form form) {
  if (is_nv(f, elements::int4)) {
    return block_kernel<int4_element, Scale::kE4M3>(form);
  }
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
