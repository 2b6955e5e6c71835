// SPDX-License-Identifier: Apache-2.0
// Codes to values: element times block scale, times tensor scale, rounded once to the dtype.
#pragma once

#include "kernels_layout.h"
#include "kernels_words.h"
#include "pairs.h"

namespace pyfmt {
namespace PYFMT_ISA {

struct DecodeRow {
  const uint8_t* codes = nullptr;  // one a byte, readable up to a multiple of 16; or packed
  int bits = 8;                    // that a code takes
  int64_t n = 0;
  void* out = nullptr;
  bool has_tensor_scale = false;
  uint32_t tensor_scale = 0x3f800000u;
  bool exact = false;  // the products are bfloat16 already
};

// ---- by pairs ------------------------------------------------------------------------

template <class Element, class Codec>
struct Arithmetic {
  Codec c;
  PYFMT_HD F operator[](U code) const { return (F)Element::decode(c, code); }
};

template <class Values, DType kDType, bool kMixed, bool kNibbles, bool kTensorScale, bool kExact>
PYFMT_INLINE void decode_pairs_as(const Values& values, const DecodeRow& d, const Multipliers& m) {
  const uint32_t* const scales = m.values;
  const uint8_t* const codes = d.codes;
  void* const out = d.out;
  const int shift = m.shift;
  const int64_t n = d.n;
  const F tensor_scale = (F)broadcast(d.tensor_scale);
  for (int64_t i = 0; i < n; i += kPairs) {
    const Group scale = pair_multipliers<kMixed>(scales, shift, i / kGroup);
    const Group g = kNibbles ? load_u8(codes + i / 2) : load_u16(codes + i);
    Pairs p;
    for (int k = 0; k < kVectors; ++k) {
      F even = values[kNibbles ? g.v[k] & 0xfu : g.v[k] & 0xffu] * (F)scale.v[k];
      F odd = values[g.v[k] >> (kNibbles ? 4 : 8)] * (F)scale.v[k];
      if (kTensorScale) {
        even = even * tensor_scale;
        odd = odd * tensor_scale;
      }
      p.even.v[k] = (U)even;
      p.odd.v[k] = (U)odd;
    }
    store_pairs<kDType, kExact>(out, i, p);
  }
}

template <class Values, DType kDType, bool kNibbles>
PYFMT_INLINE void decode_pairs(const Values& values, const DecodeRow& d, const Multipliers& m) {
  if constexpr (kDType == DType::kBF16) {
    if (d.exact) {
      return m.shift ? decode_pairs_as<Values, kDType, false, kNibbles, false, true>(values, d, m)
                     : decode_pairs_as<Values, kDType, true, kNibbles, false, true>(values, d, m);
    }
  }
  if (d.has_tensor_scale) {
    return m.shift ? decode_pairs_as<Values, kDType, false, kNibbles, true, false>(values, d, m)
                   : decode_pairs_as<Values, kDType, true, kNibbles, true, false>(values, d, m);
  }
  return m.shift ? decode_pairs_as<Values, kDType, false, kNibbles, false, false>(values, d, m)
                 : decode_pairs_as<Values, kDType, true, kNibbles, false, false>(values, d, m);
}

// Whole pairs, where no NaN can arise but from a NaN scale.
template <class Element, DType kDType>
static void decode_tame(const ElementSpec& spec, const DecodeRow& d, const Multipliers& m) {
  const auto c = Element::make(spec, false);
  const Arithmetic<Element, decltype(Element::make(spec, false))> values{c};
  if (d.bits == 8) return decode_pairs<decltype(values), kDType, false>(values, d, m);
  if constexpr (kHasLookup) {
    uint32_t table[kGroup];
    Group codes;
    for (int k = 0; k < kVectors; ++k) {
      for (int i = 0; i < kLanes; ++i) codes.v[k][i] = uint32_t(k * kLanes + i);
      codes.v[k] = (U)values[codes.v[k]];
    }
    store_u32(table, codes);
    const Lookup lookup(table);
    return decode_pairs<Lookup, kDType, true>(lookup, d, m);
  }
  decode_pairs<decltype(values), kDType, true>(values, d, m);
}

// ---- any dtype, by groups ---------------------------------------------------------------------

// The values of elements i to i + 15. kEach: a multiplier for every element.
template <class Element, class Codec, bool kEach, bool kTensorScale>
PYFMT_INLINE Group decode_group(const Codec& c, const DecodeRow& d, const Multipliers& m,
                                int64_t i) {
  Group g = load_u8(d.codes + i);
  const Group each = kEach ? load_u32(m.values + i) : Group{};
  const U one = kEach ? U{} : broadcast(m.of_group(i / kGroup));
  for (int k = 0; k < kVectors; ++k) {
    F y = (F)Element::decode(c, g.v[k]) * (F)(kEach ? each.v[k] : one);
    if (kTensorScale) y = y * (F)broadcast(d.tensor_scale);
    g.v[k] = (U)y;
  }
  return g;
}

template <class Element, DType kDType, bool kEach, bool kTensorScale>
static void decode_groups(const ElementSpec& spec, const DecodeRow& d, const Multipliers& m) {
  const auto c = Element::make(spec, false);
  using C = decltype(Element::make(spec, false));
  int64_t i = 0;
  for (; i + kGroup <= d.n; i += kGroup) {
    store_as<kDType>(d.out, i, decode_group<Element, C, kEach, kTensorScale>(c, d, m, i));
  }
  if (i < d.n) {
    alignas(64) char last[kGroup * 4];
    store_as<kDType>(last, 0, decode_group<Element, C, kEach, kTensorScale>(c, d, m, i));
    memcpy(at(d.out, kDType, i), last, size_t(d.n - i) * dtype_bytes(kDType));
  }
}

using DecodeFn = void (*)(const ElementSpec&, const DecodeRow&, const Multipliers&);

struct Decoders {
  DecodeFn groups, pairs;
};

template <class Element, DType kDType>
static DecodeFn decoder_for(bool each, bool tensor_scale) {
  if (each) return decode_groups<Element, kDType, true, true>;
  return tensor_scale ? decode_groups<Element, kDType, false, true>
                      : decode_groups<Element, kDType, false, false>;
}

template <class Element, DType kDType>
static Decoders decoders_for(bool each, bool tensor_scale) {
  return {decoder_for<Element, kDType>(each, tensor_scale),
          each ? nullptr : decode_tame<Element, kDType>};
}

template <class Element>
static Decoders decoders_of(DType dtype, bool each, bool tensor_scale) {
  return dtype == DType::kBF16   ? decoders_for<Element, DType::kBF16>(each, tensor_scale)
         : dtype == DType::kFP16 ? decoders_for<Element, DType::kFP16>(each, tensor_scale)
                                 : decoders_for<Element, DType::kFP32>(each, tensor_scale);
}

static Decoders find_decoders(const ElementSpec& e, DType dtype, bool each, bool tensor_scale) {
#define PYFMT_ELEMENT(id, name, kind, exp, man, bias, frac, is_signed, special)            \
  if (e == elements::id) {                                                                 \
    return decoders_of<Choose<id##_element, Kind::kind>::type>(dtype, each, tensor_scale); \
  }
#include "../formats.inc"
  return e.is_int() ? decoders_of<AnyInt>(dtype, each, tensor_scale)
                    : decoders_of<AnyFloat>(dtype, each, tensor_scale);
}

// Decodes rows of one tensor, block scales given as float32 bits.
class Decoder {
 public:
  PYFMT_HD Decoder(const ElementSpec& e, Scale scale, DType dtype, int64_t block,
                   const float* tensor_scale)
      : element_(e),
        block_(block),
        each_(block % kGroup != 0),
        decode_(find_decoders(e, dtype, each_, tensor_scale != nullptr)),
        words_(e),
        by_words_(dtype == DType::kBF16 && scale == Scale::kE8M0 && !tensor_scale &&
                  block % kPairs == 0) {
    const float t = tensor_scale ? *tensor_scale : 1.0f;
    const bool bounded = t > 0.0f && t <= 0x1p127f;
    // E8M0 is never zero or infinite; other scales may be, and infinity times zero is a NaN.
    const bool number = e.special != Special::kIeee || scale == Scale::kE8M0;
    if (!number || !bounded) decode_.pairs = nullptr;
    float_scales_ = scale != Scale::kE8M0 && scale != Scale::kE4M3;
    // k * 2^step with |k| below 2^8 is a bfloat16 while step is no less than -133.
    exact_ = scale == Scale::kE8M0 && !tensor_scale;
    const int lowest = -133 - e.step_exp();
    exact_ &= lowest <= 127;
    exact_from_ = lowest < -126 ? 0x00400000u : power_of_two_bits(lowest <= 127 ? lowest : 127);
  }

