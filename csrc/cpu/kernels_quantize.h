// SPDX-License-Identifier: Apache-2.0
// Quantize one tile at a time: load (and rotate), block amax, scales, codes, packed bytes; or
// decode the codes again for fake_quantize. A tile's data stay in the first-level cache.
#pragma once

#include "kernels_amax.h"
#include "kernels_dequantize.h"
#include "kernels_e2m1.h"
#include "kernels_encode.h"
#include "kernels_lanes.h"
#include "kernels_scale.h"

namespace pyfmt {
namespace PYFMT_ISA {

// ---- codes ------------------------------------------------------------------------------------

// out[i] = the 24 random bits of flat index first + i; room for n + 2 * kLanes + 4 needed.
// Returns where index `first` lies.
static const uint32_t* random_row(uint64_t seed, int64_t first, int64_t n, uint32_t* out) {
  constexpr int kCounters = kLanes / 2;
  const uint64_t begin = uint64_t(first) / 4, end = (uint64_t(first) + uint64_t(n) + 3) / 4;
  W steps;
  for (int k = 0; k < kCounters; ++k) steps[k] = uint64_t(k);
  for (uint64_t counter = begin; counter < end; counter += kCounters) {
    const W counters = steps + counter;
    W c[4] = {counters, counters >> 32, W{}, W{}};
    codec::philox<W>(seed, c);
    // Words 0 and 1 of each counter, words 2 and 3, then both in turn.
    const W low = c[0] >> 8 | c[1] >> 8 << 32, high = c[2] >> 8 | c[3] >> 8 << 32;
    W first_half, second_half;
    interleave(low, high, &first_half, &second_half);
    uint32_t* p = out + (counter - begin) * 4;
    store<W>(p, first_half);
    store<W>(p + kLanes, second_half);
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
        blocks_(t_.blocks()),
        padded_(t_.padded()),
        one_row_(t_.batches * t_.rows == 1),
        scratch_(bytes(a)),
        x_(scratch_.take<uint32_t>(staged(a))),
        codes_(scratch_.take<uint8_t>(width_)),
        random_(scratch_.take<uint32_t>(width_ + 64)),
        amax_(scratch_.take<uint32_t>(2 * most_blocks(a))),
        encode_(scratch_.take<uint32_t>(most_blocks(a))),
        decode_(scratch_.take<uint32_t>(most_blocks(a))),
        // Nearest rounding of whole blocks of 16: multiply while encoding, from the source itself.
        by_group_(t_.block_columns % kGroup == 0 && !a.stochastic && !a.given),
        encode_row_(find_encoders(a.element, a.full, a.dtype)),
        lanes_(a),
        quarters_(a.element == elements::e2m1 && a.scale == Scale::kE8M0 &&
                  a.dtype == DType::kBF16),
        tensor_scale_(codec::Lane<uint32_t>::as_float(a.recipe.tensor_scale)),
        decoder_(a.element, a.scale, a.out_dtype, t_.block_columns,
                 a.has_tensor_scale ? &tensor_scale_ : nullptr) {}

  // Spelt out: GCC gives implicit destructors no target of their own.
  ~Quantizer() {}

  void run(int64_t item) {
    const Tile tile = one_row_ ? tile_of_row(item) : tile_at(t_, item);
    if (lanes_.serves(tile) &&
        lanes_.run(source(tile, 0), tile.width, (float*)x_, scales_out(tile), codes_out(tile, 0))) {
      return;
    }
    lanes_.finish();
    const int64_t blocks = tile.padded / t_.block_columns;
    const bool direct =
        by_group_ && t_.block_rows == 1 && !a_.rotation.size && tile.padded == tile.width;
    if (!direct) stage(tile);

    const uint32_t* encode = encode_;
    int64_t phase = 0;
    if (a_.given) {
      const int64_t block = tile.column / t_.block_columns;
      phase = tile.column - block * t_.block_columns;
      encode = a_.given + given_row(tile.row) * blocks_ + block;
    }
    const bool poisoned = !a_.given && find_scales(tile, blocks, direct);
    if (poisoned && direct) stage(tile);
    if (poisoned && by_group_) clean(tile, blocks);

    for (int64_t r = 0; r < tile.rows; ++r) {
      uint32_t* x = x_ + r * width_;
      uint8_t* bytes = codes_out(tile, r);
      if (by_group_) {
        const Multipliers m = group_multipliers(encode_, 0, t_.block_columns, tile.padded, random_);
        const bool from_source = direct && !poisoned;
        if (quarters_ && from_source && m.shift && stored_bits(tile) == 4 &&
            by_quarters(encode_, amax_, blocks)) {
          encode_quarters((const uint16_t*)source(tile, r), tile.padded, m, bytes);
          finish(tile, r, bytes);
          continue;
        }
        const EncodeFn encode_row = from_source    ? encode_row_.source
                                    : paired(tile) ? encode_row_.paired
                                                   : encode_row_.staged;
        encode_row(a_.element, a_.full, from_source ? source(tile, r) : x, tile.padded, m,
                   stored_bits(tile), bytes);
      } else {
        encode_scaled(tile, r, phase, encode, bytes);
      }
      finish(tile, r, bytes);
    }
  }

  void finish() { lanes_.finish(); }

 private:
  static constexpr int64_t most_blocks(const QuantizeArgs& a) {
    return round_up(a.tiling.tile_columns / a.tiling.block_columns + 2, kGroup);
  }
  // A tile as float32, and at least two of LaneQuantizer's groups.
  static constexpr int64_t staged(const QuantizeArgs& a) {
    const int64_t n = round_up(a.tiling.tile_columns, kGroup) * a.tiling.block_rows;
    return n > 4096 ? n : 4096;
  }
  static constexpr int64_t bytes(const QuantizeArgs& a) {
    const int64_t width = round_up(a.tiling.tile_columns, kGroup);
    return staged(a) * 4 + width * 5 + most_blocks(a) * 16 + 1024;
  }

  // As tile_at, without its divisions.
  Tile tile_of_row(int64_t item) const {
    Tile tile{};
    tile.rows = 1;
    tile.column = item * t_.tile_columns;
    const int64_t left = t_.columns - tile.column, room = padded_ - tile.column;
    tile.width = left < t_.tile_columns ? left : t_.tile_columns;
    tile.padded = room < t_.tile_columns ? room : t_.tile_columns;
    return tile;
  }

  PYFMT_HD const void* source(const Tile& tile, int64_t r) const {
    return at(a_.x, a_.dtype, (tile.row + r) * t_.columns + tile.column);
  }

  // Whether a staged tile lies in paired order: rotated, of whole pairs and blocks of 16 or 32k.
  bool paired(const Tile& tile) const {
    const bool blocks = t_.block_columns == kGroup || t_.block_columns % kPairs == 0;
    return a_.rotation.size && by_group_ && blocks && tile.padded == tile.width &&
           rotates_pairs(a_.rotation, tile.width);
  }

  // Load, pad and rotate the tile's rows into x_.
  void stage(const Tile& tile) {
    const int64_t padded = round_up(tile.padded, kGroup);
    for (int64_t r = 0; r < tile.rows; ++r) {
      uint32_t* x = x_ + r * width_;
      if (paired(tile)) {
        rotate_pairs(source(tile, r), a_.dtype, tile.width, a_.rotation, tile.column, x);
      } else if (a_.rotation.size) {
        rotate_row(source(tile, r), a_.dtype, tile.width, padded, a_.rotation, tile.column, x);
      } else {
        load_row(source(tile, r), a_.dtype, tile.width, padded, x);
      }
    }
  }

  // Returns whether a block is not finite.
  bool find_scales(const Tile& tile, int64_t blocks, bool direct) {
    const DType dtype = direct ? a_.dtype : DType::kFP32;
    for (int64_t r = 0; r < tile.rows; ++r) {
      uint32_t* amax = r == 0 ? amax_ : amax_ + most_blocks(a_);
      const uint32_t* x = x_ + r * width_;
      if (!direct && t_.block_columns == kGroup && paired(tile)) {
        amax_of_paired(x, blocks, amax);
      } else {
        block_amax_row(direct ? source(tile, r) : x, dtype, blocks, t_.block_columns, amax);
      }
      if (r == 0) continue;
      for (int64_t b = 0; b < blocks; ++b) amax_[b] = amax[b] > amax_[b] ? amax[b] : amax_[b];
    }
    ScaleArgs s;
    s.quantize = &a_;
    s.amax = amax_;
    s.count = blocks;
    s.scales = scales_out(tile);
    s.encode = encode_;
    s.decode = a_.codes ? nullptr : decode_;
    return scale_tile(s);
  }

  // column / block_columns, by a shift for most blocks.
  int64_t block_of(int64_t column) const {
    return t_.block_columns == 32   ? column / 32
           : t_.block_columns == 16 ? column / 16
                                    : column / t_.block_columns;
  }
  void* scales_out(const Tile& tile) const {
    const int64_t first = tile.strip * blocks_ + block_of(tile.column);
    return a_.scales ? (char*)a_.scales + first * scale_bytes(a_.scale) : nullptr;
  }

  // Zero the poisoned blocks, whose codes must be 0 whatever they hold.
  void clean(const Tile& tile, int64_t blocks) {
    for (int64_t b = 0; b < blocks; ++b) {
      if (encode_[b] != kFloatNaN) continue;
      encode_[b] = 0;
      const int64_t first = b * t_.block_columns;
      for (int64_t r = 0; r < tile.rows; ++r) {
        for (int64_t i = first; i < first + t_.block_columns; ++i) {
          x_[r * width_ + (paired(tile) ? paired_place(i) : i)] = 0;
        }
      }
    }
  }

  void encode_scaled(const Tile& tile, int64_t r, int64_t phase, const uint32_t* encode,
                     uint8_t* codes) {
    uint32_t* x = x_ + r * width_;
    apply_multipliers(x, tile.padded, phase, t_.block_columns, encode, a_.scale == Scale::kE8M0);
    const int64_t n = round_up(tile.padded, kGroup);
    if (a_.stochastic) {
      const int64_t first = (tile.row + r) * t_.columns + tile.column;
      // Padding is zero, which no random number rounds up: any number will do for it.
      const uint32_t* random = random_row(a_.seed, first, n, random_);
      const auto encode_row =
          a_.element.is_int() ? encode_stochastic_row<AnyInt> : encode_stochastic_row<AnyFloat>;
      encode_row(a_.element, a_.full, x, random, n, codes);
      return;
    }
    const uint32_t one = 0x3f800000u;
    encode_row_.staged(a_.element, a_.full, x, n, Multipliers{&one, 63}, 8, codes);
  }

  // The bits that a code takes as it is encoded: codes of whole pairs are packed on the way.
  int stored_bits(const Tile& tile) const {
    const int bits = a_.element.bits();
    if (!by_group_ || tile.padded % kPairs) return 8;
    if (bits == 6) return kPacksSix && a_.codes ? 6 : 8;
    const bool taken = a_.codes || (tile.padded == tile.width &&
                                    decoder_.packed_bits(tile.width, decode_, 0, 0) == 4);
    return bits == 4 && taken ? 4 : 8;
  }

  // Packed codes go straight to the output where whole groups do not run over its end.
  uint8_t* codes_out(const Tile& tile, int64_t r) {
    const int bits = a_.element.bits();
    const bool straight = stored_bits(tile) == bits && tile.padded % kGroup == 0;
    if (!a_.codes || !straight) return codes_;
    return a_.codes + (tile.row + r) * a_.row_bytes + tile.column * bits / 8;
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
    d.bits = stored_bits(tile);
    d.n = tile.width;
    d.out = at(a_.out, a_.out_dtype, row * t_.columns + tile.column);
    d.has_tensor_scale = a_.has_tensor_scale;
    d.tensor_scale = a_.recipe.tensor_scale;
    const int64_t block = tile.column / t_.block_columns;
    const uint32_t* scales =
        a_.given ? a_.given_decode + given_row(row) * blocks_ + block : decode_;
    decoder_.run(d, scales, tile.column - block * t_.block_columns, random_);
  }

  const QuantizeArgs& a_;
  const Tiling& t_;
  int64_t width_, blocks_, padded_;
  bool one_row_;
  Scratch scratch_;
  uint32_t* x_;
  uint8_t* codes_;
  uint32_t *random_, *amax_, *encode_, *decode_;
  bool by_group_;
  Encoders encode_row_;
  LaneQuantizer lanes_;
  bool quarters_;
  float tensor_scale_;
  Decoder decoder_;
};

static void quantize(const QuantizeArgs& a, int64_t begin, int64_t end) {
  GradualUnderflow guard;
  Quantizer quantizer(a);
  for (int64_t item = begin; item < end; ++item) quantizer.run(item);
  quantizer.finish();
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
