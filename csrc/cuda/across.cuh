// SPDX-License-Identifier: Apache-2.0
// Quantize and dequantize down the columns of a matrix in one pass: warps read whole lines of 32
// rows, two columns a lane (one of float32), and write them where they were.
#pragma once

#include "dual.cuh"

namespace pyfmt {
namespace cuda {

template <class E, bool kPow2, DType kIn>
__global__ void __launch_bounds__(kThreads, 3)
    fake_quantize_across(const __grid_constant__ DualParams p, void* out) {
  using C = Coder<E>;
  constexpr int kColumns = tile_columns(kIn), kSides = dtype_bytes(kIn) == 2 ? 2 : 1;
  __shared__ uint32_t of_strip[kStrips][kColumns];
  const uint32_t above = blockIdx.x / p.column_tiles;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, strip = warp / 2;
  const int64_t row = int64_t(above % p.row_tiles) * kTileRows + strip * kUnit;
  const int place = (warp % 2 * 32 + lane) * kSides;
  const int64_t column = int64_t(blockIdx.x % p.column_tiles) * kColumns + place;
  const bool live = row < p.rows && column < p.columns;
  // In words of four bytes.
  const int64_t step = p.columns / kSides;
  const int64_t at = ((above / p.row_tiles * p.rows + row) * p.columns + column) / kSides;
  const uint32_t* from = static_cast<const uint32_t*>(p.x) + at;

  uint32_t x[kUnit], amax[kSides][2];
#pragma unroll
  for (int i = 0; i < kUnit; ++i, from += step) x[i] = live ? *from : 0;
  codec::RecipeConstants r{};
  if constexpr (!kPow2) r = start_recipe(p.scale);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if constexpr (kSides == 2) {
      uint32_t m = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) m = max_abs_halves<kIn>(m, x[16 * h + i]);
      amax[0][h] = as_uint(half_at<kIn>(m, 0));
      amax[1][h] = as_uint(half_at<kIn>(m, 1));
    } else {
      float m = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) m = max_abs_nan(m, as_float(x[16 * h + i]));
      amax[0][h] = as_uint(m);
    }
  }
  if (p.lanes > 1) {
#pragma unroll
    for (int s = 0; s < kSides; ++s) of_strip[strip][place + s] = L::max(amax[s][0], amax[s][1]);
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSides; ++s) {
      for (int i = 0; i < p.lanes; ++i) {
        amax[s][0] = L::max(amax[s][0], of_strip[strip - strip % p.lanes + i][place + s]);
      }
    }
  }
  BlockScale b[kSides][2];
  uint32_t codes[kSides][2 * C::kWords];
#pragma unroll
  for (int s = 0; s < kSides; ++s) scales_of<kPow2>(p, r, amax[s], b[s]);
  if constexpr (kSides == 2) {
    if (kPow2 && covered<E>(p.scale, b[0]) && covered<E>(p.scale, b[1])) {
      encode_columns<E, kPow2, true, kIn>(x, b, p.limits, codes);
    } else {
      encode_columns<E, kPow2, false, kIn>(x, b, p.limits, codes);
    }
  } else {
    encode_unit<E, false>([&](int i) { return as_float(x[i]); }, b[0], p.limits, codes[0]);
  }
  uint32_t* to = static_cast<uint32_t*>(out) + at;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float values[kSides][16];
#pragma unroll
    for (int s = 0; s < kSides; ++s) {
      clear_poisoned<E>(b[s], codes[s]);
      C::decode(codes[s] + h * C::kWords, values[s]);
      const uint32_t code = b[s][h].code;
      const float scale = as_float(kPow2 ? codec::e8m0_decode<uint32_t>(code)
                                         : codec::decode_scale<uint32_t>(p.scale.kind, code));
#pragma unroll
      for (int i = 0; i < 16; ++i) values[s][i] = values[s][i] * scale;
      if (!kPow2 && p.scale.kind == Scale::kE4M3) {
#pragma unroll
        for (int i = 0; i < 16; ++i) values[s][i] = values[s][i] * as_float(r.tensor_scale);
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i, to += step) {
      if (!live) continue;
      if constexpr (kSides == 2) {
        *to = to_halves<kIn>(values[0][i], values[1][i]);
      } else {
        *to = canonical(values[0][i]);
      }
    }
  }
}

}  // namespace cuda
}  // namespace pyfmt
