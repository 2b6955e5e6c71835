// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for integers in groups of multiples of 128 columns and up to 64 rows of x.
#include "matmul_wide_tall_groups.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel tall_group_kernel(const FormatSpec& f, Form form) {
  if (form != Form::kTall || f.block_columns % 128) return {};
  return tall_groups<32>(f);
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
