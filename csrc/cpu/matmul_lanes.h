// SPDX-License-Identifier: Apache-2.0
// What the products of every level use: multiply-add, sums across lanes, rows of b, the epilogue.
#pragma once

#include "kernels_dequantize.h"
#include "matmul.h"

namespace pyfmt {
namespace PYFMT_ISA {

using cpu::Packed;

#if defined(__clang__)
#define PYFMT_UNROLL _Pragma("unroll")
#else
#define PYFMT_UNROLL _Pragma("GCC unroll 16")
#endif

// a * b + c, in one rounding where the level has it.
PYFMT_INLINE F multiply_add(F a, F b, F c) {
#if PYFMT_AVX512
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif PYFMT_AVX2
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

PYFMT_INLINE F all(float x) {
  return x - F{};
}

// The sum of all lanes, by halves.
PYFMT_INLINE float sum_lanes(F v) {
  if constexpr (kLanes > 8) v += exchange<(kLanes > 8 ? 8 : 1)>(v);
  if constexpr (kLanes > 4) v += exchange<(kLanes > 4 ? 4 : 1)>(v);
  v += exchange<2>(v);
  v += exchange<1>(v);
  return v[0];
}

// kLanes rows of kLanes lanes to columns.
PYFMT_INLINE void transpose(U v[kLanes]) {
#if PYFMT_AVX512
  __m512i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    const __m512i x = (__m512i)v[2 * i], y = (__m512i)v[2 * i + 1];
    a[2 * i] = _mm512_unpacklo_epi32(x, y);
    a[2 * i + 1] = _mm512_unpackhi_epi32(x, y);
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
  }
  // b[4 i + j]: column j of each quarter, rows 4 i to 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    v[j] = (U)_mm512_shuffle_i32x4(low, high, 0x88);
    v[8 + j] = (U)_mm512_shuffle_i32x4(low, high, 0xdd);
    v[4 + j] = (U)_mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    v[12 + j] = (U)_mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
#else
  // log2(kLanes) rounds of taking turns.
  for (int round = 1; round < kLanes; round *= 2) {
    U w[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      w[2 * i] = lower_in_turn(v[i], v[i + kLanes / 2]);
      w[2 * i + 1] = upper_in_turn(v[i], v[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) v[i] = w[i];
  }
#endif
}

// The float32 bits of a code's value.
PYFMT_INLINE uint32_t value_of(const ElementSpec& e, uint32_t code) {
  return e.is_int() ? codec::decode_int<uint32_t>(codec::IntCodec(e, false), code)
                    : codec::decode_float<uint32_t>(codec::FloatCodec(e), code);
}

// Where the scales of a row begin, in scales.
PYFMT_INLINE int64_t first_scale(const Packed& p, int64_t row, int64_t k) {
  const int64_t r = p.format.block_rows, strips = (p.batch_rows + r - 1) / r;
  const int64_t batch = r == 1 ? row : row / p.batch_rows * strips + row % p.batch_rows / r;
  return batch * p.format.blocks(k);
}

#if PYFMT_VNNI
// The magnitudes of E4M3 as bfloat16.
struct E4M3Table {
  alignas(64) uint16_t of[128];
  constexpr E4M3Table() : of{} {
    for (int code = 0; code < 127; ++code) {
      int exponent = code >> 3, fraction = code & 7;
      if (exponent == 0 && fraction) {
        // Subnormal: up to the leading bit, which the exponent then stands for.
        exponent = 1;
        for (; fraction < 8; fraction *= 2) --exponent;
        fraction &= 7;
      }
      of[code] = code ? uint16_t((exponent + 120) << 7 | fraction << 4) : uint16_t(0);
    }
    of[127] = 0x7fc0;
  }
};

static void e4m3_scales(const uint8_t* codes, int64_t n, uint32_t* out) {
  static constexpr E4M3Table table;
  const __m512i a = _mm512_load_si512(table.of), b = _mm512_load_si512(table.of + 32);
  const __m512i c = _mm512_load_si512(table.of + 64), d = _mm512_load_si512(table.of + 96);
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 mask = n - i >= 32 ? ~__mmask32(0) : (__mmask32(1) << (n - i)) - 1;
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, codes + i));
    const __mmask32 upper = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
    const __m512i high = _mm512_permutex2var_epi16(c, code, d);
    const __m512i value = _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(a, code, b), upper, high);
    const __m512i signed_value = _mm512_ternarylogic_epi32(_mm512_set1_epi16(int16_t(0x8000)),
                                                           _mm512_slli_epi16(code, 8), value, 0xca);
    const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(signed_value));
    const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(signed_value, 1));
    _mm512_mask_storeu_epi32(out + i, __mmask16(mask), _mm512_slli_epi32(first, 16));
    _mm512_mask_storeu_epi32(out + i + 16, __mmask16(mask >> 16), _mm512_slli_epi32(second, 16));
  }
}
#endif

