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
  if constexpr (kDType == DType::kFP32) {
    const Group a = load_u32((const uint32_t*)x + i), b = load_u32((const uint32_t*)x + i + kGroup);
    for (int k = 0; k < kVectors; ++k) {
      const U lo = 2 * k < kVectors ? a.v[2 * k % kVectors] : b.v[2 * k % kVectors];
      const U hi = kVectors == 1          ? b.v[0]
                   : 2 * k + 1 < kVectors ? a.v[(2 * k + 1) % kVectors]
                                          : b.v[(2 * k + 1) % kVectors];
      p.even.v[k] = every_second<0>(lo, hi, LaneIndices{});
      p.odd.v[k] = every_second<1>(lo, hi, LaneIndices{});
    }
    return p;
  }
  const Group g = load_u32((const uint16_t*)x + i);
  for (int k = 0; k < kVectors; ++k) {
    if constexpr (kDType == DType::kBF16) {
      p.even.v[k] = g.v[k] << 16;
      p.odd.v[k] = g.v[k] & 0xffff0000u;
    } else {
      p.even.v[k] = codec::float_from_half<U>(g.v[k] & 0xffffu);
      p.odd.v[k] = codec::float_from_half<U>(g.v[k] >> 16);
    }
  }
  return p;
}

// float32 in paired order: of each thirty-two elements first the even ones, then the odd ones.
PYFMT_INLINE Pairs load_paired(const void* x, int64_t i) {
  return {load_u32((const uint32_t*)x + i), load_u32((const uint32_t*)x + i + kGroup)};
}
PYFMT_INLINE void store_paired(uint32_t* x, int64_t i, const Pairs& p) {
  store_u32(x + i, p.even);
  store_u32(x + i + kGroup, p.odd);
}
// Where element i lies in paired order.
PYFMT_INLINE int64_t paired_place(int64_t i) {
  return i / kPairs * kPairs + i % 2 * kGroup + i % kPairs / 2;
}

// Where a loop takes its elements from.
template <DType kDType>
struct FromRow {
  PYFMT_INLINE Pairs pairs(const void* x, int64_t i) { return load_pairs<kDType>(x, i); }
  PYFMT_INLINE Group group(const void* x, int64_t i) { return load_as<kDType>(x, i); }
  PYFMT_INLINE void ahead(const void* x, int64_t i) {
    const char* p = (const char*)x + i * dtype_bytes(kDType);
    for (int k = 0; k < kPairs * dtype_bytes(kDType); k += 64) fetch_ahead(p + k);
  }
};
struct FromPaired {
  PYFMT_INLINE Pairs pairs(const void* x, int64_t i) { return load_paired(x, i); }
  PYFMT_INLINE Group group(const void*, int64_t) { return {}; }  // always whole pairs
  PYFMT_INLINE void ahead(const void*, int64_t) {}
};

// Thirty-two elements to a dtype, from float32 without NaN but the canonical one. kExact: they
// are values of the dtype already.
template <DType kDType, bool kExact = false>
PYFMT_INLINE void store_pairs(void* out, int64_t i, const Pairs& p) {
  if constexpr (kDType == DType::kFP32) {
    for (int k = 0; k < kVectors; ++k) {
      uint32_t* to = (uint32_t*)out + i + 2 * kLanes * k;
      store<U>(to, lower_in_turn(p.even.v[k], p.odd.v[k]));
      store<U>(to + kLanes, upper_in_turn(p.even.v[k], p.odd.v[k]));
    }
    return;
  }
  Group joined;
  for (int k = 0; k < kVectors; ++k) {
    U even = p.even.v[k], odd = p.odd.v[k];
    if constexpr (kDType == DType::kFP16) {
      joined.v[k] = codec::half_from_float<U>(even) | codec::half_from_float<U>(odd) << 16;
      continue;
    }
    if (!kExact) {
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
