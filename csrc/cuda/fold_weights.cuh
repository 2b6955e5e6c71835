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

// pick_bytes by four places below 8, whatever stands above them: without a mask for the latter.
PYFMT_DEVICE uint32_t look_up(uint32_t a, uint32_t b, uint32_t places) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(places));
  return d;
#else
  return pick_bytes(a, b, places & 0x7777u);
#endif
}

// A float16 pair as two E4M3 codes, the low half's first.
PYFMT_DEVICE uint32_t float16_to_e4m3(uint32_t pair) {
#if defined(PYFMT_SM89)
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(d) : "r"(pair));
  return d;
#else
  return to_fp8<false>(from_half(pair), from_half(pair >> 16));
#endif
}

// Sixteen 6-bit floats to float16 pairs, codes i and i + 8 in word i: signs on top, magnitudes from
// bit kPlace on. The two start at the same bit of their halves, so three pairs of halves hold all.
template <int kPlace>
struct PlacedSixBits {
  static constexpr uint32_t kSign = both(0x8000u), kMagnitude = both(0x1fu << kPlace);

  PYFMT_DEVICE static void place_all(const uint32_t* w, uint32_t* out) {
    const uint32_t y[3] = {select_bits(w[0], w[1], 0x0000ffffu), pick_bytes(w[0], w[2], 0x5432),
                           select_bits(w[1], w[2], 0x0000ffffu)};
    out[0] = place<0>(y[0]);
    out[1] = place<6>(y[0]);
    out[3] = place<2>(y[1]);
    out[4] = place<8>(y[1]);
    out[6] = place<4>(y[2]);
    out[7] = place<10>(y[2]);
    // Two codes lie across a boundary.
    out[2] = select_bits(y[0] >> (12 - kPlace), y[1] << (kPlace + 4), both(0xfu << kPlace)) &
             both(0x1fu << kPlace);
    out[2] = select_bits(y[1] << 14, out[2], kSign);
    out[5] = select_bits(y[1] >> (14 - kPlace), y[2] << (kPlace + 2), both(0x3u << kPlace)) &
             both(0x1fu << kPlace);
    out[5] = select_bits(y[2] << 12, out[5], kSign);
  }

 private:
  template <int kFrom>
  PYFMT_DEVICE static uint32_t place(uint32_t y) {
    constexpr int kUp = kPlace - kFrom;
    const uint32_t magnitude = kUp >= 0 ? y << (kUp < 0 ? 0 : kUp) : y >> (kUp < 0 ? -kUp : 0);
    return select_bits(y << (10 - kFrom), magnitude & kMagnitude, kSign);
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

  // One block: of zeros, with any scale, or with one within the window. place: its exponent's in
  // the table.
  PYFMT_DEVICE static void decode_block(const uint32_t* words, uint32_t place, uint32_t table,
                                        uint32_t* out) {
    if constexpr (kLookup) {
      lookup(words, table + place * kEntryBytes, out);
    } else {
      multiply(words, int(place), out);
    }
  }

 private:
  PYFMT_DEVICE static void lookup(const uint32_t* words, uint32_t entry, uint32_t* out) {
    uint32_t t[4];
    if constexpr (kInt) {
      const uint4 v = hopper::load_shared16(entry);
      t[0] = v.x, t[1] = v.y, t[2] = v.z, t[3] = v.w;
    } else {
      const uint2 v = hopper::load_shared8(entry);
      t[0] = v.x, t[1] = v.y;
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t word = words[w], up = word << 4, places = word & 0x77777777u;
      if constexpr (kInt) {
        out[2 * w] = select_bits(look_up(t[2], t[3], places), look_up(t[0], t[1], places),
                                 pick_signs(up, word, 0x5140));
        out[2 * w + 1] =
            select_bits(look_up(t[2], t[3], places >> 16), look_up(t[0], t[1], places >> 16),
                        pick_signs(up, word, 0x7362));
      } else {
        out[2 * w] =
            select_bits(pick_bytes(up, word, 0x5140), look_up(t[0], t[1], places), 0x80808080u);
        out[2 * w + 1] = select_bits(pick_bytes(up, word, 0x7362),
                                     look_up(t[0], t[1], places >> 16), 0x80808080u);
      }
    }
  }

  // The elements' exponents in float16's place make numbers 2^kField too small.
  static constexpr int kField = 15 - spec.bias;
  // The exponent of the largest factor may be more than float16 has.
  static constexpr int kLowest = kField + F::kLow - kDown;
  static constexpr int kTop = kLowest + kExponents - 1;
  static constexpr int kTwice = kTop <= 15 ? 0 : kLowest >= 1 ? 15 : kTop - 15;

  // Codes i, i + 1, i + 8, i + 9 of the pairs i and i + 1.
  PYFMT_DEVICE static uint32_t four(const uint32_t* pairs) {
    if constexpr (kE5M2) return pick_bytes(pairs[0], pairs[1], 0x7351);
    return pick_bytes(float16_to_e4m3(pairs[0]), float16_to_e4m3(pairs[1]), 0x5140);
  }

  PYFMT_DEVICE static void multiply(const uint32_t* words, int place, uint32_t* out) {
    const uint32_t factor = uint32_t(place + (kLowest - kTwice + 15)) * both(0x400u);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t pairs[8];  // codes i and i + 8 of sixteen
      PlacedSixBits<10 - spec.man>::place_all(words + 3 * h, pairs);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if constexpr (kTwice != 0) {
          pairs[i] = multiply_float16(pairs[i], both(uint32_t(kTwice + 15) << 10));
        }
        pairs[i] = multiply_float16(pairs[i], factor);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t a = four(pairs + 4 * i), b = four(pairs + 4 * i + 2);
        out[4 * h + i] = pick_bytes(a, b, 0x5410);
        out[4 * h + i + 2] = pick_bytes(a, b, 0x7632);
      }
    }
  }
};

}  // namespace cuda
}  // namespace pyfmt
