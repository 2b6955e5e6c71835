// SPDX-License-Identifier: Apache-2.0
// What one instruction-set level offers: kernels over ranges of work items, on plain pointers.
// The drivers (quantize.cpp, rotate.cpp, layout.cpp) cut the work into items and call these.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../codec.h"
#include "../formats.h"

namespace pyfmt {
namespace cpu {

// Blocks of more elements than this are cut: first their amax, then their codes.
constexpr int64_t kMaxTile = 16384;

// How a tensor seen as (batches, rows, columns) falls into tiles. A tile is block_rows rows by
// tile_columns columns, the latter a multiple of the block, the rotation and 8, so that tiles
// start at whole bytes of codes. One work item is one tile.
struct Tiling {
  int64_t batches = 1, rows = 0, columns = 0;  // logical
  int64_t block_rows = 1, block_columns = 1;
  int64_t tile_columns = 1;

  int64_t blocks() const { return (columns + block_columns - 1) / block_columns; }
  int64_t padded() const { return blocks() * block_columns; }
  int64_t row_bytes(int bits) const { return (padded() * bits + 7) / 8; }
  int64_t strips() const { return (rows + block_rows - 1) / block_rows; }
  int64_t tiles_per_strip() const { return (padded() + tile_columns - 1) / tile_columns; }
  int64_t items() const { return batches * strips() * tiles_per_strip(); }
};

struct Rotation {
  int size = 0;  // 0: none
  const float* signs = nullptr;
  int64_t signs_length = 0;
};

struct QuantizeArgs {
  const void* x = nullptr;
  DType dtype = DType::kFP32;
  Tiling tiling;
  ElementSpec element;
  Scale scale = Scale::kE8M0;
  ScaleRule rule = ScaleRule::kRceil;
  codec::RecipeConstants recipe{};
  // Long blocks come with their multipliers (NaN: poisoned) and decoded scales, one row of each
  // for `given_rows` rows of x; tiling.block_rows is then 1.
  const uint32_t* given = nullptr;
  const uint32_t* given_decode = nullptr;
  int64_t given_rows = 1;
  bool stochastic = false, full = false;
  uint64_t seed = 0;
  Rotation rotation;
  uint8_t* codes = nullptr;  // (batches * rows, row_bytes), or null: fake_quantize into `out`
  int64_t row_bytes = 0;
  void* scales = nullptr;  // (batches * strips, blocks), or null
  void* out = nullptr;     // x's shape
  DType out_dtype = DType::kFP32;
  bool has_tensor_scale = false;
};

struct ScaleArgs {  // amax bits of blocks -> scales and multipliers
  const QuantizeArgs* quantize = nullptr;
  const uint32_t* amax = nullptr;
  int64_t count = 0;
  void* scales = nullptr;
  uint32_t* encode = nullptr;
  uint32_t* decode = nullptr;
};

struct DequantizeArgs {
  const uint8_t* codes = nullptr;
  const void* scales = nullptr;
  bool has_tensor_scale = false;
  float tensor_scale = 1.0f;
  ElementSpec element;
  Scale scale = Scale::kE8M0;
  Tiling tiling;
  int64_t row_bytes = 0;
  DType dtype = DType::kFP32;
  void* out = nullptr;
};

struct HadamardArgs {
  const void* x = nullptr;
  void* out = nullptr;
  DType dtype = DType::kFP32, out_dtype = DType::kFP32;
  int64_t rows = 0, columns = 0, tile_columns = 0;
  Rotation rotation;
};

struct AmaxArgs {
  const void* x = nullptr;
  DType dtype = DType::kFP32;
  Tiling tiling;  // block_rows 1
  Rotation rotation;
  uint32_t* out = nullptr;  // bits of |x|'s largest per block; above infinity's where not finite
};

struct PackArgs {
  const uint8_t* in = nullptr;
  uint8_t* out = nullptr;
  int bits = 8;
  int64_t rows = 0, in_stride = 0, out_stride = 0, length = 0;
  int64_t tile = 0;  // codes a work item, a multiple of 8
  int64_t tiles() const { return (length + tile - 1) / tile; }
};

struct Kernels {
  const char* name;
  void (*quantize)(const QuantizeArgs&, int64_t begin, int64_t end);
  void (*scale_blocks)(const ScaleArgs&);
  void (*dequantize)(const DequantizeArgs&, int64_t begin, int64_t end);
  void (*hadamard)(const HadamardArgs&, int64_t begin, int64_t end);
  void (*block_amax)(const AmaxArgs&, int64_t begin, int64_t end);
  uint32_t (*finite_amax)(const AmaxArgs&, int64_t begin, int64_t end);
  uint32_t (*range_amax)(const void* x, DType dtype, int64_t n, bool finite_only);
  void (*pack)(const PackArgs&, int64_t begin, int64_t end);
  void (*unpack)(const PackArgs&, int64_t begin, int64_t end);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

// The kernels in use: the best level that this processor has, unless set_level chose another.
const Kernels& kernels();
// "baseline", "avx2" or "avx512", and what matmul.h adds; set_level returns false for a level that
// is not there, and "best" restores the choice made at start.
const char* level();
bool set_level(const char* name);
// The levels of this build that this processor can run, separated by commas.
const char* levels();

}  // namespace cpu
}  // namespace pyfmt
