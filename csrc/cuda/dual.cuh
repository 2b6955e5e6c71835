// SPDX-License-Identifier: Apache-2.0
// Both directions of a matrix from one read: a block of threads takes a tile of 128 rows by 64
// columns, quantizes it along its rows from registers and along its columns from shared memory.
#pragma once

#include "coder.cuh"
#include "rotate.cuh"
#include "scale.cuh"

namespace pyfmt {
namespace cuda {

struct DualParams {
  const void* x = nullptr;
  int64_t rows = 0, columns = 0;  // of one matrix, whole units
  int64_t row_tiles = 0, column_tiles = 0;
  uint8_t *codes = nullptr, *codes_t = nullptr;  // null: not asked for
  void *scales = nullptr, *scales_t = nullptr;
  ScaleParams scale;
  Limits limits;
  RotationParams rotation;  // of at most a unit
  int halves = 1;
};

constexpr int kTileRows = 128, kTileColumns = 64;
static_assert(kTileRows * kTileColumns == kThreads * kUnit, "a thread takes one unit each way");

// One unit of values, at `index` along its axis, to codes and one or two scales.
template <class E, bool kPow2>
PYFMT_DEVICE void quantize_unit(const DualParams& p, const codec::RecipeConstants& r,
                                float (&v)[kUnit], int64_t index, uint32_t* codes,
                                BlockScale (&b)[2]) {
  using C = Coder<E>;
  if (p.rotation.size) rotate(v, p.rotation, index);
  uint32_t amax[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) m = max_abs_nan(m, v[16 * h + i]);
    amax[h] = as_uint(m);
  }
  if (p.halves == 1) amax[0] = L::max(amax[0], amax[1]);
  b[0] = block_scale<kPow2>(p.scale, r, amax[0]);
  b[1] = b[0];
  if (p.halves == 2) b[1] = block_scale<kPow2>(p.scale, r, amax[1]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    C::encode([&](int i) { return v[16 * h + i]; }, b[h].multiplier, p.limits,
              codes + h * C::kWords);
#pragma unroll
    for (int i = 0; i < C::kWords; ++i) {
      codes[h * C::kWords + i] = b[h].poisoned ? 0u : codes[h * C::kWords + i];
    }
  }
}

// Words of a unit to 8-byte aligned memory, device or shared.
template <int kWords>
PYFMT_DEVICE void store_words(uint8_t* out, const uint32_t* words) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      *reinterpret_cast<uint4*>(out + 4 * i) =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      *reinterpret_cast<uint2*>(out + 4 * i) = make_uint2(words[i], words[i + 1]);
    }
  }
}

PYFMT_DEVICE void store_unit_scales(const DualParams& p, void* scales, int64_t unit, uint32_t first,
                                    uint32_t second) {
  if (p.halves == 1) return store_scale(scales, p.scale.kind, unit, first);
  store_scale(scales, p.scale.kind, 2 * unit, first);
  store_scale(scales, p.scale.kind, 2 * unit + 1, second);
}

template <class E, bool kPow2, DType kIn>
__global__ void __launch_bounds__(kThreads) quantize_dual(const __grid_constant__ DualParams p) {
  using C = Coder<E>;
  constexpr int kSize = dtype_bytes(kIn), kWords = 2 * C::kWords, kBytes = 4 * kWords;
  // 16 spare bytes a row: eight lanes' 16-byte stores meet eight different groups of banks.
  constexpr int kPitch = kTileColumns * kSize + 16;
  __shared__ uint4 tile[kTileRows * kPitch / 16];
  // Results of the columns on their way to memory, in the order of the addresses there.
  __shared__ uint4 turned[kThreads * kBytes / 16];
  __shared__ uint32_t turned_scales[2 * kThreads];

  codec::RecipeConstants r{};
  if constexpr (!kPow2) r = start_recipe(p.scale);
  const int64_t column_tile = blockIdx.x % p.column_tiles;
  const int64_t above = blockIdx.x / p.column_tiles;
  const int64_t matrix = above / p.row_tiles;
  const int64_t first_row = above % p.row_tiles * kTileRows;
  const int64_t first_column = column_tile * kTileColumns;
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(tile);
  float v[kUnit];
  uint32_t codes[kWords];
  BlockScale b[2];

  {
    const int row = threadIdx.x / 2, column = threadIdx.x % 2 * kUnit;
    const bool live = first_row + row < p.rows && first_column + column < p.columns;
    const int64_t at = (matrix * p.rows + first_row + row) * p.columns + first_column + column;
    Raw<kIn> raw;
    if (live) {
      raw.load(static_cast<const char*>(p.x) + at * kSize);
    } else {
      raw.clear();
    }
    if (p.codes_t) store_words<Raw<kIn>::kWords>(bytes + row * kPitch + column * kSize, raw.w);
    if (p.codes) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = raw.get(i);
      quantize_unit<E, kPow2>(p, r, v, first_column + column, codes, b);
      if (live) {
        const int64_t unit = at / kUnit;
        store_words<kWords>(p.codes + unit * kBytes, codes);
        store_unit_scales(p, p.scales, unit, b[0].code, b[1].code);
      }
    }
  }
  if (!p.codes_t) return;
  __syncthreads();

  {
    const int column = threadIdx.x % kTileColumns, strip = threadIdx.x / kTileColumns;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const uint8_t* place = bytes + (strip * kUnit + i) * kPitch + column * kSize;
      if constexpr (kIn == DType::kFP32) {
        v[i] = *reinterpret_cast<const float*>(place);
      } else {
        v[i] = half_at<kIn>(*reinterpret_cast<const uint16_t*>(place), 0);
      }
    }
    quantize_unit<E, kPow2>(p, r, v, first_row + strip * kUnit, codes, b);
    const int place = column * (kTileRows / kUnit) + strip;
    store_words<kWords>(reinterpret_cast<uint8_t*>(turned) + place * kBytes, codes);
    turned_scales[2 * place] = b[0].code;
    turned_scales[2 * place + 1] = b[1].code;
  }
  __syncthreads();

  // Neighbouring threads write neighbouring strips of one column, chunk by chunk.
  constexpr int kChunk = kBytes % 16 == 0 ? 16 : 8, kChunks = kBytes / kChunk;
  constexpr int kStrips = kTileRows / kUnit;
  const int64_t units = p.rows / kUnit;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int i = c * kThreads + threadIdx.x, place = i / kChunks;
    const int64_t column = first_column + place / kStrips;
    const int64_t strip = first_row / kUnit + place % kStrips;
    if (column >= p.columns || strip >= units) continue;
    const int64_t unit = (matrix * p.columns + column) * units + strip;
    uint8_t* const out = p.codes_t + unit * kBytes + i % kChunks * kChunk;
    if constexpr (kChunk == 16) {
      *reinterpret_cast<uint4*>(out) = turned[i];
    } else {
      *reinterpret_cast<uint2*>(out) = reinterpret_cast<const uint2*>(turned)[i];
    }
  }
  const int place = threadIdx.x;
  const int64_t column = first_column + place / kStrips;
  const int64_t strip = first_row / kUnit + place % kStrips;
  if (column < p.columns && strip < units) {
    store_unit_scales(p, p.scales_t, (matrix * p.columns + column) * units + strip,
                      turned_scales[2 * place], turned_scales[2 * place + 1]);
  }
}

}  // namespace cuda
}  // namespace pyfmt
