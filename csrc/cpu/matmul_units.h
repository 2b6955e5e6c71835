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

// Elements of K in a quarter, and parts of it with a scale of their own. A group of four has 128
// columns, or 64 where neither scales nor codes allow for more.
PYFMT_INLINE int64_t parts_of(const TileArgs& t) {
  return t.segment % 32 && t.right.format.bits() == 4 ? 2 : 1;
}
PYFMT_INLINE int64_t quarter_of(const TileArgs& t) {
  return t.segment % 32 && parts_of(t) == 1 ? 16 : 32;
}

// Where the pairs of a group begin: pair j of quarter i of vector v at element
// i * quarter + j * by_pair + v * by_vector, which is what decoding finds easiest.
struct PairOrder {
  int64_t by_pair, by_vector;

  PYFMT_HD PairOrder(const FormatSpec& f, int64_t quarter)
      : by_pair(f.bits() == 4 ? quarter / 4 : 2), by_vector(f.bits() == 4 ? 2 : 8) {}
};

// Values of elements as bfloat16, by bytes: of six bits, or of eight with a sign.
struct ByteTable {
  __m512i low[2], high[2];
  __m512i least_low, least_high;  // of the code 0x80

  explicit ByteTable(const ElementSpec& e) {
    alignas(64) uint8_t bytes[2][128];
    const auto value = [&](uint32_t code) {
      return codec::bf16_from_float<uint32_t>(value_of(e, code & ((1u << e.bits()) - 1)));
    };
    for (uint32_t code = 0; code < 128; ++code) {
      bytes[0][code] = uint8_t(value(code));
      bytes[1][code] = uint8_t(value(code) >> 8);
    }
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(bytes[0] + 64 * i);
      high[i] = _mm512_load_si512(bytes[1] + 64 * i);
    }
    least_low = _mm512_set1_epi8(char(value(128)));
    least_high = _mm512_set1_epi8(char(value(128) >> 8));
  }
};

