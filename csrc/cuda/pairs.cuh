// SPDX-License-Identifier: Apache-2.0
// Two bfloat16 numbers a register: codes of E2M1 and of 4-bit integers under power-of-two scales,
// at half the instructions of float32. Such a product is exact in bfloat16 (or is next to nothing,
// which rounds to zero in either width), so that only the rounding to the grid rounds.
#pragma once

#include "coder.cuh"

namespace pyfmt {
namespace cuda {
namespace pairs {

#if !defined(PYFMT_SM89)
PYFMT_DEVICE uint32_t each(uint32_t a, uint32_t b, uint32_t c,
                           uint32_t (*f)(uint32_t, uint32_t, uint32_t)) {
  const uint32_t low = f(a & 0xffffu, b & 0xffffu, c & 0xffffu);
  return low | f(a >> 16, b >> 16, c >> 16) << 16;
}
// a * b + c, rounded once: float64 holds the product, and what it drops from the sum is kept as a
// last bit that no tie survives.
PYFMT_DEVICE uint32_t fused_one(uint32_t a, uint32_t b, uint32_t c) {
  const double sum =
      double(as_float(a << 16)) * double(as_float(b << 16)) + double(as_float(c << 16));
  const float near = float(sum);
  uint32_t bits = as_uint(near);
  if (double(near) != sum && near == near) {
    const double size = sum < 0 ? -sum : sum;
    if (double(as_float(bits & 0x7fffffffu)) > size) bits -= 1;
    bits |= 1;
  }
  return codec::bf16_from_float<uint32_t>(bits);
}
#endif

// Lane-wise a * b + c, rounded once.
PYFMT_DEVICE uint32_t fused(uint32_t a, uint32_t b, uint32_t c) {
#if defined(PYFMT_SM89)
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return each(a, b, c, fused_one);
#endif
}

// Adding -0 changes no product, nor the sign of a zero.
PYFMT_DEVICE uint32_t times(uint32_t a, uint32_t b) {
  return fused(a, b, 0x80008000u);
}

// Magnitudes compared, the sign of a kept; b must be positive.
PYFMT_DEVICE uint32_t min_magnitude(uint32_t a, uint32_t b) {
#if defined(PYFMT_SM89)
  uint32_t d;
  asm("min.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return each(a, b, 0, [](uint32_t x, uint32_t y, uint32_t) {
    return L::min(x & 0x7fffu, y) | (x & 0x8000u);
  });
#endif
}
PYFMT_DEVICE uint32_t max_magnitude(uint32_t a, uint32_t b) {
#if defined(PYFMT_SM89)
  uint32_t d;
  asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return each(a, b, 0, [](uint32_t x, uint32_t y, uint32_t) {
    return L::max(x & 0x7fffu, y) | (x & 0x8000u);
  });
#endif
}

PYFMT_DEVICE uint32_t two(float low, float high) {
  return pick_bytes(as_uint(low), as_uint(high), 0x7632);
}

// Pairs (a, b), ... of four rows to a word: the nibbles of the a's in its low half, first row
// lowest, those of the b's in its high half. kWithin: no number exceeds the largest.
template <class E, bool kWithin>
PYFMT_DEVICE uint32_t nibbles(const uint32_t (&x)[4], uint32_t multipliers, const Limits& limits) {
  constexpr ElementSpec spec = E::spec;
  uint32_t r[4];
  if constexpr (spec.is_int()) {
    static_assert(spec.bits() == 4, "four bits");
    // 8 steps above 128 steps: bfloat16 counts single steps there, and the low four bits of the
    // sum are the code plus 8.
    constexpr uint32_t base = 0x4308u - uint32_t(spec.frac) * (1u << 7);
    const uint32_t low = two(limits.low, limits.low), high = two(limits.high, limits.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kWithin) {
        r[i] = fused(x[i], multipliers, base * 0x10001u);
      } else {
        // On either side of zero its own limit: `low` and `high` differ in clip "full".
        const uint32_t y = times(x[i], multipliers);
        const uint32_t sign = pick_signs(y, 0, 0x3311);
        const uint32_t limit = (sign & low & 0x7fff7fffu) | (~sign & high);
        r[i] = fused(min_magnitude(y, limit), 0x3f803f80u, base * 0x10001u);
      }
    }
    // Whole numbers add up without masks; what the exponents add is known beforehand.
    constexpr uint32_t excess = (base - 8u) * 0x10001u * 0x1111u;
    const uint32_t sum = ((r[3] * 16u + r[2]) * 16u + r[1]) * 16u + r[0];
    return (sum - excess) ^ 0x88888888u;
  } else {
    static_assert(spec == elements::e2m1, "E2M1");
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t y = times(x[i], multipliers);
      if constexpr (!kWithin) y = min_magnitude(y, 0x40c040c0u);
      // To 2^max(e_y, 0), with y's sign, times 64: the adder rounds y to steps of half the power.
      const uint32_t power = max_magnitude(y & 0xff80ff80u, 0x3f803f80u);
      const uint32_t sum = fused(power, 0x42804280u, y);
      // Times 2^-126 the two exponent bits and the mantissa bit of the code are bits 8, 7 and 6.
      r[i] = times(fused(power, 0xc280c280u, sum), 0x00800080u);
    }
    // Signs in the way (bits 15 and 31, and what the shifts make of them) are left out by masks.
    const uint32_t low = r[1] * 16u + r[0], high = r[3] * 16u + r[2];
    const uint32_t codes = select_bits(low >> 6, high << 2, 0x00ff00ffu);
    const uint32_t signs =
        select_bits(pick_signs(x[0], x[2], 0x7351), pick_signs(x[1], x[3], 0x7351), 0x0f0f0f0fu);
    return select_bits(codes, signs, 0x77777777u);
  }
}

// Whether two codes at once serve an element, for bfloat16 and E8M0 scales.
template <class E>
constexpr bool serve() {
  return E::spec == elements::e2m1 || E::spec == elements::int4q2;
}

}  // namespace pairs
}  // namespace cuda
}  // namespace pyfmt
