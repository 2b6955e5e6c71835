// SPDX-License-Identifier: Apache-2.0
// Codes to values: element times block scale, times tensor scale, rounded once to the dtype.
#pragma once

#include "elements.h"
#include "kernels_layout.h"

namespace pyfmt {
namespace PYFMT_ISA {

struct DecodeRow {
  const uint8_t* codes = nullptr;  // one a byte, readable up to a multiple of 16
  int64_t n = 0;
  void* out = nullptr;
  bool has_tensor_scale = false;
  uint32_t tensor_scale = 0x3f800000u;
};

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

template <class Element, DType kDType>
static DecodeFn decoder_for(bool each, bool tensor_scale) {
  if (each) return decode_groups<Element, kDType, true, true>;
  return tensor_scale ? decode_groups<Element, kDType, false, true>
                      : decode_groups<Element, kDType, false, false>;
}

template <class Element>
static DecodeFn decoder_of(DType dtype, bool each, bool tensor_scale) {
  return dtype == DType::kBF16   ? decoder_for<Element, DType::kBF16>(each, tensor_scale)
         : dtype == DType::kFP16 ? decoder_for<Element, DType::kFP16>(each, tensor_scale)
                                 : decoder_for<Element, DType::kFP32>(each, tensor_scale);
}

static DecodeFn find_decoder(const ElementSpec& e, DType dtype, bool each, bool tensor_scale) {
#define PYFMT_ELEMENT(id, name, kind, exp, man, bias, frac, is_signed, special)               \
  if (e == elements::id) {                                                                    \
    return decoder_of<Choose<id##_element, Kind::kind>::type>(dtype, each, tensor_scale);     \
  }
#include "../formats.inc"
  return e.is_int() ? decoder_of<AnyInt>(dtype, each, tensor_scale)
                    : decoder_of<AnyFloat>(dtype, each, tensor_scale);
}

// Decodes rows of one tensor, block scales given as float32 bits.
class Decoder {
 public:
  PYFMT_HD Decoder(const ElementSpec& e, DType dtype, int64_t block, bool tensor_scale)
      : element_(e),
        block_(block),
        each_(block % kGroup != 0),
        decode_(find_decoder(e, dtype, each_, tensor_scale)) {}

  // The row's first element lies `phase` elements into the block of scales[0]; `room` holds
  // round_up(n, 16) words.
  PYFMT_HD void run(const DecodeRow& d, const uint32_t* scales, int64_t phase,
                    uint32_t* room) const {
    if (!each_) {
      return decode_(element_, d, group_multipliers(scales, phase, block_, d.n, room));
    }
    for (int64_t i = 0; i < d.n; ++scales) {
      const int64_t end = i + block_ - phase < d.n ? i + block_ - phase : d.n;
      phase = 0;
      for (; i < end; ++i) room[i] = *scales;
    }
    for (int64_t i = d.n; i < round_up(d.n, kGroup); ++i) room[i] = 0;
    decode_(element_, d, Multipliers{room, 0});
  }

 private:
  ElementSpec element_;
  int64_t block_;
  bool each_;
  DecodeFn decode_;
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
    case Scale::kE8M0: return decode_scales_as<Scale::kE8M0>(scales, n, out);
    case Scale::kE4M3: return decode_scales_as<Scale::kE4M3>(scales, n, out);
    case Scale::kBF16: return decode_scales_as<Scale::kBF16>(scales, n, out);
    case Scale::kFP16: return decode_scales_as<Scale::kFP16>(scales, n, out);
    default: return decode_scales_as<Scale::kFP32>(scales, n, out);
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
  const Decoder decoder(a.element, a.dtype, t.block_columns, a.has_tensor_scale);
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
      if (bits != 8 || tile.width % kGroup) {
        unpack_row(packed, a.row_bytes - offset, tile.width, bits, unpacked);
        d.codes = unpacked;
      }
      d.n = tile.width;
      d.out = at(a.out, a.dtype, row * t.columns + tile.column);
      decoder.run(d, scales, tile.column - block * t.block_columns, room);
    }
  }
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
