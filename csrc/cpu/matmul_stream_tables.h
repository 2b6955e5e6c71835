// SPDX-License-Identifier: Apache-2.0
// A few dense rows times codes of six bits, or floats of eight, whose values tables hold.
#pragma once

#include "matmul_rows.h"

namespace pyfmt {
namespace PYFMT_ISA {

// Six bits, and floats of eight, where tables of 64 entries are: thirty-two values at a time as
// bfloat16, the even and the odd ones in two vectors, and a likewise.
PYFMT_INLINE bool by_tables(const FormatSpec& f, int64_t k) {
  const int bits = f.bits();
  const bool known = bits == 6 || (bits == 8 && !f.element.is_int() && f.element.is_signed);
  return PYFMT_VNNI && known && f.columns(k) % kPairs == 0 && f.block_columns != 0;
}

#if PYFMT_VNNI
// Values as bfloat16 by their codes without the sign.
struct ValueTable {
  __m512i low[2], high[2];

  explicit ValueTable(const ElementSpec& e) {
    alignas(64) uint16_t values[128];
    for (uint32_t code = 0; code < 128; ++code) {
      const uint32_t value = value_of(e, code & ((1u << e.bits()) - 1));
      values[code] = uint16_t(codec::bf16_from_float<uint32_t>(value));
    }
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(values + 32 * i);
      high[i] = _mm512_load_si512(values + 64 + 32 * i);
    }
  }
  // Codes in 16-bit lanes; of four and six bits, what lies above them does not count.
  template <int kBits>
  PYFMT_HD __m512i of(__m512i codes) const {
    if (kBits == 4) return _mm512_permutexvar_epi16(codes, low[0]);
    const __m512i first = _mm512_permutex2var_epi16(low[0], codes, low[1]);
    if (kBits == 6) return first;
    const __m512i second = _mm512_permutex2var_epi16(high[0], codes, high[1]);
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
    const __m512i sign = _mm512_set1_epi16(int16_t(0x8000));
    // Where the mask is set: the sign from the codes, the rest from the table.
    return _mm512_ternarylogic_epi32(sign, _mm512_slli_epi16(codes, 8),
                                     _mm512_mask_mov_epi16(first, upper, second), 0xca);
  }
};

// Thirty-two codes in 16-bit lanes, from the start of p.
template <int kBits>
PYFMT_INLINE __m512i load_codes(const uint8_t* p) {
  if (kBits == 8) return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
  if (kBits == 4) {
    const __m512i words = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)p));
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x000c000800040000ll), words);
  }
  // 24 bytes: four codes lie in three bytes, which a 32-bit word of their own takes apart.
  alignas(64) static constexpr uint8_t kBytes[64] = {0,  1, 2,  0,  3,  4,  5,  0,  6,  7,  8,
                                                     0,  9, 10, 11, 0,  12, 13, 14, 0,  15, 16,
                                                     17, 0, 18, 19, 20, 0,  21, 22, 23, 0};
  const __m256i bytes =
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)),
                              _mm_loadl_epi64((const __m128i*)(p + 16)), 1);
  const __m256i words = _mm256_permutexvar_epi8(_mm256_load_si256((const __m256i*)kBytes), bytes);
  const __m512i wide = _mm512_cvtepu32_epi64(words);
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0012000c00060000ll), wide);
}

