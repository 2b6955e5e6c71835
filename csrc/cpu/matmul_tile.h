// SPDX-License-Identifier: Apache-2.0
// Tiles: some rows of the left panel times a panel of b, segment by segment in the order of K. A
// segment's dot product is multiplied by its scales and added to the float32 sum by one
// multiply-add; so a result depends on its row and column only, not on tiles or threads.
#pragma once

#include "matmul_tokens.h"

namespace pyfmt {
namespace PYFMT_ISA {

// The arithmetic within a segment, on 32 bits of K at a time. By name: compilers keep copies of
// the sums around the intrinsics.
struct ByFloat {
  using Part = F;
  PYFMT_INLINE Part start(const int32_t*) { return F{}; }
  PYFMT_INLINE void dot(U a, U b, Part& sum) {
#if PYFMT_AVX512
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
    sum = multiply_add((F)a, (F)b, sum);
#endif
  }
  PYFMT_INLINE F value(Part sum) { return sum; }
};

#if PYFMT_VNNI
struct ByInt8 {
  using Part = __m512i;
  // The left bytes are kBias too large, which the sums of the right bytes take back.
  PYFMT_INLINE Part start(const int32_t* sums) { return _mm512_loadu_si512(sums); }
  PYFMT_INLINE void dot(U a, U b, Part& sum) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
  PYFMT_INLINE F value(Part sum) { return (F)_mm512_cvtepi32_ps(sum); }
};
#endif

struct LeftRows {
  const char* a;
  int64_t stride;        // bytes
  const float* scales;   // of this chunk's first segment
  int64_t scale_stride;  // segments of a row
  bool first;            // of those that this panel is multiplied with
};

// Products of scales beyond the normal numbers: by way of double, rounded to float32 once.
static __attribute__((noinline)) void add_wide(const float* parts, int rows, const LeftRows& l,
                                               int64_t segment, const float* scales, float* sums) {
  for (int i = 0; i < rows * kPanel; ++i) {
    const double left = l.scales[i / kPanel * l.scale_stride + segment];
    sums[i] += float(parts[i] * left * scales[i % kPanel]);
  }
}

// kRows left rows by kWide vectors of the panel, added to `sums` (rows kPanel apart).
template <class By, int kRows, bool kLeft>
static void tile(Panel& p, int64_t words, const LeftRows& l, float* sums) {
  const uint32_t* b = p.data;
  const char* a = l.a;
  const int64_t codes = (p.codes.lines + p.segments - 1) / p.segments;
  const int64_t scale_codes = (p.scale_codes.lines + p.segments - 1) / p.segments;
  for (int64_t s = 0; s < p.segments; ++s) {
    // Sums stay in memory: compilers would carry them in registers that the parts need.
    asm volatile("" ::: "memory");
    if (l.first) {
      p.codes.fetch(codes);
      p.scale_codes.fetch(scale_codes);
    }
    typename By::Part part[kRows][kAcross];
    PYFMT_UNROLL for (int v = 0; v < kAcross; ++v) {
      const auto start = By::start(p.sums + s * kPanel + v * kLanes);
      PYFMT_UNROLL for (int m = 0; m < kRows; ++m) part[m][v] = start;
    }
    for (int64_t i = 0; i < words; ++i, b += kPanel, a += 4) {
      U right[kAcross];
      PYFMT_UNROLL for (int v = 0; v < kAcross; ++v) right[v] = load<U>(b + v * kLanes);
      PYFMT_UNROLL for (int m = 0; m < kRows; ++m) {
        uint32_t four;
        memcpy(&four, a + m * l.stride, 4);
        const U left = broadcast(four);
        PYFMT_UNROLL for (int v = 0; v < kAcross; ++v) By::dot(left, right[v], part[m][v]);
      }
    }
    const float* const scales = p.scales + s * kPanel;
    if (kLeft && p.wide) {
      alignas(64) float parts[kRows * kPanel];
      PYFMT_UNROLL for (int m = 0; m < kRows; ++m) {
        PYFMT_UNROLL for (int v = 0; v < kAcross; ++v) {
          store<F>(parts + m * kPanel + v * kLanes, By::value(part[m][v]));
        }
      }
      add_wide(parts, kRows, l, s, scales, sums);
      continue;
    }
    PYFMT_UNROLL for (int m = 0; m < kRows; ++m) {
      const F left = kLeft ? all(l.scales[m * l.scale_stride + s]) : F{};
      PYFMT_UNROLL for (int v = 0; v < kAcross; ++v) {
        F scale = load<F>(scales + v * kLanes);
        if (kLeft) scale = scale * left;
        float* const sum = sums + m * kPanel + v * kLanes;
        store<F>(sum, multiply_add(By::value(part[m][v]), scale, load<F>(sum)));
      }
    }
  }
}

#if PYFMT_AVX512
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif

template <class By, bool kLeft>
static void some_rows(int rows, Panel& p, int64_t words, const LeftRows& l, float* sums) {
  switch (rows) {
    case 1:
      return tile<By, 1, kLeft>(p, words, l, sums);
    case 2:
      return tile<By, 2, kLeft>(p, words, l, sums);
    case 3:
      return tile<By, 3, kLeft>(p, words, l, sums);
#if PYFMT_AVX512
    case 4:
      return tile<By, 4, kLeft>(p, words, l, sums);
    case 5:
      return tile<By, 5, kLeft>(p, words, l, sums);
#endif
    default:
      return tile<By, kTileRows, kLeft>(p, words, l, sums);
  }
}

using RowsFn = void (*)(int, Panel&, int64_t, const LeftRows&, float*);

static RowsFn rows_for(const TileArgs& t) {
#if PYFMT_VNNI
  if (t.kind == TileKind::kInt8) return some_rows<ByInt8, true>;
#endif
  return t.a_scales ? some_rows<ByFloat, true> : some_rows<ByFloat, false>;
}

// Sums to results: tensor scale, bias, one rounding.
static void finish(const TileArgs& t, int64_t row, int64_t rows, int64_t column, float* sums) {
  const int64_t n = t.n - column < kPanel ? t.n - column : kPanel;
  alignas(64) float bias[kPanel] = {};
  if (t.bias) {
    for (int64_t i = 0; i < n; ++i) bias[i] = float_at(t.bias, t.bias_dtype, column + i);
  }
  const F multiplier = all(t.multiplier);
  for (int64_t m = 0; m < rows; ++m, sums += kPanel) {
    for (int v = 0; v < kAcross; ++v) {
      F y = load<F>(sums + v * kLanes) * multiplier;
      if (t.bias) y = y + load<F>(bias + v * kLanes);
      store<F>(sums + v * kLanes, y);
    }
    store_row((const uint32_t*)sums, n, t.out_dtype,
              at(t.out, t.out_dtype, (row + m) * t.n + column));
  }
}

// Rows begin to end of the left side to the panel, and the exponents of their scales.
static void left(const LeftArgs& a, int64_t begin, int64_t end, int64_t* least, int64_t* most) {
  GradualUnderflow guard;
  Extremes extremes;
#if PYFMT_BF16
  if (a.tile->kind == TileKind::kBF16) {
    left_tokens(a, begin, end, &extremes);
  } else {
    left_rows(a, begin, end, &extremes);
  }
#else
  left_rows(a, begin, end, &extremes);
#endif
  *least = extremes.least;
  *most = extremes.most;
}

static void tiles(const TileArgs& t, int64_t begin, int64_t end) {
  GradualUnderflow guard;
#if PYFMT_BF16
  if (t.kind == TileKind::kBF16) return token_tiles(t, begin, end);
#endif
  const int64_t chunk = chunk_of(t), bytes = element_bytes(t.kind);
  const int64_t most = chunk / t.segment, words = t.segment * bytes / 4;
  const int64_t panels = (t.n + kPanel - 1) / kPanel;
  const int64_t floats = kPanel * (t.m_chunk + 2 * most) + chunk * kPanel * bytes / 4;
  float* const room = (float*)t.workspace(floats * 4 + 256);
  float* const sums = room;
  Panel panel{(uint32_t*)room + kPanel * (t.m_chunk + 2 * most),
              room + kPanel * t.m_chunk,
              (int32_t*)room + kPanel * (t.m_chunk + most),
              0,
              false,
              Ahead{},
              Ahead{}};
  if (t.decoded) {
    for (int64_t i = 0; i < most * kPanel; ++i) panel.scales[i] = 1.0f;
  }
  const RowsFn multiply = rows_for(t);
  RightPacker packer(t);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t column = item % panels * kPanel, row = item / panels * t.m_chunk;
    const int64_t rows = t.m - row < t.m_chunk ? t.m - row : t.m_chunk;
    for (int64_t i = 0; i < rows * kPanel; ++i) sums[i] = 0.0f;
    for (int64_t from = 0; from < t.k; from += chunk) {
      const bool last = from + chunk >= t.k;
      look_ahead(t, last ? column + kPanel : column, kPanel, last ? 0 : from + chunk, chunk,
                 &panel.codes, &panel.scale_codes);
      packer.run(column, from, t.k - from < chunk ? t.k - from : chunk, &panel);
      for (int64_t m = 0; m < rows; m += kTileRows) {
        const int count = int(rows - m < kTileRows ? rows - m : kTileRows);
        LeftRows l;
        l.first = m == 0;
        l.stride = t.a_columns * bytes;
        l.a = (const char*)t.a + (row + m) * l.stride + from * bytes;
        l.scale_stride = t.segments();
        l.scales =
            t.a_scales ? t.a_scales + (row + m) * l.scale_stride + from / t.segment : nullptr;
        multiply(count, panel, words, l, sums + m * kPanel);
      }
    }
    finish(t, row, rows, column, sums);
  }
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
