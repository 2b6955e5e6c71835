// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for e4m3 and e5m2.
#include "matmul_wide_forms.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel fp8_kernel(const FormatSpec& f, Form form) {
  if (is_mx(f, elements::e4m3fn)) {
    return block_kernel<e4m3fn_element, Scale::kE8M0>(form);
  }
  if (is_mx(f, elements::e5m2ieee)) {
    return block_kernel<e5m2ieee_element, Scale::kE8M0>(form);
  }
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
