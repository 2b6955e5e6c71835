// SPDX-License-Identifier: Apache-2.0
// Decoding for few tokens, where the integer pipe is what runs out: codes of integers as subnormal
// bfloat16 numbers.
//
// The low eight bits of a bfloat16 are worth their integer value times 2^-133 (the eighth is the
// first one of the exponent, which changes nothing there). So a code with its sign bit turned, n +
// half, needs one operation to be cut out, wherever it lies within those bits, and one
// multiply-add turns it into n times the factor, exactly.
//
// Floats of 6 bits by whole bytes, whose signs one operation spreads to where they are wanted;
// those of 8 bits with a running maximum in place of a search for infinities and NaN beforehand.
#pragma once

#include "decode.cuh"

namespace pyfmt {
namespace cuda {

// Bytes `low` and `high` of a and b (4 and more: of b) to the two halves, their signs spread.
template <uint32_t kLow, uint32_t kHigh>
PYFMT_DEVICE uint32_t signed_bytes(uint32_t a, uint32_t b) {
  return permute_bytes(a, b, kLow | (kLow | 8) << 4 | kHigh << 8 | (kHigh | 8) << 12);
}

// The larger of halves, as they count without signs.
PYFMT_DEVICE uint32_t largest_halves(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  return __vimax3_u16x2(a, b, c);
#else
  const auto larger = [](uint32_t x, uint32_t y) { return x > y ? x : y; };
  return larger(larger(a & 0xffffu, b & 0xffffu), c & 0xffffu) |
         larger(larger(a >> 16, b >> 16), c >> 16) << 16;
#endif
}

template <class E, Scale kScale>
struct SkinnyDecoder : Decoder<E, kScale> {
  using Base = Decoder<E, kScale>;
  static constexpr bool kSubnormal = Base::kInt && Base::kBits != 6;
  static constexpr bool kBlocks = kScale == Scale::kE8M0 || kScale == Scale::kE4M3;

  static constexpr bool kSixFloats = !Base::kInt && Base::kBits == 6;
  // Four codes of 6 bits make three bytes, so that codes of neighbouring fours stand at the same
  // bits of their bytes, none across a boundary.
  PYFMT_HD static constexpr int element(int j, int h) {
    return kSixFloats ? j / 4 * 8 + 4 * h + j % 4 : Base::element(j, h);
  }

  // What comes out is element * scale * 2^-kDown, so that factors stay within bfloat16.
  static constexpr int kDown = !kSubnormal ? Base::kDown : kBlocks ? 15 : 6;

  // E8M0 bytes that one factor serves: from a result of 2^-133 to a factor of 2^127.
  static constexpr int kLowest = kSubnormal ? 9 + Base::spec.frac : Base::kLowest;
  static constexpr int kHighest = kSubnormal ? kLowest + 127 : Base::kHighest;

  // The factor of an E8M0 byte, for codes in the lowest bits; `more`: for those 4 bits higher.
  template <bool kAll>
  PYFMT_DEVICE static Factor factor(uint32_t b) {
    if constexpr (!kSubnormal || kAll) {
      return Base::template factor<kAll>(b);
    } else {
      Factor f;
      f.by = (b + uint32_t(133 - kDown - Base::spec.frac)) * both(0x80u);
      return completed(f.by);
    }
  }

