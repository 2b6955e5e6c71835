// SPDX-License-Identifier: Apache-2.0
// Rotation fused into quantize for bf16 rows end to end, blocks of 16 or 32: the hot case.
#pragma once

#include "coder.cuh"
#include "rotate.cuh"
#include "scale.cuh"

namespace pyfmt {
namespace cuda {

struct RotatedParams {
  const uint8_t* x = nullptr;
  int64_t units = 0;
  uint8_t* codes = nullptr;
  uint8_t* scales = nullptr;
  ScaleParams scale;
  Limits limits;
  RotationParams rotation;
  uint32_t first = 0;  // encode_covered's multiplier for byte 0, past float32's largest
  int halves = 1;      // blocks in a unit
};

// One rotated unit, without the factor, to codes and one or two scales.
template <class E, bool kPow2>
PYFMT_DEVICE void quantize_rotated_unit(const RotatedParams& p, const codec::RecipeConstants& r,
                                        const float* v, uint32_t* codes, uint32_t (&scales)[2]) {
  using C = Coder<E>;
  const float factor = p.rotation.factor;
  uint32_t amax[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) m = max_abs_nan(m, v[16 * h + i]);
    amax[h] = as_uint(m * factor);
  }
  if (p.halves == 1) amax[0] = amax[1] = L::max(amax[0], amax[1]);
  if constexpr (C::kE2M1 && kPow2) {
    // Scales within 2^-48 to 2^48, where all is exact: the plain case of e8m0_from_amax. Not so
    // where amax is zero, subnormal or not finite.
    if (p.scale.covers) {
      const int32_t bias = p.scale.emax;
      scales[0] = uint32_t(int32_t(amax[0] + p.scale.addend) >> 23) - bias;
      scales[1] = uint32_t(int32_t(amax[1] + p.scale.addend) >> 23) - bias;
      if (scales[0] - 79u <= 96u && (p.halves == 1 || scales[1] - 79u <= 96u)) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float multiplier = as_float(p.first - (scales[h] << 23));
          C::encode_covered([&](int i) { return v[16 * h + i]; }, multiplier,
                            codes + h * C::kWords);
        }
        return;
      }
    }
  }
  BlockScale b[2];
  b[0] = block_scale<kPow2>(p.scale, r, amax[0]);
  b[1] = b[0];
  if (p.halves == 2) b[1] = block_scale<kPow2>(p.scale, r, amax[1]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    scales[h] = b[h].code;
    C::encode([&](int i) { return v[16 * h + i] * factor; }, b[h].multiplier, p.limits,
              codes + h * C::kWords);
#pragma unroll
    for (int i = 0; i < C::kWords; ++i) {
      codes[h * C::kWords + i] = b[h].poisoned ? 0u : codes[h * C::kWords + i];
    }
  }
}

// kSize: of the rotations, or 128 for 128 and more.
template <class E, bool kPow2, int kSize, int kWarpsHere, int kBlocks>
__global__ void __launch_bounds__(32 * kWarpsHere, kBlocks)
    quantize_rotated(const __grid_constant__ RotatedParams p) {
  using C = Coder<E>;
  constexpr int kUnits = kSize > kUnit ? 2 : 1;
  constexpr bool kSwap = kSize > 64;
  using T = Tile<kUnits>;
  constexpr int kWords = 2 * C::kWords, kOutBytes = 4 * kWords;
  __shared__ uint4 shared[kWarpsHere * T::kBytes / 16];
  codec::RecipeConstants r{};
  if constexpr (!kPow2) r = start_recipe(p.scale);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint8_t* const mine = reinterpret_cast<uint8_t*>(shared) + warp * T::kBytes;
  int64_t first = (int64_t(blockIdx.x) * kWarpsHere + warp) * T::kUnitCount;
  const int64_t step = int64_t(gridDim.x) * kWarpsHere * T::kUnitCount;
  SignWords<kUnits, kSwap> sign_words;
  sign_words.start(p.rotation, first, step, lane);
  if (first < p.units) T::fetch(mine, p.x + first * 64, p.units - first, lane);
  for (; first < p.units; first += step) {
    uint32_t signs[kUnits], words[T::kChunks * 4];
    if (p.rotation.signs) sign_words.next(p.rotation, signs, lane);
    wait_copies();
    __syncwarp();
    T::template read<kSwap>(mine, lane, words);
    __syncwarp();
    if (first + step < p.units) {
      T::fetch(mine, p.x + (first + step) * 64, p.units - first - step, lane);
    }
    float v[kUnits * kUnit];
    if (p.rotation.signs) {
#pragma unroll
      for (int j = 0; j < kUnits * 16; ++j) {
        words[j] = flip_pair(words[j], signs[j / 16], j % 16);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnits * kUnit; ++i) v[i] = half_at<DType::kBF16>(words[i / 2], i & 1);
    rotate_tile<kSize, kUnits>(v, p.rotation.size);
#pragma unroll
    for (int h = 0; h < kUnits; ++h) {
      uint32_t codes[kWords], scales[2];
      quantize_rotated_unit<E, kPow2>(p, r, v + h * kUnit, codes, scales);
      const int64_t unit = first + T::template unit_of<kSwap>(lane, h);
      if (unit >= p.units) continue;
      uint8_t* const out = p.codes + unit * kOutBytes;
      if constexpr (kOutBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
          reinterpret_cast<uint4*>(out)[i / 4] =
              make_uint4(codes[i], codes[i + 1], codes[i + 2], codes[i + 3]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWords; i += 2) {
          reinterpret_cast<uint2*>(out)[i / 2] = make_uint2(codes[i], codes[i + 1]);
        }
      }
      if (p.halves == 2) {
        reinterpret_cast<uint16_t*>(p.scales)[unit] = uint16_t(scales[0] | scales[1] << 8);
      } else {
        p.scales[unit] = uint8_t(scales[0]);
      }
    }
  }
}

}  // namespace cuda
}  // namespace pyfmt
