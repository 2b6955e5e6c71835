// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for e2m3 and e3m2.
#include "matmul_wide_blocks.cuh"
#include "matmul_wide_shared.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel fp6_kernel(const FormatSpec& f, bool shared) {
  if (is_mx(f, elements::e2m3)) {
    return shared ? shared_kernel<e2m3_element, Scale::kE8M0>()
                  : blocks_kernel<e2m3_element, Scale::kE8M0>();
  }
  if (is_mx(f, elements::e3m2)) {
    return shared ? shared_kernel<e3m2_element, Scale::kE8M0>()
                  : blocks_kernel<e3m2_element, Scale::kE8M0>();
  }
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
