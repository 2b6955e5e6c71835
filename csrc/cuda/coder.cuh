// SPDX-License-Identifier: Apache-2.0
// Sixteen values to sixteen packed codes and back, in few instructions per named element.
//
// Same bits as codec.h, by other means: float32 additions to magic numbers where an integer step
// would cost more, the fp8 conversions of the hardware for all grids that are a part of one.
#pragma once

#include "device.cuh"

namespace pyfmt {
namespace cuda {

// The largest magnitudes of an integer element by sign; set on the host from `clip`.
struct Limits {
  float low = 0.0f, high = 0.0f;
};

inline Limits limits(const ElementSpec& e, bool full) {
  const uint32_t low = full && e.is_int() ? e.full_min_bits() : e.max_bits();
  return {-L::as_float(low), L::as_float(e.max_bits())};
}

// The signs of four bytes, each stretched over its byte; one selector nibble a byte.
PYFMT_DEVICE uint32_t pick_signs(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  // __byte_perm drops the bits that ask for this.
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector | 0x8888u));
  return d;
#else
  const uint32_t tops = pick_bytes(a, b, selector) & 0x80808080u;
  return (tops >> 7) * 0xffu;
#endif
}

// Four 6-bit codes, one a byte (bits 6 and 7 of the bytes ignored), to 24 bits, and back.
PYFMT_DEVICE uint32_t squeeze6(uint32_t bytes) {
  const uint32_t pairs = (bytes & 0x003f003fu) | ((bytes >> 2) & 0x0fc00fc0u);
  return select_bits(pairs, pairs >> 4, 0xfffu);
}
PYFMT_DEVICE uint32_t spread6(uint32_t packed) {
  const uint32_t pairs = (packed & 0xfffu) | ((packed << 4) & 0x0fff0000u);
  return (pairs & 0x003f003fu) | ((pairs << 2) & 0x3f003f00u);
}

template <class E>
struct Coder {
  static constexpr ElementSpec spec = E::spec;
  static constexpr int kBits = spec.bits();
  static constexpr int kWords = kBits / 2;  // of sixteen codes
  static constexpr bool kInt = spec.is_int();
  // The two grids that fp8 contains scaled by a power of two, and fp8 itself.
  static constexpr bool kLikeE4M3 = !kInt && spec.man == 3;
  static constexpr bool kLikeE5M2 = !kInt && spec.man == 2;
  static constexpr bool kNarrow = (kLikeE4M3 || kLikeE5M2) && kBits == 6;
  static constexpr bool kE2M1 = spec == elements::e2m1;
  static_assert(kInt || kE2M1 || kLikeE4M3 || kLikeE5M2, "no encoder for this element");
  static_assert(kBits == 4 || kBits == 6 || kBits == 8, "codes pack into words by 4, 6 or 8 bits");

  // e2m3 * 2^-6 and e3m2 * 2^-12 are the smallest codes of E4M3 and E5M2, bit for bit.
  static constexpr int kFp8Shift =
      kNarrow ? (kLikeE4M3 ? elements::e4m3fn.emin() : elements::e5m2ieee.emin()) - spec.emin() : 0;
  static constexpr uint32_t kFp8Scale = power_of_two_bits(kFp8Shift);
  static constexpr uint32_t kFp8Unscale = power_of_two_bits(-kFp8Shift);
  static constexpr uint32_t kFp8Limit = spec.max_bits() + uint32_t(kFp8Shift) * (1u << 23);
  // 1.5 * 2^23 steps: the sum's low bits are the integer.
  static constexpr uint32_t kIntMagic = 0x4b400000u - uint32_t(spec.frac) * (1u << 23);
  // 2^23 steps, for the way back.
  static constexpr uint32_t kIntBase = 0x4b000000u - uint32_t(spec.frac) * (1u << 23);
  static constexpr uint32_t kIntTop = 1u << (kBits - 1);

