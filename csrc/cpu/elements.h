// SPDX-License-Identifier: Apache-2.0
// Elements as template arguments of the kernels' loops, and the multipliers of their blocks.
#pragma once

#include "lanes.h"

namespace pyfmt {
namespace PYFMT_ISA {

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
  PYFMT_INLINE int make(const ElementSpec&, bool) { return 0; }
  PYFMT_INLINE U encode(int, U y) {
    constexpr codec::FloatCodec c(Element::spec);
    return codec::encode_float<U>(c, y);
  }
  PYFMT_INLINE U decode(int, U code) {
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