template <int kBits, int R, int M>
static void table_rows(const StreamArgs& s, int64_t row, const ValueTable& table,
                       uint32_t* scales) {
  const FormatSpec& f = s.right.format;
  const int64_t columns = round_up(s.k, kPairs), blocks = f.blocks(s.k), block = f.columns(s.k);
  const int64_t bytes = f.row_bytes(s.k), room = round_up(blocks, kGroup);
  for (int r = 0; r < R; ++r) row_scales(s.right, row + r, s.k, 0, blocks, scales + r * room);
  prefetch_scales(s, row + R, R);
  const uint8_t* const codes = s.right.codes + row * bytes;
  const __m512i odd = _mm512_set1_epi32(int32_t(0xffff0000u));
  F sum[R][M] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = (b + 1) * block < columns ? (b + 1) * block : columns;
    F part[R][M] = {};
    for (int64_t i = b * block; i < end; i += kPairs) {
      for (int r = 0; r < R; ++r) {
        const uint8_t* const p = codes + r * bytes + i * kBits / 8;
        if (i % 64 == 0) prefetch(p + R * bytes);
        const __m512i values = table.of<kBits>(load_codes<kBits>(p));
        const F even_value = (F)_mm512_slli_epi32(values, 16);
        const F odd_value = (F)_mm512_and_si512(values, odd);
        for (int m = 0; m < M; ++m) {
          const float* const left = s.prepared + m * columns + i;
          part[r][m] = multiply_add(even_value, load<F>(left), part[r][m]);
          part[r][m] = multiply_add(odd_value, load<F>(left + kGroup), part[r][m]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      const F scale = (F)broadcast(scales[r * room + b]);
      for (int m = 0; m < M; ++m) sum[r][m] = multiply_add(scale, part[r][m], sum[r][m]);
    }
  }
  finish_rows<R, M>(s, row, sum);
}

template <int kBits, int R, int M>
static void stream_tables(const StreamArgs& s, int64_t begin, int64_t end) {
  const int64_t room = round_up(s.right.format.blocks(s.k), kGroup);
  Scratch scratch(R * room * 4 + 64);
  uint32_t* const scales = scratch.take<uint32_t>(R * room);
  const ValueTable table(s.right.format.element);
  int64_t row = begin;
  for (; row + R <= end; row += R) table_rows<kBits, R, M>(s, row, table, scales);
  for (; row < end; ++row) table_rows<kBits, 1, M>(s, row, table, scales);
}

// The same for rows of bfloat16, where products of pairs are at hand: a as it stands.
PYFMT_INLINE bool by_words(const FormatSpec& f, DType a, int64_t k) {
  return PYFMT_BF16 && a == DType::kBF16 && by_tables(f, k);
}

static void prepare_words(const StreamArgs& s, int64_t columns) {
  for (int64_t m = 0; m < s.m; ++m) {
    uint16_t* const out = (uint16_t*)s.prepared + m * columns;
    memcpy(out, (const uint16_t*)s.a + m * s.k, size_t(s.k) * 2);
    memset(out + s.k, 0, size_t(columns - s.k) * 2);
  }
}

#if PYFMT_BF16
template <int kBits, int R, int M>
static void word_rows(const StreamArgs& s, int64_t row, const ValueTable& table, uint32_t* scales) {
  const FormatSpec& f = s.right.format;
  const int64_t columns = round_up(s.k, kPairs), blocks = f.blocks(s.k), block = f.columns(s.k);
  const int64_t bytes = f.row_bytes(s.k), room = round_up(blocks, kGroup);
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
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = (b + 1) * block < columns ? (b + 1) * block : columns;
    __m512 part[R][M];
    PYFMT_UNROLL
    for (int r = 0; r < R; ++r) {
      PYFMT_UNROLL
      for (int m = 0; m < M; ++m) part[r][m] = _mm512_setzero_ps();
    }
    for (int64_t i = b * block; i < end; i += kPairs) {
      PYFMT_UNROLL
      for (int r = 0; r < R; ++r) {
        const uint8_t* const p = codes + r * bytes + i * kBits / 8;
        prefetch(p + R * bytes);
        const __m512i values = table.of<kBits>(load_codes<kBits>(p));
        PYFMT_UNROLL
        for (int m = 0; m < M; ++m) {
          pair_product(_mm512_loadu_si512(a + m * columns + i), values, part[r][m]);
        }
      }
    }
    PYFMT_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512 scale = (__m512)broadcast(scales[r * room + b]);
      PYFMT_UNROLL
      for (int m = 0; m < M; ++m) sum[r][m] = _mm512_fmadd_ps(scale, part[r][m], sum[r][m]);
    }
  }
  F sums[R][M];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) sums[r][m] = (F)sum[r][m];
  }
  finish_rows<R, M>(s, row, sums);
}
#endif

template <int kBits, int R, int M>
static void stream_words(const StreamArgs& s, int64_t begin, int64_t end) {
#if PYFMT_BF16
  const int64_t room = round_up(s.right.format.blocks(s.k), kGroup);
  Scratch scratch(R * room * 4 + 64);
  uint32_t* const scales = scratch.take<uint32_t>(R * room);
  const ValueTable table(s.right.format.element);
  int64_t row = begin;
  for (; row + R <= end; row += R) word_rows<kBits, R, M>(s, row, table, scales);
  for (; row < end; ++row) word_rows<kBits, 1, M>(s, row, table, scales);
#else
  (void)s, (void)begin, (void)end;
#endif
}
#else
PYFMT_INLINE bool by_words(const FormatSpec&, DType, int64_t) {
  return false;
}
PYFMT_INLINE void prepare_words(const StreamArgs&, int64_t) {}
#endif

}  // namespace PYFMT_ISA
}  // namespace pyfmt
