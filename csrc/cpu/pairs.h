// SPDX-License-Identifier: Apache-2.0
// Thirty-two elements at a time, the even and the odd ones in two groups: bfloat16 splits and
// joins within 32-bit lanes, and so do the nibbles of a byte.
#pragma once

#include "elements.h"

namespace pyfmt {
namespace PYFMT_ISA {

// Elements 0, 2, ..., 30 and 1, 3, ..., 31 of thirty-two.
struct Pairs {
  Group even, odd;
};

constexpr int kPairs = 2 * kGroup;

template <DType kDType>
PYFMT_INLINE Pairs load_pairs(const void* x, int64_t i) {
  Pairs p;
  if constexpr (kDType == DType::kBF16) {
    const Group g = load_u32((const uint16_t*)x + i);
    for (int k = 0; k < kVectors; ++k) {
      p.even.v[k] = g.v[k] << 16;
      p.odd.v[k] = g.v[k] & 0xffff0000u;
    }
  } else {
    const Group a = load_as<kDType>(x, i), b = load_as<kDType>(x, i + kGroup);
    for (int k = 0; k < kVectors; ++k) {
      const U lo = 2 * k < kVectors ? a.v[2 * k % kVectors] : b.v[2 * k % kVectors];
      const U hi = kVectors == 1          ? b.v[0]
                   : 2 * k + 1 < kVectors ? a.v[(2 * k + 1) % kVectors]
                                          : b.v[(2 * k + 1) % kVectors];
      p.even.v[k] = every_second<0>(lo, hi, LaneIndices{});
      p.odd.v[k] = every_second<1>(lo, hi, LaneIndices{});
    }
  }
  return p;
}

// Thirty-two bfloat16 from float32 whose low halves are zero, or that are to be rounded first.
PYFMT_INLINE void store_bf16_pairs(void* out, int64_t i, Pairs p, bool round) {
  Group joined;
  for (int k = 0; k < kVectors; ++k) {
    U even = p.even.v[k], odd = p.odd.v[k];
    if (round) {
      even = even + 0x7fffu + ((even >> 16) & 1u);
      odd = odd + 0x7fffu + ((odd >> 16) & 1u);
    }
    joined.v[k] = select_bits(0xffff0000u, odd, even >> 16);
  }
  store_u32((uint16_t*)out + i, joined);
}

// The multipliers of pairs from group g (even) on. kMixed: two groups, two multipliers.
template <bool kMixed>
PYFMT_INLINE Group pair_multipliers(const uint32_t* values, int shift, int64_t g) {
  Group m;
  if constexpr (!kMixed) {
    const U one = broadcast(values[g >> shift]);
    for (int k = 0; k < kVectors; ++k) m.v[k] = one;
    return m;
  }
#if PYFMT_AVX512
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  int64_t two;
  memcpy(&two, values + g, 8);
  m.v[0] = (U)_mm512_permutexvar_epi32(halves, _mm512_set1_epi64(two));
#else
  for (int k = 0; k < kVectors; ++k) m.v[k] = broadcast(values[g + (2 * k >= kVectors)]);
#endif
  return m;
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
