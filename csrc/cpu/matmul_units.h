// SPDX-License-Identifier: Apache-2.0
// Units of b for the bfloat16 products (matmul_tokens.h): some rows, decoded such that the quarters
// of a vector, 128 bits each, hold elements of different stretches of K.
#pragma once

#include "matmul_pack.h"
#include "matmul_stream.h"

#if PYFMT_BF16
namespace pyfmt {
namespace PYFMT_ISA {

constexpr int64_t kUnitColumns = 512;               // elements of K in a unit, at most
constexpr int64_t kUnitStride = kUnitColumns + 32;  // of a decoded row: not a power of two
constexpr int64_t kStretch = 8 * kUnitColumns;      // columns whose scales are decoded together
constexpr int64_t kScaleStride = kStretch / 16 + 16;

// Elements of K in a quarter: a group of four has 128 or 64 columns, each quarter one scale.
PYFMT_INLINE int64_t quarter_of(const TileArgs& t) {
  return t.segment % 32 ? 16 : 32;
}

// Rows of b, decoded: quarter i of vector v of a group has the pairs that begin at elements
// i * quarter + j * quarter / 4 + 2 v, j from 0 to 3. And the scales of the quarters.
struct Unit {
  uint16_t* data;  // (rows, kUnitStride)
  float* scales;   // (rows, kScaleStride)
  int64_t groups = 0, vectors = 0, first_scale = 0;
  bool wide = false;
  Ahead codes, scale_codes;
};

class UnitDecoder {
 public:
  PYFMT_HD explicit UnitDecoder(const TileArgs& t)
      : t_(t),
        rows_{t.right, t.k, t},
        quarter_(quarter_of(t)),
        decoder_(rows_, DType::kBF16),
        table_(t.right.format.element) {
    const ElementSpec& e = t.right.format.element;
    const int bits = e.bits();
    way_ = bits == 4                  ? kNibbles
           : bits == 6                ? kTable64
           : bits == 8 && e.is_signed ? e.is_int() ? kSteps : kTable128
                                      : kDecoder;
    if (way_ == kSteps) step_ = codec::Lane<uint32_t>::as_float(power_of_two_bits(e.step_exp()));
  }

  // `rows` rows from `row`, elements `from` to `from + n` of K; zeros up to a whole group.
  PYFMT_HD void run(int64_t row, int64_t rows, int64_t from, int64_t n, Unit* u) {
    u->groups = (n + 4 * quarter_ - 1) / (4 * quarter_);
    const int64_t have = t_.n - row < rows ? t_.n - row : rows;
    quarter_ == 32 ? by_way<32>(row, have, from, n, u) : by_way<16>(row, have, from, n, u);
    for (int64_t r = have; r < rows; ++r) {
      memset(u->data + r * kUnitStride, 0, size_t(u->groups * 4 * quarter_) * 2);
    }
  }

  // The scales of elements `from` to `from + n` of the same rows, one for each quarter.
  PYFMT_HD void scales(int64_t row, int64_t rows, int64_t from, int64_t n, Unit* u) const {
    const int64_t slots = (n + quarter_ - 1) / quarter_, whole = round_up(slots, 4);
    Extremes extremes;
    for (int64_t r = 0; r < rows; ++r) {
      float* const out = u->scales + r * kScaleStride;
      if (row + r < t_.n) some_scales(row + r, from, slots, out, &extremes);
      for (int64_t i = row + r < t_.n ? slots : 0; i < whole; ++i) out[i] = 0.0f;
    }
    // Products of scales that might leave the normal numbers.
    u->wide = t_.a_scales && extremes.most && t_.a_most &&
              (extremes.least + t_.a_least < 128 || extremes.most + t_.a_most > 357);
  }

 private:
  enum Way { kNibbles, kTable64, kTable128, kSteps, kDecoder };

  template <int kQuarter>
  PYFMT_HD void by_way(int64_t row, int64_t rows, int64_t from, int64_t n, Unit* u) {
    switch (way_) {
      case kNibbles:
        return by<kNibbles, kQuarter>(row, rows, from, n, u->data);
      case kTable64:
        return by<kTable64, kQuarter>(row, rows, from, n, u->data);
      case kTable128:
        return by<kTable128, kQuarter>(row, rows, from, n, u->data);
      case kSteps:
        return by<kSteps, kQuarter>(row, rows, from, n, u->data);
      default:
        for (int64_t r = 0; r < rows; ++r) plainly<kQuarter>(row + r, from, n, u, r);
    }
  }

