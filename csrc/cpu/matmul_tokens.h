// SPDX-License-Identifier: Apache-2.0
// bfloat16 products of four left rows ("tokens") with one row of b in a vector: lane 4 i + t holds
// token t and the i-th quarter of a stretch of K. Rows of b are decoded a unit at a time into the
// first-level cache, such that each quarter of a vector has elements of its own stretch and so one
// scale; in-lane shuffles then bring up two elements after two for all tokens. A stretch's dot
// product is multiplied by its scales and added to the float32 sums by one multiply-add, in the
// order of K; the four quarters are added last.
#pragma once

#include <optional>

#include "matmul_pack.h"
#include "matmul_units.h"

#if PYFMT_BF16
namespace pyfmt {
namespace PYFMT_ISA {

constexpr int64_t kQuad = 4;        // tokens in a vector
constexpr int64_t kTokens = 16;     // four vectors of them: what a tile takes at once
constexpr int64_t kFewTokens = 32;  // units are short up to so many
constexpr int64_t kUnitRows = 16;   // rows of b in a short unit

// ---- left -----------------------------------------------------------------------------

// Rows begin to end of the left side to its panel: (16 tokens, groups of four quarters, vectors of
// a group, four pairs, four quads, 16); scales (16 tokens, groups, parts, four quads, 16).
static void left_tokens(const LeftArgs& a, int64_t begin, int64_t end, Extremes* extremes) {
  const TileArgs& t = *a.tile;
  const int64_t quarter = quarter_of(t), group = 4 * quarter, groups = t.a_columns / group;
  const int64_t parts = parts_of(t), slot = quarter / parts;
  const int64_t vectors = quarter / 8, slots = (t.k + slot - 1) / slot;
  const PairOrder order(t.right.format, quarter);
  const Rows rows{a.left ? *a.left : t.right, t.k, t};
  std::optional<RowDecoder> decoder;
  if (a.left) decoder.emplace(rows, DType::kBF16);
  Scratch scratch(t.a_columns * 2 + groups * parts * 16 + 256);
  uint32_t* const pairs = scratch.take<uint32_t>(t.a_columns / 2);
  float* const scales = scratch.take<float>(groups * parts * 4);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at_row = a.first_row + row, lane = at_row % kQuad;
    if (a.left) {
      for (int64_t i = 0; i < t.k; i += kPiece) {
        decoder->run(row, i, t.k - i < kPiece ? t.k - i : kPiece, (uint16_t*)pairs + i);
      }
    } else {
      memcpy(pairs, at(a.a, a.a_dtype, row * t.k), size_t(t.k) * 2);
    }
    memset((uint16_t*)pairs + t.k, 0, size_t(t.a_columns - t.k) * 2);
    const int64_t place = at_row % kTokens / kQuad * kLanes + lane;
    uint32_t* to = (uint32_t*)t.a + at_row / kTokens * t.a_columns * (kTokens / 2) + place;
    // Lanes that no row follows into are zeros.
    const int64_t copies = at_row + 1 == t.m ? kQuad - lane : 1;
    for (const uint32_t* from = pairs; from < pairs + t.a_columns / 2; from += group / 2) {
      for (int64_t v = 0; v < vectors; ++v) {
        for (int64_t j = 0; j < 4; ++j, to += 4 * kLanes) {
          const uint32_t* const pair = from + (j * order.by_pair + v * order.by_vector) / 2;
          for (int64_t i = 0; i < 4; ++i) to[4 * i] = pair[i * quarter / 2];
          for (int64_t c = 1; c < copies; ++c) {
            for (int64_t i = 0; i < 4; ++i) to[4 * i + c] = 0;
          }
        }
      }
    }
    if (!t.a_scales) continue;
    segment_scales(rows, row, 0, slots, slot, 1.0f, scales, extremes);
    for (int64_t i = slots; i < groups * parts * 4; ++i) scales[i] = 0.0f;
    float* out = t.a_scales + at_row / kTokens * groups * parts * 4 * kLanes + place;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t p = 0; p < parts; ++p, out += 4 * kLanes) {
        for (int64_t i = 0; i < 4; ++i) {
          out[4 * i] = scales[(g * 4 + i) * parts + p];
          for (int64_t c = 1; c < copies; ++c) out[4 * i + c] = 0.0f;
        }
      }
    }
  }
}

// ---- products -------------------------------------------------------------------------

// By name, as in the other tiles: pairs of elements of b times those of tokens.
PYFMT_INLINE void dot_pairs(__m512i pairs, U tokens, F& sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(tokens), "v"(pairs));
}

struct Tokens {
  const uint32_t* a;    // this unit's first group
  const float* scales;  // of the unit's first group
  float* sums;          // (rows / 4, quads, 4, 16)
  int64_t sum_stride;   // of four rows
  bool first;           // of those that the unit is multiplied with
};

