// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for integers with an E8M0 scale.
#include "matmul_wide_forms.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel mxint_kernel(const FormatSpec& f, Form form) {
  if (is_mx(f, elements::int8q6)) {
    return block_kernel<int8q6_element, Scale::kE8M0>(form);
  }
  if (is_mx(f, elements::int6q4)) {
    return block_kernel<int6q4_element, Scale::kE8M0>(form);
  }
  if (is_mx(f, elements::int4q2)) {
    return block_kernel<int4q2_element, Scale::kE8M0>(form);
  }
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