  // A group at a time; the last one by way of a copy that ends where the elements do.
  template <Way kWay, int kQuarter>
  PYFMT_HD void by(int64_t row, int64_t rows, int64_t from, int64_t n, uint16_t* data) const {
    constexpr int kBits = kWay == kNibbles ? 4 : kWay == kTable64 ? 6 : 8;
    constexpr int kColumns = 4 * kQuarter, kBytes = kColumns * kBits / 8;
    const int64_t bytes = t_.right.format.row_bytes(t_.k);
    const uint8_t* codes = t_.right.codes + row * bytes + from * kBits / 8;
    const ValueTable table = table_;  // in registers: stores might change the member
    for (int64_t r = 0; r < rows; ++r, codes += bytes, data += kUnitStride) {
      const uint8_t* p = codes;
      uint16_t* out = data;
      int64_t left = n;
      for (; left >= kColumns; left -= kColumns, p += kBytes, out += kColumns) {
        one_group<kWay, kQuarter>(table, p, out);
      }
      if (left == 0) continue;
      uint8_t last[kBytes] = {};
      memcpy(last, p, size_t(left * kBits + 7) / 8);
      // Whatever code fills up the last byte is none of the row's.
      if (kBits != 8 && left * kBits % 8) last[left * kBits / 8] &= (1u << left * kBits % 8) - 1;
      one_group<kWay, kQuarter>(table, last, out);
    }
  }

  template <Way kWay, int kQuarter>
  static PYFMT_HD void one_group(const ValueTable& table, const uint8_t* p, uint16_t* out) {
    constexpr int kHalves = kQuarter / 16;
    if constexpr (kWay == kNibbles && kQuarter == 32) {
      const __m512i x = _mm512_loadu_si512(p);
      put(out, 0, table.of<4>(words(x, 0, 4)));
      put(out, 1, table.of<4>(words(x, 8, 12)));
      put(out, 2, table.of<4>(words(x, 16, 20)));
      put(out, 3, table.of<4>(words(x, 24, 28)));
      return;
    }
    PYFMT_UNROLL for (int h = 0; h < kHalves; ++h) {
      const __m512i x = four_codes<kWay, kQuarter>(p, h);
      if constexpr (kWay == kNibbles) {
        put(out, 2 * h, table.of<4>(words(x, 0, 4)));
        put(out, 2 * h + 1, table.of<4>(words(x, 8, 12)));
      } else if constexpr (kWay == kTable64) {
        put(out, 2 * h, table.of<6>(words(x, 0, 6)));
        put(out, 2 * h + 1, table.of<6>(words(x, 12, 18)));
      } else if constexpr (kWay == kTable128) {
        put(out, 2 * h, table.of<8>(words(x, 0, 8)));
        put(out, 2 * h + 1, table.of<8>(words(x, 16, 24)));
      } else {
        put(out, 2 * h, two_steps(_mm512_slli_epi32(x, 24), _mm512_slli_epi32(x, 16)));
        put(out, 2 * h + 1, two_steps(_mm512_slli_epi32(x, 8), x));
      }
    }
  }

  static PYFMT_HD void put(uint16_t* out, int i, __m512i v) {
    _mm512_storeu_si512(out + i * kPairs, v);
  }

  // Of each 32-bit lane, the bits from `low` and from `high` on at the low end of its halves.
  static PYFMT_HD __m512i words(__m512i x, int low, int high) {
    const int64_t lane = int64_t(high) << 16 | low;
    return _mm512_multishift_epi64_epi8(
        _mm512_set1_epi64((lane | 0x20002000000000ll) + (lane << 32)), x);
  }

  // The signed top bytes of both as bfloat16, which their eight significant bits fit.
  static PYFMT_HD __m512i two_steps(__m512i even, __m512i odd) {
    const __m512 a = _mm512_cvtepi32_ps(_mm512_srai_epi32(even, 24));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_srai_epi32(odd, 24));
    return _mm512_or_si512(_mm512_srli_epi32((__m512i)a, 16), (__m512i)b);
  }

