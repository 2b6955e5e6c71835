// SPDX-License-Identifier: Apache-2.0
// Codes with E8M0 scales as fp8 numbers, relative to one power of two for a whole row. An element
// times a power of two is an fp8 number as long as the power stays within a window.
#pragma once

#include "coder.cuh"
#include "expand.h"
#include "scale.cuh"

namespace pyfmt {
namespace cuda {

// Scales of a product of two rows then lie within 2^-100 and 2^100: the epilogue of a GEMM may
// multiply by them in any order.
constexpr int kLargestBase = 50;

template <class E, bool kE5M2>
struct Fold {
  using C = Coder<E>;
  static constexpr ElementSpec from = E::spec;
  static constexpr ElementSpec to = kE5M2 ? elements::e5m2ieee : elements::e4m3fn;
  static constexpr int kBits = from.bits();

  // The largest magnitude of all codes: an integer's lone -2^(bits - 1) counts.
  static constexpr uint32_t largest_bits(int e) {
    return from.is_int() ? ElementSpec::scaled_bits(1, from.step_exp() + kBits - 1 + e)
                         : ElementSpec::scaled_bits(from.max_significand(), from.max_exp() + e);
  }
  static constexpr int highest() {
    int e = 0;
    while (largest_bits(e + 1) <= to.max_bits()) ++e;
    return e;
  }
  // The exponents that may be folded in, from the last bit of the one grid to that of the other.
  static constexpr int kHigh = highest();
  static constexpr int kLow = to.step_exp() - from.step_exp();
  static_assert(from.significand() <= to.man, "the element has more significant bits than fp8");

  // The bits of a word of packed codes that are not signs of zeros.
  static constexpr uint32_t magnitude_mask(int word) {
    uint32_t mask = 0;
    for (int b = 0; b < 32; ++b) {
      const bool sign = (32 * word + b) % kBits == kBits - 1;
      if (from.is_int() || !sign) mask |= 1u << b;
    }
    return mask;
  }

  // What a unit adds to its row's range: largest exponent byte + 1, and 256 - smallest above it.
  PYFMT_DEVICE static uint32_t range(const uint32_t* codes, uint32_t scale) {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kBits; ++i) any |= codes[i] & magnitude_mask(i);
    return any == 0 || scale == 255u ? 0u : (scale + 1) | (256u - scale) << 16;
  }

  // 32 codes times 2^e, for kLow <= e <= kHigh.
  PYFMT_DEVICE static void convert(const uint32_t* codes, int e, uint32_t* out) {
    const float p = as_float(uint32_t(e + 127) << 23);
    if constexpr (kBits == 4) {
      const Table t(p);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t word = codes[w], places = word & 0x77777777u;
        out[2 * w] = t.four(places, pick_bytes(word << 4, word, 0x5140));
        out[2 * w + 1] = t.four(places >> 16, pick_bytes(word << 4, word, 0x7362));
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v[16];
        C::decode(codes + h * C::kWords, v);
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
          const uint32_t low = to_fp8<kE5M2>(v[i] * p, v[i + 1] * p);
          const uint32_t high = to_fp8<kE5M2>(v[i + 2] * p, v[i + 3] * p);
          out[4 * h + i / 4] = pick_bytes(low, high, 0x5410);
        }
      }
    }
  }

  // fp8 of all sixteen 4-bit codes, eight by eight.
  struct Table {
    uint32_t low, high, negative_low = 0, negative_high = 0;

    PYFMT_DEVICE static uint32_t four_of(float p, float a, float b, float c, float d) {
      return pick_bytes(to_fp8<kE5M2>(a * p, b * p), to_fp8<kE5M2>(c * p, d * p), 0x5410);
    }
    PYFMT_DEVICE explicit Table(float p) {
      if constexpr (from.is_int()) {
        const float step = p * as_float(power_of_two_bits(from.step_exp()));
        low = four_of(step, 0.0f, 1.0f, 2.0f, 3.0f);
        high = four_of(step, 4.0f, 5.0f, 6.0f, 7.0f);
        negative_low = four_of(step, -8.0f, -7.0f, -6.0f, -5.0f);
        negative_high = four_of(step, -4.0f, -3.0f, -2.0f, -1.0f);
      } else {
        static_assert(from.is_int() || from == elements::e2m1, "no table for this element");
        low = four_of(p, 0.0f, 0.5f, 1.0f, 1.5f);
        high = four_of(p, 2.0f, 3.0f, 4.0f, 6.0f);
      }
    }
    // places: a code's low three bits in each of four nibbles; signs: its sign atop each byte.
    PYFMT_DEVICE uint32_t four(uint32_t places, uint32_t signs) const {
      const uint32_t positive = pick_bytes(low, high, places);
      if constexpr (from.is_int()) {
        const uint32_t negative = pick_bytes(negative_low, negative_high, places);
        return select_bits(negative, positive, ((signs >> 7) & 0x01010101u) * 255u);
      } else {
        return select_bits(signs, positive, 0x80808080u);
      }
    }
  };
};

