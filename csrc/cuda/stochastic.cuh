// SPDX-License-Identifier: Apache-2.0
// Stochastic rounding: codec.h's random numbers and codes, sixteen at a time.
#pragma once

#include "coder.cuh"

namespace pyfmt {
namespace cuda {

// What Philox4x32-10 adds in each round, two words a round.
struct RandomKeys {
  uint32_t k[20];
};

inline RandomKeys random_keys(uint64_t seed) {
  RandomKeys keys;
  uint32_t a = uint32_t(seed), b = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    keys.k[2 * round] = a;
    keys.k[2 * round + 1] = b;
    a += 0x9e3779b9u;
    b += 0xbb67ae85u;
  }
  return keys;
}

// a ^ b ^ c, with all bits flipped if asked; one instruction, which the compiler does not find.
PYFMT_DEVICE uint32_t xor_three(uint32_t a, uint32_t b, uint32_t c, bool flip) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  if (flip) {
    asm("lop3.b32 %0, %1, %2, %3, 0x69;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
#endif
  return flip ? ~(a ^ b ^ c) : a ^ b ^ c;
}

// The four random words of a counter: element 4 * counter + i has word i. kFlipped: with all bits
// flipped, where it costs nothing but for odd words.
template <bool kFlipped = false>
PYFMT_DEVICE void random_words(const RandomKeys& keys, uint32_t low, uint32_t high, uint32_t* w) {
  w[0] = low;
  w[1] = high;
  w[2] = w[3] = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(w[0]) * 0xd2511f53u, b = uint64_t(w[2]) * 0xcd9e8d57u;
    const bool flip = kFlipped && round == 9;
    w[0] = xor_three(uint32_t(b >> 32), w[1], keys.k[2 * round], flip);
    w[1] = flip ? ~uint32_t(b) : uint32_t(b);
    w[2] = xor_three(uint32_t(a >> 32), w[3], keys.k[2 * round + 1], flip);
    w[3] = flip ? ~uint32_t(a) : uint32_t(a);
  }
}

// The flipped words of sixteen elements, the first at `index`, a multiple of 16.
PYFMT_DEVICE void random_sixteen(const RandomKeys& keys, uint64_t index, uint32_t (&w)[16]) {
  const uint64_t counter = index / 4;
#pragma unroll
  for (uint32_t g = 0; g < 4; ++g) {
    random_words<true>(keys, uint32_t(counter) | g, uint32_t(counter >> 32), w + 4 * g);
  }
}

// The same for any index.
PYFMT_DEVICE void random_sixteen_from(const RandomKeys& keys, uint64_t index, uint32_t (&w)[16]) {
  uint32_t all[20];
#pragma unroll
  for (int g = 0; g < 5; ++g) {
    const uint64_t counter = index / 4 + uint64_t(g);
    random_words<true>(keys, uint32_t(counter), uint32_t(counter >> 32), all + 4 * g);
  }
#pragma unroll
  for (int i = 0; i < 18; ++i) all[i] = index & 2 ? all[i + 2] : all[i];
#pragma unroll
  for (int i = 0; i < 16; ++i) w[i] = index & 1 ? all[i + 1] : all[i];
}

// a + b and a * b + c rounded towards minus infinity, for 0 <= a < b and 0 <= c < a * b.
PYFMT_DEVICE float add_down(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rd(a, b);
#else
  const float step = b * as_float(power_of_two_bits(-23));
  return __builtin_floorf(a / step) * step + b;
#endif
}
PYFMT_DEVICE float fused_down(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rd(a, b, c);
#else
  const float near = fused(a, b, c);
  return near - a * b > c ? as_float(as_uint(near) - 1) : near;
#endif
}

template <class E>
struct Dither {
  using C = Coder<E>;
  static constexpr ElementSpec spec = E::spec;
  static constexpr int kBits = spec.bits();
  static constexpr bool kInt = spec.is_int();

