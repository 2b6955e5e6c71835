// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for e4m3 and e5m2.
#include "matmul_wide_blocks.cuh"
#include "matmul_wide_shared.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel fp8_kernel(const FormatSpec& f, bool shared) {
  if (is_mx(f, elements::e4m3fn)) {
    return shared ? shared_kernel<e4m3fn_element, Scale::kE8M0>()
                  : blocks_kernel<e4m3fn_element, Scale::kE8M0>();
  }
  if (is_mx(f, elements::e5m2ieee)) {
    return shared ? shared_kernel<e5m2ieee_element, Scale::kE8M0>()
                  : blocks_kernel<e5m2ieee_element, Scale::kE8M0>();
  }
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
