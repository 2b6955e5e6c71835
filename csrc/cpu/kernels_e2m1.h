// SPDX-License-Identifier: Apache-2.0
// bfloat16 to E2M1 under E8M0 scales in lanes of sixteen bits, without float32 between: scaling by
// a power of two only moves the exponent. AVX-512, thirty-two elements at a time.
#pragma once

#include "pairs.h"

namespace pyfmt {
namespace PYFMT_ISA {

#if PYFMT_AVX512
// Codes of quarters of binades, from 2^-3 on: all thresholds of rounding, 0.25, 0.75, 1.25, 1.75,
// 2.5, 3.5 and 5, lie at such quarters.
struct QuarterCodes {
  alignas(64) uint16_t of[32];

  constexpr QuarterCodes() : of{} {
    constexpr int first[7] = {4, 10, 13, 15, 17, 19, 21};
    for (int quarter = 0; quarter < 32; ++quarter) {
      for (int k = 0; k < 7; ++k) of[quarter] = uint16_t(of[quarter] + (quarter >= first[k]));
    }
  }
};

// Whether every block's multiplier 2^-E leaves its elements normal: byte 4 to 253, or all zero.
PYFMT_INLINE bool by_quarters(const uint32_t* multipliers, const uint32_t* amax, int64_t blocks) {
  __mmask16 outside = 0;
  for (int64_t b = 0; b < blocks; b += kLanes) {
    const int64_t left = blocks - b;
    const __mmask16 present = left < kLanes ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
    const __m512i bits = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(present, multipliers + b),
                                          _mm512_set1_epi32(1 << 23));
    const __m512i largest = _mm512_maskz_loadu_epi32(present, amax + b);
    outside |= _mm512_mask_cmpgt_epu32_mask(_mm512_test_epi32_mask(largest, largest), bits,
                                            _mm512_set1_epi32(249 << 23));
  }
  return outside == 0;
}

// n elements, a multiple of 32, of blocks of 32 or a power of two times that; two codes a byte.
static void encode_quarters(const uint16_t* x, int64_t n, const Multipliers& m, uint8_t* codes) {
  static constexpr QuarterCodes table;
  const __m512i quarters = _mm512_load_si512(table.of);
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
  // The bits of 2^-3 times the block's scale and one more, less those of the multiplier.
  const __m512i sum = _mm512_set1_epi16(251 * 128 + 1), sign = _mm512_set1_epi16(8);
  const __m512i weights = _mm512_set1_epi32(16 << 16 | 1);
  for (int64_t i = 0; i < n; i += kPairs) {
    FromRow<DType::kBF16>::ahead(x, i);
    uint16_t high;
    memcpy(&high, (const char*)&m.values[(i / kGroup) >> m.shift] + 2, 2);
    const __m512i v = _mm512_loadu_si512(x + i);
    const __m512i least = _mm512_sub_epi16(sum, _mm512_set1_epi16(int16_t(high)));
    const __m512i above = _mm512_subs_epu16(_mm512_and_si512(v, magnitude), least);
    // Of ties, those of the upper half of a binade go up: the unit taken away comes back.
    const __m512i up = _mm512_and_si512(_mm512_srli_epi16(v, 6), one);
    const __m512i quarter = _mm512_srli_epi16(_mm512_add_epi16(above, up), 5);
    const __m512i code = _mm512_permutexvar_epi16(quarter, quarters);
    const __m512i with_sign = _mm512_ternarylogic_epi32(sign, _mm512_srli_epi16(v, 12), code, 0xca);
    const __m512i two = _mm512_madd_epi16(with_sign, weights);
    _mm_storeu_si128((__m128i*)(codes + i / 2), _mm512_cvtepi32_epi8(two));
  }
}
#else
PYFMT_INLINE bool by_quarters(const uint32_t*, const uint32_t*, int64_t) {
  return false;
}
PYFMT_INLINE void encode_quarters(const uint16_t*, int64_t, const Multipliers&, uint8_t*) {}
#endif

}  // namespace PYFMT_ISA
}  // namespace pyfmt
