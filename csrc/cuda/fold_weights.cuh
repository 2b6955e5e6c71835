// SPDX-License-Identifier: Apache-2.0
// Packed weights as the fp8 operand of products (matmul_wide_turns_codes.cuh). The values are those
// of Fold<E, false>, in fewer instructions.
//
// Elements of 4 bits are looked up: a table in shared memory has the fp8 numbers of all codes for
// each exponent of the window. Elements of 6 bits become float16 numbers, whose upper bytes are
// E5M2, and are multiplied.
#pragma once

#include "decode.cuh"
#include "fold.cuh"
#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {

// Lane-wise product of float16 pairs, where it is exact.
PYFMT_DEVICE uint32_t multiply_float16(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  uint32_t d = 0;
  for (int h = 0; h < 32; h += 16) {
    const float product = from_half(a >> h) * from_half(b >> h);
    d |= (codec::half_from_float<uint32_t>(as_uint(product)) & 0xffffu) << h;
  }
  return d;
#endif
}

// Sixteen 6-bit floats as float16 pairs, codes i and i + 8 in pair i: magnitudes from bit kPlace
// on, and signs. The two codes of a pair start at the same bit of their halves, so three words of
// halves hold all.
template <int kPlace>
struct PlacedSixBits {
  static constexpr uint32_t kMagnitude = both(0x1fu << kPlace);
  uint32_t y[3];

  PYFMT_DEVICE explicit PlacedSixBits(const uint32_t* w)
      : y{select_bits(w[0], w[1], 0x0000ffffu), pick_bytes(w[0], w[2], 0x5432),
          select_bits(w[1], w[2], 0x0000ffffu)} {}

  PYFMT_DEVICE void magnitudes(uint32_t* out) const {
    out[0] = place<0>(y[0]);
    out[1] = place<6>(y[0]);
    out[3] = place<2>(y[1]);
    out[4] = place<8>(y[1]);
    out[6] = place<4>(y[2]);
    out[7] = place<10>(y[2]);
    // Two codes lie across a boundary.
    out[2] =
        select_bits(y[0] >> (12 - kPlace), y[1] << (kPlace + 4), both(0xfu << kPlace)) & kMagnitude;
    out[5] =
        select_bits(y[1] >> (14 - kPlace), y[2] << (kPlace + 2), both(0x3u << kPlace)) & kMagnitude;
  }
  // Four bytes with the signs of pairs 2 j and 2 j + 1: of codes 2 j, 2 j + 1, and 8 further. A
  // product has a word at two places, whose signs do not meet.
  PYFMT_DEVICE uint32_t with_signs(int j, uint32_t four) const {
    constexpr uint32_t kLow = 0x00ff00ffu;
    const uint32_t signs = j == 0   ? (y[0] & 0x08200820u) * (1u << 2 | 1u << 4)
                           : j == 1 ? (y[1] & 0x00820082u) * (1u << 6 | 1u << 8)
                           : j == 2 ? select_bits(y[1] >> 6, y[2] << 12, kLow)
                                    : select_bits(y[2] >> 2, y[2], kLow);
    return select_bits(signs, four, 0x80808080u);
  }

 private:
  template <int kFrom>
  PYFMT_DEVICE static uint32_t place(uint32_t word) {
    constexpr int kUp = kPlace - kFrom;
    return (kUp >= 0 ? word << (kUp < 0 ? 0 : kUp) : word >> (kUp < 0 ? -kUp : 0)) & kMagnitude;
  }
};

// kXE5M2: what the activations are. kE5M2: what the weights become (two binary digits fit E5M2,
// whose bytes need no conversion). kWide: exponents are in the window of E5M2, not of E4M3.
template <class E, bool kXE5M2, bool kE5M2 = E::spec.bits() == 6 && E::spec.man == 2,
          bool kWide = false>
struct FoldWeights {
  using F = Fold<E, kWide>;
  static constexpr ElementSpec spec = E::spec;
  static constexpr int kBits = spec.bits();
  static constexpr bool kLookup = kBits == 4, kInt = spec.is_int();
  static_assert(!kLookup || kE5M2 == kWide, "the table has numbers of the window's type");
  using Type = hopper::Fp8<kE5M2, kXE5M2>;
  static constexpr int kDown = kE5M2 && !kWide ? 4 : 0;

  // ---- the table ------------------------------------------------------------------------------

  static constexpr int kExponents = F::kHigh - F::kLow + 1;
  static constexpr uint32_t kEntryBytes = kInt ? 16 : 8;
  static constexpr int kEntries = kExponents <= 16 ? 16 : 32;

  PYFMT_DEVICE static void fill_table(uint32_t at, int thread) {
    if constexpr (kLookup) {
      if (thread >= kEntries) return;
      const int e = F::kLow + (thread < kExponents ? thread : kExponents - 1);
      const typename F::Table t(as_float(uint32_t(e + 127) << 23));
      const uint32_t to = at + uint32_t(thread) * kEntryBytes;
      hopper::store_shared(to, t.low);
      hopper::store_shared(to + 4, t.high);
      if constexpr (kInt) {
        hopper::store_shared(to + 8, t.negative_low);
        hopper::store_shared(to + 12, t.negative_high);
      }
    }
  }