  // Codes of get(i) * m for i = 0..15, rounded away from zero where the top 24 bits of word i are
  // less than the share of a step that is cut off; `random` has the words flipped. kWithin: none
  // exceeds the largest.
  //
  // Multiplied into float32's own subnormals, whose grid has the element's binades, a number has
  // its code above kCut bits of that share, and adding as many random bits rounds. False where
  // the sum's last bits cannot tell: then `exact` can.
  template <bool kWithin, class Get>
  PYFMT_DEVICE static bool quick(const Get& get, float m, const uint32_t (&random)[16],
                                 const Limits& limits, uint32_t* out) {
    uint32_t last = 0;
    // The upper halves of two sums: sign, code from bit kCut - 16 on.
    const auto pair = [&](int i, int j) {
      const uint32_t a = sum<kWithin>(get(i) * m, random[i], limits);
      const uint32_t b = sum<kWithin>(get(j) * m, random[j], limits);
      last = max_halves(last, pick_bytes(a, b, 0x5410));
      return pick_bytes(a, b, 0x7632);
    };
    if constexpr (kBits == 4) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        uint32_t q[4], t[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int first = 8 * w + i / 2 * 4 + i % 2;
          q[i] = pair(first, first + 2);
          // The code on top of its half.
          t[i] = q[i] << (28 - kCut);
          if constexpr (!kInt) t[i] = select_bits(q[i], t[i], 0x80008000u);
        }
        const uint32_t low = select_bits(t[1], t[0] >> 4, 0xf000f000u);
        const uint32_t high = select_bits(t[3], t[2] >> 4, 0xf000f000u);
        out[w] = pick_bytes(low, high, 0x7531);
        if constexpr (kInt) {
          const uint32_t signs = select_bits(pick_signs(q[0], q[2], 0x7531),
                                             pick_signs(q[1], q[3], 0x7531), 0x0f0f0f0fu);
          out[w] = negated(out[w], signs, 0x77777777u);
        }
      }
    } else {
      uint32_t bytes[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t q[2] = {pair(4 * w, 4 * w + 1), pair(4 * w + 2, 4 * w + 3)};
        if constexpr (kInt) {
          bytes[w] =
              negated(pick_bytes(q[0], q[1], 0x6420), pick_signs(q[0], q[1], 0x7531), 0x7f7f7f7fu);
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            q[i] = select_bits(q[i] >> (kCut - 16), q[i] >> (16 - kBits),
                               spec.magnitude_mask() * 0x10001u);
          }
          bytes[w] = pick_bytes(q[0], q[1], 0x6420);
        }
      }
      C::join(bytes, out);
    }
    return last < 0xffff0000u && (last & 0xffffu) != 0xffffu;
  }

  // The same for all numbers, one after the other in few registers; `index` of the first.
  template <class Get>
  PYFMT_DEVICE static void exact(const Get& get, float m, const RandomKeys& keys, uint64_t index,
                                 const Limits& limits, uint32_t* out) {
    float y[16];
    uint32_t bytes[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) y[i] = get(i) * m;
#pragma unroll 1
    for (int n = 0; n < 16; ++n, ++index) {
      uint32_t w[4];
      random_words(keys, uint32_t(index / 4), uint32_t(index / 4 >> 32), w);
      const uint32_t odd = index & 2 ? w[3] : w[1], even = index & 2 ? w[2] : w[0];
      const uint32_t code = rounded(y[0], index & 1 ? odd : even, limits);
#pragma unroll
      for (int i = 0; i < 15; ++i) y[i] = y[i + 1];
#pragma unroll
      for (int i = 0; i < 3; ++i) bytes[i] = bytes[i] >> 8 | bytes[i + 1] << 24;
      bytes[3] = bytes[3] >> 8 | code << 24;
    }
    if constexpr (kBits == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t pairs = bytes[i] | bytes[i] >> 4;
        bytes[i] = pick_bytes(pairs, 0, 0x4420);
      }
      out[0] = bytes[0] | bytes[1] << 16;
      out[1] = bytes[2] | bytes[3] << 16;
    } else {
      C::join(bytes, out);
    }
  }

 private:
  static constexpr int kCut = !kInt ? 23 - spec.man : kBits == 4 ? 20 : 16;
  // A step of the number system's finest binade to 2^kCut steps of float32's.
  static constexpr int kDown = kCut - 149 - spec.step_exp();

  template <bool kWithin>
  PYFMT_DEVICE static uint32_t sum(float y, uint32_t random, const Limits& limits) {
    if constexpr (!kWithin) {
      y = kInt ? fmaxf(fminf(y, limits.high), limits.low)
               : min_magnitude(y, as_float(spec.max_bits()));
    }
    constexpr uint32_t factor = kDown < -126 ? 1u << (kDown + 149) : power_of_two_bits(kDown);
    return as_uint(multiply_down(y, as_float(factor))) + (random >> (32 - kCut));
  }

  PYFMT_DEVICE static uint32_t rounded(float y, uint32_t random, const Limits& limits) {
    const float r = L::to_float(random >> 8);
    constexpr uint32_t mask = (1u << kBits) - 1;
    if constexpr (kInt) {
      constexpr uint32_t base = 0x4b000000u - uint32_t(spec.frac) * (1u << 23);
      const float size = __builtin_fabsf(fmaxf(fminf(y, limits.high), limits.low));
      const float sum = add_down(size, as_float(base));
      const float rest = size - (sum - as_float(base));
      const uint32_t n = as_uint(sum) + below(rest, power_of_two_bits(24 + spec.frac), r);
      return (as_uint(y) >> 31 ? 0u - n : n) & mask;
    } else {
      // As codec::FloatCodec: what is added makes the sum's low bits the code, once the exponent
      // field is shifted down onto them.
      constexpr uint32_t field = uint32_t(spec.emin() + 127 + 23 - spec.man);
      constexpr uint32_t base =
          power_of_two_bits(23 - spec.man) + ((0u - (field << spec.man)) & spec.magnitude_mask());
      const float size = fminf(__builtin_fabsf(y), as_float(spec.max_bits()));
      const float power =
          fmaxf(as_float(as_uint(size) & kFloatInf), as_float(power_of_two_bits(spec.emin())));
      const float sum = fused_down(power, as_float(base), size);
      const float rest = size - fused(power, -as_float(base), sum);
      const uint32_t n = as_uint(sum) + below(rest, power_of_two_bits(24 + spec.man), r * power);
      return select_bits(n + (n >> (23 - spec.man)), as_uint(y) >> (32 - kBits),
                         spec.magnitude_mask()) &
             mask;
    }
  }

  // Whether random < share * factor, all of them exact: the sum keeps the difference's sign.
  PYFMT_DEVICE static uint32_t below(float share, uint32_t factor, float random) {
    return as_uint(fused(share, -as_float(factor), random)) >> 31;
  }

  // Fields with their sign taken from `signs` (all ones or none): two's complement without carries
  // from field to field. low: all bits of the fields but their first.
  PYFMT_DEVICE static uint32_t negated(uint32_t fields, uint32_t signs, uint32_t low) {
    constexpr uint32_t ones = kBits == 4 ? 0x11111111u : 0x01010101u;
    const uint32_t turned = fields ^ signs;
    return ((turned & low) + (signs & ones)) ^ (turned & ~low);
  }
};

// Sixteen codes, of the elements from `index` on; kAligned: a multiple of 16.
template <class E, bool kWithin, bool kAligned, class Get>
PYFMT_DEVICE void encode_stochastic(const RandomKeys& keys, uint64_t index, const Get& get, float m,
                                    const Limits& limits, uint32_t* out) {
  uint32_t random[16];
  if constexpr (kAligned) {
    random_sixteen(keys, index, random);
  } else {
    random_sixteen_from(keys, index, random);
  }
  if (!Dither<E>::template quick<kWithin>(get, m, random, limits, out)) {
    Dither<E>::exact(get, m, keys, index, limits, out);
  }
}

}  // namespace cuda
}  // namespace pyfmt
