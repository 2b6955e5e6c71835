// SPDX-License-Identifier: Apache-2.0
// Products with quantized matrices on the CPU: y = a b^T (+ bias) of decoded values, float32 sums.
//
// Three kinds of tiles and one kernel for few rows, chosen by the driver (matmul.cpp):
//   stream  few rows of a dense left side: each packed row of b is read once, decoded in
//           registers and multiplied there
//   int8    both sides count steps of a power of two: a block's dot product is an exact int32
//   bf16    elements and left side are bfloat16: pairs of products, scales applied block by block
//   fp32    everything else, on decoded values or (where both sides are integers) on steps
#pragma once

#include <cstddef>

#include "cpu.h"

namespace pyfmt {
namespace cpu {

// A quantized matrix of `rows` rows of K elements. Square blocks do not cross batches.
struct Packed {
  const uint8_t* codes = nullptr;
  const void* scales = nullptr;
  FormatSpec format;
  int64_t rows = 0, batch_rows = 0;
  bool has_tensor_scale = false;
  float tensor_scale = 1.0f;
};

struct MatmulCall {
  int64_t m = 0, n = 0, k = 0;
  // The left side: dense (a, perhaps to be rotated, perhaps to be quantized), or packed.
  const void* a = nullptr;
  DType a_dtype = DType::kFP32;
  const Packed* left = nullptr;
  Rotation rotation;
  const Options* quantize = nullptr;  // includes the rotation
  View view;                          // a's, where it is quantized
  Packed right;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFP32;
  void* out = nullptr;  // (m, n)
  DType out_dtype = DType::kFP32;
  // Memory for the time of the call, aligned to 64 bytes: for what is too large for threads to
  // keep. Without it such memory is allocated and given back.
  void* (*borrow)(void* context, int64_t bytes) = nullptr;
  void* context = nullptr;
};

void matmul(const ParallelFor&, const MatmulCall&);

// ---- what a level offers ------------------------------------------------------------------------

enum class TileKind : uint8_t { kInt8, kBF16, kFP32 };

// At most so many left rows are multiplied while b streams by.
constexpr int64_t kStreamRows = 4;
constexpr int64_t kStreamTokens = 2;  // where bfloat16 tiles are faster from there on

struct StreamArgs {
  Packed right;
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  DType a_dtype = DType::kFP32;
  float* prepared = nullptr;  // (m, prepared_columns): a in the order of the kernel
  const void* bias = nullptr;
  DType bias_dtype = DType::kFP32;
  void* out = nullptr;
  DType out_dtype = DType::kFP32;
};

struct TileArgs {
  TileKind kind = TileKind::kFP32;
  int64_t m = 0, n = 0, k = 0;
  // The left panel: rows of `a_columns` elements (biased bytes or float32), zeros beyond k;
  // bfloat16 in groups of 16 rows, pairs along K of each side by side. And one scale a segment
  // where the left side is quantized and its scales stand apart, in the same order.
  void* a = nullptr;
  int64_t a_columns = 0;
  float* a_scales = nullptr;
  int64_t a_least = 0, a_most = 0;  // biased exponents of its scales, for overflow
  Packed right;
  int64_t segment = 0;   // elements of one dot product
  bool decoded = false;  // panels hold decoded values: no scales apart
  float multiplier = 1.0f;
  int64_t m_chunk = 0;  // left rows of one work item
  const void* bias = nullptr;
  DType bias_dtype = DType::kFP32;
  void* out = nullptr;
  DType out_dtype = DType::kFP32;

  // The calling thread's scratch memory, kept from call to call.
  void* (*workspace)(int64_t bytes) = nullptr;

  int64_t segments() const { return (k + segment - 1) / segment; }
};

struct LeftArgs {
  const TileArgs* tile = nullptr;
  const Packed* left = nullptr;  // or
  const void* a = nullptr;       // dense
  DType a_dtype = DType::kFP32;
  int64_t first_row = 0;  // the row of the panel where row 0 of the source belongs
};

struct MatmulKernels {
  const char* name;
  bool has_int8, has_bf16;
  int panel;  // rows of b in one work item of `tiles`
  // Whether stream serves b, and how many floats a prepared row of a takes.
  bool (*stream_serves)(const FormatSpec&, int64_t k);
  int64_t (*stream_columns)(const FormatSpec&, int64_t k);
  void (*stream_prepare)(const StreamArgs&);
  void (*stream)(const StreamArgs&, int64_t begin, int64_t end);  // rows of b
  void (*left)(const LeftArgs&, int64_t begin, int64_t end, int64_t* least, int64_t* most);
  void (*tiles)(const TileArgs&, int64_t begin, int64_t end);  // panels, then chunks of rows
  // Whether every finite number of a is zero or has an exponent within +-60.
  bool (*tame)(const void* a, DType dtype, int64_t n);
};

extern const MatmulKernels kBaselineMatmul;
#if defined(__x86_64__)
extern const MatmulKernels kAvx2Matmul, kAvx512Matmul, kAvx512VnniMatmul, kAvx512Bf16Matmul;
#endif

// The level in use, chosen together with the other kernels (level.cpp), and all of this processor.
const MatmulKernels& matmul_kernels();
const char* matmul_levels();

}  // namespace cpu
}  // namespace pyfmt
