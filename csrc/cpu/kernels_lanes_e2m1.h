// SPDX-License-Identifier: Apache-2.0
// E2M1 codes of sixteen groups side by side: the sum of a multiple and a constant has the quarter
// in which an element lies in its low bits, a table of 64 gives the code. AVX-512.
#pragma once

#include "lanes.h"

namespace pyfmt {
namespace PYFMT_ISA {

#if PYFMT_AVX512
// Codes of floor(4 y), |y| < 8, modulo 64, moved to the four nibbles of 16 bits.
struct CellCodes {
  alignas(64) uint16_t of[4][64];

  constexpr CellCodes() : of{} {
    // All thresholds of rounding, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5 and 5, are multiples of 0.25.
    constexpr int thresholds[7] = {1, 3, 5, 7, 10, 14, 20};
    for (int cell = 0; cell < 64; ++cell) {
      const bool negative = cell >= 32;
      const int quarters = negative ? 63 - cell : cell;
      int code = negative ? 8 : 0;
      for (int k = 0; k < 7; ++k) code += quarters >= thresholds[k];
      for (int place = 0; place < 4; ++place) of[place][cell] = uint16_t(code << 4 * place);
    }
  }
};

// Ties. A threshold itself goes to the even code, so that of the mantissas of thresholds 1 and 1.25
// must fall below, 1.5 and 1.75 not. Rounded times 1 + 5 2^-23, then exactly times 1 - 5 2^-23,
// numbers keep their order, the former come out below themselves and the latter above, while the
// neighbours of all four stay on their side. Where the threshold holds for y = v sqrt(1/2) rounded,
// the rounded product of v and sqrt(1/2) + 7 2^-24 does the same. (An exhaustive search over small
// steps; a test goes through the neighbours.) No number is at a threshold then, so that rounding
// down is right for negative ones as well.
constexpr float kAboveOne = 0x1.00000ap0f, kAboveRoot = 0x1.6a09f4p-1f, kBelowOne = 0x1.ffffecp-1f;

// The rotation's factor for size 2^k, as above, times 2^40: no number underflows.
PYFMT_INLINE float tie_factor(int size) {
  int k = 0;
  while (size >> (k + 1)) ++k;
  const float root = k & 1 ? kAboveRoot : kAboveOne;
  return root * codec::Lane<uint32_t>::as_float(power_of_two_bits(40 - k / 2));
}
constexpr float kTieScale = 0x1p-40f;

// kScaled: x holds y times 2^40 over the multipliers' powers of two, ties broken, without -0.
// kZeros: the same with -0. kNumbers: x holds numbers, to be rounded times the multipliers.
enum class Cells { kScaled, kZeros, kNumbers };

template <Cells kCells>
PYFMT_INLINE F cell_operand(const float* x, F multiplier) {
  F y = (F)_mm512_load_ps(x);
  if (kCells == Cells::kNumbers) {
    // The smaller magnitude, y's sign.
    y = (F)_mm512_range_ps((__m512)(y * multiplier), _mm512_set1_ps(7.0f), 0b0010);
  }
  if (kCells != Cells::kScaled) {
    // At least something: zero keeps its sign.
    y = (F)_mm512_range_ps((__m512)y, _mm512_set1_ps(0x1p-100f), 0b0011);
  }
  if (kCells == Cells::kNumbers) y *= (F)_mm512_set1_ps(kAboveOne);
  return y;
}

// A word of eight codes of each group, from eight elements of each.
template <Cells kCells>
PYFMT_INLINE U cell_word(const float* x, U multiplier) {
  constexpr int kDown = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  constexpr float kFour = 4.0f * kBelowOne * (kCells == Cells::kNumbers ? 1.0f : kTieScale);
  static constexpr CellCodes codes;
  // Units of the sum's last place, and of its upper half.
  const __m512 low = _mm512_set1_ps(0x1.8p23f), high = _mm512_set1_ps(0x1.8p7f);
  const F m = (F)multiplier, four = (F)_mm512_set1_ps(kFour);
  const __m512 times = (__m512)(kCells == Cells::kNumbers ? four : m * four);
  __m512i w[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512 first = (__m512)cell_operand<kCells>(x + k * kLanes, m);
    const __m512 second = (__m512)cell_operand<kCells>(x + (k + 4) * kLanes, m);
    const __m512 lower = _mm512_fmadd_round_ps(first, times, low, kDown);
    const __m512 upper = _mm512_fmadd_round_ps(second, times, high, kDown);
    w[k] = _mm512_permutex2var_epi16(
        _mm512_load_si512(codes.of[k]),
        _mm512_mask_mov_epi16((__m512i)lower, 0xaaaaaaaau, (__m512i)upper),
        _mm512_load_si512(codes.of[k] + 32));
  }
  return (U)_mm512_or_si512(_mm512_ternarylogic_epi32(w[0], w[1], w[2], 0xfe), w[3]);
}

// All sixteen. Meanwhile as many bytes are asked for from `ahead` on, to be written.
template <Cells kCells, int kBlocks>
static void encode_cells(const ElementSpec&, bool, const float* x, const U* multipliers, U* words,
                         uint8_t* ahead) {
#pragma GCC unroll 4
  for (int i = 0; i < 16; ++i) {
    fetch_output(ahead + 64 * i, 64);
    words[i] = cell_word<kCells>(x + 8 * i * kLanes, multipliers[i * kBlocks / 16]);
  }
}

template <Cells kCells>
PYFMT_INLINE auto cell_encoder_of(int blocks) {
  return blocks == 4 ? encode_cells<kCells, 4> : encode_cells<kCells, 8>;
}
#endif

}  // namespace PYFMT_ISA
}  // namespace pyfmt
