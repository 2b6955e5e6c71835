// SPDX-License-Identifier: Apache-2.0
// Elements as template arguments of the kernels' loops, and the multipliers of their blocks.
#pragma once

#include "lanes.h"

namespace pyfmt {
namespace PYFMT_ISA {

#if PYFMT_AVX512
// The float codec of AVX-512: a table in one register, or two, holds the rounding base of each
// exponent, for elements of at most 16 exponents, or 32.
struct TableFloat {
  alignas(64) uint32_t base[32];

  PYFMT_HD constexpr explicit TableFloat(const codec::FloatCodec& c, bool wide) : base{} {
    const uint32_t count = wide ? 32 : 16, low = (c.emin_bits >> 23) - 1;
    for (uint32_t field = low; field < low + count; ++field) {
      uint32_t exponent = field << 23;
      if (exponent < c.emin_bits) exponent = c.emin_bits;
      base[field & (count - 1)] = exponent + (exponent >> c.shift) + c.magic;
    }
  }
  static constexpr bool wide(const ElementSpec& e) { return e.emax() - e.emin() >= 15; }
  static constexpr bool serves(const ElementSpec& e) {
    return e.is_signed && e.emax() - e.emin() < 31;
  }
  template <bool kWide>
  PYFMT_INLINE U encode(const codec::FloatCodec& c, __m512i table, __m512i upper, U y) {
    const __m512 max = _mm512_castsi512_ps((__m512i)broadcast(c.max_bits));
    // The smaller magnitude, positive.
    const __m512 mag = _mm512_range_ps((__m512)y, max, 0b1010);
    const U bounded = max_u((U)mag, broadcast(c.emin_bits - (1u << 23)));
    const __m512i field = (__m512i)(bounded >> 23);
    const __m512i base = kWide ? _mm512_permutex2var_epi32(table, field, upper)
                               : _mm512_permutexvar_epi32(field, table);
    const U sum = (U)(F)_mm512_add_ps(mag, _mm512_castsi512_ps(base));
    return select_bits(c.magnitude_mask, sum, y >> c.sign_shift);
  }
};
#endif

// The values of 16 codes, looked up lane by lane where the level can.
#if PYFMT_AVX512 || PYFMT_AVX2
constexpr bool kHasLookup = true;
#else
constexpr bool kHasLookup = false;
#endif
struct Lookup {
#if PYFMT_AVX512
  __m512 values;
  PYFMT_HD explicit Lookup(const uint32_t* v) : values(_mm512_loadu_ps(v)) {}
  // Only the low four bits of an index count.
  PYFMT_HD F operator[](U code) const { return (F)_mm512_permutexvar_ps((__m512i)code, values); }
#elif PYFMT_AVX2
  __m256 low, high;
  PYFMT_HD explicit Lookup(const uint32_t* v)
      : low(_mm256_loadu_ps((const float*)v)), high(_mm256_loadu_ps((const float*)v + 8)) {}
  PYFMT_HD F operator[](U code) const {
    const __m256i i = (__m256i)code;
    return (F)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                               (__m256)(code << 28));
  }
#else
  PYFMT_HD explicit Lookup(const uint32_t*) {}
  PYFMT_HD F operator[](U code) const { return (F)code; }
#endif
};

// Any float element, its constants in registers.
struct AnyFloat {
  PYFMT_INLINE codec::FloatCodec make(const ElementSpec& e, bool) { return codec::FloatCodec(e); }
  PYFMT_INLINE U encode(const codec::FloatCodec& c, U y) { return codec::encode_float<U>(c, y); }
  PYFMT_INLINE U encode_stochastic(const codec::FloatCodec& c, U y, U random) {
    return codec::encode_float_stochastic<U>(c, y, random);
  }
  PYFMT_INLINE U decode(const codec::FloatCodec& c, U code) {
    return codec::decode_float<U>(c, code);
  }
};

// A float element of the format table: its constants fold into the instructions.
template <class Element>
struct StaticFloat {
#if PYFMT_AVX512
  struct Table {
    __m512i base, upper;
  };
  static constexpr bool kWide = TableFloat::wide(Element::spec);
  PYFMT_INLINE Table make(const ElementSpec&, bool) {
    constexpr TableFloat table(codec::FloatCodec(Element::spec), kWide);
    return {_mm512_load_si512(table.base), _mm512_load_si512(table.base + 16)};
  }
#else
  struct Table {};
  PYFMT_INLINE Table make(const ElementSpec&, bool) { return {}; }
#endif
  PYFMT_INLINE U encode(const Table& t, U y) {
    constexpr codec::FloatCodec c(Element::spec);
#if PYFMT_AVX512
    if constexpr (TableFloat::serves(Element::spec)) {
      return TableFloat::encode<kWide>(c, t.base, t.upper, y);
    }
#endif
    (void)t;
    return codec::encode_float<U>(c, y);
  }
  PYFMT_INLINE U decode(const Table&, U code) {
    constexpr codec::FloatCodec c(Element::spec);
    return codec::decode_float<U>(c, code);
  }
};

// Any integer: the named ones too, since constants in registers cost them nothing.
struct AnyInt {
  PYFMT_INLINE codec::IntCodec make(const ElementSpec& e, bool full) {
    return codec::IntCodec(e, full);
  }
  PYFMT_INLINE U encode(const codec::IntCodec& c, U y) { return codec::encode_int<U>(c, y); }
  PYFMT_INLINE U encode_stochastic(const codec::IntCodec& c, U y, U random) {
    return codec::encode_int_stochastic<U>(c, y, random);
  }
  PYFMT_INLINE U decode(const codec::IntCodec& c, U code) { return codec::decode_int<U>(c, code); }
};

// A signed integer with equal limits on both sides.
struct SymmetricInt : AnyInt {
#if PYFMT_AVX512
  PYFMT_INLINE U encode(const codec::IntCodec& c, U y) {
    const F v = (F)y * (F)broadcast(c.steps_per_one);
    // The smaller magnitude with y's sign; then as in codec::encode_int.
    const F clamped = (F)_mm512_range_ps((__m512)v, (__m512)broadcast(c.positive_limit), 0b0010);
    return (U)(clamped + 12582912.0f) & c.mask;
  }
#endif
};

template <class Element, Kind kKind>
struct Choose {
  using type = StaticFloat<Element>;
};
template <class Element>
struct Choose<Element, Kind::kInt> {
  using type = AnyInt;
};

// One float32 (bits) for each 2^shift groups of sixteen elements.
struct Multipliers {
  const uint32_t* values;
  int shift;

  PYFMT_HD uint32_t of_group(int64_t g) const { return values[g >> shift]; }
};

// The multipliers of n elements that begin `phase` elements into the first block; block and phase
// are multiples of 16. They are spelt out in `room` where a shift cannot find them.
PYFMT_INLINE Multipliers group_multipliers(const uint32_t* values, int64_t phase, int64_t block,
                                           int64_t n, uint32_t* room) {
  const int64_t each = block / kGroup, count = (n + kGroup - 1) / kGroup;
  if ((each & (each - 1)) == 0 && phase == 0) return {values, __builtin_ctzll(uint64_t(each))};
  int64_t left = each - phase / kGroup;
  for (int64_t g = 0; g < count; ++g) {
    if (left-- == 0) {
      ++values;
      left = each - 1;
    }
    room[g] = *values;
  }
  return {room, 0};
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
