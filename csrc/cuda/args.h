// SPDX-License-Identifier: Apache-2.0
// The verbs of the CUDA room on plain device pointers and a stream. Nothing here allocates,
// synchronizes or knows torch; every function only launches.
#pragma once

#include <cstdint>

#include "../formats.h"

namespace pyfmt {
namespace cuda {

using Stream = void*;  // a cudaStream_t

// Make a device current for the launches that follow; this library has its own CUDA runtime.
void set_device(int index);

// A tensor as rows along the quantized axis: row o * inner + i starts at o * outer_stride +
// i * inner_stride, and its elements lie column_stride apart. All in elements.
struct View {
  int64_t outer = 1, inner = 1, columns = 0;
  int64_t outer_stride = 0, inner_stride = 0, column_stride = 1;

  PYFMT_HD int64_t rows() const { return outer * inner; }
  int64_t count() const { return rows() * columns; }
  // Rows lie end to end.
  bool flat() const {
    return (column_stride == 1 || columns <= 1) && (inner <= 1 || inner_stride == columns) &&
           (outer <= 1 || outer_stride == inner * columns);
  }
  // Rows are contiguous and evenly spaced.
  bool even() const {
    return (column_stride == 1 || columns <= 1) &&
           (outer <= 1 || inner <= 1 || outer_stride == inner * inner_stride);
  }
  int64_t row_stride() const { return inner > 1 ? inner_stride : outer_stride; }
};

struct Rotation {
  int size = 0;                     // 0: none
  const uint32_t* signs = nullptr;  // device: what pack_signs wrote
  int64_t signs_words = 0;
};

// Signs of any real dtype, +1 or -1, to bits: 32 a word, repeated to whole words.
struct SignsArgs {
  const void* signs = nullptr;
  int item_bytes = 4;
  int64_t length = 0, stride = 1;
  uint32_t* words = nullptr;
  int64_t count = 0;  // signs_words(length)
};
int64_t signs_words(int64_t length);
void pack_signs(const SignsArgs&, Stream);

// Room for the partial maxima of a tensor-wide reduction.
constexpr int kPartials = 1024;

struct QuantizeArgs {
  const void* x = nullptr;
  DType dtype = DType::kFP32;
  View view;
  int64_t matrix_rows = 1;  // rows of one matrix, for square blocks
  FormatSpec format;
  ScaleRule rule = ScaleRule::kRceil;
  Recipe recipe = Recipe::kNvidia;
  bool stochastic = false, full = false;
  uint64_t seed = 0;
  Rotation rotation;
  const float* tensor_scale = nullptr;  // the caller's (device), or null
  uint8_t* codes = nullptr;             // (rows, row_bytes); null for fake_quantize
  void* scales = nullptr;               // (strips, blocks); scratch for some fake_quantize calls
  float* tensor_scale_out = nullptr;    // where the format and recipe have one
  void* out = nullptr;                  // fake_quantize: rows end to end, in x's dtype
  float* partials = nullptr;            // kPartials floats where the tensor scale is dynamic
  // The launch that follows may start early (launch.cuh): it waits before it reads codes or scales.
  bool next_waits = false;
};

// Whether `quantize` must be given rotated float32 rows instead of a rotation.
bool needs_rotated_rows(const QuantizeArgs&);
// Whether fake_quantize needs `scales` as scratch.
bool needs_scales(const QuantizeArgs&);
void quantize(const QuantizeArgs&, Stream);

// The same matrices quantized along their columns as well (or only so, where args.codes is null):
// codes of shape (*lead, columns, bytes of a row of matrix_rows elements). The rotated columns have
// a tensor scale of their own, unless one is given: kPartials floats for it.
struct Across {
  uint8_t* codes = nullptr;
  void* scales = nullptr;
  float* tensor_scale_out = nullptr;
  float* partials = nullptr;
};
// What a rotation does to the rows: the same as to the columns, nothing, or there are no rows.
enum class DualRows { kAlike, kPlain, kNone };
// Whether one kernel serves both directions; where not, quantize a transposed copy.
bool dual_serves(const QuantizeArgs&, DualRows = DualRows::kAlike);
void quantize_dual(const QuantizeArgs&, const Across&, DualRows, Stream);
// fake_quantize along the columns, where dual_serves says so.
void fake_quantize_across(const QuantizeArgs&, Stream);

struct DequantizeArgs {
  const uint8_t* codes = nullptr;
  const void* scales = nullptr;
  const float* tensor_scale = nullptr;
  FormatSpec format;
  int64_t matrix_rows = 1;
  View view;  // of the result
  DType dtype = DType::kFP32;
  void* out = nullptr;
};
void dequantize(const DequantizeArgs&, Stream);

struct HadamardArgs {
  const void* x = nullptr;
  void* out = nullptr;
  DType dtype = DType::kFP32, out_dtype = DType::kFP32;  // equal, or out_dtype float32
  int64_t count = 0;                                     // rows end to end
  Rotation rotation;
};
void hadamard(const HadamardArgs&, Stream);

struct AmaxArgs {
  const void* x = nullptr;
  DType dtype = DType::kFP32;
  View view;
  int64_t block = 0;  // 0: the whole tensor, finite elements only
  float* out = nullptr;
  float* partials = nullptr;       // for block 0
  Rotation rotation;               // for `amax_partials`, flat views
  int64_t matrix_rows = 1;         // for `amax_partials_across`
  float* rows_partials = nullptr;  // for it, too: kPartials of the rows as they are, or null
};
void amax(const AmaxArgs&, Stream);
// Only the first step of the whole tensor's: returns how many partial maxima there are.
int amax_partials(const AmaxArgs&, Stream);
// The same of columns rotated by at most 32, in flat matrices of whole rotations.
int amax_partials_across(const AmaxArgs&, Stream);

struct PackArgs {
  const uint8_t* in = nullptr;
  uint8_t* out = nullptr;
  int bits = 8;
  int64_t rows = 0, in_stride = 0, out_stride = 0, length = 0;
};
void pack(const PackArgs&, Stream);
void unpack(const PackArgs&, Stream);

// Codes one a byte of x * 2^(127 - scale), for tests; of E2M1 after a rotation, too, whose factor
// x has yet to be multiplied by, where none saturates and the scale is from 79 to 175.
struct EncodeArgs {
  const void* x = nullptr;
  DType dtype = DType::kFP32;
  uint8_t* codes = nullptr;
  int64_t count = 0;
  ElementSpec element;
  uint32_t scale = 127;
  bool full = false;
  int rotation = 0;
};
void encode(const EncodeArgs&, Stream);

}  // namespace cuda
}  // namespace pyfmt
