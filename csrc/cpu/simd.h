// SPDX-License-Identifier: Apache-2.0
// Vectors of 32-bit lanes for one instruction-set level. Included after the level's target pragma,
// inside no namespace. Operators come from GCC vector extensions; this page adds the few
// operations that those lack.
#pragma once

#include "../codec.h"

#if !defined(PYFMT_LANES)
#define PYFMT_LANES 4
#endif
// Which intrinsics serve; clang's target attribute does not define __AVX2__ and its like.
#define PYFMT_AVX512 (PYFMT_LANES == 16)
#define PYFMT_AVX2 (PYFMT_LANES == 8)
#if defined(__SSE2__) && PYFMT_LANES == 4
#define PYFMT_SSE2 1
#else
#define PYFMT_SSE2 0
#endif

namespace pyfmt {
namespace PYFMT_ISA {

#define PYFMT_INLINE static inline __attribute__((always_inline))

constexpr int kLanes = PYFMT_LANES;
typedef uint32_t U __attribute__((vector_size(4 * PYFMT_LANES)));
typedef int32_t I __attribute__((vector_size(4 * PYFMT_LANES)));
typedef float F __attribute__((vector_size(4 * PYFMT_LANES)));
typedef uint64_t W __attribute__((vector_size(4 * PYFMT_LANES)));

// Sixteen elements, the unit in which kernels walk.
constexpr int kGroup = 16;
constexpr int kVectors = kGroup / kLanes;

template <class V>
PYFMT_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
PYFMT_INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

PYFMT_INLINE U broadcast(uint32_t x) {
  return x - U{};
}

PYFMT_INLINE U min_u(U a, U b) {
#if PYFMT_AVX512
  return (U)_mm512_min_epu32((__m512i)a, (__m512i)b);
#elif PYFMT_AVX2
  return (U)_mm256_min_epu32((__m256i)a, (__m256i)b);
#else
  return a < b ? a : b;
#endif
}
PYFMT_INLINE U max_u(U a, U b) {
#if PYFMT_AVX512
  return (U)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif PYFMT_AVX2
  return (U)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

// The bits of a where the mask is 1, of b where it is 0.
PYFMT_INLINE U select_bits(uint32_t mask, U a, U b) {
#if PYFMT_AVX512
  return (U)_mm512_ternarylogic_epi32((__m512i)broadcast(mask), (__m512i)a, (__m512i)b, 0xca);
#else
  return (a & mask) | (b & ~mask);
#endif
}

// The larger of 16-bit lanes below 2^15.
PYFMT_INLINE U max_i16(U a, U b) {
#if PYFMT_AVX512
  return (U)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif PYFMT_AVX2
  return (U)_mm256_max_epi16((__m256i)a, (__m256i)b);
#elif PYFMT_SSE2
  return (U)_mm_max_epi16((__m128i)a, (__m128i)b);
#else
  typedef int16_t H __attribute__((vector_size(sizeof(U))));
  return (U)((H)a > (H)b ? (H)a : (H)b);
#endif
}

}  // namespace PYFMT_ISA

namespace codec {
template <>
struct Lane<PYFMT_ISA::U> {
  using U = PYFMT_ISA::U;
  using I = PYFMT_ISA::I;
  using F = PYFMT_ISA::F;
  PYFMT_INLINE U set(uint32_t x) { return PYFMT_ISA::broadcast(x); }
  PYFMT_INLINE U min(U a, U b) { return PYFMT_ISA::min_u(a, b); }
  PYFMT_INLINE U max(U a, U b) { return PYFMT_ISA::max_u(a, b); }
  PYFMT_INLINE I as_int(U x) { return (I)x; }
  PYFMT_INLINE U from_int(I x) { return (U)x; }
  PYFMT_INLINE F as_float(U x) { return (F)x; }
  PYFMT_INLINE U as_uint(F x) { return (U)x; }
  PYFMT_INLINE F to_float(U x) { return __builtin_convertvector((I)x, F); }
  PYFMT_INLINE U truncate(F x) { return (U) __builtin_convertvector(x, I); }
};
#if PYFMT_AVX512 || PYFMT_AVX2 || PYFMT_SSE2
template <>
struct Multiply32<PYFMT_ISA::W> {
  using W = PYFMT_ISA::W;
  PYFMT_INLINE W low(W a, uint64_t b) {
#if PYFMT_AVX512
    return (W)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(int64_t(b)));
#elif PYFMT_AVX2
    return (W)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(int64_t(b)));
#else
    return (W)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(int64_t(b)));
#endif
  }
};
#endif
}  // namespace codec

