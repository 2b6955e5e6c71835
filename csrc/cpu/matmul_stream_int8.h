// SPDX-License-Identifier: Apache-2.0
// A few dense rows times signed bytes in AVX-512: blocks of 32, or of a power of two times that.
#pragma once

#include "matmul_rows.h"

namespace pyfmt {
namespace PYFMT_ISA {

PYFMT_INLINE bool by_int8(const FormatSpec& f, int64_t k) {
  const int64_t block = f.columns(k);
  return PYFMT_AVX512 && f.element.is_int() && f.element.is_signed && f.bits() == 8 &&
         k % 32 == 0 && block % 32 == 0 && (block & (block - 1)) == 0;
}

#if PYFMT_AVX512
// Sums stay in registers: spelt out for R rows of b.
template <int R, int M>
static void int8_rows(const StreamArgs& s, int64_t row, int shift, uint32_t* scales) {
  const FormatSpec& f = s.right.format;
  const int64_t blocks = f.blocks(s.k), room = round_up(blocks, kGroup), bytes = f.row_bytes(s.k);
  const F step = (F)broadcast(power_of_two_bits(-f.element.frac));
  for (int r = 0; r < R; ++r) {
    uint32_t* const each = scales + r * room;
    row_scales(s.right, row + r, s.k, 0, blocks, each);
    for (int64_t b = 0; b < room; b += kLanes) store<F>(each + b, load<F>(each + b) * step);
  }
  prefetch_scales(s, row + R, R);
  const uint8_t* const codes = s.right.codes + row * bytes;
  const float* const a = s.prepared;
  __m512 sum[R][M];
  PYFMT_UNROLL
  for (int r = 0; r < R; ++r) {
    PYFMT_UNROLL
    for (int m = 0; m < M; ++m) sum[r][m] = _mm512_setzero_ps();
  }
  const int64_t k = s.k;
  for (int64_t i = 0; i < k; i += 32) {
    __m512 left[M][2];
    PYFMT_UNROLL
    for (int m = 0; m < M; ++m) {
      left[m][0] = _mm512_loadu_ps(a + m * k + i);
      left[m][1] = _mm512_loadu_ps(a + m * k + i + 16);
    }
    const float* const scale = (const float*)scales + ((i / 32) >> shift);
    PYFMT_UNROLL
    for (int r = 0; r < R; ++r) {
      const uint8_t* const p = codes + r * bytes + i;
      if (i % 64 == 0) prefetch(p + R * bytes);
      const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
      const __m512 y =
          _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
      const __m512 each = _mm512_set1_ps(scale[r * room]);
      PYFMT_UNROLL
      for (int m = 0; m < M; ++m) {
        const __m512 part = _mm512_fmadd_ps(y, left[m][1], _mm512_mul_ps(x, left[m][0]));
        sum[r][m] = _mm512_fmadd_ps(each, part, sum[r][m]);
      }
    }
  }
  F sums[R][M];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) sums[r][m] = (F)sum[r][m];
  }
  finish_rows<R, M>(s, row, sums);
}

template <int R, int M>
static void stream_int8(const StreamArgs& s, int64_t begin, int64_t end) {
  const FormatSpec& f = s.right.format;
  const int64_t room = round_up(f.blocks(s.k), kGroup);
  Scratch scratch(R * room * 4 + 64);
  uint32_t* const scales = scratch.take<uint32_t>(R * room);
  memset(scales, 0, size_t(R * room) * 4);
  const int shift = __builtin_ctzll(uint64_t(f.columns(s.k) / 32));
  int64_t row = begin;
  for (; row + R <= end; row += R) int8_rows<R, M>(s, row, shift, scales);
  for (; row < end; ++row) int8_rows<1, M>(s, row, shift, scales);
}
#else
template <int R, int M>
PYFMT_INLINE void stream_int8(const StreamArgs&, int64_t, int64_t) {}
#endif

}  // namespace PYFMT_ISA
}  // namespace pyfmt
