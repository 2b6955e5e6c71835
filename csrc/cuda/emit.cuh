// SPDX-License-Identifier: Apache-2.0
// Numbers of a block to the exact bfloat16 values of their codes.
#pragma once

#include "coder.cuh"
#include "scale.cuh"

namespace pyfmt {
namespace cuda {

// Codes of get(0) to get(15).
template <class E, bool kPow2, class Get>
PYFMT_DEVICE void encode16(const Get& get, const BlockScale& b, const ScaleParams& scale,
                           const Limits& limits, uint32_t* codes) {
  using C = Coder<E>;
  if constexpr (C::kE2M1) {
    if (kPow2 && scale.covers && b.code - 79u <= 96u) {
      const float multiplier = as_float(C::kEven + ((127u - b.code) << 23));
      C::encode_covered(get, multiplier, codes);
      return;
    }
    const auto saturated = [&](int i) { return min_magnitude(get(i) * b.multiplier, 6.0f); };
    C::encode_covered(saturated, as_float(C::kEven), codes);
  } else {
    C::encode(get, b.multiplier, limits, codes);
  }
#pragma unroll
  for (int i = 0; i < C::kWords; ++i) codes[i] = b.poisoned ? 0u : codes[i];
}

// Up to sixteen values as bf16 of RNE(v * multiplier) * s, the element's grid in between.
template <class E, bool kPow2, int kCount = 16>
PYFMT_DEVICE void round_values(const float* v, const BlockScale& b, float s,
                               const ScaleParams& scale, const Limits& limits, uint32_t* words) {
  static_assert(kCount <= 16 && kCount % 2 == 0, "codes are packed by sixteen");
  float d[16];
  if constexpr (Coder<E>::kE2M1) {
    // The float32 numbers near c are spaced like E2M1 near |y|, and c - |y| is rounded to them.
    constexpr float kSpread = 4194304.0f, kLeast = 1.5f * kSpread;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float y = fabsf(min_magnitude(v[i] * b.multiplier, 6.0f));
      const float c = fmaxf(y * kSpread, kLeast);
      d[i] = (c - (c - y)) * s;
    }
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const uint32_t signs = pick_bytes(as_uint(v[i]), as_uint(v[i + 1]), 0x7632) & 0x80008000u;
      words[i / 2] = to_halves<DType::kBF16>(d[i], d[i + 1]) | signs;
    }
  } else {
    if constexpr (E::spec.is_int() && E::spec.frac == 0) {
      constexpr float kMagic = 12582912.0f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float y = fmaxf(fminf(v[i] * b.multiplier, limits.high), limits.low);
        d[i] = (y + kMagic) - kMagic;
      }
    } else {
      uint32_t codes[Coder<E>::kWords];
      encode16<E, kPow2>([&](int i) { return i < kCount ? v[i % kCount] : 0.0f; }, b, scale, limits,
                         codes);
      Coder<E>::decode(codes, d);
    }
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      words[i / 2] = to_halves<DType::kBF16>(d[i] * s, d[i + 1] * s);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) words[i] = b.poisoned ? 0x7fc07fc0u : words[i];
}

// The value of a stored scale.
template <bool kPow2>
PYFMT_DEVICE float scale_value(uint32_t code) {
  if constexpr (kPow2) return as_float(codec::e8m0_decode<uint32_t>(code));
  float value, unused;
  from_e4m3(code, &value, &unused);
  return value;
}

}  // namespace cuda
}  // namespace pyfmt
