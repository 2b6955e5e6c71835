// SPDX-License-Identifier: Apache-2.0
// Right panels where VBMI is: sixteen rows of packed codes are turned first, 32 bits of each at a
// time, and widened to bytes after that, so that few bytes go through the shuffles.
#pragma once

#include "matmul_lanes.h"

#if PYFMT_VNNI
namespace pyfmt {
namespace PYFMT_ISA {

// The codes of an element to signed bytes that count its steps.
class Turner {
 public:
  Turner(const ElementSpec& e, int64_t k, const int8_t* steps) : steps_(_mm512_loadu_si512(steps)) {
    const int bits = e.bits();
    way_ = bits == 4 && k % 2 == 0                  ? kNibbles
           : bits <= 6                              ? kTable64
           : bits == 8 && e.is_int() && e.is_signed ? kSigned
                                                    : kNone;
  }

  bool serves() const { return way_ != kNone; }
  bool packed() const { return way_ == kNibbles || way_ == kSigned; }
  int codes_per_word() const { return way_ == kNibbles ? 8 : 4; }

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
        return widen<kNibbles>(v, out, words, stride);
      case kTable64:
        return widen<kTable64>(v, out, words, stride);
      default:
        return widen<kSigned>(v, out, words, stride);
    }
  }

 private:
  enum Way { kNone, kNibbles, kTable64, kSigned };

  // Bit offsets for a multishift: byte b of each 32-bit lane takes its bits from first + 4 b.
  static __m512i offsets(int first) {
    alignas(64) uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = uint8_t((i & 4) * 8 + first + (i & 3) * 4);
    return _mm512_load_si512(bytes);
  }

  template <Way kWay>
  PYFMT_HD void widen(const U (&v)[16], uint32_t* out, int64_t words, int64_t stride) const {
    constexpr int kEach = kWay == kNibbles ? 2 : 1;
    if (words >= 16 * kEach) {
      for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < kEach; ++j, out += stride) {
          _mm512_storeu_si512(out, bytes_of<kWay>((__m512i)v[i], j));
        }
      }
      return;
    }
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < kEach; ++j, out += stride) {
        if (i * kEach + j >= words) return;
        _mm512_storeu_si512(out, bytes_of<kWay>((__m512i)v[i], j));
      }
    }
  }

  // Four bytes of each lane; only the low six bits of an index count, and the table repeats itself.
  template <Way kWay>
  PYFMT_HD __m512i bytes_of(__m512i x, int j) const {
    if (kWay == kSigned) return x;
    if (kWay == kNibbles) x = _mm512_multishift_epi64_epi8(quads_[j], x);
    return _mm512_permutexvar_epi8(x, steps_);
  }

  Way way_;
  __m512i steps_;
  __m512i quads_[2] = {offsets(0), offsets(16)};
};

}  // namespace PYFMT_ISA
}  // namespace pyfmt
#endif
