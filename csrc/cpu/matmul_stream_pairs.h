// SPDX-License-Identifier: Apache-2.0
// One or two rows of bfloat16 times four-bit codes by vdpbf16ps: of 64 bytes of codes the even and
// the odd elements become bfloat16 by two tables of bytes each, and a is laid out likewise. Half
// the instructions of the same in float32.
#pragma once

#include "matmul_rows.h"

namespace pyfmt {
namespace PYFMT_ISA {

#if PYFMT_BF16
constexpr int kPairStep = 128;  // elements of 64 bytes

// A vector's 128-bit piece holds 32 elements, its halves 16 each.
PYFMT_INLINE bool by_pairs(const FormatSpec& f, DType a, int64_t k) {
  const int64_t block = f.columns(k);
  const bool served = block >= k || block == 16 || (block % 32 == 0 && (block & (block - 1)) == 0);
  return a == DType::kBF16 && f.bits() == 4 && served;
}

// Of each 128 elements, as the codes' bytes come apart: in piece L of vector q those with even
// (q < 2) or odd places of the first (q % 2 == 0) or second half of elements 32 L to 32 L + 31.
static void prepare_pairs(const StreamArgs& s, int64_t columns) {
  alignas(64) uint16_t places[32];
  for (int word = 0; word < 32; ++word) {
    places[word] = uint16_t(word / 8 % 2 * 16 + word % 8 * 2 + word / 16);
  }
  const __m512i order = _mm512_load_si512(places);
  for (int64_t m = 0; m < s.m; ++m) {
    const uint16_t* const a = (const uint16_t*)s.a + m * s.k;
    uint16_t* const out = (uint16_t*)s.prepared + m * columns;
    for (int64_t i = 0; i < columns; i += kPairStep) {
      __m512i v[4];
      for (int piece = 0; piece < 4; ++piece) {
        const int64_t left = s.k - i - 32 * piece;
        const __mmask32 present = left >= 32 ? ~__mmask32(0)
                                  : left > 0 ? (__mmask32(1) << left) - 1
                                             : __mmask32(0);
        v[piece] =
            _mm512_permutexvar_epi16(order, _mm512_maskz_loadu_epi16(present, a + i + 32 * piece));
      }
      const __m512i low = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
      const __m512i high = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
      const __m512i low2 = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
      const __m512i high2 = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
      _mm512_storeu_si512(out + i, _mm512_shuffle_i32x4(low, low2, 0x88));
      _mm512_storeu_si512(out + i + 32, _mm512_shuffle_i32x4(low, low2, 0xdd));
      _mm512_storeu_si512(out + i + 64, _mm512_shuffle_i32x4(high, high2, 0x88));
      _mm512_storeu_si512(out + i + 96, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
  }
}

// Where a vector's scales lie: which of those from (i * pieces) >> shift on each lane takes.
struct PairScales {
  __m512i index[2];
  int64_t shift;
  int pieces;  // of 128 elements

  // kHalves: blocks of 16.
  PYFMT_HD PairScales(int64_t block, int64_t k) : shift(62), pieces(block == 16 ? 8 : 4) {
    alignas(64) uint32_t lanes[2][16] = {};
    if (block < k) shift = block == 16 ? 0 : __builtin_ctzll(uint64_t(block / 32));
    for (int lane = 0; lane < 16; ++lane) {
      const int piece = lane / 4;
      for (int half = 0; half < 2; ++half) {
        lanes[half][lane] = block >= k    ? 0
                            : block == 16 ? 2 * piece + half
                                          : uint32_t(int64_t(piece) >> shift);
      }
    }
    for (int half = 0; half < 2; ++half) index[half] = _mm512_load_si512(lanes[half]);
  }
  PYFMT_HD const uint32_t* at(const uint32_t* scales, int64_t i) const {
    return scales + ((i * pieces) >> shift);
  }
};

struct PairTables {
  __m512i low, high;  // bytes of the values; only the low four bits of an index count

  explicit PairTables(const ElementSpec& e) {
    alignas(64) uint8_t bytes[2][64];
    for (uint32_t code = 0; code < 64; ++code) {
      const uint32_t value = value_of(e, code & 15);
      const uint32_t half = codec::bf16_from_float<uint32_t>(value);
      bytes[0][code] = uint8_t(half);
      bytes[1][code] = uint8_t(half >> 8);
    }
    low = _mm512_load_si512(bytes[0]);
    high = _mm512_load_si512(bytes[1]);
  }
};

// 64 bytes of a row of codes: products with each row of a, times their scales.
template <int M, bool kHalves>
PYFMT_INLINE void pair_step(__m512i codes, const PairTables& t, const PairScales& places,
                            const uint32_t* scales, const __m512i (&left)[M][4], __m512 (&sum)[M]) {
  const __m512i odd = _mm512_srli_epi16(codes, 4);
  const __m512i even_low = _mm512_permutexvar_epi8(codes, t.low);
  const __m512i even_high = _mm512_permutexvar_epi8(codes, t.high);
  const __m512i odd_low = _mm512_permutexvar_epi8(odd, t.low);
  const __m512i odd_high = _mm512_permutexvar_epi8(odd, t.high);
  const __m512i values[4] = {
      _mm512_unpacklo_epi8(even_low, even_high), _mm512_unpackhi_epi8(even_low, even_high),
      _mm512_unpacklo_epi8(odd_low, odd_high), _mm512_unpackhi_epi8(odd_low, odd_high)};
  const __m512i some = _mm512_loadu_si512(scales);
  const __m512 first = _mm512_castsi512_ps(_mm512_permutexvar_epi32(places.index[0], some));
  PYFMT_UNROLL
  for (int m = 0; m < M; ++m) {
    __m512 part = _mm512_setzero_ps();
    if constexpr (kHalves) {
      const __m512 second = _mm512_castsi512_ps(_mm512_permutexvar_epi32(places.index[1], some));
      __m512 other = _mm512_setzero_ps();
      pair_product(left[m][0], values[0], part);
      pair_product(left[m][1], values[1], other);
      pair_product(left[m][2], values[2], part);
      pair_product(left[m][3], values[3], other);
      sum[m] = _mm512_fmadd_ps(second, other, sum[m]);
    } else {
      pair_product(left[m][0], values[0], part);
      pair_product(left[m][1], values[1], part);
      pair_product(left[m][2], values[2], part);
      pair_product(left[m][3], values[3], part);
    }
    sum[m] = _mm512_fmadd_ps(first, part, sum[m]);
  }
}

// 64 bytes of R rows, or `have` of them.
template <int R, int M, bool kHalves, bool kPartial>
PYFMT_INLINE void pair_columns(const uint16_t* a, int64_t columns, const uint8_t* codes,
                               int64_t bytes, int64_t have, const PairTables& tables,
                               const PairScales& places, const uint32_t* scales, int64_t room,
                               __m512 (&sum)[R][M]) {
  __m512i left[M][4];
  PYFMT_UNROLL
  for (int m = 0; m < M; ++m) {
    PYFMT_UNROLL
    for (int q = 0; q < 4; ++q) left[m][q] = _mm512_loadu_si512(a + m * columns + 32 * q);
  }
  const __mmask64 present = kPartial ? (__mmask64(1) << have) - 1 : ~__mmask64(0);
  PYFMT_UNROLL
  for (int r = 0; r < R; ++r) {
    const uint8_t* const p = codes + r * bytes;
    // The rows after these: a row is too short for the hardware to foresee the next ones.
    prefetch(p + R * bytes);
    const __m512i some = kPartial ? _mm512_maskz_loadu_epi8(present, p) : _mm512_loadu_si512(p);
    pair_step<M, kHalves>(some, tables, places, scales + r * room, left, sum[r]);
  }
}

template <int R, int M, bool kHalves>
static void pair_rows(const StreamArgs& s, int64_t row, const PairTables& tables,
                      const PairScales& places, uint32_t* scales) {
  const FormatSpec& f = s.right.format;
  const int64_t columns = round_up(s.k, kPairStep), bytes = f.row_bytes(s.k);
  const int64_t blocks = f.blocks(s.k), room = round_up(blocks, kGroup) + kGroup;
  for (int r = 0; r < R; ++r) row_scales(s.right, row + r, s.k, 0, blocks, scales + r * room);
  prefetch_scales(s, row + R, R);
  const uint8_t* const codes = s.right.codes + row * bytes;
  const uint16_t* const a = (const uint16_t*)s.prepared;
  __m512 sum[R][M];
  PYFMT_UNROLL
  for (int r = 0; r < R; ++r) {
    PYFMT_UNROLL
    for (int m = 0; m < M; ++m) sum[r][m] = _mm512_setzero_ps();
  }
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    pair_columns<R, M, kHalves, false>(a + 2 * i, columns, codes + i, bytes, 64, tables, places,
                                       places.at(scales, i / 64), room, sum);
  }
  if (i < bytes) {
    pair_columns<R, M, kHalves, true>(a + 2 * i, columns, codes + i, bytes, bytes - i, tables,
                                      places, places.at(scales, i / 64), room, sum);
  }
  F sums[R][M];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) sums[r][m] = (F)sum[r][m];
  }
  finish_rows<R, M>(s, row, sums);
}

template <int R, int M, bool kHalves>
static void stream_pairs_of(const StreamArgs& s, int64_t begin, int64_t end) {
  const FormatSpec& f = s.right.format;
  const int64_t room = round_up(f.blocks(s.k), kGroup) + kGroup;
  Scratch scratch(R * room * 4 + 64);
  uint32_t* const scales = scratch.take<uint32_t>(R * room);
  // Beyond a row's scales lie zeros, for the lanes beyond its codes.
  memset(scales, 0, size_t(R * room) * 4);
  const PairTables tables(f.element);
  const PairScales places(f.columns(s.k), s.k);
  int64_t row = begin;
  for (; row + R <= end; row += R) pair_rows<R, M, kHalves>(s, row, tables, places, scales);
  for (; row < end; ++row) pair_rows<1, M, kHalves>(s, row, tables, places, scales);
}

template <int R, int M>
static void stream_pairs(const StreamArgs& s, int64_t begin, int64_t end) {
  const bool halves = s.right.format.columns(s.k) == 16 && s.k > 16;
  halves ? stream_pairs_of<R, M, true>(s, begin, end) : stream_pairs_of<R, M, false>(s, begin, end);
}
#else
PYFMT_INLINE bool by_pairs(const FormatSpec&, DType, int64_t) {
  return false;
}
PYFMT_INLINE void prepare_pairs(const StreamArgs&, int64_t) {}
template <int R, int M>
PYFMT_INLINE void stream_pairs(const StreamArgs&, int64_t, int64_t) {}
#endif

}  // namespace PYFMT_ISA
}  // namespace pyfmt
