// SPDX-License-Identifier: Apache-2.0
// y = a w^T by fp8 tensor cores on Hopper, w straight from its packed codes: they become fp8 numbers
// in registers, beside the products. a lies folded in a panel of tiles (fold_panel.cuh).
//
// y[m, n] = RNE(a_scale[m] * w_scale[n] * sum_k a8[m, k] * w8[n, k] + bias[n])
//
// Sums of 128 columns are those of the tensor cores, which keep 13 bits below the largest product
// or sum of a step; they are added up in float32. The order follows from the shapes alone.
#pragma once

#include "expand.h"

namespace pyfmt {
namespace cuda {

struct MatmulFoldPlan {
  int tokens = 0;  // rows of a of one tile: 64 or 128; 0: chosen
  int share = 1;   // neighbouring tiles of w in a cluster, which share what is read of a
  int split = 1;   // parts of K in a cluster
};

struct MatmulFoldArgs {
  Folded a;  // a panel in the order of w's bits
  int64_t m = 0, n = 0, k = 0;
  const uint8_t* codes = nullptr;   // (n, row_bytes)
  const uint8_t* scales = nullptr;  // (n, blocks)
  const float* w_scale = nullptr;   // of each row, a power of two, or 0 where it does not fold
  const void* bias = nullptr;
  DType bias_dtype = DType::kFP32;
  FormatSpec format;
  void* y = nullptr;  // (m, n) contiguous
  DType dtype = DType::kBF16;
  MatmulFoldPlan plan;
};

// Why this kernel cannot serve a weight's format on the current device; null where it can.
const char* matmul_fold_refuses(const FormatSpec& format, int64_t m, int64_t n, int64_t k);
MatmulFoldPlan matmul_fold_plan(const FormatSpec& format, int64_t m, int64_t n, int64_t k,
                                MatmulFoldPlan asked);
// Rows and bytes of the panel.
int64_t matmul_fold_panel_rows(int64_t m, const MatmulFoldPlan&);
int64_t matmul_fold_panel_bytes(int64_t m, int64_t k, const MatmulFoldPlan&);
// The kernels before it on the stream may let it start early; it waits for them by itself.
void matmul_fold(const MatmulFoldArgs&, Stream);

}  // namespace cuda
}  // namespace pyfmt
