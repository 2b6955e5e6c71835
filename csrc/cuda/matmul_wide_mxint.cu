// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for integers with an E8M0 scale.
#include "matmul_wide_blocks.cuh"
#include "matmul_wide_shared.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel mxint_kernel(const FormatSpec& f, bool shared) {
  if (is_mx(f, elements::int8q6)) {
    return shared ? shared_kernel<int8q6_element, Scale::kE8M0>()
                  : blocks_kernel<int8q6_element, Scale::kE8M0>();
  }
  if (is_mx(f, elements::int6q4)) {
    return shared ? shared_kernel<int6q4_element, Scale::kE8M0>()
                  : blocks_kernel<int6q4_element, Scale::kE8M0>();
  }
  if (is_mx(f, elements::int4q2)) {
    return shared ? shared_kernel<int4q2_element, Scale::kE8M0>()
                  : blocks_kernel<int4q2_element, Scale::kE8M0>();
  }
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