// The float32 bits of scales `from` to `from + n` of a row.
PYFMT_INLINE void row_scales(const Packed& p, int64_t row, int64_t k, int64_t from, int64_t n,
                             uint32_t* out) {
  const int64_t first = first_scale(p, row, k) + from;
#if PYFMT_VNNI
  if (p.format.scale == Scale::kE4M3) return e4m3_scales((const uint8_t*)p.scales + first, n, out);
#endif
  decode_scales(p.format.scale, (const char*)p.scales + first * scale_bytes(p.format.scale), n,
                out);
}

PYFMT_INLINE float float_at(const void* p, DType dtype, int64_t i) {
  using S = codec::Lane<uint32_t>;
  switch (dtype) {
    case DType::kBF16:
      return S::as_float(codec::float_from_bf16<uint32_t>(((const uint16_t*)p)[i]));
    case DType::kFP16:
      return S::as_float(codec::float_from_half<uint32_t>(((const uint16_t*)p)[i]));
    default:
      return ((const float*)p)[i];
  }
}

PYFMT_INLINE void store_at(void* p, DType dtype, int64_t i, float x) {
  const uint32_t bits = codec::Lane<uint32_t>::as_uint(x);
  switch (dtype) {
    case DType::kBF16:
      ((uint16_t*)p)[i] = uint16_t(codec::bf16_from_float<uint32_t>(bits));
      return;
    case DType::kFP16:
      ((uint16_t*)p)[i] = uint16_t(codec::half_from_float<uint32_t>(bits));
      return;
    default:
      ((uint32_t*)p)[i] = codec::canonical_nan<uint32_t>(bits, kFloatNaN);
  }
}

// Whether a mask has a lane set.
PYFMT_INLINE bool any(U mask) {
#if PYFMT_AVX512
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif PYFMT_AVX2
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  uint32_t all = 0;
  for (int k = 0; k < kLanes; ++k) all |= mask[k];
  return all != 0;
#endif
}

// Whether every finite number among n is zero or has an exponent within +-60.
static bool tame(const void* a, DType dtype, int64_t n) {
  constexpr int64_t kRow = 256;
  alignas(64) uint32_t row[kRow];
  U wild{};
  for (int64_t i = 0; i < n; i += kRow) {
    const int64_t count = n - i < kRow ? n - i : kRow;
    load_row(at(a, dtype, i), dtype, count, round_up(count, kGroup), row);
    for (int64_t k = 0; k < round_up(count, kGroup); k += kLanes) {
      const U bits = load<U>(row + k) & 0x7fffffffu;
      // Out of [2^-60, 2^61), less zero and what is no number.
      const U outside = (U)((bits - (67u << 23)) >= (121u << 23));
      wild |= outside & (U)(bits != 0u) & (U)((I)bits < int32_t(kFloatInf));
    }
  }
  return !any(wild);
}

// Whether products with tame numbers, and sums of them, stay far from overflow and underflow.
PYFMT_INLINE bool moderate(const ElementSpec& e) {
  return e.step_exp() >= -20 && e.emax() <= 20;
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
