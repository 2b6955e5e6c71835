// SPDX-License-Identifier: Apache-2.0
// Few rows in four bits by a weight in four bits: y (m, n) = x (m, k) times W (n, k) transposed,
// products of codes in the tensor cores of integers.
#pragma once

#include <cstdint>

#include "args.h"
#include "together.h"

namespace pyfmt {
namespace cuda {

// The left operand as the products want it, and its scales; see CodesLayout.
struct CodesLeft {
  void* bytes = nullptr;
  float* scales = nullptr;
  // Of rounding: where it leaves the tensor scale, and how its blocks find that together.
  float* tensor_scale = nullptr;
  Together together;
  int m = 0, k = 0;
  bool halves = false;  // even elements of eight before odd ones
};

struct MatmulCodesArgs {
  CodesLeft x;
  int64_t n = 0;
  FormatSpec x_format, format;     // of x, of the weight
  const uint8_t* codes = nullptr;  // (n, k / 2)
  const uint8_t* scales = nullptr;
  const float *x_tensor_scale = nullptr, *tensor_scale = nullptr;  // the weight's; or null
  const void* bias = nullptr;                                      // (n,)
  DType bias_dtype = DType::kFP32;
  void* out = nullptr;  // (m, n) contiguous
  DType out_dtype = DType::kBF16;
  // For measurements: blocks that share the rows, slots that are filled ahead of x; 0: chosen.
  int blocks = 0, early = 0;
  bool overlap = true;  // start before the launch ahead ends
};

// Null where the kernel serves, else why it does not.
const char* matmul_codes_refuses(const FormatSpec& x, const FormatSpec& w, int64_t m, int64_t n,
                                 int64_t k);
// Whether a weight's codes and scales lie where copies may start.
bool matmul_codes_reads(const FormatSpec& w, const void* codes, const void* scales);
// Bytes of CodesLeft::bytes and numbers of CodesLeft::scales.
int64_t codes_bytes(int64_t m, int64_t k);
int64_t codes_scales(int64_t m, int64_t k);
// Whether `round_codes` takes x as it is: bfloat16 rows of whole blocks.
bool round_codes_serves(const QuantizeArgs&);
// x to CodesLeft, rotated and rounded; or from packed codes and scales.
void round_codes(const QuantizeArgs&, const CodesLeft&, Stream);
void place_codes(const uint8_t* codes, const uint8_t* scales, const FormatSpec&, const CodesLeft&,
                 Stream);
// Whether a weight of this format wants CodesLeft::halves.
bool codes_in_halves(const FormatSpec& w);
void matmul_codes(const MatmulCodesArgs&, Stream);

}  // namespace cuda
}  // namespace pyfmt
