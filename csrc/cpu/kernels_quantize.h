// SPDX-License-Identifier: Apache-2.0
// Quantize one tile at a time: load (and rotate), block amax, scales, codes, packed bytes; or
// decode the codes again for fake_quantize. A tile's data stay in the first-level cache.
#pragma once

#include "kernels_amax.h"
#include "kernels_dequantize.h"

namespace pyfmt {
namespace PYFMT_ISA {

using cpu::QuantizeArgs;
using cpu::ScaleArgs;

// ---- scales -----------------------------------------------------------------------------------

template <class T>
PYFMT_INLINE void store_narrow(void* scales, int64_t i, U codes, int64_t count) {
  if (count == kLanes) {
    store((T*)scales + i,
          __builtin_convertvector(codes, typename Narrow<int(sizeof(T))>::V));
    return;
  }
  for (int64_t k = 0; k < count; ++k) ((T*)scales)[i + k] = T(codes[k]);
}

template <Scale kScale>
PYFMT_INLINE void scale_blocks_as(const ScaleArgs& a) {
  const QuantizeArgs& q = *a.quantize;
  const uint32_t addend = codec::e8m0_addend(q.rule, q.element);
  const int emax = q.element.emax();
  const F qmax = (F)broadcast(q.element.max_bits());
  for (int64_t i = 0; i < a.count; i += kLanes) {
    const int64_t count = a.count - i < kLanes ? a.count - i : kLanes;
    U amax{};
    memcpy(&amax, a.amax + i, size_t(count) * 4);
    U code, encode;
    if constexpr (kScale == Scale::kE8M0) {
      code = codec::e8m0_from_amax<U>(amax, addend, emax);
      encode = codec::e8m0_encode_multiplier<U>(code);
    } else if constexpr (kScale == Scale::kE4M3) {
      code = codec::e4m3_from_amax<U>(q.recipe, amax, &encode);
    } else {
      code = codec::round_scale<U>(kScale, (U)((F)amax / qmax));
      encode = codec::reciprocal<U>((F)codec::decode_scale<U>(kScale, code), code);
    }
    // A block holding NaN or infinity: NaN scale, and a NaN multiplier as its mark.
    const auto poisoned = (I)amax >= int32_t(kFloatInf);
    code = poisoned ? broadcast(codec::scale_nan(kScale)) : code;
    encode = poisoned ? broadcast(kFloatNaN) : encode;
    memcpy(a.encode + i, &encode, size_t(count) * 4);
    if (a.decode) {
      const U decode = codec::decode_scale<U>(kScale, code);
      memcpy(a.decode + i, &decode, size_t(count) * 4);
    }
    if (!a.scales) continue;
    if constexpr (kScale == Scale::kFP32) {
      memcpy((uint32_t*)a.scales + i, &code, size_t(count) * 4);
    } else if constexpr (scale_bytes(kScale) == 2) {
      store_narrow<uint16_t>(a.scales, i, code, count);
    } else {
      store_narrow<uint8_t>(a.scales, i, code, count);
    }
  }
}

static void scale_blocks(const ScaleArgs& a) {
  GradualUnderflow guard;
  switch (a.quantize->scale) {
    case Scale::kE8M0: return scale_blocks_as<Scale::kE8M0>(a);
    case Scale::kE4M3: return scale_blocks_as<Scale::kE4M3>(a);
    case Scale::kBF16: return scale_blocks_as<Scale::kBF16>(a);
    case Scale::kFP16: return scale_blocks_as<Scale::kFP16>(a);
    default: return scale_blocks_as<Scale::kFP32>(a);
  }
}

// ---- codes ------------------------------------------------------------------------------------

// n elements (a multiple of 16) times the multiplier of their group, to one code a byte.
using EncodeFn = void (*)(const ElementSpec&, bool full, const void* x, int64_t n,
                          const Multipliers&, uint8_t* codes);

template <class Element, DType kDType>
static void encode_row(const ElementSpec& spec, bool full, const void* x, int64_t n,
                       const Multipliers& m, uint8_t* codes) {
  const auto c = Element::make(spec, full);
  for (int64_t i = 0; i < n; i += kGroup) {
    const F multiplier = (F)broadcast(m.of_group(i / kGroup));
    Group g = load_as<kDType>(x, i);
    for (int k = 0; k < kVectors; ++k) {
      g.v[k] = Element::encode(c, (U)((F)g.v[k] * multiplier));
    }
    store_u8(codes + i, g);
  }
}

template <class Element>
static EncodeFn encoder_of(DType dtype) {
  return dtype == DType::kBF16   ? encode_row<Element, DType::kBF16>
         : dtype == DType::kFP16 ? encode_row<Element, DType::kFP16>
                                 : encode_row<Element, DType::kFP32>;
}

static EncodeFn find_encoder(const ElementSpec& e, DType dtype) {
#define PYFMT_ELEMENT(id, name, kind, exp, man, bias, frac, is_signed, special) \
  if (e == elements::id) return encoder_of<Choose<id##_element, Kind::kind>::type>(dtype);
#include "../formats.inc"
  return e.is_int() ? encoder_of<AnyInt>(dtype) : encoder_of<AnyFloat>(dtype);
}

// Scaled float32 values and their random numbers to codes.
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

// out[i] = the 24 random bits of flat index first + i; room for n + 2 * kLanes + 4 needed.
// Returns where index `first` lies.
static const uint32_t* random_row(uint64_t seed, int64_t first, int64_t n, uint32_t* out) {
  constexpr int kCounters = kLanes / 2;
  const uint64_t begin = uint64_t(first) / 4, end = (uint64_t(first) + uint64_t(n) + 3) / 4;
  for (uint64_t counter = begin; counter < end; counter += kCounters) {
    uint64_t first_word[kCounters];
    for (int k = 0; k < kCounters; ++k) first_word[k] = counter + uint64_t(k);
    const W counters = load<W>(first_word);
    W c[4] = {counters, counters >> 32, W{}, W{}};
    codec::philox<W>(seed, c);
    uint32_t* p = out + (counter - begin) * 4;
    for (int k = 0; k < kCounters; ++k) {
      for (int lane = 0; lane < 4; ++lane) p[4 * k + lane] = uint32_t(c[lane][k]) >> 8;
    }
  }
  return out + uint64_t(first) % 4;
}

// x *= multiplier, block by block; blocks of unlike size, and poisoned ones, which become zero.
// With `sticky` a product that underflows from nonzero stays the smallest subnormal.
static void apply_multipliers(uint32_t* x, int64_t n, int64_t phase, int64_t size,
                              const uint32_t* multipliers, bool sticky) {
  for (int64_t i = 0; i < n; ++multipliers) {
    const int64_t end = i + size - phase < n ? i + size - phase : n;
    phase = 0;
    if (*multipliers == kFloatNaN) {
      memset(x + i, 0, size_t(end - i) * 4);
      i = end;
      continue;
    }
    using S = codec::Lane<uint32_t>;
    const float m = S::as_float(*multipliers);
    for (; i < end; ++i) {
      const uint32_t y = S::as_uint(S::as_float(x[i]) * m);
      const bool lost = sticky && (y & 0x7fffffffu) == 0 && (x[i] & 0x7fffffffu) != 0;
      x[i] = y | uint32_t(lost);
    }
  }
}

// ---- the tile ---------------------------------------------------------------------------------

class Quantizer {
 public:
  PYFMT_HD explicit Quantizer(const QuantizeArgs& a)
      : a_(a),
        t_(a.tiling),
        width_(round_up(t_.tile_columns, kGroup)),
        scratch_(bytes(a)),
        x_(scratch_.take<uint32_t>(width_ * t_.block_rows)),
        codes_(scratch_.take<uint8_t>(width_)),
        random_(scratch_.take<uint32_t>(width_ + 64)),
        amax_(scratch_.take<uint32_t>(2 * most_blocks(a))),
        encode_(scratch_.take<uint32_t>(most_blocks(a))),
        decode_(scratch_.take<uint32_t>(most_blocks(a))),
        // Nearest rounding of whole blocks of 16: multiply while encoding, from the source itself.
        by_group_(t_.block_columns % kGroup == 0 && !a.stochastic && !a.given),
        direct_(find_encoder(a.element, a.dtype)),
        staged_(find_encoder(a.element, DType::kFP32)),
        decoder_(a.element, a.out_dtype, t_.block_columns, a.has_tensor_scale) {}

