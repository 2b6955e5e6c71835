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
  uint32_t first = 0;  // first_multiplier
  int halves = 1;      // blocks in a unit
  int rounds = 1;      // tiles a warp takes one after the other
  bool next_waits = false;
};

// encode_covered's multiplier, the rotation's factor included, for the scale byte 0: its exponent
// field less the byte is the one to use.
inline uint32_t first_multiplier(int size) {
  using C = Coder<e2m1_element>;
  const uint32_t factor = L::as_uint(rotation_factor(size));
  const bool odd = (factor & 0x7fffffu) != 0;
  return factor - (odd ? 0x3f3504f3u : 0x3f800000u) + (odd ? C::kOdd : C::kEven) + (127u << 23);
}

// Any 16 rotated numbers, without the factor, to E2M1 by a power of two; returns the scale.
template <class E, class Params>
PYFMT_DEVICE uint32_t encode_any(const Params& p, uint32_t amax, const float* v, uint32_t* codes) {
  using C = Coder<E>;
  const float factor = p.rotation.factor;
  const BlockScale b = block_scale<true>(p.scale, {}, amax);
  const auto saturated = [&](int i) { return min_magnitude(v[i] * factor * b.multiplier, 6.0f); };
  C::encode_covered(saturated, as_float(C::kEven), codes);
#pragma unroll
  for (int i = 0; i < C::kWords; ++i) codes[i] = b.poisoned ? 0u : codes[i];
  return b.code;
}

// Whether the exponent of a scale lies where all of encode_covered is exact, within 2^-48 to 2^48:
// not for an amax of zero, subnormal or not finite.
PYFMT_DEVICE bool plain_scale(uint32_t scale) {
  return scale - 79u <= 96u;
}

// One rotated unit, without the factor, to codes and one or two scales.
template <class E, bool kPow2, class Params>
PYFMT_DEVICE void quantize_rotated_unit(const Params& p, const codec::RecipeConstants& r,
                                        const float* v, uint32_t* codes, uint32_t (&scales)[2],
                                        Multipliers known = {nullptr}) {
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
    // The plain case of e8m0_from_amax.
    scales[0] = uint32_t(int32_t(amax[0] + p.scale.addend) >> 23) - uint32_t(p.scale.emax);
    scales[1] = uint32_t(int32_t(amax[1] + p.scale.addend) >> 23) - uint32_t(p.scale.emax);
    if (p.scale.covers && plain_scale(scales[0]) && plain_scale(scales[1])) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        C::encode_covered([&](int i) { return v[16 * h + i]; },
                          as_float(p.first - (scales[h] << 23)), codes + h * C::kWords);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scales[h] = encode_any<E>(p, amax[h], v + 16 * h, codes + h * C::kWords);
      }
    }
  } else {
    BlockScale b[2];
    b[0] = block_scale<kPow2>(p.scale, r, amax[0], known);
    b[1] = b[0];
    if (p.halves == 2) b[1] = block_scale<kPow2>(p.scale, r, amax[1], known);
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
}

// Units of a lane, warps of a block, blocks that a multiprocessor is to hold, tiles of a warp.
struct RotatedShape {
  int units, warps, blocks, rounds;
};
// pow2: scales that are powers of two take fewer registers.
constexpr RotatedShape rotated_shape(int size, bool pow2) {
  if (size <= kUnit) return {1, 8, pow2 ? 4 : 3, 4};
  return {2, 4, pow2 ? 5 : 4, size == 64 ? 2 : 4};
}

// kSize: of the rotations, or 128 for 128 and more.
template <class E, bool kPow2, int kSize>
__global__ void __launch_bounds__(32 * rotated_shape(kSize, kPow2).warps,
                                  rotated_shape(kSize, kPow2).blocks)
    quantize_rotated(const __grid_constant__ RotatedParams p) {
  using C = Coder<E>;
  constexpr RotatedShape kShape = rotated_shape(kSize, kPow2);
  constexpr int kUnits = kShape.units, kWarpsHere = kShape.warps;
  constexpr bool kSwap = kSize > 64;
  using T = Tile<kUnits, kSwap>;
  constexpr int kWords = 2 * C::kWords, kOutBytes = 4 * kWords;
  using S = Signs<kUnits, kSwap>;
  __shared__ __align__(256) uint8_t shared[kWarpsHere * T::kBytes + S::kBytes];
  if (p.next_waits) allow_next_launch();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  constexpr int kStep = kWarpsHere * T::kUnitCount;
  int rounds = p.rounds;
  int64_t first = int64_t(blockIdx.x) * rounds * kStep + warp * T::kUnitCount;
  const SharedAddress buffer = shared_address(shared) + warp * T::kBytes;
  const SharedAddress to = buffer + T::copy_place(lane), from = buffer + T::read_place(lane);
  const auto fetch = [&](int64_t unit) {
    T::fetch(to, p.x + unit * 64 + lane * 16, p.units - unit, lane);
  };
  if (first < p.units) fetch(first);
  S signs(p.rotation, shared + kWarpsHere * T::kBytes, first, kStep, lane);
  codec::RecipeConstants r{};
  if constexpr (!kPow2) r = start_recipe(p.scale);
  if (first >= p.units) return;
  for (;;) {
    uint32_t words[T::kChunks * 4];
    wait_copies();
    __syncwarp();
    T::read(from, words);
    __syncwarp();
    const bool more = first + kStep < p.units && --rounds > 0;
    if (more) fetch(first + kStep);
    float v[kUnits * kUnit];
    signs.unpack(p.rotation, lane, words, v);
    rotate_tile<kSize, kUnits>(v, p.rotation.size);
#pragma unroll
    for (int h = 0; h < kUnits; ++h) {
      uint32_t codes[kWords], scales[2];
      quantize_rotated_unit<E, kPow2>(p, r, v + h * kUnit, codes, scales);
      const int64_t unit = first + T::unit_of(lane, h);
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
    if (!more) break;
    first += kStep;
  }
}

}  // namespace cuda
}  // namespace pyfmt
