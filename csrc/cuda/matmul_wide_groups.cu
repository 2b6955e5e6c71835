// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for integers in groups.
#include "matmul_wide_groups.cuh"
#include "matmul_wide_turns.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel group_kernel(const FormatSpec& f, Form form) {
  if (form == Form::kTall) return {};
  if (form == Form::kShared) {
    if (has_groups(f, elements::int4)) return {groups::launch<4>, groups::kColumns, false};
    if (has_groups(f, elements::int8)) return {groups::launch<8>, groups::kColumns, false};
  }
  if (has_groups(f, elements::int4)) return {turns::launch_groups<4>, kChunk, true};
  if (has_groups(f, elements::int8)) return {turns::launch_groups<8>, kChunk, true};
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