  // Four codes in each 32-bit lane: lane 4 i + j has those that begin at element
  // i * kQuarter + j * kQuarter / 4 + 4 h.
  template <Way kWay, int kQuarter>
  static PYFMT_HD __m512i four_codes(const uint8_t* p, int h) {
    if constexpr (kWay == kNibbles) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    } else if constexpr (kWay == kTable64) {
      static constexpr ByteOrder orders[2] = {{kQuarter, 0}, {kQuarter, 1}};
      const __m512i index = _mm512_load_si512(orders[h].of);
      const __mmask64 first48 = (__mmask64(1) << 48) - 1;
      const __m512i a = _mm512_maskz_loadu_epi8(first48, p);
      if (kQuarter == 16) return _mm512_permutexvar_epi8(index, a);
      return _mm512_permutex2var_epi8(a, index, _mm512_maskz_loadu_epi8(first48, p + 48));
    } else {
      const __m512i a = _mm512_loadu_si512(p);
      if (kQuarter == 16) return a;
      const __m512i every_other =
          _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
      const __m512i index = _mm512_add_epi32(every_other, _mm512_set1_epi32(h));
      return _mm512_permutex2var_epi32(a, index, _mm512_loadu_si512(p + 64));
    }
  }

  // Where the three bytes of four six-bit codes are, in two vectors of 48 bytes.
  struct ByteOrder {
    alignas(64) uint8_t of[64] = {};
    constexpr ByteOrder(int quarter, int h) {
      for (int lane = 0; lane < 16; ++lane) {
        const int element = lane / 4 * quarter + lane % 4 * quarter / 4 + 4 * h;
        for (int i = 0; i < 4; ++i) {
          const int byte = element * 6 / 8 + (i < 3 ? i : 0);
          of[lane * 4 + i] = uint8_t(byte < 48 ? byte : 64 + byte - 48);
        }
      }
    }
  };

  // Any other format: a row in its order, then pair by pair.
  template <int kQuarter>
  PYFMT_HD void plainly(int64_t row, int64_t from, int64_t n, Unit* u, int64_t r) {
    alignas(64) uint16_t plain[kUnitColumns] = {};
    for (int64_t i = 0; i < n; i += kPiece) {
      decoder_.run(row, from + i, n - i < kPiece ? n - i : kPiece, plain + i);
    }
    uint16_t* out = u->data + r * kUnitStride;
    for (const uint16_t* group = plain; group < plain + u->groups * 4 * kQuarter;
         group += 4 * kQuarter) {
      for (int v = 0; v < kQuarter / 8; ++v) {
        for (int lane = 0; lane < 16; ++lane, out += 2) {
          memcpy(out, group + lane / 4 * kQuarter + lane % 4 * kQuarter / 4 + 2 * v, 4);
        }
      }
    }
  }

  PYFMT_HD void some_scales(int64_t row, int64_t from, int64_t slots, float* out,
                            Extremes* extremes) const {
    const FormatSpec& f = t_.right.format;
    const int64_t block = f.columns(t_.k), first = from / block;
    // Left scales, which products of scales are made with, want extremes and no empty blocks.
    if (t_.a_scales) {
      return segment_scales(rows_, row, from / quarter_, slots, quarter_, step_, out, extremes);
    }
    const int64_t last = (from + slots * quarter_ - 1) / block;
    const int64_t blocks = (last < f.blocks(t_.k) ? last + 1 : f.blocks(t_.k)) - first;
    if (block == quarter_) {
      row_scales(t_.right, row, t_.k, first, blocks, (uint32_t*)out);
      for (int64_t i = 0; i < slots; i += kLanes) store<F>(out + i, load<F>(out + i) * all(step_));
      return;
    }
    alignas(64) float some[kScaleStride];
    row_scales(t_.right, row, t_.k, first, blocks, (uint32_t*)some);
    const int64_t each = block / quarter_;
    if (each * quarter_ == block && kLanes % each == 0 && from % block == 0) {
      I index;
      for (int i = 0; i < kLanes; ++i) index[i] = int32_t(i / each);
      for (int64_t i = 0; i < slots; i += kLanes) {
        const F scale = (F)__builtin_shuffle(load<U>(some + i / each), (U)index);
        store<F>(out + i, scale * all(step_));
      }
      return;
    }
    int64_t slot = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = b + 1 < blocks ? ((first + b + 1) * block - from) / quarter_ : slots;
      for (; slot < end; slot += kLanes) store<F>(out + slot, all(some[b] * step_));
      slot = end;
    }
  }

  const TileArgs& t_;
  Rows rows_;
  int64_t quarter_;
  RowDecoder decoder_;
  ValueTable table_;
  Way way_;
  float step_ = 1.0f;  // what the scales are multiplied by
};

}  // namespace PYFMT_ISA
}  // namespace pyfmt
#endif
