// SPDX-License-Identifier: Apache-2.0
// Decoding for few tokens, where the integer pipe is what runs out: codes of integers as subnormal
// bfloat16 numbers.
//
// The low eight bits of a bfloat16 are worth their integer value times 2^-133 (the eighth is the
// first one of the exponent, which changes nothing there). So a code with its sign bit turned, n +
// half, needs one operation to be cut out, wherever it lies within those bits, and one
// multiply-add turns it into n times the factor, exactly.
#pragma once

#include "decode.cuh"

namespace pyfmt {
namespace cuda {

template <class E, Scale kScale>
struct SkinnyDecoder : Decoder<E, kScale> {
  using Base = Decoder<E, kScale>;
  static constexpr bool kSubnormal = Base::kInt && Base::kBits != 6;
  static constexpr bool kBlocks = kScale == Scale::kE8M0 || kScale == Scale::kE4M3;

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
    if constexpr (!kSubnormal || kAll) {
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

 private:
  // -half * 2^-133 * by, and by / 16.
  PYFMT_DEVICE static Factor completed(uint32_t by) {
    return {by, multiply_pairs(by, both(0x8000u | uint32_t(Base::kHalf))),
            Base::kBits == 4 ? multiply_pairs(by, both(0x3d80u)) : 0};
  }
};

}  // namespace cuda
}  // namespace pyfmt
