// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for e2m3 and e3m2.
#include "matmul_wide_forms.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel fp6_kernel(const FormatSpec& f, Form form) {
  if (is_mx(f, elements::e2m3)) {
    return block_kernel<e2m3_element, Scale::kE8M0>(form);
  }
  if (is_mx(f, elements::e3m2)) {
    return block_kernel<e3m2_element, Scale::kE8M0>(form);
  }
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
