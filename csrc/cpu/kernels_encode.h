// SPDX-License-Identifier: Apache-2.0
// Scaled elements to codes, by pairs.
#pragma once

#include "pairs.h"

namespace pyfmt {
namespace PYFMT_ISA {

#if PYFMT_AVX512
constexpr bool kPacksSix = true;
// Two codes of six bits in each lane to 24 bytes.
PYFMT_INLINE void store_six(uint8_t* p, U two) {
  const __m512i four = _mm512_or_si512((__m512i)two, _mm512_srli_epi64((__m512i)two, 20));
  const __m512i bytes =
      _mm512_shuffle_epi8(four, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 8, 9, 10, -1, -1, -1,
                                                                     -1, -1, -1, -1, -1, -1, -1)));
  const __m512i words = _mm512_castsi256_si512(
      _mm256_setr_epi16(0, 1, 2, 8, 9, 10, 16, 17, 18, 24, 25, 26, 3, 3, 3, 3));
  _mm256_mask_storeu_epi32(p, 0x3f, _mm512_castsi512_si256(_mm512_permutexvar_epi16(words, bytes)));
}
#else
constexpr bool kPacksSix = false;
PYFMT_INLINE void store_six(uint8_t*, U) {}
#endif

// kBits: those of a code in `codes`, 4, 6 or 8.
template <class Element, class Codec, class From, bool kMixed, int kBits>
PYFMT_INLINE void encode_pairs(const Codec& c, const void* x, int64_t n, Multipliers m,
                               uint8_t* codes) {
  const uint32_t* const values = m.values;
  const int shift = m.shift;
  for (int64_t i = 0; i < n; i += kPairs) {
    const Group multiplier = pair_multipliers<kMixed>(values, shift, i / kGroup);
    From::ahead(x, i);
    if (i % 128 == 0) fetch_output(codes + i * kBits / 8 + 1024, 16 * kBits);
    const Pairs p = From::pairs(x, i);
    Group joined;
    for (int k = 0; k < kVectors; ++k) {
      const F f = (F)multiplier.v[k];
      const U even = Element::encode(c, (U)((F)p.even.v[k] * f));
      const U odd = Element::encode(c, (U)((F)p.odd.v[k] * f));
      joined.v[k] = even | odd << kBits;
    }
    if constexpr (kBits == 4) {
      store_u8(codes + i / 2, joined);
    } else if constexpr (kBits == 6) {
      store_six(codes + i / 8 * 6, joined.v[0]);
    } else {
      store_u16(codes + i, joined);
    }
  }
}

// n elements (a multiple of 16) times the multiplier of their group. Codes take `bits`: a byte, or
// where n is a multiple of 32 four bits, or six where kPacksSix.
using EncodeFn = void (*)(const ElementSpec&, bool full, const void* x, int64_t n,
                          const Multipliers&, int bits, uint8_t* codes);

template <class Element, class From, int kBits>
PYFMT_INLINE void encode_whole(const ElementSpec& spec, bool full, const void* x, int64_t n,
                               const Multipliers& m, uint8_t* codes) {
  const auto c = Element::make(spec, full);
  using C = decltype(Element::make(spec, full));
  if (m.shift) {
    encode_pairs<Element, C, From, false, kBits>(c, x, n, m, codes);
  } else {
    encode_pairs<Element, C, From, true, kBits>(c, x, n, m, codes);
  }
}

template <class Element, class From>
static void encode_row(const ElementSpec& spec, bool full, const void* x, int64_t n,
                       const Multipliers& m, int bits, uint8_t* codes) {
  if (bits == 4) return encode_whole<Element, From, 4>(spec, full, x, n, m, codes);
  if constexpr (kPacksSix) {
    if (bits == 6) return encode_whole<Element, From, 6>(spec, full, x, n, m, codes);
  }
  const auto c = Element::make(spec, full);
  const int64_t whole = n / kPairs * kPairs;
  encode_whole<Element, From, 8>(spec, full, x, whole, m, codes);
  for (int64_t i = whole; i < n; i += kGroup) {
    const F multiplier = (F)broadcast(m.of_group(i / kGroup));
    Group g = From::group(x, i);
    for (int k = 0; k < kVectors; ++k) {
      g.v[k] = Element::encode(c, (U)((F)g.v[k] * multiplier));
    }
    store_u8(codes + i, g);
  }
}

struct Encoders {
  EncodeFn source, staged, paired;  // from x itself, from float32, from float32 in paired order
};

template <class Element>
static Encoders encoders_of(DType dtype) {
  const EncodeFn staged = encode_row<Element, FromRow<DType::kFP32>>;
  const EncodeFn source = dtype == DType::kBF16   ? encode_row<Element, FromRow<DType::kBF16>>
                          : dtype == DType::kFP16 ? encode_row<Element, FromRow<DType::kFP16>>
                                                  : staged;
  return {source, staged, encode_row<Element, FromPaired>};
}

static Encoders find_encoders(const ElementSpec& e, bool full, DType dtype) {
#define PYFMT_ELEMENT(id, name, kind, exp, man, bias, frac, is_signed, special) \
  if (Kind::kind == Kind::kFloat && e == elements::id) {                        \
    return encoders_of<Choose<id##_element, Kind::kind>::type>(dtype);          \
  }
#include "../formats.inc"
  if (!e.is_int()) return encoders_of<AnyFloat>(dtype);
  return e.is_signed && !full ? encoders_of<SymmetricInt>(dtype) : encoders_of<AnyInt>(dtype);
}

// Scaled float32 values and their random numbers to codes, one a byte.
template <class Element>
static void encode_stochastic_row(const ElementSpec& spec, bool full, const uint32_t* y,
                                  const uint32_t* random, int64_t n, uint8_t* codes) {
  const auto c = Element::make(spec, full);
  for (int64_t i = 0; i < n; i += kGroup) {
    Group g = load_u32(y + i);
    const Group r = load_u32(random + i);
    for (int k = 0; k < kVectors; ++k) {
      g.v[k] = Element::encode_stochastic(c, g.v[k], r.v[k]);
    }
    store_u8(codes + i, g);
  }
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
