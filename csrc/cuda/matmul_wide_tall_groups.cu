// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for integers in groups and up to 64 rows of x.
#include "matmul_wide_tall_groups.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel tall_group_kernel(const FormatSpec& f, Form form) {
  if (form != Form::kTall || f.block_columns % kChunk) return {};
  if (has_groups(f, elements::int4)) {
    return {tall::launch_groups<4>, kChunk, false, 64};
  }
  if (has_groups(f, elements::int8)) {
    return {tall::launch_groups<8>, kChunk, false, 64};
  }
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