  // Codes of get(i) * m for i = 0..15 (i is known at compile time), finite or infinite. kWithin: m
  // is a power of two that leaves none beyond the largest.
  template <bool kWithin = false, class Get>
  PYFMT_DEVICE static void encode(const Get& get, float m, const Limits& limits, uint32_t* out) {
    if constexpr (kE2M1) {
      encode_covered([&](int i) { return kWithin ? get(i) * m : min_magnitude(get(i) * m, 6.0f); },
                     as_float(kEven), out);
    } else if constexpr (kBits == 4) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        // Codes plus 8 are whole numbers without carries, and what the magic numbers add is known.
        uint32_t word = 0;
#pragma unroll
        for (int i = 7; i >= 0; --i) {
          word = word * 16u + integer<kWithin, 8>(get(8 * w + i), m, limits);
        }
        out[w] = (word - kIntMagic * 0x11111111u) ^ 0x88888888u;
      }
    } else {
      uint32_t bytes[4];
      const float fp8_m = kNarrow ? m * as_float(kFp8Scale) : m;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float a = get(4 * w), b = get(4 * w + 1), c = get(4 * w + 2), d = get(4 * w + 3);
        if constexpr (kInt) {
          const uint32_t low =
              pick_bytes(integer<kWithin>(a, m, limits), integer<kWithin>(b, m, limits), 0x0040);
          const uint32_t high =
              pick_bytes(integer<kWithin>(c, m, limits), integer<kWithin>(d, m, limits), 0x0040);
          bytes[w] = pick_bytes(low, high, 0x5410);
        } else {
          const uint32_t low = fp8_pair<kWithin>(a * fp8_m, b * fp8_m);
          bytes[w] = pick_bytes(low, fp8_pair<kWithin>(c * fp8_m, d * fp8_m), 0x5410);
          if constexpr (kNarrow) {
            // The sign goes from bit 7 to bit 5; squeeze6 ignores what stays behind.
            bytes[w] = select_bits(bytes[w] >> 2, bytes[w], 0x20202020u);
          }
        }
      }
      join(bytes, out);
    }
  }

  // E2M1 codes of RNE(get(i) * c) * 2^-e, c = 1 or float32(sqrt(1/2)), where none saturates; for
  // multiplier = kEven or kOdd times 2^-e, e within 2^+-100.
  //
  // Two multiplications, to nearest and then towards zero, take each number to the side of every
  // midpoint between codes on which it is to be rounded, so that halves may go up: kSecond was
  // searched for the pairs. The second ends where float32's own subnormals are spaced like
  // E2M1's, so that bits 24 to 22 hold the code, and the bits below them what is cut off.
  static constexpr uint32_t kSecond = 0x00842125u, kEven = 0x3f77ffcau, kOdd = 0x3f2f5ca5u;
  // 2^6 and 2^2. Where they come from a kernel's parameters, codes are moved by multiplications
  // rather than by shifts, which the busier pipe would take.
  struct Moves {
    uint32_t far = 64, near = 4;
  };
  template <class Get>
  PYFMT_DEVICE static void encode_covered(const Get& get, float multiplier, uint32_t* out,
                                          const Moves& by = {}) {
    static_assert(kE2M1, "for E2M1 alone");
    // The upper halves of two: signs above, codes and what is cut off in bits 8 to 0 of either.
    const auto pair = [&](int i, int j) {
      const float a = multiply_down(get(i) * multiplier, as_float(kSecond));
      const float b = multiply_down(get(j) * multiplier, as_float(kSecond));
      return pick_bytes(as_uint(a), as_uint(b), 0x7632);
    };
    // Elements with odd numbers belong four bits above the even ones before them. Adding half of a
    // step rounds; what the low one's sign adds to the high one's stays below that.
    const auto four = [&](uint32_t odd, uint32_t even) {
      return select_bits(odd * by.far + 0x08000800u, even * by.near + 0x00800080u, 0xf000f000u);
    };
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t odd[2] = {pair(8 * w + 1, 8 * w + 3), pair(8 * w + 5, 8 * w + 7)};
      const uint32_t even[2] = {pair(8 * w, 8 * w + 2), pair(8 * w + 4, 8 * w + 6)};
      const uint32_t codes = pick_bytes(four(odd[0], even[0]), four(odd[1], even[1]), 0x7531);
      const uint32_t signs = select_bits(pick_signs(odd[0], odd[1], 0x7531),
                                         pick_signs(even[0], even[1], 0x7531), 0xf0f0f0f0u);
      out[w] = select_bits(codes, signs, 0x77777777u);
    }
  }

  // Sixteen codes to their exact values.
  PYFMT_DEVICE static void decode(const uint32_t* in, float* out) {
    if constexpr (kBits == 4) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if constexpr (kInt) {
          const uint32_t word = in[i / 8] ^ 0x88888888u;
          out[i] = from_offset(((word >> (4 * (i % 8))) & 0xfu) | kIntBase);
        } else {
          // The code's fields in float32's places make a number 2^126 too small.
          const uint32_t top = in[i / 8] << (28 - 4 * (i % 8));
          const uint32_t bits = (top & 0x80000000u) | ((top >> 6) & 0x01c00000u);
          out[i] = as_float(bits) * as_float(power_of_two_bits(126));
        }
      }
    } else {
      uint32_t bytes[4];
      split(in, bytes);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (kInt) {
          const uint32_t offset = bytes[w] ^ (kIntTop * 0x01010101u);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            out[4 * w + i] = from_offset(pick_bytes(offset, kIntBase, 0x7650 + i));
          }
        } else {
          uint32_t codes = bytes[w];
          if constexpr (kNarrow) {
            codes = (codes & 0x1f1f1f1fu) | ((codes << 2) & 0x80808080u);
          }
          fp8_values(codes, out + 4 * w);
        }
      }
    }
  }

  // Sixteen codes, one a byte, closed up.
  PYFMT_DEVICE static void join(const uint32_t* bytes, uint32_t* out) {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int w = 0; w < 4; ++w) out[w] = bytes[w];
    } else {
      const uint32_t a = squeeze6(bytes[0]), b = squeeze6(bytes[1]), c = squeeze6(bytes[2]),
                     d = squeeze6(bytes[3]);
      out[0] = a | b << 24;
      out[1] = b >> 8 | c << 16;
      out[2] = c >> 16 | d << 8;
    }
  }

 private:
  // The two's complement code of x * m, and some more, in the low bits; other bits above it.
  template <bool kWithin, uint32_t kMore = 0>
  PYFMT_DEVICE static uint32_t integer(float x, float m, const Limits& limits) {
    const float magic = as_float(kIntMagic + kMore);
    if constexpr (kWithin) return as_uint(fused(x, m, magic));
    return as_uint(fmaxf(fminf(x * m, limits.high), limits.low) + magic);
  }

  template <bool kWithin>
  PYFMT_DEVICE static uint32_t fp8_pair(float a, float b) {
    if constexpr (kNarrow && !kWithin) {
      a = min_magnitude(a, as_float(kFp8Limit));
      b = min_magnitude(b, as_float(kFp8Limit));
    }
    return to_fp8<kLikeE5M2>(a, b);
  }

  PYFMT_DEVICE static float from_offset(uint32_t bits) {
    constexpr uint32_t zero = kIntBase + kIntTop;
    return as_float(bits) - as_float(zero);
  }

  PYFMT_DEVICE static void fp8_values(uint32_t codes, float* out) {
    if constexpr (kLikeE5M2) {
      // An E5M2 code is the high byte of a float16.
      const uint32_t low = pick_bytes(codes, 0, 0x1404), high = pick_bytes(codes, 0, 0x3424);
      out[0] = from_half(low);
      out[1] = from_half(low >> 16);
      out[2] = from_half(high);
      out[3] = from_half(high >> 16);
    } else {
      from_e4m3(codes, out, out + 1);
      from_e4m3(codes >> 16, out + 2, out + 3);
    }
    if constexpr (kNarrow) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = out[i] * as_float(kFp8Unscale);
    }
  }

  PYFMT_DEVICE static void split(const uint32_t* in, uint32_t* bytes) {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int w = 0; w < 4; ++w) bytes[w] = in[w];
    } else {
      bytes[0] = spread6(in[0]);
      bytes[1] = spread6(in[0] >> 24 | in[1] << 8);
      bytes[2] = spread6(in[1] >> 16 | in[2] << 16);
      bytes[3] = spread6(in[2] >> 8);
    }
  }
};

}  // namespace cuda
}  // namespace pyfmt
