// SPDX-License-Identifier: Apache-2.0
// Few tokens by a packed weight, read once: y (m, n) = x (m, k) times W (n, k) transposed.
#pragma once

#include <cstdint>

#include "args.h"

namespace pyfmt {
namespace cuda {

struct SkinnyArgs {
  const void* x = nullptr;  // rows of k contiguous elements, x_stride elements apart
  DType x_dtype = DType::kBF16;
  int64_t x_stride = 0, m = 0, n = 0, k = 0;
  const uint8_t* codes = nullptr;  // (n, row_bytes(k))
  const void* scales = nullptr;    // (n, blocks(k))
  // Of the launch that rounded x (together.h), to be cleared; or null.
  void* slots = nullptr;
  int slot_count = 0;
  const float* tensor_scale = nullptr;
  FormatSpec format;
  const void* bias = nullptr;  // (n,)
  DType bias_dtype = DType::kFP32;
  void* out = nullptr;  // (m, n) contiguous
  DType out_dtype = DType::kBF16;
  bool batch_invariant = false;  // a token's bits do not depend on how many others there are
  // For measurements: blocks that share the rows; 0: chosen.
  int blocks = 0;
  int split = 0;  // blocks that share k where activations stay in registers; below 0: none such
  int early = 0;  // slots that such a kernel fills ahead of its activations; 0: chosen
  bool overlap = true;  // start before the launch ahead ends
};

// Whether this kernel knows the weight's format: the rows of formats.py with blocks along k, and
// int4 and int8 with float scales for groups of any multiple of 32, or for whole rows.
bool skinny_serves(const FormatSpec&);
void matmul_skinny(const SkinnyArgs&, Stream);

}  // namespace cuda
}  // namespace pyfmt
