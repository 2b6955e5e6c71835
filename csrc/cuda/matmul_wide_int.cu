// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for integers with an E4M3 scale, and groups of integers.
#include "matmul_wide_blocks.cuh"
#include "matmul_wide_shared.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel int_kernel(const FormatSpec& f, bool shared) {
  if (is_nv(f, elements::int4)) {
    return shared ? shared_kernel<int4_element, Scale::kE4M3>()
                  : blocks_kernel<int4_element, Scale::kE4M3>();
  }
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
