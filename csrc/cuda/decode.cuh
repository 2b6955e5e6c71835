// SPDX-License-Identifier: Apache-2.0
// Packed codes to bfloat16 pairs, exactly, for tensor cores: the one place where the matrix kernels
// learn what a code means.
//
// Codes come in units of whole 32-bit words as they lie in memory. A unit's elements leave in an
// order that costs the fewest instructions; `Decoder::element` says which, and whoever multiplies
// puts the other operand in the same order.
#pragma once

#include "device.cuh"

namespace pyfmt {
namespace cuda {

// ---- bfloat16 pairs: IEEE, subnormals and all -------------------------------------------------

#if !defined(__CUDA_ARCH__)
// One half of each operand, rounded once: the sums and products that decoding needs are exact.
template <class Operation>
PYFMT_DEVICE uint32_t each_half(uint32_t a, uint32_t b, uint32_t c, Operation of) {
  uint32_t d = 0;
  for (int h = 0; h < 32; h += 16) {
    const float x = as_float(a >> h << 16), y = as_float(b >> h << 16), z = as_float(c >> h << 16);
    d |= (codec::bf16_from_float<uint32_t>(as_uint(of(x, y, z))) & 0xffffu) << h;
  }
  return d;
}
#endif

PYFMT_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return each_half(a, b, 0, [](float x, float y, float) { return x * y; });
#endif
}

PYFMT_DEVICE uint32_t add_pairs(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return each_half(a, b, 0, [](float x, float y, float) { return x + y; });
#endif
}

PYFMT_DEVICE uint32_t fused_pairs(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return each_half(a, b, c, [](float x, float y, float z) { return fused(x, y, z); });
#endif
}

// (a & mask) ^ turn in one instruction, which the compiler makes two where both are constants.
PYFMT_DEVICE uint32_t mask_xor(uint32_t a, uint32_t mask, uint32_t turn) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(mask), "r"(turn));
  return d;
#else
  return (a & mask) ^ turn;
#endif
}

// The same 16 bits in both halves.
PYFMT_HD constexpr uint32_t both(uint32_t half) {
  return half * 0x10001u;
}

// ---- units ------------------------------------------------------------------------------------

// What multiplies the elements of a block: `by`, for integers with `also` added; where one factor
// cannot span the distance, `more` once again.
struct Factor {
  uint32_t by, also, more;
};

// Elements E with scales of one kind; a float scale kind stands for integers left as they are.
// E: e2m1, e2m3, e3m2, e4m3fn, e5m2ieee and the integers of 4, 6 and 8 bits. kInOrder: elements
// leave in their own order, at half an instruction each.
template <class E, Scale kScale, bool kInOrder = false>
struct Decoder {
  static constexpr ElementSpec spec = E::spec;
  static constexpr int kBits = spec.bits();
  static constexpr bool kInt = spec.is_int();
  static_assert(kBits == 4 || kBits == 6 || kBits == 8, "elements have 4, 6 or 8 bits");

  static constexpr int kElements = kBits == 6 ? 16 : 8;  // of a unit
  static constexpr int kWords = kElements * kBits / 32;  // that hold them packed
  static constexpr int kPairs = kElements / 2;           // words that come out

  // Which element of the unit stands in half h (0: low) of the j-th word that comes out.
  PYFMT_HD static constexpr int element(int j, int h) {
    if (kInOrder) return 2 * j + h;
    return kBits == 8 ? j / 2 * 4 + j % 2 + 2 * h : j + kPairs * h;
  }

  // What comes out is element * scale * 2^-kDown: E4M3 scales of e2m1 elements reach beyond what
  // one factor can hold. Wherever kDown is not 0 a tensor scale follows, which takes it in.
  static constexpr int kDown = kScale == Scale::kE4M3 && !kInt ? 8 : 0;

  // ---- scales ---------------------------------------------------------------------------------

  // A float's bits in place are its value * 2^(bias - 127); an integer n of 4 or 6 bits in the
  // mantissa of 128 is 128 + half + n.
  static constexpr int kHalf = 1 << (kBits - 1);
  static constexpr bool kMagic = kInt && kBits < 8;
  // An integer of 8 bits comes as n * 2^-kSteps.
  static constexpr int kSteps = kInt && !kMagic ? 6 : 0;
  static constexpr int kField = kInt ? kSteps - spec.frac : 127 - spec.bias;
  // E8M0 bytes that one factor serves.
  static constexpr int kLowest = kInt ? 1 - kField : 0;
  static constexpr int kHighest = kMagic ? 247 + spec.frac : kInt ? 254 : 127 + spec.bias;

  // Whether the E8M0 byte b asks for `scaled<true>`: it is NaN, or out of one factor's reach.
  PYFMT_DEVICE static bool special_scale(uint32_t b) {
    return kScale == Scale::kE8M0 && b - uint32_t(kLowest) > uint32_t(kHighest - kLowest);
  }