template <int kPair, int kRows, int kQuads>
PYFMT_INLINE void dot_quads(const uint16_t* w, const uint32_t* a, F (&part)[kRows][kQuads]) {
  U tokens[kQuads];
  PYFMT_UNROLL for (int q = 0; q < kQuads; ++q) tokens[q] = load<U>(a + (kPair * 4 + q) * kLanes);
  PYFMT_UNROLL for (int r = 0; r < kRows; ++r) {
    const __m512i x = _mm512_loadu_si512(w + r * kUnitStride);
    const __m512i pairs = _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)(kPair * 0x55));
    PYFMT_UNROLL for (int q = 0; q < kQuads; ++q) dot_pairs(pairs, tokens[q], part[r][q]);
  }
}

// Products of scales beyond the normal numbers: by way of double, rounded to float32 once.
static __attribute__((noinline)) void add_wide_quads(F part, F left, F scale, float* sum) {
  for (int lane = 0; lane < kLanes; ++lane) {
    sum[lane] += float(double(part[lane]) * left[lane] * scale[lane]);
  }
}

// What a tile adds to the sums of: one part of each quarter of a group.
template <int kPart, int kParts, int kRows, int kQuads, bool kLeft>
PYFMT_INLINE void add_part(const Unit& u, const uint16_t* w, const uint32_t* a, const float* scales,
                           const float* left_scales, float* const (&sums)[2]) {
  // Sums stay in memory: compilers would carry them in registers that the parts need.
  asm volatile("" ::: "memory");
  F part[kRows][kQuads];
  PYFMT_UNROLL for (int r = 0; r < kRows; ++r) {
    PYFMT_UNROLL for (int q = 0; q < kQuads; ++q) part[r][q] = F{};
  }
  for (int64_t v = 0; v < u.vectors; ++v, w += kPairs, a += 16 * kLanes) {
    dot_quads<kPart * 2>(w, a, part);
    dot_quads<kPart * 2 + 1>(w, a, part);
    if constexpr (kParts == 1) {
      dot_quads<2>(w, a, part);
      dot_quads<3>(w, a, part);
    }
  }
  // The scales of a group, each to its quarter.
  I quarters;
  for (int i = 0; i < kLanes; ++i) quarters[i] = i / 4 * kParts + kPart;
  PYFMT_UNROLL for (int r = 0; r < kRows; ++r) {
    const __m256 some = _mm256_loadu_ps(scales + r * kScaleStride);
    const F scale = (F)_mm512_permutexvar_ps((__m512i)quarters, _mm512_castps256_ps512(some));
    PYFMT_UNROLL for (int q = 0; q < kQuads; ++q) {
      float* const sum = sums[r / 4] + (q * 4 + r % 4) * kLanes;
      F each = scale;
      if (kLeft) {
        const F left = load<F>(left_scales + (kPart * 4 + q) * kLanes);
        if (u.wide) {
          add_wide_quads(part[r][q], left, scale, sum);
          continue;
        }
        each = scale * left;
      }
      store<F>(sum, multiply_add(part[r][q], each, load<F>(sum)));
    }
  }
}

// kRows rows of a unit by kQuads quads of tokens, added to the sums.
template <int kParts, int kRows, int kQuads, bool kLeft>
static __attribute__((noinline)) void token_tile(Unit& u, int64_t first, const Tokens& k) {
  const uint16_t* w = u.data + first * kUnitStride;
  const float* scales = u.scales + first * kScaleStride + u.first_scale;
  const float* left = k.scales;
  const uint32_t* a = k.a;
  float* const four_rows = k.sums + first / 4 * k.sum_stride;
  float* const sums[2] = {four_rows, four_rows + k.sum_stride};
  const int64_t codes = (u.codes.lines + u.groups - 1) / u.groups;
  const int64_t scale_codes = (u.scale_codes.lines + u.groups - 1) / u.groups;
  for (int64_t g = 0; g < u.groups; ++g, scales += 4 * kParts, left += 4 * kLanes * kParts) {
    if (k.first) {
      u.codes.fetch(codes);
      u.scale_codes.fetch(scale_codes);
    }
    add_part<0, kParts, kRows, kQuads, kLeft>(u, w, a, scales, left, sums);
    if constexpr (kParts == 2) {
      add_part<1, kParts, kRows, kQuads, kLeft>(u, w, a, scales, left, sums);
    }
    w += u.vectors * kPairs;
    a += u.vectors * 16 * kLanes;
  }
}

template <int kParts, int kRows, int kQuads, bool kLeft>
static void unit_rows(Unit& u, int64_t rows, Tokens& k) {
  for (int64_t r = 0; r < rows; r += kRows, k.first = false) {
    token_tile<kParts, kRows, kQuads, kLeft>(u, r, k);
  }
}