// Rows of b, decoded, and the scales of the quarters' parts.
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
        slot_(quarter_ / parts_of(t)),
        decoder_(rows_, DType::kBF16),
        nibbles_(t.right.format.element),
        bytes_(t.right.format.element) {
    const ElementSpec& e = t.right.format.element;
    const int bits = e.bits();
    way_ = bits == 4                  ? kNibbles
           : bits == 6                ? kSixBits
           : bits == 8 && e.is_signed ? e.is_int() ? kIntegers : kFloats
                                      : kDecoder;
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

  // The scales of elements `from` to `from + n` of the same rows, one for each part of a quarter.
  PYFMT_HD void scales(int64_t row, int64_t rows, int64_t from, int64_t n, Unit* u) const {
    const int64_t slots = (n + slot_ - 1) / slot_, whole = round_up(slots, 8);
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
  enum Way { kNibbles, kSixBits, kFloats, kIntegers, kDecoder };

  template <int kQuarter>
  PYFMT_HD void by_way(int64_t row, int64_t rows, int64_t from, int64_t n, Unit* u) {
    switch (way_) {
      case kNibbles:
        return by<kNibbles, 32>(row, rows, from, n, u->data);
      case kSixBits:
        return by<kSixBits, kQuarter>(row, rows, from, n, u->data);
      case kFloats:
        return by<kFloats, kQuarter>(row, rows, from, n, u->data);
      case kIntegers:
        return by<kIntegers, kQuarter>(row, rows, from, n, u->data);
      default:
        for (int64_t r = 0; r < rows; ++r) plainly<kQuarter>(row + r, from, n, u, r);
    }
  }

  // A group at a time; the last one by way of a copy that ends where the elements do.
  template <Way kWay, int kQuarter>
  PYFMT_HD void by(int64_t row, int64_t rows, int64_t from, int64_t n, uint16_t* data) const {
    constexpr int kBits = kWay == kNibbles ? 4 : kWay == kSixBits ? 6 : 8;
    constexpr int kColumns = 4 * kQuarter, kBytes = kColumns * kBits / 8;
    const int64_t bytes = t_.right.format.row_bytes(t_.k);
    const uint8_t* codes = t_.right.codes + row * bytes + from * kBits / 8;
    // In registers: stores might change the members.
    const std::conditional_t<kWay == kNibbles, ValueTable, ByteTable> table = [&] {
      if constexpr (kWay == kNibbles) {
        return nibbles_;
      } else {
        return bytes_;
      }
    }();
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

  template <Way kWay, int kQuarter, class Table>
  static PYFMT_HD void one_group(const Table& table, const uint8_t* p, uint16_t* out) {
    if constexpr (kWay != kNibbles) {
      PYFMT_UNROLL for (int h = 0; h < kQuarter / 16; ++h) {
        const __m512i codes = codes_of<kWay, kQuarter>(p, h);
        __m512i low, high;
        values<kWay>(table, codes, low, high);
        put(out, 2 * h, _mm512_unpacklo_epi8(low, high));
        put(out, 2 * h + 1, _mm512_unpackhi_epi8(low, high));
      }
    } else {
      static_assert(kQuarter == 32, "nibbles come in whole vectors");
      const __m512i x = _mm512_loadu_si512(p);
      PYFMT_UNROLL for (int v = 0; v < 4; ++v) put(out, v, table.template of<4>(words(x, 8 * v)));
    }
  }

  static PYFMT_HD void put(uint16_t* out, int i, __m512i v) {
    _mm512_storeu_si512(out + i * kPairs, v);
  }

  // Of each 32-bit lane, two nibbles from bit `first` on at the low ends of its halves.
  static PYFMT_HD __m512i words(__m512i x, int first) {
    const int64_t lane = int64_t(first + 4) << 16 | first;
    const int64_t both = (lane | 0x20002000000000) + (lane << 32);
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(both), x);
  }

  // The bytes of values; of six bits, what lies above an index does not count.
  template <Way kWay>
  static PYFMT_HD void values(const ByteTable& t, __m512i codes, __m512i& low, __m512i& high) {
    if constexpr (kWay == kSixBits) {
      low = _mm512_permutexvar_epi8(codes, t.low[0]);
      high = _mm512_permutexvar_epi8(codes, t.high[0]);
      return;
    }
    const __m512i sign = _mm512_set1_epi8(char(0x80));
    const __m512i index = kWay == kIntegers ? _mm512_abs_epi8(codes) : codes;
    low = _mm512_permutex2var_epi8(t.low[0], index, t.low[1]);
    high = _mm512_permutex2var_epi8(t.high[0], index, t.high[1]);
    high = _mm512_ternarylogic_epi32(high, codes, sign, 0xf8);  // high | (codes & sign)
    if constexpr (kWay == kIntegers) {
      // The one that has no positive counterpart.
      const __mmask64 least = _mm512_cmpeq_epi8_mask(codes, sign);
      low = _mm512_mask_mov_epi8(low, least, t.least_low);
      high = _mm512_mask_mov_epi8(high, least, t.least_high);
    }
  }

  // One code a byte: in quarter i those from element i * kQuarter + 16 h on.
  template <Way kWay, int kQuarter>
  static PYFMT_HD __m512i codes_of(const uint8_t* p, int h) {
    if constexpr (kWay == kSixBits) {
      static constexpr ByteOrder orders[2] = {{kQuarter, 0}, {kQuarter, 1}};
      const __m512i index = _mm512_load_si512(orders[h].of);
      const __m512i four = kQuarter == 16
                               ? _mm512_permutexvar_epi8(index, load48(p))
                               : _mm512_permutex2var_epi8(load48(p), index, load48(p + 48));
      return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x322c2620120c0600), four);
    } else {
      const __m512i a = _mm512_loadu_si512(p);
      if (kQuarter == 16) return a;
      const __m512i b = _mm512_loadu_si512(p + 64);
      return h ? _mm512_shuffle_i64x2(a, b, 0xdd) : _mm512_shuffle_i64x2(a, b, 0x88);
    }
  }

  static PYFMT_HD __m512i load48(const uint8_t* p) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)p);
    return _mm512_inserti32x4(_mm512_castsi256_si512(first),
                              _mm_loadu_si128((const __m128i*)(p + 32)), 2);
  }

  // Where the three bytes of four six-bit codes are, in two vectors of 48 bytes.
  struct ByteOrder {
    alignas(64) uint8_t of[64] = {};
    constexpr ByteOrder(int quarter, int h) {
      for (int lane = 0; lane < 16; ++lane) {
        const int element = lane / 4 * quarter + lane % 4 * 4 + 16 * h;
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
          memcpy(out, group + lane / 4 * kQuarter + lane % 4 * 2 + 8 * v, 4);
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
      return segment_scales(rows_, row, from / slot_, slots, slot_, 1.0f, out, extremes);
    }
    const int64_t last = (from + slots * slot_ - 1) / block;
    const int64_t blocks = (last < f.blocks(t_.k) ? last + 1 : f.blocks(t_.k)) - first;
    if (block == slot_) {
      return row_scales(t_.right, row, t_.k, first, blocks, (uint32_t*)out);
    }
    alignas(64) float some[kScaleStride];
    row_scales(t_.right, row, t_.k, first, blocks, (uint32_t*)some);
    const int64_t each = block / slot_;
    if (each * slot_ == block && kLanes % each == 0 && from % block == 0) {
      I index;
      for (int i = 0; i < kLanes; ++i) index[i] = int32_t(i / each);
      for (int64_t i = 0; i < slots; i += kLanes) {
        store<U>(out + i, __builtin_shuffle(load<U>(some + i / each), (U)index));
      }
      return;
    }
    int64_t slot = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = b + 1 < blocks ? ((first + b + 1) * block - from) / slot_ : slots;
      for (; slot < end; slot += kLanes) store<F>(out + slot, all(some[b]));
      slot = end;
    }
  }

  const TileArgs& t_;
  Rows rows_;
  int64_t quarter_, slot_;  // elements of a quarter, and with a scale of their own
  RowDecoder decoder_;
  ValueTable nibbles_;
  ByteTable bytes_;
  Way way_;
};

}  // namespace PYFMT_ISA
}  // namespace pyfmt
#endif