  // Spelt out: GCC gives implicit destructors no target of their own.
  ~Quantizer() {}

  void run(int64_t item) {
    const Tile tile = tile_at(t_, item);
    const int64_t blocks = tile.padded / t_.block_columns;
    const bool direct = by_group_ && t_.block_rows == 1 && !a_.rotation.size &&
                        tile.padded == tile.width;
    if (!direct) stage(tile);

    const uint32_t* encode = encode_;
    int64_t phase = 0;
    if (a_.given) {
      const int64_t block = tile.column / t_.block_columns;
      phase = tile.column - block * t_.block_columns;
      encode = a_.given + given_row(tile.row) * t_.blocks() + block;
    } else {
      find_scales(tile, blocks, direct);
    }
    bool poisoned = false;
    if (!a_.given) {
      for (int64_t b = 0; b < blocks; ++b) poisoned |= encode[b] == kFloatNaN;
    }
    if (poisoned && direct) stage(tile);
    if (poisoned && by_group_) clean(tile, blocks);

    for (int64_t r = 0; r < tile.rows; ++r) {
      uint32_t* x = x_ + r * width_;
      uint8_t* bytes = codes_out(tile, r);
      if (by_group_) {
        const Multipliers m =
            group_multipliers(encode_, 0, t_.block_columns, tile.padded, random_);
        const bool from_source = direct && !poisoned;
        (from_source ? direct_ : staged_)(a_.element, a_.full, from_source ? source(tile, r) : x,
                                          tile.padded, m, bytes);
      } else {
        encode_scaled(tile, r, phase, encode, bytes);
      }
      finish(tile, r, bytes);
    }
  }