  // The bits that a code of a row with these scales may take: those of the element, or a byte.
  PYFMT_HD int packed_bits(int64_t n, const uint32_t* scales, int64_t phase, int64_t blocks) const {
    const int bits = element_.bits();
    if (bits == 4) return decode_.pairs && n % kPairs == 0 && tame(scales, blocks) ? 4 : 8;
    return bits == 6 && takes_words(n, scales, phase, blocks) ? 6 : 8;
  }

  // The row's first element lies `phase` elements into the block of scales[0]; `room` holds
  // round_up(n, 16) words.
  PYFMT_HD void run(DecodeRow d, const uint32_t* scales, int64_t phase, uint32_t* room) const {
    if (!each_) {
      const Multipliers m = group_multipliers(scales, phase, block_, d.n, room);
      const int64_t blocks = (phase + d.n + block_ - 1) / block_;
      if (m.shift && takes_words(d.n, scales, phase, blocks)) {
        return words_.run(d.codes, d.bits, d.n, m, (uint16_t*)d.out);
      }
      const bool pairs = decode_.pairs && d.n % kPairs == 0 && tame(scales, blocks);
      if (!pairs) return decode_.groups(element_, d, m);
      uint32_t least = exact_ ? ~0u : 0u;
      for (int64_t b = 0; exact_ && b < blocks; ++b) least = scales[b] < least ? scales[b] : least;
      d.exact = least >= exact_from_;
      return decode_.pairs(element_, d, m);
    }
    for (int64_t i = 0; i < d.n; ++scales) {
      const int64_t end = i + block_ - phase < d.n ? i + block_ - phase : d.n;
      phase = 0;
      for (; i < end; ++i) room[i] = *scales;
    }
    for (int64_t i = d.n; i < round_up(d.n, kGroup); ++i) room[i] = 0;
    decode_.groups(element_, d, Multipliers{room, 0});
  }