// Rows of a unit by all quads, four at a time; tokens are `next` words apart, scales `next_scales`.
template <int kParts, bool kLeft>
static void all_tokens(Unit& u, int64_t rows, int64_t quads, Tokens k, int64_t next,
                       int64_t next_scales) {
  k.first = true;
  for (; quads > 0; quads -= 4) {
    switch (quads) {
      case 1:
        unit_rows<kParts, 8, 1, kLeft>(u, rows, k);
        break;
      case 2:
        unit_rows<kParts, 8, 2, kLeft>(u, rows, k);
        break;
      case 3:
        unit_rows<kParts, 4, 3, kLeft>(u, rows, k);
        break;
      default:
        unit_rows<kParts, 4, 4, kLeft>(u, rows, k);
    }
    k.a += next;
    k.scales += next_scales;
    k.sums += 16 * kLanes;
  }
}

// The sum of the four quarters.
PYFMT_INLINE __m128 add_quarters(const float* sums) {
  const __m512 v = _mm512_loadu_ps(sums);
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// Sums to results: rows of b become columns; tensor scale, bias, one rounding.
static void finish_tokens(const TileArgs& t, int64_t token, int64_t tokens, int64_t row,
                          const float* sums, int64_t stride) {
  alignas(64) float bias[kPanel] = {}, out[kQuad][kPanel];
  const int64_t n = t.n - row < kPanel ? t.n - row : kPanel;
  for (int64_t i = 0; t.bias && i < n; ++i) bias[i] = float_at(t.bias, t.bias_dtype, row + i);
  const F multiplier = all(t.multiplier);
  for (int64_t q = 0; q * kQuad < tokens; ++q) {
    for (int64_t r = 0; r < kPanel; r += 4) {
      __m128 v[4];
      for (int i = 0; i < 4; ++i) v[i] = add_quarters(sums + r / 4 * stride + (q * 4 + i) * kLanes);
      _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
      for (int i = 0; i < 4; ++i) _mm_storeu_ps(out[i] + r, v[i]);
    }
    for (int m = 0; m < kQuad && q * kQuad + m < tokens; ++m) {
      for (int p = 0; p < kPanel; p += kLanes) {
        F y = load<F>(out[m] + p) * multiplier;
        if (t.bias) y = y + load<F>(bias + p);
        store<F>(out[m] + p, y);
      }
      store_row((const uint32_t*)out[m], n, t.out_dtype,
                at(t.out, t.out_dtype, (token + q * kQuad + m) * t.n + row));
    }
  }
}

static void token_tiles(const TileArgs& t, int64_t begin, int64_t end) {
  const int64_t panels = (t.n + kPanel - 1) / kPanel, quarter = quarter_of(t);
  const int64_t slot = quarter / parts_of(t);
  // Few tokens: short units, which the first-level cache holds beside them.
  const int64_t rows = t.m_chunk <= kFewTokens ? kUnitRows : kPanel;
  const int64_t stride = (t.m_chunk + kQuad - 1) / kQuad * 4 * kLanes;
  const int64_t bytes = kPanel * (stride + kUnitStride * 2 + kScaleStride * 4) + 256;
  float* const sums = (float*)t.workspace(bytes);
  Unit unit;
  unit.scales = sums + kPanel / 4 * stride;
  unit.data = (uint16_t*)(unit.scales + kPanel * kScaleStride);
  unit.vectors = quarter / 8;
  UnitDecoder decoder(t);
  const auto multiply = parts_of(t) == 2 ? t.a_scales ? all_tokens<2, true> : all_tokens<2, false>
                        : t.a_scales     ? all_tokens<1, true>
                                         : all_tokens<1, false>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item % panels * kPanel, token = item / panels * t.m_chunk;
    const int64_t tokens = t.m - token < t.m_chunk ? t.m - token : t.m_chunk;
    memset(sums, 0, size_t(kPanel * stride));
    for (int64_t r = 0; r < kPanel && row + r < t.n; r += rows) {
      for (int64_t from = 0; from < t.k; from += kUnitColumns) {
        const bool last = from + kUnitColumns >= t.k;
        look_ahead(t, last ? row + r + rows : row + r, rows, last ? 0 : from + kUnitColumns,
                   kUnitColumns, &unit.codes, &unit.scale_codes);
        const int64_t place = from % kStretch;
        if (place == 0) {
          decoder.scales(row + r, rows, from, t.k - from < kStretch ? t.k - from : kStretch, &unit);
        }
        unit.first_scale = place / slot;
        decoder.run(row + r, rows, from, t.k - from < kUnitColumns ? t.k - from : kUnitColumns,
                    &unit);
        Tokens k;
        const int64_t next = t.a_columns * (kTokens / 2), block = token / kTokens;
        const int64_t next_scales = t.a_columns / slot * kTokens;
        k.a = (const uint32_t*)t.a + block * next + from * (kTokens / 2);
        k.scales = t.a_scales ? t.a_scales + block * next_scales + from / slot * kTokens : nullptr;
        k.sums = sums + r / 4 * stride;
        k.sum_stride = stride;
        const int64_t quads = (tokens + kQuad - 1) / kQuad;
        multiply(unit, rows, quads, k, next, next_scales);
      }
    }
    finish_tokens(t, token, tokens, row, sums, stride);
  }
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
#endif