  // What a scale byte is to be added to: the byte's distance from the window's lowest exponent. A
  // row that does not fold gives some place too, and its sums mean nothing.
  PYFMT_DEVICE static int offset_of(float row_scale) {
    return -int(as_uint(row_scale) >> 23) - F::kLow;
  }

  // ---- codes ----------------------------------------------------------------------------------

  // What a block's scale has its codes become, by its exponent's place in the table: of zeros, with
  // any scale, or of one within the window.
  struct Meaning {
    uint32_t v[kLookup ? kEntryBytes / 4 : 1];
  };
  PYFMT_DEVICE static Meaning meaning(uint32_t place, uint32_t table) {
    Meaning of;
    if constexpr (!kLookup) {
      of.v[0] = (place + uint32_t(kLowest - kTwice + 15)) * both(0x400u);
    } else if constexpr (kInt) {
      const uint4 v = hopper::load_shared16(table + place * kEntryBytes);
      of.v[0] = v.x, of.v[1] = v.y, of.v[2] = v.z, of.v[3] = v.w;
    } else {
      const uint2 v = hopper::load_shared8(table + place * kEntryBytes);
      of.v[0] = v.x, of.v[1] = v.y;
    }
    return of;
  }

  // A block's 32 codes are decoded by kParts.
  static constexpr int kParts = kLookup ? 4 : 2;
  template <int kPart>
  PYFMT_DEVICE static void decode_part(const uint32_t* words, const Meaning& of, uint32_t* out) {
    if constexpr (kLookup) {
      look_up_word(words[kPart], of.v, out + 2 * kPart);
    } else {
      multiply(words + 3 * kPart, of.v[0], out + 4 * kPart);
    }
  }
  PYFMT_DEVICE static void decode_block(const uint32_t* words, uint32_t place, uint32_t table,
                                        uint32_t* out) {
    const Meaning of = meaning(place, table);
    decode_part<0>(words, of, out);
    decode_part<1>(words, of, out);
    if constexpr (kParts == 4) {
      decode_part<2>(words, of, out);
      decode_part<3>(words, of, out);
    }
  }

 private:
  // Eight codes of 4 bits.
  PYFMT_DEVICE static void look_up_word(uint32_t word, const uint32_t* t, uint32_t* out) {
    const uint32_t up = word << 4, places = word & 0x77777777u;
    if constexpr (kInt) {
      out[0] = select_bits(permute_bytes(t[2], t[3], places), permute_bytes(t[0], t[1], places),
                           pick_signs(up, word, 0x5140));
      out[1] = select_bits(permute_bytes(t[2], t[3], places >> 16),
                           permute_bytes(t[0], t[1], places >> 16), pick_signs(up, word, 0x7362));
    } else {
      out[0] =
          select_bits(pick_bytes(up, word, 0x5140), permute_bytes(t[0], t[1], places), 0x80808080u);
      out[1] = select_bits(pick_bytes(up, word, 0x7362), permute_bytes(t[0], t[1], places >> 16),
                           0x80808080u);
    }
  }

  // The elements' exponents in float16's place make numbers 2^kField too small. Float16 numbers
  // 2^-kHalf of the fp8 ones have the same exponents, and their upper bits, one further up, are
  // E4M3; conversions are slow.
  static constexpr int kField = 15 - spec.bias, kHalf = kE5M2 ? 0 : 8;
  // The exponent of the largest factor may be more than float16 has.
  static constexpr int kLowest = kField + F::kLow - kDown - kHalf;
  static constexpr int kTop = kLowest + kExponents - 1;
  static constexpr int kTwice = kTop <= 15 ? 0 : kLowest >= 1 ? 15 : kTop - 15;

  // Sixteen codes of 6 bits.
  PYFMT_DEVICE static void multiply(const uint32_t* words, uint32_t factor, uint32_t* out) {
    const PlacedSixBits<10 - spec.man> placed(words);
    uint32_t pairs[8];  // codes i and i + 8, in the upper bytes of their halves
    placed.magnitudes(pairs);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kTwice != 0) {
        pairs[i] = multiply_float16(pairs[i], both(uint32_t(kTwice + 15) << 10));
      }
      pairs[i] = multiply_float16(pairs[i], factor);
    }
    uint32_t fours[4];  // codes 2 j, 2 j + 1, and 8 further
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t a = pairs[2 * j], b = pairs[2 * j + 1];
      fours[j] = placed.with_signs(j, kE5M2 ? pick_bytes(a, b, 0x7351) : (a >> 7) + (b << 1));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      out[i] = pick_bytes(fours[2 * i], fours[2 * i + 1], 0x5410);
      out[i + 2] = pick_bytes(fours[2 * i], fours[2 * i + 1], 0x7632);
    }
  }
};

}  // namespace cuda
}  // namespace pyfmt