 private:
  PYFMT_HD bool takes_words(int64_t n, const uint32_t* scales, int64_t phase,
                            int64_t blocks) const {
    const int64_t each = block_ / kGroup;
    return by_words_ && n % kPairs == 0 && phase == 0 && (each & (each - 1)) == 0 &&
           words_.takes(scales, blocks);
  }

  // No scale that a caller may have made up: infinite, or a NaN but the canonical one.
  PYFMT_HD bool tame(const uint32_t* scales, int64_t blocks) const {
    bool wild = false;
    for (int64_t b = 0; float_scales_ && b < blocks; ++b) {
      wild |= scales[b] > kFloatMax && scales[b] != kFloatNaN;
    }
    return !wild;
  }

  ElementSpec element_;
  int64_t block_;
  bool each_, exact_, float_scales_;
  Decoders decode_;
  uint32_t exact_from_;
  WordTable words_;
  bool by_words_;
};

// Scale codes to float32 bits.
template <Scale kScale>
PYFMT_INLINE void decode_scales_as(const void* scales, int64_t n, uint32_t* out) {
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    Group g = scale_bytes(kScale) == 4   ? load_u32((const uint32_t*)scales + i)
              : scale_bytes(kScale) == 2 ? load_u16((const uint16_t*)scales + i)
                                         : load_u8((const uint8_t*)scales + i);
    for (int k = 0; k < kVectors; ++k) g.v[k] = codec::decode_scale<U>(kScale, g.v[k]);
    store_u32(out + i, g);
  }
  for (; i < n; ++i) {
    const uint32_t code = scale_bytes(kScale) == 4   ? ((const uint32_t*)scales)[i]
                          : scale_bytes(kScale) == 2 ? ((const uint16_t*)scales)[i]
                                                     : ((const uint8_t*)scales)[i];
    out[i] = codec::decode_scale<uint32_t>(kScale, code);
  }
}

static void decode_scales(Scale kind, const void* scales, int64_t n, uint32_t* out) {
  switch (kind) {
    case Scale::kE8M0:
      return decode_scales_as<Scale::kE8M0>(scales, n, out);
    case Scale::kE4M3:
      return decode_scales_as<Scale::kE4M3>(scales, n, out);
    case Scale::kBF16:
      return decode_scales_as<Scale::kBF16>(scales, n, out);
    case Scale::kFP16:
      return decode_scales_as<Scale::kFP16>(scales, n, out);
    default:
      return decode_scales_as<Scale::kFP32>(scales, n, out);
  }
}

static void dequantize(const cpu::DequantizeArgs& a, int64_t begin, int64_t end) {
  GradualUnderflow guard;
  const Tiling& t = a.tiling;
  const int bits = a.element.bits();
  const int64_t width = round_up(t.tile_columns, kGroup);
  const int64_t most_blocks = round_up(t.tile_columns / t.block_columns + 2, kGroup);
  Scratch scratch(width * 5 + most_blocks * 4 + 256);
  uint32_t* room = scratch.take<uint32_t>(width);
  uint32_t* scales = scratch.take<uint32_t>(most_blocks);
  uint8_t* unpacked = scratch.take<uint8_t>(width);
  const Decoder decoder(a.element, a.scale, a.dtype, t.block_columns,
                        a.has_tensor_scale ? &a.tensor_scale : nullptr);
  DecodeRow d;
  d.has_tensor_scale = a.has_tensor_scale;
  d.tensor_scale = codec::Lane<uint32_t>::as_uint(a.tensor_scale);
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tile_at(t, item);
    if (tile.width <= 0) continue;
    const int64_t block = tile.column / t.block_columns;
    const int64_t blocks = (tile.column + tile.width - 1) / t.block_columns - block + 1;
    const int64_t first = tile.strip * t.blocks() + block;
    decode_scales(a.scale, (const char*)a.scales + first * scale_bytes(a.scale), blocks, scales);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r, offset = tile.column * bits / 8;
      const uint8_t* packed = a.codes + row * a.row_bytes + offset;
      d.codes = packed;
      const int64_t phase = tile.column - block * t.block_columns;
      d.bits = decoder.packed_bits(tile.width, scales, phase, blocks);
      if (d.bits == 8 && (bits != 8 || tile.width % kGroup)) {
        unpack_row(packed, a.row_bytes - offset, tile.width, bits, unpacked);
        d.codes = unpacked;
      }
      d.n = tile.width;
      d.out = at(a.out, a.dtype, row * t.columns + tile.column);
      decoder.run(d, scales, phase, room);
    }
  }
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
