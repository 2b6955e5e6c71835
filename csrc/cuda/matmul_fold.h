// SPDX-License-Identifier: Apache-2.0
// y = a w^T by fp8 tensor cores on Hopper, w straight from its packed codes: the kernel of
// matmul_wide_turns.cuh with fp8 tiles.
//
// y[m, n] = RNE(a_scale[m] * w_scale[n] * sum_k a8[m, k] * w8[n, k] + bias[n])
//
// Sums of 128 columns are those of the tensor cores, which keep 13 bits below the largest product
// or sum of a step; they are added up in float32. The order follows from the shapes alone.
#pragma once

#include "expand.h"
#include "matmul_wide.h"

namespace pyfmt {
namespace cuda {

struct MatmulFoldArgs {
  Folded a;  // with its panel; padded to whole tiles of the plan
  int64_t n = 0;
  const uint8_t* codes = nullptr;   // (n, row_bytes)
  const uint8_t* scales = nullptr;  // (n, blocks)
  const float* w_scale = nullptr;   // of each row, a power of two, or 0 where it does not fold
  const float* bias = nullptr;
  FormatSpec format;
  void* y = nullptr;  // (rows of a, n) contiguous
  DType dtype = DType::kBF16;
  RepairArgs repair;          // of the same operands: products of rows that do not fold
  void* workspace = nullptr;  // of matmul_fold_workspace bytes, aligned to 16
  WidePlan plan;              // tokens 0: chosen here
};

// Why this kernel cannot serve a weight's format on the current device; null where it can.
const char* matmul_fold_refuses(const FormatSpec& format, int64_t m, int64_t n, int64_t k);
// The plan that would be chosen for the rows and columns of `a` and n, bytes of a's panel, and of
// scratch that `a` needs.
WidePlan matmul_fold_plan(const MatmulFoldArgs& a);
int64_t matmul_fold_panel(const MatmulFoldArgs& a);
int64_t matmul_fold_workspace(const MatmulFoldArgs& a);
// The kernels before it on the stream may let it start early; it waits for them by itself.
void matmul_fold(const MatmulFoldArgs&, Stream);

}  // namespace cuda
}  // namespace pyfmt
