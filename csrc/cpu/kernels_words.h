// SPDX-License-Identifier: Apache-2.0
// Codes of six bits, and floats of eight, to bfloat16 without float32 between: a table of the
// elements' bfloat16 values, to whose exponents the block's is added. For E8M0 scales under which
// every value is a normal bfloat16; AVX-512, thirty-two elements at a time.
#pragma once

#include "pairs.h"

namespace pyfmt {
namespace PYFMT_ISA {

#if PYFMT_AVX512
constexpr bool kHasWords = true;
#else
constexpr bool kHasWords = false;
#endif

class WordTable {
 public:
  PYFMT_HD explicit WordTable(const ElementSpec& e)
      : serves_(kHasWords && (e.bits() == 6 || (e.bits() == 8 && !e.is_int() && e.is_signed))),
        bits_(e.bits()),
        from_(power_of_two_bits(-126)),
        range_(0) {
    if (!serves_) return;
    const int step = e.step_exp(), top = 127 - e.emax() - (e.is_int() ? 1 : 0);
    // The smallest nonzero magnitude is 2^step; the largest lies below 2^(emax + 1), or is that.
    if (step < 0) from_ = power_of_two_bits(-126 - step);
    range_ = power_of_two_bits(top < 127 ? top : 127) - from_;
    magnitudes_ = uint16_t(e.is_int() ? 0x3f : (1 << (bits_ - 1)) - 1);
    const bool special = e.special != Special::kNone && bits_ == 8;
    numbers_ = uint16_t(special ? e.max_code() : magnitudes_);
    signed_ = uint16_t(special && e.special == Special::kIeee ? e.max_code() + 1 : numbers_);
    fill(e);
  }

  // Whether these scales (float32 bits) are all such that every value is normal.
  PYFMT_HD bool takes(const uint32_t* scales, int64_t blocks) const {
    if (!serves_) return false;
    uint32_t most = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const uint32_t above = scales[b] - from_;
      most = above > most ? above : most;
    }
    return most <= range_;
  }

  // n elements, a multiple of 32, from bytes or six bits packed; one scale for 2^shift groups of
  // sixteen, shift above 0.
  PYFMT_HD void run(const uint8_t* codes, int bits, int64_t n, const Multipliers& m,
                    uint16_t* out) const {
#if PYFMT_AVX512
    if (bits_ == 8) return eight(codes, n, m, out);
    if (bits == 6) return six<true>(codes, n, m, out);
    six<false>(codes, n, m, out);
#else
    (void)codes, (void)bits, (void)n, (void)m, (void)out;
#endif
  }

 private:
  // Values less the exponent of 1, which every scale brings along; zeros and what is no number
  // stay themselves.
  PYFMT_HD void fill(const ElementSpec& e) {
    const codec::FloatCodec floats(e);
    const codec::IntCodec ints(e, true);
    for (uint32_t code = 0; code < (bits_ == 6 ? 64u : 128u); ++code) {
      using S = uint32_t;
      const S value =
          e.is_int() ? codec::decode_int<S>(ints, code) : codec::decode_float<S>(floats, code);
      const uint32_t magnitude = code & magnitudes_;
      const bool moved = magnitude != 0 && magnitude <= numbers_;
      values_[code] = uint16_t((value >> 16) - (moved ? 0x3f80u : 0u));
    }
  }

#if PYFMT_AVX512
  PYFMT_INLINE __m512i scale_of(const Multipliers& m, int64_t i) {
    uint16_t high;
    memcpy(&high, (const char*)&m.values[(i / kGroup) >> m.shift] + 2, 2);
    return _mm512_set1_epi16(int16_t(high));
  }

  template <bool kPacked>
  PYFMT_HD void six(const uint8_t* codes, int64_t n, const Multipliers& m, uint16_t* out) const {
    const __m512i low = _mm512_load_si512(values_), high = _mm512_load_si512(values_ + 32);
    const __m512i magnitudes = _mm512_set1_epi16(int16_t(magnitudes_));
    // Twelve bits for each lane of 32: the two words that hold them, and where they begin.
    alignas(64) uint16_t words[32];
    alignas(64) uint32_t starts[16];
    for (int k = 0; k < 16; ++k) {
      words[2 * k] = uint16_t(12 * k / 16);
      words[2 * k + 1] = uint16_t(12 * k / 16 + 1);
      starts[k] = uint32_t(12 * k % 16);
    }
    const __m512i from = _mm512_load_si512(words), start = _mm512_load_si512(starts);
    for (int64_t i = 0; i < n; i += kPairs) {
      __m512i code;
      if constexpr (kPacked) {
        const uint8_t* p = codes + i / 8 * 6;
        fetch_ahead(p);
        const __m512i bytes = _mm512_castsi256_si512(_mm256_maskz_loadu_epi32(0x3f, p));
        const __m512i two = _mm512_srlv_epi32(_mm512_permutexvar_epi16(from, bytes), start);
        code = _mm512_mask_mov_epi16(two, 0xaaaaaaaau, _mm512_slli_epi32(two, 10));
      } else {
        code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(codes + i)));
      }
      const __m512i value = _mm512_permutex2var_epi16(low, code, high);
      const __mmask32 some = _mm512_test_epi16_mask(code, magnitudes);
      _mm512_storeu_si512(out + i, _mm512_mask_add_epi16(value, some, value, scale_of(m, i)));
    }
  }

  PYFMT_HD void eight(const uint8_t* codes, int64_t n, const Multipliers& m, uint16_t* out) const {
    __m512i t[4];
    for (int k = 0; k < 4; ++k) t[k] = _mm512_load_si512(values_ + 32 * k);
    const __m512i one = _mm512_set1_epi16(1), numbers = _mm512_set1_epi16(int16_t(numbers_));
    const __m512i mask = _mm512_set1_epi16(0x7f), sign = _mm512_set1_epi16(int16_t(0x8000));
    const __m512i last = _mm512_set1_epi16(int16_t(signed_));
    for (int64_t i = 0; i < n; i += kPairs) {
      fetch_ahead(codes + i);
      const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(codes + i)));
      const __m512i magnitude = _mm512_and_si512(code, mask);
      const __m512i low = _mm512_permutex2var_epi16(t[0], code, t[1]);
      const __m512i high = _mm512_permutex2var_epi16(t[2], code, t[3]);
      const __mmask32 upper = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
      __m512i value = _mm512_mask_mov_epi16(low, upper, high);
      // 1 to the largest number's code.
      const __mmask32 some = _mm512_cmplt_epu16_mask(_mm512_sub_epi16(magnitude, one), numbers);
      value = _mm512_mask_add_epi16(value, some, value, scale_of(m, i));
      // NaN has no sign.
      const __mmask32 is_signed = _mm512_cmple_epu16_mask(magnitude, last);
      const __m512i signs = _mm512_and_si512(_mm512_slli_epi16(code, 8), sign);
      _mm512_storeu_si512(out + i, _mm512_mask_add_epi16(value, is_signed, value, signs));
    }
  }
#endif

  bool serves_;
  int bits_;
  uint32_t from_, range_;
  uint16_t magnitudes_ = 0, numbers_ = 0, signed_ = 0;
  alignas(64) uint16_t values_[128];
};

}  // namespace PYFMT_ISA
}  // namespace pyfmt