 private:
  static constexpr int64_t most_blocks(const QuantizeArgs& a) {
    return round_up(a.tiling.tile_columns / a.tiling.block_columns + 2, kGroup);
  }
  static constexpr int64_t bytes(const QuantizeArgs& a) {
    const int64_t width = round_up(a.tiling.tile_columns, kGroup);
    return width * (a.tiling.block_rows * 4 + 5) + most_blocks(a) * 16 + 1024;
  }

  PYFMT_HD const void* source(const Tile& tile, int64_t r) const {
    return at(a_.x, a_.dtype, (tile.row + r) * t_.columns + tile.column);
  }

  // Load, pad and rotate the tile's rows into x_.
  void stage(const Tile& tile) {
    const int64_t padded = round_up(tile.padded, kGroup);
    for (int64_t r = 0; r < tile.rows; ++r) {
      uint32_t* x = x_ + r * width_;
      load_row(source(tile, r), a_.dtype, tile.width, padded, x);
      if (a_.rotation.size) rotate((float*)x, tile.width, a_.rotation, tile.column);
    }
  }

  void find_scales(const Tile& tile, int64_t blocks, bool direct) {
    const DType dtype = direct ? a_.dtype : DType::kFP32;
    for (int64_t r = 0; r < tile.rows; ++r) {
      uint32_t* amax = r == 0 ? amax_ : amax_ + most_blocks(a_);
      block_amax_row(direct ? source(tile, r) : x_ + r * width_, dtype, blocks, t_.block_columns,
                     amax);
      if (r == 0) continue;
      for (int64_t b = 0; b < blocks; ++b) amax_[b] = amax[b] > amax_[b] ? amax[b] : amax_[b];
    }
    const int64_t first = tile.strip * t_.blocks() + tile.column / t_.block_columns;
    ScaleArgs s;
    s.quantize = &a_;
    s.amax = amax_;
    s.count = blocks;
    s.scales = a_.scales ? (char*)a_.scales + first * scale_bytes(a_.scale) : nullptr;
    s.encode = encode_;
    s.decode = a_.codes ? nullptr : decode_;
    scale_blocks(s);
  }

