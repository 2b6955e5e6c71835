// SPDX-License-Identifier: Apache-2.0
// What the dense GEMM paths stand on: rows as fp8 numbers with one power of two for each row
// ("folded"), rows as exact bf16 numbers, what repairs rows that do not fold, and the epilogue.
#pragma once

#include "args.h"

namespace pyfmt {
namespace cuda {

// Rows as fp8: value(row, k) = fp8(row, k) * scale(row), exactly. A row whose blocks' exponents
// spread over more than the fp8 type holds has scale 0 and zeros, and is marked.
struct Folded {
  // (padded rows, padded columns), rows beyond the end are zeros; or null
  uint8_t* fp8 = nullptr;
  float* scale = nullptr;               // of each padded row, a power of two
  uint8_t* marks = nullptr;             // of each padded row: 1 where it does not fold
  uint16_t* spare = nullptr;            // the rows that do not fold as exact bf16, or null
  unsigned long long* total = nullptr;  // how many there were in all calls, or null
  int64_t rows = 0, padded_rows = 0, columns = 0;
  bool e5m2 = false;
  // Or null; in place of fp8, the numbers as matmul_fold.h reads them. By chunks of 128 columns
  // (the last one may end early), each with all padded rows: 16-byte piece q of row r lies at q ^
  // (r & 7) and has numbers 4q to 4q + 3 of each of the chunk's four blocks.
  uint8_t* panel = nullptr;
};

// Whether an element of a format with blocks of 32 and E8M0 scales folds into an fp8 type.
bool folds(const FormatSpec&, bool e5m2);
// The longest row that fold_values takes.
constexpr int64_t kLongestFold = 32768;

struct FoldCodesArgs {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  FormatSpec format;
  Folded to;
};

// The row scales and marks of a weight whose codes stay packed, by the window of E4M3. A row that
// holds a NaN is marked too.
struct FoldScanArgs {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  Folded to;  // no fp8; no rows: nothing to do
  int bits = 0, low = 0, high = 0;
  int lanes = 0;           // of a warp that share a row (fold_scan.cuh)
  uint32_t masks[6] = {};  // of a unit's words, without the signs of zeros
};
FoldScanArgs fold_scan_args(const FoldCodesArgs&);

// scan: in the same launch.
void fold_codes(const FoldCodesArgs&, Stream, const FoldScanArgs& scan = {});
// Two matrices of one format in one launch, their blocks of threads mixed. beside: it may start
// before the launch ahead ends, which writes the codes and scales of the first and nothing else
// that is read or written here; the first then comes last.
void fold_two(const FoldCodesArgs&, const FoldCodesArgs&, Stream, bool beside = false);

// Rotate, quantize and fold in one: the values are those of fold_codes(quantize(x)). args.x: bf16,
// rows end to end, whole units, 16-byte aligned.
void fold_values(const QuantizeArgs& args, const Folded& to, Stream, const FoldScanArgs& scan = {});
bool fold_values_serves(const QuantizeArgs&);

// Rotate, quantize and decode in one: exact bf16 of element * scale. The tensor scale is not in it:
// it is stored in args.tensor_scale_out, times *`factor` where that is given.
void round_values(const QuantizeArgs& args, const float* factor, Stream);
bool round_values_serves(const QuantizeArgs&);
// The same for few rows, by launches that find room beside products. order: the columns of each 128
// lie in the order in which matmul_wide.h has codes of so many bits (4, 6 or 8); 0: as in x.
void round_few(const QuantizeArgs& args, const float* factor, int order, Stream);
bool round_few_serves(const QuantizeArgs&, int order);

// The rows and columns of y = a w^T + bias that stand for rows which do not fold, summed in
// float32 from exact values. w's exact values come from its codes.
struct RepairArgs {
  void* y = nullptr;
  DType dtype = DType::kBF16;
  int64_t rows = 0, columns = 0, stride = 0, k = 0;  // k: padded
  Folded a, w;  // w without fp8: all values come from its codes
  const uint8_t* w_codes = nullptr;
  const uint8_t* w_scales = nullptr;
  FormatSpec w_format;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFP32;
};
void repair(const RepairArgs&, Stream);

// out = RNE(y * *factors[0] * *factors[1] * row_scale * column_scale + bias); absent ones are 1.
struct FinishArgs {
  const float* y = nullptr;
  int64_t rows = 0, columns = 0, stride = 0;
  const float* factors[2] = {nullptr, nullptr};
  const float* row_scale = nullptr;
  const float* column_scale = nullptr;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFP32;
  void* out = nullptr;
  DType dtype = DType::kFP32;
};
void finish(const FinishArgs&, Stream);

}  // namespace cuda
}  // namespace pyfmt