// A row's base exponent from the range of its units: as near to zero as the window allows.
struct AnyBase {
  int exponent = 0;
  bool fits = true;

  PYFMT_DEVICE AnyBase(uint32_t range, int low, int high) {
    if (range == 0) return;
    const int top = int(range & 0xffffu) - 128, bottom = 129 - int(range >> 16);
    const int lowest = top - high, highest = bottom - low;
    exponent = max(lowest, min(highest, 0));
    fits = lowest <= highest && exponent >= -kLargestBase && exponent <= kLargestBase;
  }
};
template <class F>
struct Base : AnyBase {
  PYFMT_DEVICE explicit Base(uint32_t range) : AnyBase(range, F::kLow, F::kHigh) {}
};

// Where a row's threads meet: a warp, or a whole block of them.
template <bool kBlock>
PYFMT_DEVICE uint32_t range_of_row(uint32_t range, uint32_t* of_warp) {
  for (int far = 16; far; far /= 2) range = max_halves(range, __shfl_xor_sync(kAll, range, far));
  if constexpr (kBlock) {
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = range;
    __syncthreads();
    for (int i = 0; i < int(blockDim.x) / 32; ++i) range = max_halves(range, of_warp[i]);
  }
  return range;
}

// A row's scale, and its mark; by one thread.
PYFMT_DEVICE void store_base(const Folded& to, int64_t row, const AnyBase& base) {
  to.scale[row] = base.fits ? as_float(uint32_t(base.exponent + 127) << 23) : 0.0f;
  to.marks[row] = base.fits ? 0 : 1;
  if (!base.fits && to.total) atomicAdd(to.total, 1ull);
}

// Two words of this lane and two of a neighbour, `far` lanes away, as a square that is turned.
PYFMT_DEVICE void turn_square(uint32_t& a, uint32_t& b, int far) {
  const bool upper = threadIdx.x & unsigned(far);
  const uint32_t got = __shfl_xor_sync(kAll, upper ? a : b, far);
  (upper ? a : b) = got;
}

// One unit of a row to the panel; zeros beyond the row's end. All lanes of a warp call, with
// neighbouring units: four have one word each of every piece, and exchange them for whole pieces.
PYFMT_DEVICE void store_in_panel(const Folded& to, int64_t row, int64_t unit,
                                 const uint32_t (&words)[8]) {
  uint32_t v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = words[i];
#pragma unroll
  for (int h = 0; h < 8; h += 4) {
    turn_square(v[h], v[h + 1], 1);
    turn_square(v[h + 2], v[h + 3], 1);
    turn_square(v[h], v[h + 2], 2);
    turn_square(v[h + 1], v[h + 3], 2);
  }
  if (unit * kUnit >= (to.columns + 127) / 128 * 128) return;
  uint4* out = reinterpret_cast<uint4*>(to.panel) + (unit / 4 * to.padded_rows + row) * 8;
  const int piece = int(unit & 3) ^ int(row & 7);
  out[piece] = make_uint4(v[0], v[1], v[2], v[3]);
  out[piece ^ 4] = make_uint4(v[4], v[5], v[6], v[7]);
}

// One unit of a row to where `to` has it; all lanes of a warp call, with neighbouring units.
PYFMT_DEVICE void store_folded(const Folded& to, int64_t row, int64_t unit,
                               const uint32_t (&words)[8], uint4* shared) {
  if (to.panel) return store_in_panel(to, row, unit, words);
  Stage<32>::store(to.fp8 + row * to.columns, unit, to.columns / kUnit, words, shared);
}

// One unit of a row; all lanes of a warp call, with neighbouring units.
template <class E, bool kE5M2>
PYFMT_DEVICE void store_unit(const Folded& to, int64_t row, int64_t unit,
                             const Base<Fold<E, kE5M2>>& base, const uint32_t* codes,
                             uint32_t scale, uint4* shared) {
  using F = Fold<E, kE5M2>;
  const int64_t units = to.columns / kUnit;
  uint32_t words[8];
  if (base.fits && scale != 255u) {
    const bool empty = F::range(codes, scale) == 0;
    F::convert(codes, empty ? 0 : int(scale) - 127 - base.exponent, words);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = base.fits ? 0x7f7f7f7fu : 0u;
  }
  store_folded(to, row, unit, words, shared);
  if (base.fits || !to.spare || unit >= units) return;
  const float s = as_float(codec::e8m0_decode<uint32_t>(scale));
  uint32_t* out = reinterpret_cast<uint32_t*>(to.spare + row * to.columns + unit * kUnit);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float v[16];
    Coder<E>::decode(codes + h * Coder<E>::kWords, v);
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      out[8 * h + i / 2] = to_halves<DType::kBF16>(v[i] * s, v[i + 1] * s);
    }
  }
}

}  // namespace cuda
}  // namespace pyfmt
