// SPDX-License-Identifier: Apache-2.0
// A few dense rows times a packed matrix: each row of b is read once, decoded in registers and
// multiplied there. Elements are multiplied as they stand, sums of a few of them by the block's
// scale: one float32 multiply-add an element and one a scale.
#pragma once

#include "matmul_rows.h"
#include "matmul_stream_int8.h"
#include "matmul_stream_pairs.h"
#include "matmul_stream_tables.h"

namespace pyfmt {
namespace PYFMT_ISA {

// Four-bit codes where a lookup serves: a vector holds 8 * kLanes of them, lane i the elements
// 8 i to 8 i + 7, and each shift by four bits brings up the next one. a is permuted likewise.
constexpr int kNibbleStep = 8 * kLanes;

PYFMT_INLINE bool by_nibbles(const FormatSpec& f) {
  return kHasLookup && f.bits() == 4;
}

// Which of a vector's scales belong to its lanes of eight elements: blocks of 8, 16, 32, ... or as
// long as the row.
struct LaneScales {
  I index;
  int64_t shift;  // scales of vector i begin at (i * kLanes) >> shift

  PYFMT_HD LaneScales(int64_t block, int64_t k)
      : shift(block >= k ? 62 : __builtin_ctzll(uint64_t(block / 8))) {
    for (int lane = 0; lane < kLanes; ++lane) index[lane] = int32_t(int64_t(lane) >> shift);
  }
  static bool serves(int64_t block, int64_t k) {
    return block >= k || (block % 8 == 0 && (block & (block - 1)) == 0);
  }
  // Vector i's; kLanes scales are readable wherever one is.
  PYFMT_HD F of(const uint32_t* scales, int64_t i) const {
    return (F)__builtin_shuffle(load<U>(scales + ((i * kLanes) >> shift)), (U)index);
  }
};

static bool stream_serves(const FormatSpec& f, int64_t k) {
  const int64_t block = f.columns(k);
  const bool whole = f.element.special == Special::kNone || k % block == 0;
  if (!moderate(f.element) || !whole) return false;
  return by_nibbles(f) ? LaneScales::serves(block, k) : block % kGroup == 0;
}

static int64_t stream_columns(const FormatSpec& f, int64_t k) {
  return round_up(k, by_nibbles(f) ? kNibbleStep : by_tables(f, k) ? kPairs : kGroup);
}

static void stream_prepare(const StreamArgs& s) {
  const FormatSpec& f = s.right.format;
  const int64_t columns = stream_columns(f, s.k);
  if (by_pairs(f, s.a_dtype, s.k)) return prepare_pairs(s, columns);
  if (by_words(f, s.a_dtype, s.k)) return prepare_words(s, columns);
  const bool nibbles = by_nibbles(f), pairs = by_tables(f, s.k), turned = nibbles || pairs;
  Scratch scratch(turned ? columns * 4 : 0);
  uint32_t* const row = turned ? scratch.take<uint32_t>(columns) : nullptr;
  for (int64_t m = 0; m < s.m; ++m) {
    uint32_t* const out = (uint32_t*)s.prepared + m * columns;
    load_row(at(s.a, s.a_dtype, m * s.k), s.a_dtype, s.k, columns, turned ? row : out);
    for (int64_t i = 0; pairs && i < columns; ++i) out[paired_place(i)] = row[i];
    if (!nibbles) continue;
    for (int64_t i = 0; i < columns; i += kNibbleStep) {
      for (int j = 0; j < 8; ++j) {
        for (int lane = 0; lane < kLanes; ++lane)
          out[i + j * kLanes + lane] = row[i + lane * 8 + j];
      }
    }
  }
}

// ---- four bits ------------------------------------------------------------------------

template <int R, int M>
PYFMT_INLINE void nibble_step(const Lookup& values, const U (&codes)[R], const float* a,
                              int64_t columns, const F (&scale)[R], F (&sum)[R][M]) {
  F part[R][M];
  for (int j = 0; j < 8; ++j) {
    F left[M];
    for (int m = 0; m < M; ++m) left[m] = load<F>(a + m * columns + j * kLanes);
    for (int r = 0; r < R; ++r) {
      const F w = values[j ? codes[r] >> (4 * j) : codes[r]];
      for (int m = 0; m < M; ++m) {
        part[r][m] = j ? multiply_add(w, left[m], part[r][m]) : w * left[m];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) sum[r][m] = multiply_add(scale[r], part[r][m], sum[r][m]);
  }
}

template <int R, int M>
static void nibble_rows(const StreamArgs& s, int64_t row, const Lookup& values,
                        const LaneScales& lanes, uint32_t* scales) {
  const FormatSpec& f = s.right.format;
  const int64_t columns = stream_columns(f, s.k), bytes = f.row_bytes(s.k);
  const int64_t blocks = f.blocks(s.k), room = blocks + kGroup;
  for (int r = 0; r < R; ++r) row_scales(s.right, row + r, s.k, 0, blocks, scales + r * room);
  prefetch_scales(s, row + R, R);
  const uint8_t* const codes = s.right.codes + row * bytes;
  F sum[R][M] = {}, scale[R];
  U words[R];
  int64_t i = 0, v = 0;
  for (; i + kNibbleStep <= s.k; i += kNibbleStep, ++v) {
    for (int r = 0; r < R; ++r) {
      words[r] = load<U>(codes + r * bytes + i / 2);
      // The rows after these: a row is too short for the hardware to foresee the next ones.
      if (i / 2 % 64 == 0) prefetch(codes + (r + R) * bytes + i / 2);
      scale[r] = lanes.of(scales + r * room, v);
    }
    nibble_step<R, M>(values, words, s.prepared + i, columns, scale, sum);
  }
  if (i < s.k) {
    for (int r = 0; r < R; ++r) {
      words[r] = U{};
      memcpy(&words[r], codes + r * bytes + i / 2, size_t((s.k - i + 1) / 2));
      scale[r] = lanes.of(scales + r * room, v);
      // Lanes beyond the row have no scale; what lies there must not be a NaN.
      const int64_t used = (s.k - i + 7) / 8;
      for (int lane = int(used); lane < kLanes; ++lane) scale[r][lane] = 0.0f;
    }
    nibble_step<R, M>(values, words, s.prepared + i, columns, scale, sum);
  }
  finish_rows<R, M>(s, row, sum);
}

template <int R, int M>
static void stream_nibbles(const StreamArgs& s, int64_t begin, int64_t end) {
  const FormatSpec& f = s.right.format;
  Scratch scratch(R * (f.blocks(s.k) + kGroup) * 4 + 64);
  uint32_t* const scales = scratch.take<uint32_t>(R * (f.blocks(s.k) + kGroup));
  const LaneScales lanes(f.columns(s.k), s.k);
  uint32_t table[16];
  for (uint32_t code = 0; code < 16; ++code) {
    table[code] = value_of(f.element, code);
  }
  const Lookup values(table);
  int64_t row = begin;
  for (; row + R <= end; row += R) nibble_rows<R, M>(s, row, values, lanes, scales);
  for (; row < end; ++row) nibble_rows<1, M>(s, row, values, lanes, scales);
}

// ---- one byte a code ------------------------------------------------------------------

// Integers as they stand; their step goes into the scales, exactly.
template <bool kSigned8>
struct Steps {
  int extend;
  PYFMT_HD explicit Steps(const ElementSpec& e) : extend(e.is_signed ? 32 - e.bits() : 0) {}
  PYFMT_HD void decode(const uint8_t* codes, F (&w)[kVectors]) const {
#if PYFMT_AVX512
    if constexpr (kSigned8) {
      const __m128i bytes = _mm_loadu_si128((const __m128i*)codes);
      w[0] = (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
      return;
    }
#endif
    const Group g = load_u8(codes);
    for (int v = 0; v < kVectors; ++v) {
      w[v] = __builtin_convertvector((I)(g.v[v] << extend) >> extend, F);
    }
  }
  static float step(const ElementSpec& e) {
    return codec::Lane<uint32_t>::as_float(power_of_two_bits(-e.frac));
  }
};

template <class Element>
struct Values {
  decltype(Element::make(ElementSpec{}, false)) c;
  PYFMT_HD explicit Values(const ElementSpec& e) : c(Element::make(e, false)) {}
  PYFMT_HD void decode(const uint8_t* codes, F (&w)[kVectors]) const {
    const Group g = load_u8(codes);
    for (int v = 0; v < kVectors; ++v) w[v] = (F)Element::decode(c, g.v[v]);
  }
  static float step(const ElementSpec&) { return 1.0f; }
};

template <class Decode, int kBlock, int R, int M>
static void byte_rows(const StreamArgs& s, int64_t row, const Decode& values, uint32_t* scales,
                      uint8_t* unpacked) {
  const FormatSpec& f = s.right.format;
  const int64_t columns = stream_columns(f, s.k), blocks = f.blocks(s.k);
  const int64_t block = kBlock ? kBlock : f.columns(s.k);
  const int64_t bytes = f.row_bytes(s.k), room = round_up(blocks, kGroup);
  const uint8_t* codes[R];
  const float step = Decode::step(f.element);
  for (int r = 0; r < R; ++r) {
    codes[r] = s.right.codes + (row + r) * bytes;
    if (unpacked) {
      uint8_t* const to = unpacked + r * round_up(f.padded(s.k), 64);
      unpack_row(codes[r], bytes, f.padded(s.k), f.bits(), to);
      codes[r] = to;
    }
    row_scales(s.right, row + r, s.k, 0, blocks, scales + r * room);
    float* const each = (float*)scales + r * room;
    for (int64_t b = 0; b < blocks; ++b) each[b] *= step;
  }
  prefetch_scales(s, row + R, R);
  F sum[R][M] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t most = columns - b * block, width = block < most ? block : most;
    F part[R][M] = {};
    if (!unpacked) {
      for (int64_t i = round_up(b * block, 64); i < b * block + width; i += 64) {
        PYFMT_UNROLL
        for (int r = 0; r < R; ++r) prefetch(codes[r] + R * bytes + i);
      }
    }
    PYFMT_UNROLL
    for (int64_t i = 0; i < (kBlock ? kBlock : width); i += kGroup) {
      const int64_t at = b * block + i;
      F w[R][kVectors];
      PYFMT_UNROLL
      for (int r = 0; r < R; ++r) values.decode(codes[r] + at, w[r]);
      PYFMT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        PYFMT_UNROLL
        for (int m = 0; m < M; ++m) {
          const F left = load<F>(s.prepared + m * columns + at + v * kLanes);
          PYFMT_UNROLL
          for (int r = 0; r < R; ++r) part[r][m] = multiply_add(w[r][v], left, part[r][m]);
        }
      }
    }
    PYFMT_UNROLL
    for (int r = 0; r < R; ++r) {
      const F scale = (F)broadcast(scales[r * room + b]);
      PYFMT_UNROLL
      for (int m = 0; m < M; ++m) sum[r][m] = multiply_add(scale, part[r][m], sum[r][m]);
    }
  }
  finish_rows<R, M>(s, row, sum);
}

template <class Decode, int R, int M>
static void stream_bytes(const StreamArgs& s, int64_t begin, int64_t end) {
  const FormatSpec& f = s.right.format;
  const int64_t room = round_up(f.blocks(s.k), kGroup);
  const int64_t width = f.bits() == 8 ? 0 : round_up(f.padded(s.k), 64);
  Scratch scratch(R * (room * 4 + width) + 256);
  uint32_t* const scales = scratch.take<uint32_t>(R * room);
  uint8_t* const unpacked = width ? scratch.take<uint8_t>(R * width) : nullptr;
  const Decode values(f.element);
  int64_t row = begin;
  // Blocks of the usual size, each whole, in a loop without counters.
  const bool usual = f.columns(s.k) == 32 && s.k % 32 == 0;
  for (; row + R <= end; row += R) {
    usual ? byte_rows<Decode, 32, R, M>(s, row, values, scales, unpacked)
          : byte_rows<Decode, 0, R, M>(s, row, values, scales, unpacked);
  }
  for (; row < end; ++row) byte_rows<Decode, 0, 1, M>(s, row, values, scales, unpacked);
}

// ---- by format and rows of a ----------------------------------------------------------

template <int R, int M>
static void stream_rows(const StreamArgs& s, int64_t begin, int64_t end) {
  const ElementSpec& e = s.right.format.element;
  if (by_pairs(s.right.format, s.a_dtype, s.k)) return stream_pairs<R, M>(s, begin, end);
  if (by_nibbles(s.right.format)) return stream_nibbles<R, M>(s, begin, end);
#if PYFMT_VNNI
  if (by_words(s.right.format, s.a_dtype, s.k)) {
    return e.bits() == 6 ? stream_words<6, R, M>(s, begin, end)
                         : stream_words<8, R, M>(s, begin, end);
  }
  if (by_tables(s.right.format, s.k)) {
    return e.bits() == 6 ? stream_tables<6, R, M>(s, begin, end)
                         : stream_tables<8, R, M>(s, begin, end);
  }
#endif
  if (by_int8(s.right.format, s.k)) return stream_int8<R, M>(s, begin, end);
  if (e.is_int()) {
    return e.is_signed && e.bits() == 8 ? stream_bytes<Steps<true>, R, M>(s, begin, end)
                                        : stream_bytes<Steps<false>, R, M>(s, begin, end);
  }
  if (e == elements::e4m3fn) {
    return stream_bytes<Values<StaticFloat<e4m3fn_element>>, R, M>(s, begin, end);
  }
  if (e == elements::e5m2ieee) {
    return stream_bytes<Values<StaticFloat<e5m2ieee_element>>, R, M>(s, begin, end);
  }
  stream_bytes<Values<AnyFloat>, R, M>(s, begin, end);
}

static void stream(const StreamArgs& s, int64_t begin, int64_t end) {
  GradualUnderflow guard;
  switch (s.m) {
    case 1:
      return stream_rows<4, 1>(s, begin, end);
    case 2:
      return stream_rows<4, 2>(s, begin, end);
    case 3:
      return stream_rows<2, 3>(s, begin, end);
    default:
      return stream_rows<2, 4>(s, begin, end);
  }
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
