// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for integers in groups of other multiples of 32 columns and up to 64 rows of x.
#include "matmul_wide_tall_groups.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel tall_small_group_kernel(const FormatSpec& f, Form form) {
  if (form != Form::kTall || f.block_columns % 128 == 0 || f.block_columns % 32) return {};
  return f.block_columns % 64 ? tall_groups<8>(f) : tall_groups<16>(f);
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