namespace PYFMT_ISA {

using L = codec::Lane<U>;

template <int... i>
struct Indices {};
#if PYFMT_LANES == 16
using LaneIndices = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif PYFMT_LANES == 8
using LaneIndices = Indices<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using LaneIndices = Indices<0, 1, 2, 3>;
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define PYFMT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PYFMT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

// ---- sixteen elements in and out --------------------------------------------------------------

struct Group {
  U v[kVectors];
};

template <int kBytes>
struct Narrow;  // vectors of kLanes smaller unsigned integers
template <>
struct Narrow<1> {
  typedef uint8_t V __attribute__((vector_size(PYFMT_LANES)));
};
template <>
struct Narrow<2> {
  typedef uint16_t V __attribute__((vector_size(2 * PYFMT_LANES)));
};

PYFMT_INLINE Group load_u32(const void* p) {
  Group g;
  for (int i = 0; i < kVectors; ++i) g.v[i] = load<U>((const char*)p + i * sizeof(U));
  return g;
}
PYFMT_INLINE void store_u32(void* p, const Group& g) {
  for (int i = 0; i < kVectors; ++i) store<U>((char*)p + i * sizeof(U), g.v[i]);
}

PYFMT_INLINE Group load_u16(const void* p) {
  Group g;
#if PYFMT_AVX512
  g.v[0] = (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif PYFMT_AVX2
  for (int i = 0; i < 2; ++i) {
    g.v[i] = (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + i));
  }
#elif PYFMT_SSE2
  for (int i = 0; i < 2; ++i) {
    const __m128i x = _mm_loadu_si128((const __m128i*)p + i);
    g.v[2 * i] = (U)_mm_unpacklo_epi16(x, _mm_setzero_si128());
    g.v[2 * i + 1] = (U)_mm_unpackhi_epi16(x, _mm_setzero_si128());
  }
#else
  for (int i = 0; i < kVectors; ++i) {
    const auto x = load<Narrow<2>::V>((const uint16_t*)p + i * kLanes);
    g.v[i] = __builtin_convertvector(x, U);
  }
#endif
  return g;
}

// Lanes must be below 2^16.
PYFMT_INLINE void store_u16(void* p, const Group& g) {
#if PYFMT_AVX512
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)g.v[0]));
#elif PYFMT_AVX2
  const __m256i x = _mm256_packus_epi32((__m256i)g.v[0], (__m256i)g.v[1]);
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(x, 0xd8));
#else
  for (int i = 0; i < kVectors; ++i) {
    store((uint16_t*)p + i * kLanes, __builtin_convertvector(g.v[i], Narrow<2>::V));
  }
#endif
}

PYFMT_INLINE Group load_u8(const uint8_t* p) {
  Group g;
#if PYFMT_AVX512
  g.v[0] = (U)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif PYFMT_AVX2
  for (int i = 0; i < 2; ++i) {
    g.v[i] = (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * i)));
  }
#elif PYFMT_SSE2
  const __m128i x = _mm_loadu_si128((const __m128i*)p), zero = _mm_setzero_si128();
  const __m128i lo = _mm_unpacklo_epi8(x, zero), hi = _mm_unpackhi_epi8(x, zero);
  g.v[0] = (U)_mm_unpacklo_epi16(lo, zero);
  g.v[1] = (U)_mm_unpackhi_epi16(lo, zero);
  g.v[2] = (U)_mm_unpacklo_epi16(hi, zero);
  g.v[3] = (U)_mm_unpackhi_epi16(hi, zero);
#else
  for (int i = 0; i < kVectors; ++i) {
    g.v[i] = __builtin_convertvector(load<Narrow<1>::V>(p + i * kLanes), U);
  }
#endif
  return g;
}

// Lanes must be below 2^8.
PYFMT_INLINE void store_u8(uint8_t* p, const Group& g) {
#if PYFMT_AVX512
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)g.v[0]));
#elif PYFMT_AVX2
  const __m256i x = _mm256_packus_epi32((__m256i)g.v[0], (__m256i)g.v[1]);
  const __m256i y = _mm256_permute4x64_epi64(x, 0xd8);
  _mm_storeu_si128((__m128i*)p,
                   _mm_packus_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
#elif PYFMT_SSE2
  const __m128i lo = _mm_packs_epi32((__m128i)g.v[0], (__m128i)g.v[1]);
  const __m128i hi = _mm_packs_epi32((__m128i)g.v[2], (__m128i)g.v[3]);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(lo, hi));
