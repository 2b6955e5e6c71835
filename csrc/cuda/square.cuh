// SPDX-License-Identifier: Apache-2.0
// Square blocks of 16 or 32 rows and columns: a block of threads takes 64 rows of four units.
#pragma once

#include "dual.cuh"

namespace pyfmt {
namespace cuda {

struct SquareParams {
  const void* x = nullptr;
  int64_t rows = 0, columns = 0;  // of one matrix; whole units a row
  uint32_t row_tiles = 0, column_tiles = 0;
  uint8_t* codes = nullptr;
  void* scales = nullptr;
  ScaleParams scale;
  Limits limits;
  int halves = 1;       // blocks in a unit: 2 where they are of 16 columns
  int block_rows = 32;  // 16 or 32
  int64_t strips = 0;   // of one matrix
  int64_t tiles = 0;    // in all
};

constexpr int kSquareRows = 64, kSquareUnits = kThreads / kSquareRows;
constexpr int kSquareBlocks = 4;  // of a multiprocessor

template <class E, bool kPow2, DType kIn>
__global__ void __launch_bounds__(kThreads, kSquareBlocks)
    quantize_square(const __grid_constant__ SquareParams p) {
  using C = Coder<E>;
  constexpr int kWords = 2 * C::kWords, kBytes = 4 * kWords;
  __shared__ uint4 staged[kBytes == 16 ? 1 : kThreads * kBytes / 16];
  // Tiles take turns with the halves, so that one barrier a tile is enough.
  __shared__ uint32_t of_warps[2][kWarps][2 * kSquareUnits];

  __shared__ float multipliers[kPow2 ? 1 : 128];
  const Multipliers known{kPow2 ? nullptr : multipliers};

  codec::RecipeConstants r{};
  if constexpr (!kPow2) {
    r = start_recipe(p.scale);
    known.fill(p.scale, r);
  }
  int turn = 0;
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, turn ^= 1) {
    uint32_t (&of_warp)[kWarps][2 * kSquareUnits] = of_warps[turn];
    const uint32_t above = uint32_t(tile / p.column_tiles);
    const int64_t matrix = above / p.row_tiles;
    const int64_t first_row = int64_t(above % p.row_tiles) * kSquareRows;
    const int64_t first_unit = tile % p.column_tiles * kSquareUnits;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row = threadIdx.x / kSquareUnits, unit = threadIdx.x % kSquareUnits;
    const int64_t units_per_row = p.columns / kUnit;
    const bool live = first_row + row < p.rows && first_unit + unit < units_per_row;
    const int64_t start = (matrix * p.rows + first_row) * units_per_row + first_unit;
    const int64_t index = start + row * units_per_row + unit;
    Raw<kIn> raw;
    if (live) {
      raw.load(static_cast<const char*>(p.x) + index * (kUnit * dtype_bytes(kIn)));
    } else {
      raw.clear();
    }

    // Eight rows a warp, then two or four warps a block.
    uint32_t amax[2] = {raw.amax16(0), raw.amax16(1)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int far = kSquareUnits; far < 32; far *= 2) {
        amax[h] = L::max(amax[h], __shfl_xor_sync(kAll, amax[h], far));
      }
      if (lane < kSquareUnits) of_warp[warp][2 * unit + h] = amax[h];
    }
    __syncthreads();
    const int warps = p.block_rows / 8, first = warp - warp % warps;
    for (int i = 0; i < warps; ++i) {
      amax[0] = L::max(amax[0], of_warp[first + i][2 * unit]);
      amax[1] = L::max(amax[1], of_warp[first + i][2 * unit + 1]);
    }
    BlockScale b[2];
    scales_of<kPow2>(p, r, amax, b, known);

    uint32_t codes[kWords];
    if (kPow2 && covered<E>(p.scale, b)) {
      encode_row<E, kPow2, true>(raw, b, p.limits, codes);
    } else {
      encode_row<E, kPow2, false>(raw, b, p.limits, codes);
    }
    clear_poisoned<E>(b, codes);
    if constexpr (kBytes == 16) {
      if (live) {
        reinterpret_cast<uint4*>(p.codes)[index] =
            make_uint4(codes[0], codes[1], codes[2], codes[3]);
      }
    } else {
      const int top = warp * (32 / kSquareUnits);
      const int64_t rows = p.rows - first_row - top, units = units_per_row - first_unit;
      store_rows<kBytes, kSquareUnits>(p.codes + (start + top * units_per_row) * kBytes,
                                       units_per_row, int(rows < 32 ? rows : 32),
                                       int(units < 32 ? units : 32), codes, staged);
    }
    if (!live || row % p.block_rows) continue;
    const int64_t strip = matrix * p.strips + (first_row + row) / p.block_rows;
    const int64_t block = (strip * units_per_row + first_unit + unit) * p.halves;
    store_scale(p.scales, p.scale.kind, block, b[0].code);
    if (p.halves == 2) store_scale(p.scales, p.scale.kind, block + 1, b[1].code);
  }
}

}  // namespace cuda
}  // namespace pyfmt
