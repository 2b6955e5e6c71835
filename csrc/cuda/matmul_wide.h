// SPDX-License-Identifier: Apache-2.0
// y = x w^T for middle-sized M on Hopper: packed weights are decoded beside the products, into
// registers (matmul_wide_tall.cuh, matmul_wide_blocks.cuh, matmul_wide_turns.cuh) or shared memory
// (matmul_wide_shared.cuh), and multiplied by tiles of activations.
//
// y[m, n] = RNE(tensor_scale * sum_k x[m, k] * element[n, k] * scale[n, k / block] + bias[n])
//
// element * scale is a bfloat16, so products are exact; groups of integers, whose scales have as
// many bits, have each group's float32 sum multiplied by its scale. The order of all sums follows
// from the shapes alone: same inputs, same bits.
#pragma once

#include "args.h"

namespace pyfmt {
namespace cuda {

struct WidePlan {
  int tokens = 0;  // rows of x of one tile: 16, 32, 64, 96, 128, 160, 192 or 256
  // Tiles of w that share what is read of x: blocks of a cluster, or, of up to 64 rows of x,
  // warpgroups of a block (1, 2 or 4).
  int share = 1;
  // Parts of K: 1, or 2 in a cluster, or, of up to 64 rows of x, 4 or 8 that another launch adds.
  int split = 1;
  // Of groups of integers and 192 or 256 tokens: w is written out as bfloat16 integers first. Then,
  // and with 192 tokens, share and split are 1.
  bool written = false;
};

struct MatmulWideArgs {
  const void* x = nullptr;  // (m, k) bfloat16, contiguous
  int64_t m = 0, n = 0, k = 0;
  const uint8_t* codes = nullptr;  // (n, row_bytes)
  const void* scales = nullptr;    // (n, blocks)
  const float* tensor_scale = nullptr;
  const float* bias = nullptr;  // (n)
  FormatSpec format;
  void* y = nullptr;  // (m, n) contiguous
  DType dtype = DType::kBF16;
  void* workspace = nullptr;  // of matmul_wide_workspace bytes, aligned to 16
  WidePlan plan;              // tokens 0: chosen here
  bool ordered = false;       // columns of x lie as round_few leaves them; see takes_ordered
};

// Why this path cannot serve a format on the current device; null where it can.
const char* matmul_wide_refuses(const FormatSpec& format, int64_t m, int64_t n, int64_t k);
// Whether x may come with its columns in the order of the weight's codes.
bool takes_ordered(const MatmulWideArgs& a);
// The plan that would be chosen for `a`.
WidePlan matmul_wide_plan(const MatmulWideArgs& a);
// Bytes of scratch that `a` needs: for x in the order of codes, or for rows of x or of codes that
// are not aligned to 16 bytes.
int64_t matmul_wide_workspace(const MatmulWideArgs& a);
void matmul_wide(const MatmulWideArgs& a, Stream stream);

}  // namespace cuda
}  // namespace pyfmt