  PYFMT_DEVICE static void factors(uint32_t two, Factor* f) {
    if constexpr (!kSubnormal) {
      Base::factors(two, f);
    } else {
      float s[2];
      from_e4m3(two, &s[0], &s[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        s[i] = s[i] * as_float(power_of_two_bits(133 - kDown));
        f[i] = completed(pick_bytes(as_uint(s[i]), 0, 0x3232));
      }
    }
  }

  PYFMT_DEVICE static Factor unit_factor() {
    if constexpr (!kSubnormal) return Base::unit_factor();
    return {both(0x7f00u), both(0x8000u | (127 + 127 - 133 + Base::kBits - 1) << 7), both(0x7d00u)};
  }

  template <bool kAll>
  PYFMT_DEVICE static void scaled(const uint32_t* words, const Factor& f, uint32_t* out) {
    if constexpr (kSixFloats) {
      six_floats<0>(words[0], words[1], out);
      six_floats<2>(words[1], words[2], out + 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out[i] = multiply_pairs(out[i], f.by);
        if constexpr (kAll) out[i] = multiply_pairs(out[i], f.more);
      }
    } else if constexpr (!kSubnormal || kAll) {
      Base::template scaled<kAll>(words, f, out);
    } else if constexpr (Base::kBits == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t w = i < 2 ? words[0] : words[0] >> 8;
        const uint32_t cut = i & 1 ? mask_xor(w, both(0x00f0u), both(0x0080u))
                                   : mask_xor(w, both(0x000fu), both(0x0008u));
        out[i] = fused_pairs(cut, i & 1 ? f.more : f.by, f.also);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t w = i & 1 ? words[i / 2] >> 8 : words[i / 2];
        out[i] = fused_pairs(mask_xor(w, both(0x00ffu), both(0x0080u)), f.by, f.also);
      }
    }
  }

  // scaled<false> of bytes that are floats; `largest` has the largest magnitudes so far, in place,
  // of which `found_special` tells afterwards whether there was an infinity or a NaN.
  PYFMT_DEVICE static void scaled_finding(const uint32_t* words, const Factor& f, uint32_t* out,
                                          uint32_t& largest) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t w = words[i], even = w << kPlace & kMask & both(0x7fffu);
      const uint32_t odd = w >> (8 - kPlace) & kMask & both(0x7fffu);
      largest = largest_halves(largest, even, odd);
      out[2 * i] = multiply_pairs(even | (w << 8 & both(0x8000u)), f.by);
      out[2 * i + 1] = multiply_pairs(odd | (w & both(0x8000u)), f.by);
    }
  }
  PYFMT_DEVICE static bool found_special(uint32_t largest) {
    constexpr uint32_t kFirst = (0x80u - Base::kCarry) << kPlace;
    return ((largest + both(0x8000u - kFirst)) & both(0x8000u)) != 0;
  }

 private:
  // A float's magnitude starts at this bit, so that its exponent starts at bfloat16's.
  static constexpr int kPlace = 7 - Base::spec.man;
  static constexpr uint32_t kMask = both(0x8000u | Base::spec.magnitude_mask() << kPlace);

  // Two fours of codes, which start at bytes kFirst and kFirst + 3 of `low` and `high`. A code in
  // the upper six bits of a byte needs its sign spread, a shift and a mask; where there is room, a
  // multiplication copies a code to two places, for sign and magnitude.
  template <uint32_t kFirst>
  PYFMT_DEVICE static void six_floats(uint32_t low, uint32_t high, uint32_t* out) {
    constexpr uint32_t f = kFirst, kTwo = (f | (f + 1) << 4) + ((f + 3) << 8 | (f + 4) << 12);
    const uint32_t head = pick_bytes(low, high, kTwo), tail = pick_bytes(low, high, kTwo + 0x1111u);
    if constexpr (kPlace + 5 < 10) {
      out[0] = (head & both(0x3fu)) * ((1u << 10) + (1u << kPlace)) & kMask;
      out[2] = (tail & both(0x3f0u)) * ((1u << 6) + (1u << (kPlace - 4))) & kMask;
    } else {
      out[0] = lifted(signed_bytes<0, 2>(head << 2, 0));
      out[2] = lifted(signed_bytes<1, 3>(tail << 6, 0));
    }
    out[1] = lifted(signed_bytes<1, 3>(head << 4, 0));
    out[3] = lifted(signed_bytes<f + 2, f + 5>(low, high));
  }
  PYFMT_DEVICE static uint32_t lifted(uint32_t halves) { return halves << (kPlace - 2) & kMask; }

  // -half * 2^-133 * by, and by / 16.
  PYFMT_DEVICE static Factor completed(uint32_t by) {
    return {by, multiply_pairs(by, both(0x8000u | uint32_t(Base::kHalf))),
            Base::kBits == 4 ? multiply_pairs(by, both(0x3d80u)) : 0};
  }
};

}  // namespace cuda
}  // namespace pyfmt
