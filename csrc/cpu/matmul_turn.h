// SPDX-License-Identifier: Apache-2.0
// Right panels where VBMI is: sixteen rows of packed codes are turned first, 32 bits of each at a
// time, and widened to bytes or bfloat16 after that, so that few bytes go through the shuffles.
#pragma once

#include "matmul_lanes.h"

#if PYFMT_VNNI
namespace pyfmt {
namespace PYFMT_ISA {

// The codes of an element as 16-bit lanes hold them: bfloat16 by table or by conversion.
class Turner {
 public:
  Turner(const ElementSpec& e, int64_t k, bool bytes, const int8_t* steps) : bytes_(bytes) {
    const int bits = e.bits();
    way_ = bits == 4 && k % 2 == 0                             ? kNibbles
           : bits <= 6                                         ? kTable64
           : bits == 8 && e.is_int() && e.is_signed            ? kSigned
           : bits == 8 && !e.is_int() && e.is_signed && !bytes ? kSignTable128
                                                               : kNone;
    if (bytes_) {
      steps_ = _mm512_loadu_si512(steps);
      return;
    }
    alignas(64) uint16_t values[128];
    for (uint32_t i = 0; i < 128; ++i) {
      const uint32_t code = bits < 8 ? i & ((1u << bits) - 1) : i;
      const uint32_t value = value_of(e, code);
      values[i] = uint16_t(codec::bf16_from_float<uint32_t>(value));
    }
    for (int i = 0; i < 4; ++i) table_[i] = _mm512_load_si512(values + 32 * i);
  }

  bool serves() const { return way_ != kNone; }
  bool nibbles() const { return way_ == kNibbles; }
  bool packed() const { return way_ == kNibbles || way_ == kSigned || way_ == kSignTable128; }
  // Whether bfloat16 panels hold integers, which the scales bring to their values.
  bool counts_steps() const { return way_ == kSigned; }
  int codes_per_word() const { return nibbles() ? 8 : 4; }

  // 64 bytes of each of `rows` rows, `count` of them used, to `words` vectors of the panel.
  PYFMT_HD void run(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t count,
                    uint32_t* out, int64_t words, int64_t stride) const {
    U v[16];
    if (rows >= 16 && count >= 64) {
      for (int i = 0; i < 16; ++i) v[i] = load<U>(codes + i * row_bytes);
    } else {
      const __mmask64 mask = count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1;
      for (int i = 0; i < 16; ++i) {
        v[i] = i < rows ? (U)_mm512_maskz_loadu_epi8(mask, codes + i * row_bytes) : U{};
      }
    }
    transpose(v);
    switch (way_) {
      case kNibbles:
        return bytes_ ? widen<kNibbles, true>(v, out, words, stride)
                      : widen<kNibbles, false>(v, out, words, stride);
      case kTable64:
        return bytes_ ? widen<kTable64, true>(v, out, words, stride)
                      : widen<kTable64, false>(v, out, words, stride);
      case kSigned:
        return bytes_ ? widen<kSigned, true>(v, out, words, stride)
                      : widen<kSigned, false>(v, out, words, stride);
      default:
        return widen<kSignTable128, false>(v, out, words, stride);
    }
  }

 private:
  enum Way { kNone, kNibbles, kTable64, kSigned, kSignTable128 };

  // Bit offsets for a multishift: byte b of each 32-bit lane takes its bits from first + b * step.
  static __m512i offsets(int first, int step) {
    alignas(64) uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = uint8_t((i & 4) * 8 + first + (i & 3) * step);
    return _mm512_load_si512(bytes);
  }

  template <Way kWay, bool kBytes>
  PYFMT_HD void widen(const U (&v)[16], uint32_t* out, int64_t words, int64_t stride) const {
    constexpr int kEach = (kBytes ? 1 : 2) * (kWay == kNibbles ? 2 : 1);
    if (words >= 16 * kEach) {
      for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < kEach; ++j, out += stride) {
          const __m512i x = (__m512i)v[i];
          _mm512_storeu_si512(out, kBytes ? bytes_of<kWay>(x, j) : halves_of<kWay>(x, j));
        }
      }
      return;
    }
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < kEach; ++j, out += stride) {
        if (i * kEach + j >= words) return;
        const __m512i x =
            kBytes ? bytes_of<kWay>((__m512i)v[i], j) : halves_of<kWay>((__m512i)v[i], j);
        _mm512_storeu_si512(out, x);
      }
    }
  }

  // Four bytes of each lane; only the low six bits of an index count, and the table repeats itself.
  template <Way kWay>
  PYFMT_HD __m512i bytes_of(__m512i x, int j) const {
    if (kWay == kSigned) return x;
    if (kWay == kNibbles) x = _mm512_multishift_epi64_epi8(quads4_[j], x);
    return _mm512_permutexvar_epi8(x, steps_);
  }

  // Two bfloat16 of each lane.
  template <Way kWay>
  PYFMT_HD __m512i halves_of(__m512i x, int j) const {
    if (kWay == kNibbles) {
      return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(pairs4_[j], x), table_[0]);
    }
    if (kWay == kSigned) {
      const __m512i even = j ? _mm512_slli_epi32(x, 8) : _mm512_slli_epi32(x, 24);
      const __m512i odd = j ? x : _mm512_slli_epi32(x, 16);
      const __m512 a = _mm512_cvtepi32_ps(_mm512_srai_epi32(even, 24));
      const __m512 b = _mm512_cvtepi32_ps(_mm512_srai_epi32(odd, 24));
      // Eight significant bits: the low halves are zero.
      return _mm512_or_si512(_mm512_srli_epi32((__m512i)a, 16), (__m512i)b);
    }
    const __m512i index = _mm512_multishift_epi64_epi8(pairs8_[j & 1], x);
    const __m512i low = _mm512_permutex2var_epi16(table_[0], index, table_[1]);
    if (kWay == kTable64) return low;
    const __m512i high = _mm512_permutex2var_epi16(table_[2], index, table_[3]);
    const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x40));
    const __m512i sign =
        _mm512_and_si512(_mm512_slli_epi16(index, 8), _mm512_set1_epi16(int16_t(0x8000)));
    return _mm512_or_si512(_mm512_mask_mov_epi16(low, upper, high), sign);
  }

  bool bytes_;
  Way way_;
  __m512i steps_{}, table_[4] = {};
  __m512i quads4_[2] = {offsets(0, 4), offsets(16, 4)};
  // Two codes, each at the low end of 16 bits; what lies above does not count or is masked.
  __m512i pairs4_[4] = {halves(0, 4), halves(8, 4), halves(16, 4), halves(24, 4)};
  __m512i pairs8_[2] = {halves(0, 8), halves(16, 8)};

  static __m512i halves(int first, int step) {
    alignas(64) uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = uint8_t((i & 4) * 8 + first + (i & 2) / 2 * step);
    return _mm512_load_si512(bytes);
  }
};

}  // namespace PYFMT_ISA
}  // namespace pyfmt
#endif
