// SPDX-License-Identifier: Apache-2.0
// The bit-level truth, shared by host and device: float conversions, block scales, element codes,
// the random source and packed codes. Branch-free integer and IEEE float32 arithmetic, no libm.
//
// Every function is a template over a lane type, so that one text serves a scalar (uint32_t, on
// the host and in CUDA) and a SIMD vector of uint32 (GCC vector extensions, cpu/simd.h). Float32
// values travel as their bits. Compile without contraction into FMA and without flush-to-zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats.h"

// always_inline and static: code compiled for one instruction set must never be picked by the
// linker for another.
#if defined(__CUDACC__)
#define PYFMT_CODEC __host__ __device__ __forceinline__
#else
#define PYFMT_CODEC static inline __attribute__((always_inline))
#endif
#define PYFMT_LANE static PYFMT_HD

namespace pyfmt {
namespace codec {

// What a lane type can do beyond the operators; U holds bits, I is signed, F is float.
template <class U>
struct Lane;

template <>
struct Lane<uint32_t> {
  using I = int32_t;
  using F = float;
  PYFMT_LANE uint32_t set(uint32_t x) { return x; }
  PYFMT_LANE uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
  PYFMT_LANE uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
  PYFMT_LANE int32_t as_int(uint32_t x) { return int32_t(x); }
  PYFMT_LANE uint32_t from_int(int32_t x) { return uint32_t(x); }
  PYFMT_LANE float as_float(uint32_t x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
  }
  PYFMT_LANE uint32_t as_uint(float f) {
    uint32_t x;
    memcpy(&x, &f, 4);
    return x;
  }
  // Values below 2^31, so that the signed conversion serves.
  PYFMT_LANE float to_float(uint32_t x) { return float(int32_t(x)); }
  PYFMT_LANE uint32_t truncate(float f) { return uint32_t(int32_t(f)); }
};

// ---- bfloat16, float16 ------------------------------------------------------------------------

template <class U>
PYFMT_CODEC U canonical_nan(U bits, uint32_t nan) {
  using L = Lane<U>;
  return L::as_int(bits & 0x7fffffffu) > int32_t(kFloatInf) ? L::set(nan) : bits;
}

template <class U>
PYFMT_CODEC U float_from_bf16(U half) {
  return half << 16;
}

// RNE for numbers: adding just under half an ulp, plus the last kept bit, carries exactly when
// rounding to nearest even does. NaN with low bits set may carry: see bf16_from_float.
template <class U>
PYFMT_CODEC U bf16_from_number(U bits) {
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

template <class U>
PYFMT_CODEC U bf16_from_float(U bits) {
  return bf16_from_number<U>(canonical_nan<U>(bits, kFloatNaN));
}

// ---- float elements ---------------------------------------------------------------------------

// The constants of a float grid with `man` mantissa bits and smallest binade 2^emin.
//
// Encoding adds |y| to a number just above 2^(23 - man + e), e = max(e_y, emin), whose ulp is the
// grid's step, so that the float32 adder rounds to nearest even. One binade holds 2^man steps:
// that number's low bits hold (e - emin) << man, so the sum's low bits are the code itself, and
// ties go to the even code.
struct FloatCodec {
  uint32_t max_bits, emin_bits, magic, nan_code, magnitude_mask, sign_bit, ieee;
  int man, shift, sign_shift, step_exp;
  bool is_signed, has_special;

  PYFMT_HD constexpr explicit FloatCodec(const ElementSpec& e)
      : max_bits(e.max_bits()),
        emin_bits(power_of_two_bits(e.emin())),
        magic((uint32_t(23 - e.man) << 23) + ((0u - (emin_bits >> (23 - e.man))) & 0x1ffu)),
        nan_code(e.max_code() + 1),
        magnitude_mask(e.magnitude_mask()),
        sign_bit(e.sign_bit()),
        ieee(e.special == Special::kIeee),
        man(e.man),
        shift(23 - e.man),
        sign_shift(32 - e.bits()),
        step_exp(e.step_exp()),
        is_signed(e.is_signed),
        has_special(e.special != Special::kNone) {}
};

// Scaled values (bits, finite or infinite) to codes, nearest even, saturating.
template <class U>
PYFMT_CODEC U encode_float(const FloatCodec& c, U y) {
  using L = Lane<U>;
  U mag = L::min(y & 0x7fffffffu, L::set(c.max_bits));
  if (!c.is_signed) mag = L::as_int(y) < 0 ? L::set(0) : mag;
  const U exponent = L::max(mag & kFloatInf, L::set(c.emin_bits));
  const U base = exponent + (exponent >> c.shift) + c.magic;
  const U sum = L::as_uint(L::as_float(mag) + L::as_float(base));
  return (sum & c.magnitude_mask) | ((y >> c.sign_shift) & c.sign_bit);
}

// The same, rounding away from zero iff random24 < (|y| - lo) / (hi - lo) * 2^24.
template <class U>
PYFMT_CODEC U encode_float_stochastic(const FloatCodec& c, U y, U random24) {
  using L = Lane<U>;
  U mag = L::min(y & 0x7fffffffu, L::set(c.max_bits));
  if (!c.is_signed) mag = L::as_int(y) < 0 ? L::set(0) : mag;
  const U exponent = L::max(mag & kFloatInf, L::set(c.emin_bits));
  const U per_step = ((254u + uint32_t(c.man)) << 23) - exponent;
  U t = L::as_uint(L::as_float(mag) * L::as_float(per_step));
  // Whatever is not zero stays above it: only random24 = 0 can tell such values apart.
  t = mag == 0u ? t : L::max(t, L::set(power_of_two_bits(-60)));
  const U steps = L::truncate(L::as_float(t));
  const auto rest = (L::as_float(t) - L::to_float(steps)) * 16777216.0f;
  const U up = L::to_float(random24) < rest ? L::set(1) : L::set(0);
  const U code = steps + up + ((exponent - c.emin_bits) >> c.shift);
  return (code & c.magnitude_mask) | ((y >> c.sign_shift) & c.sign_bit);
}

// Codes to float32 bits; codes beyond the largest are NaN (or infinity for special "ieee").
template <class U>
PYFMT_CODEC U decode_float(const FloatCodec& c, U code) {
  using L = Lane<U>;
  const U mag = code & c.magnitude_mask;
  // Normal: move the fields up and rebias. Subnormal: pretend exponent 1, subtract the hidden bit.
  const uint32_t hidden = c.emin_bits, rebias = c.emin_bits - (1u << 23);
  U bits = (mag << c.shift) + rebias;
  const U subnormal = L::as_uint(L::as_float(bits + (1u << 23)) - L::as_float(L::set(hidden)));
  bits = L::as_int(mag >> c.man) == 0 ? subnormal : bits;
  if (c.has_special) {
    const U special =
        c.ieee ? (mag == c.nan_code ? L::set(kFloatInf) : L::set(kFloatNaN)) : L::set(kFloatNaN);
    bits = L::as_int(mag) >= int32_t(c.nan_code) ? special : bits;
  }
  bits = bits | ((code & c.sign_bit) << c.sign_shift);
  return c.has_special ? canonical_nan<U>(bits, kFloatNaN) : bits;
}

// float16 is the grid e5m10 with specials; its codes are 16 bits wide.
PYFMT_CODEC constexpr FloatCodec half_codec() {
  return FloatCodec(ElementSpec{Kind::kFloat, 5, 10, 15, 0, true, Special::kIeee});
}

template <class U>
PYFMT_CODEC U float_from_half(U half) {
  constexpr FloatCodec c = half_codec();
  return decode_float<U>(c, half);
}

template <class U>
PYFMT_CODEC U half_from_float(U bits) {
  using L = Lane<U>;
  constexpr FloatCodec c = half_codec();
  // Clamping at 2^16 instead of the largest value lets overflow round to infinity.
  const U mag = L::min(bits & 0x7fffffffu, L::set(power_of_two_bits(16)));
  const U exponent = L::max(mag & kFloatInf, L::set(c.emin_bits));
  const U sum = L::as_uint(L::as_float(mag) + L::as_float(exponent + (uint32_t(c.shift) << 23)));
  const U steps = sum - (exponent + (uint32_t(c.shift) << 23));
  const U code = steps + ((exponent - c.emin_bits) >> c.shift);
  const U number = L::min(code, L::set(0x7c00u)) | ((bits >> 16) & 0x8000u);
  return L::as_int(bits & 0x7fffffffu) > int32_t(kFloatInf) ? L::set(0x7e00u) : number;
}

// ---- integer elements -------------------------------------------------------------------------

// The constants of an integer of `bits` bits counting steps of 2^-frac.
struct IntCodec {
  uint32_t positive_limit, negative_limit, mask, steps_per_one, step;
  int extend;
  bool is_signed;

  PYFMT_HD constexpr IntCodec(const ElementSpec& e, bool full)
      : positive_limit(ElementSpec::scaled_bits(e.max_code(), 0)),
        negative_limit(!e.is_signed ? 0u
                       : full       ? ElementSpec::scaled_bits(e.max_code() + 1, 0)
                                    : positive_limit),
        mask((1u << e.bits()) - 1),
        steps_per_one(power_of_two_bits(e.frac)),
        step(power_of_two_bits(-e.frac)),
        extend(32 - e.bits()),
        is_signed(e.is_signed) {}
};

template <class U>
PYFMT_CODEC U clamp_int(const IntCodec& c, U v) {
  using L = Lane<U>;
  const U negative = L::from_int(L::as_int(v) >> 31);
  const U limit = c.positive_limit + (negative & (c.negative_limit - c.positive_limit));
  return L::min(v & 0x7fffffffu, limit);
}

template <class U>
PYFMT_CODEC U encode_int(const IntCodec& c, U y) {
  using L = Lane<U>;
  const U v = L::as_uint(L::as_float(y) * L::as_float(L::set(c.steps_per_one)));
  const U clamped = clamp_int<U>(c, v) | (v & 0x80000000u);
  // 1.5 * 2^23 has an ulp of 1 on both sides: the sum's low bits are the integer.
  return L::as_uint(L::as_float(clamped) + 12582912.0f) & c.mask;
}

template <class U>
PYFMT_CODEC U encode_int_stochastic(const IntCodec& c, U y, U random24) {
  using L = Lane<U>;
  const U v = L::as_uint(L::as_float(y) * L::as_float(L::set(c.steps_per_one)));
  const U clamped = clamp_int<U>(c, v);
  U t = L::max(clamped, L::set(power_of_two_bits(-60)));
  t = (y & 0x7fffffffu) == 0u ? clamped : t;
  // A negative value of an unsigned element is zero, not nearly zero.
  if (!c.is_signed) t = L::as_int(v) < 0 ? L::set(0) : t;
  const U steps = L::truncate(L::as_float(t));
  const auto rest = (L::as_float(t) - L::to_float(steps)) * 16777216.0f;
  const U up = L::to_float(random24) < rest ? L::set(1) : L::set(0);
  const U n = steps + up;
  const U negative = L::from_int(L::as_int(v) >> 31);
  return ((n ^ negative) - negative) & c.mask;
}

template <class U>
PYFMT_CODEC U decode_int(const IntCodec& c, U code) {
  using L = Lane<U>;
  U n = code & c.mask;
  if (c.is_signed) n = L::from_int(L::as_int(n << c.extend) >> c.extend);
  return L::as_uint(L::to_float(n) * L::as_float(L::set(c.step)));
}

// ---- E8M0 scales ------------------------------------------------------------------------------

// What a scale rule adds to amax's bits before their exponent is read:
// floor nothing; ceil all but one ulp; rceil what carries exactly when the mantissa exceeds
// Qmax's; even half an ulp of the element.
PYFMT_HD constexpr uint32_t e8m0_addend(ScaleRule rule, const ElementSpec& e) {
  return rule == ScaleRule::kFloor  ? 0u
         : rule == ScaleRule::kCeil ? 0x7fffffu
         : rule == ScaleRule::kEven ? 1u << (22 - e.significand())
                                    : 0x7fffffu - (e.max_bits() & 0x7fffffu);
}

// The scale byte of a block: 0 for zero blocks, 0xFF where amax is infinite or NaN.
template <class U>
PYFMT_CODEC U e8m0_from_amax(U amax, uint32_t addend, int emax) {
  using L = Lane<U>;
  // Give subnormals an exponent field below zero: n * 2^-149 as float(n), rebiased by hand.
  const U rebiased = L::as_uint(L::to_float(amax)) - (149u << 23);
  const U bits = L::as_int(amax) < 0x00800000 ? rebiased : amax;
  const U biased = L::from_int((L::as_int(bits + addend) >> 23) - emax);
  U byte = L::as_int(biased) < 0 ? L::set(0) : L::min(biased, L::set(254));
  byte = amax == 0u ? L::set(0) : byte;
  return L::as_int(amax) >= int32_t(kFloatInf) ? L::set(255) : byte;
}

// 2^-E and 2^E for the byte E + 127, both exact; byte 254 and byte 0 give the subnormal 2^-127.
template <class U>
PYFMT_CODEC U e8m0_encode_multiplier(U byte) {
  using L = Lane<U>;
  const U bits = (254u - byte) << 23;
  return L::as_int(byte) >= 254 ? L::set(0x00400000u) : bits;
}

template <class U>
PYFMT_CODEC U e8m0_decode(U byte) {
  using L = Lane<U>;
  const U bits = byte == 0u ? L::set(0x00400000u) : byte << 23;
  return byte == 255u ? L::set(kFloatNaN) : bits;
}

// ---- E4M3 and float scales --------------------------------------------------------------------

PYFMT_CODEC constexpr FloatCodec e4m3_codec() {
  return FloatCodec(elements::e4m3fn);
}

// Non-negative float32 (bits, infinity included) to scale codes: RNE, saturating.
template <class U>
PYFMT_CODEC U round_scale(Scale kind, U s) {
  using L = Lane<U>;
  constexpr FloatCodec e4m3 = e4m3_codec();
  switch (kind) {
    case Scale::kE4M3:
      return encode_float<U>(e4m3, s);
    case Scale::kBF16:
      return L::min(bf16_from_number<U>(s), L::set(0x7f7fu));
    case Scale::kFP16:
      return L::min(half_from_float<U>(s), L::set(0x7bffu));
    default:
      return L::min(s, L::set(kFloatMax));
  }
}

PYFMT_HD constexpr uint32_t scale_nan(Scale kind) {
  return kind == Scale::kE8M0   ? 0xffu
         : kind == Scale::kE4M3 ? 0x7fu
         : kind == Scale::kBF16 ? 0x7fc0u
         : kind == Scale::kFP16 ? 0x7e00u
                                : kFloatNaN;
}

// Scale codes to float32 bits.
template <class U>
PYFMT_CODEC U decode_scale(Scale kind, U code) {
  constexpr FloatCodec e4m3 = e4m3_codec();
  switch (kind) {
    case Scale::kE8M0:
      return e8m0_decode<U>(code);
    case Scale::kE4M3:
      return decode_float<U>(e4m3, code);
    case Scale::kBF16:
      return float_from_bf16<U>(code);
    case Scale::kFP16:
      return float_from_half<U>(code);
    default:
      return code;
  }
}

// The float32 constants of a two-level recipe, each rounded once.
struct RecipeConstants {
  uint32_t tensor_scale;  // the stored decode multiplier (1 for single_level)
  uint32_t amax_factor;   // nvidia: S * (1 / Q)
  uint32_t qmax;          // torchao: Q
  uint32_t inverse;       // torchao: 1 / tensor_scale
  bool torchao;
};

// min(1 / s, FLT_MAX), and 0 where the scale code is.
template <class U, class F>
PYFMT_CODEC U reciprocal(F s, U code) {
  using L = Lane<U>;
  const U r = L::min(L::as_uint(1.0f / s), L::set(kFloatMax));
  return code == 0u ? L::set(0) : r;
}

// Block amax (bits, finite) to the E4M3 scale code; returns the elements' multiplier in `enc`.
template <class U>
PYFMT_CODEC U e4m3_from_amax(const RecipeConstants& r, U amax, U* enc) {
  using L = Lane<U>;
  const auto a = L::as_float(amax);
  constexpr FloatCodec e4m3 = e4m3_codec();
  U s;
  if (r.torchao) {
    const auto quotient = a / L::as_float(L::set(r.qmax)) / L::as_float(L::set(r.tensor_scale));
    s = L::max(L::min(L::as_uint(quotient), L::set(e4m3.max_bits)), L::set(e4m3.emin_bits));
  } else {
    s = L::min(L::as_uint(a * L::as_float(L::set(r.amax_factor))), L::set(kFloatMax));
    s = amax == 0u ? L::set(0) : s;
  }
  const U code = round_scale<U>(Scale::kE4M3, s);
  const auto value = L::as_float(decode_scale<U>(Scale::kE4M3, code));
  if (r.torchao) {
    const auto q = L::as_float(L::set(r.inverse)) / value;
    *enc = L::min(L::as_uint(q), L::set(kFloatMax));
  } else {
    *enc = reciprocal<U>(value * L::as_float(L::set(r.tensor_scale)), code);
  }
  return code;
}

// ---- random source ----------------------------------------------------------------------------

// The product of the low halves of 64-bit lanes; a SIMD level may know better.
template <class W>
struct Multiply32 {
  PYFMT_LANE W low(W a, uint64_t b) { return (a & 0xffffffffull) * b; }
};

// Philox4x32-10 with counter words c[0..3], each in the low half of a 64-bit lane.
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
template <class W>
PYFMT_CODEC void philox(uint64_t seed, W c[4]) {
  constexpr uint64_t kLow = 0xffffffffu;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const W p0 = Multiply32<W>::low(c[0], 0xd2511f53ull);
    const W p1 = Multiply32<W>::low(c[2], 0xcd9e8d57ull);
    c[0] = (p1 >> 32) ^ c[1] ^ uint64_t(k0);
    c[1] = p1 & kLow;
    c[2] = (p0 >> 32) ^ c[3] ^ uint64_t(k1);
    c[3] = p0 & kLow;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

// ---- packed codes -----------------------------------------------------------------------------

// Eight codes, one a byte (first code lowest), to 8 * bits contiguous bits: neighbours close up
// pairwise, three times. W: 64-bit lanes; codes must be below 2^bits.
template <class W>
PYFMT_CODEC W pack8(W w, int bits) {
  const int gap = 8 - bits;
  const uint64_t one = (1ull << bits) - 1, two = (1ull << (2 * bits)) - 1,
                 four = (1ull << (4 * bits)) - 1;
  const uint64_t m1 = one * 0x0001000100010001ull, m2 = two * 0x0000000100000001ull;
  w = (w & m1) | ((w >> gap) & (m1 << bits));
  w = (w & m2) | ((w >> (2 * gap)) & (m2 << (2 * bits)));
  return (w & four) | ((w >> (4 * gap)) & (four << (4 * bits)));
}

template <class W>
PYFMT_CODEC W unpack8(W w, int bits) {
  const int gap = 8 - bits;
  const uint64_t one = (1ull << bits) - 1, two = (1ull << (2 * bits)) - 1,
                 four = (1ull << (4 * bits)) - 1;
  const uint64_t m1 = one * 0x0001000100010001ull, m2 = two * 0x0000000100000001ull;
  w = (w & four) | ((w & (four << (4 * bits))) << (4 * gap));
  w = (w & m2) | ((w & (m2 << (2 * bits))) << (2 * gap));
  return (w & m1) | ((w & (m1 << bits)) << gap);
}

}  // namespace codec
}  // namespace pyfmt