  // Zero the poisoned blocks, whose codes must be 0 whatever they hold.
  void clean(const Tile& tile, int64_t blocks) {
    for (int64_t b = 0; b < blocks; ++b) {
      if (encode_[b] != kFloatNaN) continue;
      encode_[b] = 0;
      for (int64_t r = 0; r < tile.rows; ++r) {
        memset(x_ + r * width_ + b * t_.block_columns, 0, size_t(t_.block_columns) * 4);
      }
    }
  }

  void encode_scaled(const Tile& tile, int64_t r, int64_t phase, const uint32_t* encode,
                     uint8_t* codes) {
    uint32_t* x = x_ + r * width_;
    apply_multipliers(x, tile.padded, phase, t_.block_columns, encode,
                      a_.scale == Scale::kE8M0);
    const int64_t n = round_up(tile.padded, kGroup);
    if (a_.stochastic) {
      const int64_t first = (tile.row + r) * t_.columns + tile.column;
      // Padding is zero, which no random number rounds up: any number will do for it.
      const uint32_t* random = random_row(a_.seed, first, n, random_);
      const auto encode_row = a_.element.is_int() ? encode_stochastic_row<AnyInt>
                                                  : encode_stochastic_row<AnyFloat>;
      encode_row(a_.element, a_.full, x, random, n, codes);
      return;
    }
    const uint32_t one = 0x3f800000u;
    staged_(a_.element, a_.full, x, n, Multipliers{&one, 63}, codes);
  }

  // 8-bit codes go straight to the output where whole groups do not run over its end.
  uint8_t* codes_out(const Tile& tile, int64_t r) {
    if (!a_.codes || a_.element.bits() != 8 || tile.padded % kGroup) return codes_;
    return a_.codes + (tile.row + r) * a_.row_bytes + tile.column;
  }

  int64_t given_row(int64_t row) const {
    const int64_t batch = row / t_.rows, strips = (t_.rows + a_.given_rows - 1) / a_.given_rows;
    return batch * strips + row % t_.rows / a_.given_rows;
  }

  void finish(const Tile& tile, int64_t r, const uint8_t* codes) {
    const int64_t row = tile.row + r;
    const int bits = a_.element.bits();
    if (a_.codes) {
      if (codes != codes_) return;
      pack_row(codes, tile.padded, bits, a_.codes + row * a_.row_bytes + tile.column * bits / 8);
      return;
    }
    DecodeRow d;
    d.codes = codes;
    d.n = tile.width;
    d.out = at(a_.out, a_.out_dtype, row * t_.columns + tile.column);
    d.has_tensor_scale = a_.has_tensor_scale;
    d.tensor_scale = a_.recipe.tensor_scale;
    const int64_t block = tile.column / t_.block_columns;
    const uint32_t* scales =
        a_.given ? a_.given_decode + given_row(row) * t_.blocks() + block : decode_;
    decoder_.run(d, scales, tile.column - block * t_.block_columns, random_);
  }

  const QuantizeArgs& a_;
  const Tiling& t_;
  int64_t width_;
  Scratch scratch_;
  uint32_t* x_;
  uint8_t* codes_;
  uint32_t *random_, *amax_, *encode_, *decode_;
  bool by_group_;
  EncodeFn direct_, staged_;
  Decoder decoder_;
};

static void quantize(const QuantizeArgs& a, int64_t begin, int64_t end) {
  GradualUnderflow guard;
  Quantizer quantizer(a);
  for (int64_t item = begin; item < end; ++item) quantizer.run(item);
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
