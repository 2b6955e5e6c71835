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

// The four random words of a counter: element 4 * counter + i has word i.
PYFMT_DEVICE void random_words(const RandomKeys& keys, uint32_t low, uint32_t high, uint32_t* w) {
  w[0] = low;
  w[1] = high;
  w[2] = w[3] = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(w[0]) * 0xd2511f53u, b = uint64_t(w[2]) * 0xcd9e8d57u;
    w[0] = uint32_t(b >> 32) ^ w[1] ^ keys.k[2 * round];
    w[1] = uint32_t(b);
    w[2] = uint32_t(a >> 32) ^ w[3] ^ keys.k[2 * round + 1];
    w[3] = uint32_t(a);
  }
}

// The words of sixteen elements, the first at `index`, a multiple of 16.
PYFMT_DEVICE void random_sixteen(const RandomKeys& keys, uint64_t index, uint32_t (&w)[16]) {
  const uint64_t counter = index / 4;
#pragma unroll
  for (uint32_t g = 0; g < 4; ++g) {
    random_words(keys, uint32_t(counter) | g, uint32_t(counter >> 32), w + 4 * g);
  }
}

// The same for any index.
PYFMT_DEVICE void random_sixteen_from(const RandomKeys& keys, uint64_t index, uint32_t (&w)[16]) {
  uint32_t all[20];
#pragma unroll
  for (int g = 0; g < 5; ++g) {
    const uint64_t counter = index / 4 + uint64_t(g);
    random_words(keys, uint32_t(counter), uint32_t(counter >> 32), all + 4 * g);
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
  // less than the share cut off.
  template <class Get>
  PYFMT_DEVICE static void encode(const Get& get, float m, const uint32_t (&random)[16],
                                  const Limits& limits, uint32_t* out) {
    if constexpr (kBits == 4) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        uint32_t word = 0, signs = 0;
#pragma unroll
        for (int i = 7; i >= 0; --i) {
          const float y = get(8 * w + i) * m;
          const uint32_t n = rounded(y, random[8 * w + i], limits);
          if constexpr (kInt) {
            word = push_nibble(word, n << 28);
            signs = push_nibble(signs, as_uint(y));
          } else {
            // The exponent field moves onto the mantissa's low bits: see Coder.
            word = push_nibble(word, select_bits(n * 0x10000040u, as_uint(y), 0x7fffffffu));
          }
        }
        out[w] = kInt ? negated(word, (signs >> 3 & 0x11111111u) * 15u, 0x77777777u) : word;
      }
    } else {
      uint32_t bytes[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t n[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float scaled = get(4 * w + i) * m;
          y[i] = as_uint(scaled);
          n[i] = rounded(scaled, random[4 * w + i], limits);
          if constexpr (!kInt) n[i] = n[i] + (n[i] >> (23 - spec.man));
        }
        const uint32_t codes =
            pick_bytes(pick_bytes(n[0], n[1], 0x0040), pick_bytes(n[2], n[3], 0x0040), 0x5410);
        const uint32_t signs =
            pick_bytes(pick_bytes(y[0], y[1], 0x0073), pick_bytes(y[2], y[3], 0x0073), 0x5410);
        if constexpr (kInt) {
          bytes[w] = negated(codes, (signs >> 7 & 0x01010101u) * 255u, 0x7f7f7f7fu);
        } else if constexpr (kBits == 8) {
          bytes[w] = select_bits(codes, signs, 0x7f7f7f7fu);
        } else {
          bytes[w] = select_bits(codes, signs >> 2, 0x1f1f1f1fu);
        }
      }
      C::join(bytes, out);
    }
  }

 private:
  // Steps in |y|'s own binade, rounded; other bits above them.
  PYFMT_DEVICE static uint32_t rounded(float y, uint32_t random, const Limits& limits) {
    const float r = L::to_float(random >> 8);
    if constexpr (kInt) {
      constexpr uint32_t base = 0x4b000000u - uint32_t(spec.frac) * (1u << 23);
      const float size = __builtin_fabsf(fmaxf(fminf(y, limits.high), limits.low));
      const float sum = add_down(size, as_float(base));
      const float rest = size - (sum - as_float(base));
      return as_uint(sum) + below(rest, power_of_two_bits(24 + spec.frac), r);
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
      return as_uint(sum) + below(rest, power_of_two_bits(24 + spec.man), r * power);
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

}  // namespace cuda
}  // namespace pyfmt