#else
  for (int i = 0; i < kVectors; ++i) {
    store(p + i * kLanes, __builtin_convertvector(g.v[i], Narrow<1>::V));
  }
#endif
}

// ---- across lanes -----------------------------------------------------------------------------

// The lanes 0, 2, 4, ... of a and b (first = 0), or 1, 3, 5, ... (first = 1).
template <int first, int... i>
PYFMT_INLINE U every_second(U a, U b, Indices<i...>) {
  return PYFMT_SHUFFLE(a, b, (2 * i + first)...);
}

// a[0], b[0], a[1], b[1], ...: the first half of that, and the second.
template <int kFirst, int... i>
PYFMT_INLINE U in_turn_from(U a, U b, Indices<i...>) {
  return PYFMT_SHUFFLE(a, b, (kFirst + i / 2 + i % 2 * kLanes)...);
}
PYFMT_INLINE U lower_in_turn(U a, U b) {
  return in_turn_from<0>(a, b, LaneIndices{});
}
PYFMT_INLINE U upper_in_turn(U a, U b) {
  return in_turn_from<kLanes / 2>(a, b, LaneIndices{});
}

// The lane i ^ kStride of v.
template <int kStride, int... i>
PYFMT_INLINE F exchange_lanes(F v, Indices<i...>) {
  return PYFMT_SHUFFLE(v, v, (i ^ kStride)...);
}
template <int kStride>
PYFMT_INLINE F exchange(F v) {
  return exchange_lanes<kStride>(v, LaneIndices{});
}

// a[0], b[0], a[1], b[1], ... in two vectors.
PYFMT_INLINE void interleave(W a, W b, W* first, W* second) {
#if PYFMT_AVX512
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  *first = (W)_mm512_permutex2var_epi64((__m512i)a, low, (__m512i)b);
  *second = (W)_mm512_permutex2var_epi64((__m512i)a, high, (__m512i)b);
#else
  constexpr int kHalf = kLanes / 4;
  for (int i = 0; i < kHalf; ++i) {
    (*first)[2 * i] = a[i];
    (*first)[2 * i + 1] = b[i];
    (*second)[2 * i] = a[kHalf + i];
    (*second)[2 * i + 1] = b[kHalf + i];
  }
#endif
}

// a + sign * b for sign +-1 in each lane: the product is exact, so that a fused multiply-add rounds
// as the sum or difference does.
PYFMT_INLINE F add_signed(F a, F b, F sign) {
#if PYFMT_AVX512
  return (F)_mm512_fmadd_ps((__m512)b, (__m512)sign, (__m512)a);
#else
  return a + (F)((U)b ^ ((U)sign & 0x80000000u));
#endif
}

// The largest lane of each of kLanes vectors, in order.
PYFMT_INLINE U max_of_each(const U in[kLanes]) {
#if PYFMT_AVX512
  __m512i a[16];
  for (int i = 0; i < 8; ++i) {
    const __m512i x = (__m512i)in[2 * i], y = (__m512i)in[2 * i + 1];
    a[i] = _mm512_max_epu32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i x = a[2 * i], y = a[2 * i + 1];
    a[i] = _mm512_max_epu32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
  }
  for (int n = 2; n >= 1; --n) {
    for (int i = 0; i < n; ++i) {
      const __m512i x = a[2 * i], y = a[2 * i + 1];
      a[i] = _mm512_max_epu32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
    }
  }
  return (U)a[0];
#elif PYFMT_AVX2
  __m256i a[8];
  for (int i = 0; i < 4; ++i) {
    const __m256i x = (__m256i)in[2 * i], y = (__m256i)in[2 * i + 1];
    a[i] = _mm256_max_epu32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
  }
  for (int i = 0; i < 2; ++i) {
    const __m256i x = a[2 * i], y = a[2 * i + 1];
    a[i] = _mm256_max_epu32(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y));
  }
  return (U)_mm256_max_epu32(_mm256_permute2x128_si256(a[0], a[1], 0x20),
                             _mm256_permute2x128_si256(a[0], a[1], 0x31));
#else
  U out;
  for (int i = 0; i < kLanes; ++i) {
    uint32_t m = 0;
    for (int j = 0; j < kLanes; ++j) m = in[i][j] > m ? in[i][j] : m;
    out[i] = m;
  }
  return out;
#endif
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