  // The factor of an E8M0 byte; kAll: of any byte.
  template <bool kAll>
  PYFMT_DEVICE static Factor factor(uint32_t b) {
    Factor f;
    int field = int(b) + kField;
    f.more = 0;
    if constexpr (kAll) {
      constexpr int kMost = kMagic ? 247 : 254;
      const int whole = field;
      field = field < 1 ? 1 : field > kMost ? kMost : field;
      f.more = b == 255 ? both(0x7fffu) : both(uint32_t(127 + whole - field) << 7);
    }
    f.by = uint32_t(field) * both(0x80u);
    f.also = f.by + both(0x8000u + (7u << 7) + uint32_t(kHalf));  // -(128 + half) * by
    return f;
  }

  // The factors of two E4M3 codes, the low byte's first. NaN comes through.
  PYFMT_DEVICE static void factors(uint32_t two, Factor* f) {
    float s[2];
    from_e4m3(two, &s[0], &s[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (!kInt) s[i] = s[i] * as_float(power_of_two_bits(kField - kDown));
      f[i].by = pick_bytes(as_uint(s[i]), 0, 0x3232);
      f[i].also = kInt ? multiply_pairs(f[i].by, both(0xc300u + uint32_t(kHalf))) : 0;
      f[i].more = 0;
    }
  }

  // The factor that leaves integers as they are.
  PYFMT_DEVICE static Factor unit_factor() {
    return {both(0x3f80u), both(0xc300u + uint32_t(kHalf)), 0};
  }

  // ---- elements -------------------------------------------------------------------------------

  static constexpr bool kHasSpecials = spec.special != Special::kNone;
  // Added to a magnitude, carries out of it for the codes of infinity and NaN.
  static constexpr uint32_t kCarry = spec.special == Special::kIeee ? 1u << spec.man : 1u;

  // Not 0 where one of the words holds an infinity or a NaN: they ask for `scaled<true>`.
  template <int kCount>
  PYFMT_DEVICE static uint32_t special_codes(const uint32_t* words) {
    uint32_t any = 0;
    if constexpr (kHasSpecials) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) any |= (words[i] & 0x7f7f7f7fu) + kCarry * 0x01010101u;
    }
    return any & 0x80808080u;
  }

  // A unit of packed words to kPairs words of element * scale.
  // kAll: any scale and any code; else none that `special_scale` or `special_codes` tell of.
  template <bool kAll>
  PYFMT_DEVICE static void scaled(const uint32_t* words, const Factor& f, uint32_t* out) {
    if constexpr (kBits == 4) {
      kInt ? nibble_ints(words[0], out) : nibble_floats(words[0], out);
    } else if constexpr (kBits == 6) {
      kInt ? six_bit_ints(words, out) : six_bit_floats(words, out);
    } else {
      for (int i = 0; i < 2; ++i) {
        kInt ? byte_ints(words[i], out + 2 * i) : byte_floats<kAll>(words[i], out + 2 * i);
      }
    }
    constexpr bool kPlain = kScale != Scale::kE8M0 && kScale != Scale::kE4M3;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if constexpr (kPlain) {
        if constexpr (kMagic) out[i] = add_pairs(out[i], f.also);
      } else {
        out[i] = kMagic ? fused_pairs(out[i], f.by, f.also) : multiply_pairs(out[i], f.by);
      }
      if constexpr (kAll && kScale == Scale::kE8M0) out[i] = multiply_pairs(out[i], f.more);
    }
    if constexpr (kInOrder && kBits < 8) {
      uint32_t pairs[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) pairs[i] = out[i];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int first = 2 * i % kPairs;
        out[i] = pick_bytes(pairs[first], pairs[first + 1], 2 * i < kPairs ? 0x5410 : 0x7632);
      }
    }
  }

 private:
  // A float's magnitude starts at this bit, so that its exponent starts at bfloat16's.
  static constexpr int kPlace = 7 - spec.man;
  static constexpr uint32_t kMagnitude = both(spec.magnitude_mask() << kPlace);
  static constexpr uint32_t kSign = both(0x8000u);

  // A multiplication copies a field to two places at once, sign and magnitude; the mask drops
  // the rest of both copies, which must not overlap.
  PYFMT_DEVICE static void nibble_floats(uint32_t w, uint32_t* out) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t v = w >> (8 * i);
      out[2 * i] = (v & both(0x000fu)) * ((1u << 12) + (1u << kPlace)) & (kSign | kMagnitude);
      out[2 * i + 1] =
          (v & both(0x00f0u)) * ((1u << 8) + (1u << (kPlace - 4))) & (kSign | kMagnitude);
    }
  }
  PYFMT_DEVICE static void nibble_ints(uint32_t w, uint32_t* out) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = mask_xor(i ? w >> (4 * i) : w, both(0x000fu), both(0x4308u));
    }
  }

  // Sixteen codes of 6 bits fill six halves; codes i and i + 8 start at the same bit of their
  // halves, so three pairs of halves hold everything twice over. Two codes lie across a boundary.
  PYFMT_DEVICE static void pair_halves(const uint32_t* w, uint32_t* y) {
    y[0] = select_bits(w[0], w[1], 0x0000ffffu);
    y[1] = pick_bytes(w[0], w[2], 0x5432);
    y[2] = select_bits(w[1], w[2], 0x0000ffffu);
  }
  template <int kFrom>
  PYFMT_DEVICE static uint32_t place(uint32_t y) {
    constexpr int kUp = kPlace - kFrom;
    if constexpr (kUp >= 0 && kPlace + 5 < 10) {
      return (y & both(0x3fu << kFrom)) * ((1u << (10 - kFrom)) + (1u << (kUp < 0 ? 0 : kUp))) &
             (kSign | kMagnitude);
    } else {
      const uint32_t magnitude = kUp >= 0 ? y << (kUp < 0 ? 0 : kUp) : y >> (kUp < 0 ? -kUp : 0);
      return (y << (10 - kFrom) & kSign) | (magnitude & kMagnitude);
    }
  }
  PYFMT_DEVICE static void six_bit_floats(const uint32_t* w, uint32_t* out) {
    uint32_t y[3];
    pair_halves(w, y);
    out[0] = place<0>(y[0]);
    out[1] = place<6>(y[0]);
    out[3] = place<2>(y[1]);
    out[4] = place<8>(y[1]);
    out[6] = place<4>(y[2]);
    out[7] = place<10>(y[2]);
    const uint32_t top2 = (y[1] & both(0x3u)) * ((1u << 14) + (1u << (kPlace + 4)));
    out[2] = (y[0] >> (12 - kPlace) & both(0xfu << kPlace)) |
             (top2 & (kSign | both(1u << (kPlace + 4))));
    const uint32_t top4 = (y[2] & both(0xfu)) * ((1u << 12) + (1u << (kPlace + 2)));
    out[5] = (y[1] >> (14 - kPlace) & both(0x3u << kPlace)) |
             (top4 & (kSign | both(0x7u << (kPlace + 2))));
  }
  PYFMT_DEVICE static void six_bit_ints(const uint32_t* w, uint32_t* out) {
    constexpr uint32_t kCode = both(0x3fu), kBase = both(0x4320u);
    uint32_t y[3];
    pair_halves(w, y);
    out[0] = mask_xor(y[0], kCode, kBase);
    out[1] = mask_xor(y[0] >> 6, kCode, kBase);
    out[2] = mask_xor(y[0] >> 12, both(0x0fu), kBase) ^ (y[1] << 4 & both(0x30u));
    out[3] = mask_xor(y[1] >> 2, kCode, kBase);
    out[4] = mask_xor(y[1] >> 8, kCode, kBase);
    out[5] = mask_xor(y[1] >> 14, both(0x03u), kBase) ^ (y[2] << 2 & both(0x3cu));
    out[6] = mask_xor(y[2] >> 4, kCode, kBase);
    out[7] = mask_xor(y[2] >> 10, kCode, kBase);
  }

  template <bool kAll>
  PYFMT_DEVICE static void byte_floats(uint32_t w, uint32_t* out) {
    if constexpr (kInOrder) w = pick_bytes(w, 0, 0x3120);
    out[0] = (w << 8 & kSign) | (w << kPlace & kMagnitude);
    out[1] = (w & kSign) | (w >> (8 - kPlace) & kMagnitude);
    if constexpr (kAll) {
      // Codes whose magnitude carries get the exponent of infinity and NaN.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t carried = (out[i] & kMagnitude) + both(kCarry << kPlace);
        out[i] |= (carried >> (kPlace + 7) & both(1u)) * 0x7f80u;
      }
    }
  }
  // Below 2^-125 bfloat16 is evenly spaced: a byte in the lower half of its 16 bits, its sign
  // turned into an offset, is a number of steps of 2^-133 as it stands. One multiply-add makes them
  // 2^-6.
  PYFMT_DEVICE static void byte_ints(uint32_t w, uint32_t* out) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t steps = kInOrder ? pick_bytes(w, 0, i ? 0x4342 : 0x4140) ^ both(0x0080u)
                                      : mask_xor(i ? w >> 8 : w, both(0x00ffu), both(0x0080u));
      out[i] = fused_pairs(steps, both(0x7f00u), both(0xc000u));
    }
  }
};

}  // namespace cuda
}  // namespace pyfmt
