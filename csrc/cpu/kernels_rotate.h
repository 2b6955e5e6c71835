// SPDX-License-Identifier: Apache-2.0
// Block Hadamard rotation in float32: signs, butterflies at strides 1, 2, 4, ..., one multiply.
#pragma once

#include "pairs.h"

namespace pyfmt {
namespace PYFMT_ISA {

// (a, b) -> (a + b, a - b) for lanes kStride apart: b's lane adds -b to a, which rounds as a - b.
template <int kStride>
PYFMT_INLINE F butterfly_lanes(F v) {
  if constexpr (kStride < kLanes) {
    F sign;
    for (int i = 0; i < kLanes; ++i) sign[i] = i & kStride ? -1.0f : 1.0f;
    return add_signed(exchange<kStride>(v), v, sign);
  }
  return v;
}

// The strides of elements 2, 4, ... below kSize, as far as they lie within a vector of every
// second element.
template <int kSize>
PYFMT_INLINE F butterflies_within(F v) {
  if (kSize > 2) v = butterfly_lanes<1>(v);
  if (kSize > 4) v = butterfly_lanes<2>(v);
  if (kSize > 8) v = butterfly_lanes<4>(v);
  if (kSize > 16) v = butterfly_lanes<8>(v);
  return v;
}

PYFMT_INLINE void butterfly(F* a, F* b) {
  const F sum = *a + *b, difference = *a - *b;
  *a = sum;
  *b = difference;
}

// What fits in registers: this many elements, as vectors of even and of odd ones.
constexpr int kSpan = kLanes == 16 ? 128 : kLanes == 8 ? 64 : 32;

// Blocks of kSize elements (at most kSpan), max(kSize, 32) at a time: neighbours are an even and
// an odd element, strides up to kLanes lie within vectors, and the rest are across them.
template <int kSize, class From, bool kSigns>
PYFMT_INLINE void rotate_span(const void* in, float* out, int64_t n, F factor, const float* signs,
                              int64_t place, int64_t period) {
  constexpr int kStep = kSize > kPairs ? kSize : kPairs, kUnits = kStep / kPairs;
  constexpr int kCount = kUnits * kVectors, kAcross = kSize / (2 * kLanes);
  for (int64_t i = 0; i < n; i += kStep) {
    F even[kCount], odd[kCount];
    for (int u = 0; u < kUnits; ++u) {
      const Pairs p = From::pairs(in, i + u * kPairs);
      Pairs s{};
      if (kSigns) {
        s = load_pairs<DType::kFP32>(signs, place);
        place = place + kPairs == period ? 0 : place + kPairs;
      }
      for (int k = 0; k < kVectors; ++k) {
        even[u * kVectors + k] = (F)p.even.v[k];
        odd[u * kVectors + k] = (F)p.odd.v[k];
        if (!kSigns) continue;
        even[u * kVectors + k] *= (F)s.even.v[k];
        odd[u * kVectors + k] *= (F)s.odd.v[k];
      }
    }
    for (int k = 0; k < kCount; ++k) {
      butterfly(&even[k], &odd[k]);
      even[k] = butterflies_within<kSize>(even[k]);
      odd[k] = butterflies_within<kSize>(odd[k]);
    }
    for (int stride = 1; stride < kAcross; stride *= 2) {
      for (int k = 0; k < kCount; ++k) {
        if (k & stride) continue;
        butterfly(&even[k], &even[k + stride]);
        butterfly(&odd[k], &odd[k + stride]);
      }
    }
    for (int u = 0; u < kUnits; ++u) {
      Pairs p;
      for (int k = 0; k < kVectors; ++k) {
        p.even.v[k] = (U)(even[u * kVectors + k] * factor);
        p.odd.v[k] = (U)(odd[u * kVectors + k] * factor);
      }
      store_paired((uint32_t*)out, i + u * kPairs, p);
    }
  }
}

// One pass of butterflies at `stride`, a multiple of 32, in paired order as in any other.
PYFMT_INLINE void butterfly_pass(float* x, int64_t n, int64_t stride, F factor) {
  for (int64_t block = 0; block < n; block += 2 * stride) {
    for (int64_t i = block; i < block + stride; i += kLanes) {
      const F a = load<F>(x + i), b = load<F>(x + i + stride);
      store<F>(x + i, (a + b) * factor);
      store<F>(x + i + stride, (a - b) * factor);
    }
  }
}

// float32(2^(-k/2)) for size 2^k.
PYFMT_INLINE float rotation_factor(int size) {
  int k = 0;
  while (size >> (k + 1)) ++k;
  const uint32_t root = k & 1 ? 0x3f3504f3u : 0x3f800000u;  // float32(sqrt(1/2)) or 1
  return codec::Lane<uint32_t>::as_float(root - (uint32_t(k / 2) << 23));
}

// A row, or a piece of one that begins at `column`, in whole pairs and whole blocks.
template <class From, bool kSigns>
static void rotate_pairs_as(const void* in, int64_t n, const Rotation& r, int64_t column,
                            float* x) {
  const F one = (F)broadcast(0x3f800000u);
  const F factor = (F)broadcast(codec::Lane<uint32_t>::as_uint(rotation_factor(r.size)));
  const int64_t period = kSigns ? r.signs_length : 1, place = column % period;
  const int size = r.size < kSpan ? r.size : kSpan;
  const F first = r.size <= kSpan ? factor : one;
  switch (size) {
    case 2:
      rotate_span<2, From, kSigns>(in, x, n, first, r.signs, place, period);
      break;
    case 4:
      rotate_span<4, From, kSigns>(in, x, n, first, r.signs, place, period);
      break;
    case 8:
      rotate_span<8, From, kSigns>(in, x, n, first, r.signs, place, period);
      break;
    case 16:
      rotate_span<16, From, kSigns>(in, x, n, first, r.signs, place, period);
      break;
    case 32:
      rotate_span<32, From, kSigns>(in, x, n, first, r.signs, place, period);
      break;
    case 64:
      rotate_span < kSpan<64 ? kSpan : 64, From, kSigns>(in, x, n, first, r.signs, place, period);
      break;
    default:
      rotate_span<kSpan, From, kSigns>(in, x, n, first, r.signs, place, period);
  }
  for (int64_t stride = kSpan; stride < r.size; stride *= 2) {
    butterfly_pass(x, n, stride, 2 * stride == r.size ? factor : one);
  }
}

// Whether rows of n elements can be rotated by pairs.
PYFMT_INLINE bool rotates_pairs(const Rotation& r, int64_t n) {
  const int64_t period = r.signs ? r.signs_length : 1;
  return n % kPairs == 0 && (kPairs % period == 0 || period % kPairs == 0);
}

template <class From>
static void rotate_pairs_from(const void* in, int64_t n, Rotation r, int64_t column, float* x) {
  if (!r.signs) return rotate_pairs_as<From, false>(in, n, r, column, x);
  float repeated[kPairs];
  if (r.signs_length < kPairs) {
    for (int i = 0; i < kPairs; ++i) repeated[i] = r.signs[(column + i) % r.signs_length];
    r.signs = repeated;
    r.signs_length = kPairs;
    column = 0;
  }
  rotate_pairs_as<From, true>(in, n, r, column, x);
}

// The result lies in x in paired order.
static void rotate_pairs(const void* in, DType dtype, int64_t n, const Rotation& r, int64_t column,
                         uint32_t* x) {
  switch (dtype) {
    case DType::kBF16:
      return rotate_pairs_from<FromRow<DType::kBF16>>(in, n, r, column, (float*)x);
    case DType::kFP16:
      return rotate_pairs_from<FromRow<DType::kFP16>>(in, n, r, column, (float*)x);
    default:
      return rotate_pairs_from<FromRow<DType::kFP32>>(in, n, r, column, (float*)x);
  }
}

// Any n, a multiple of the size; `padded` (a multiple of 16) elements are written in plain order.
static void rotate_row(const void* in, DType dtype, int64_t n, int64_t padded, const Rotation& r,
                       int64_t column, uint32_t* x) {
  load_row(in, dtype, n, padded, x);
  float* y = (float*)x;
  int64_t s = r.signs ? column % r.signs_length : 0;
  for (int64_t i = 0; r.signs && i < n; s = 0) {
    const int64_t left = r.signs_length - s, run = left < n - i ? left : n - i;
    for (int64_t k = 0; k < run; ++k) y[i + k] *= r.signs[s + k];
    i += run;
  }
  const float factor = rotation_factor(r.size);
  for (int64_t stride = 1; stride < r.size; stride *= 2) {
    for (int64_t block = 0; block < n; block += 2 * stride) {
      for (int64_t i = block; i < block + stride; ++i) {
        const float a = y[i], b = y[i + stride];
        y[i] = a + b;
        y[i + stride] = a - b;
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) y[i] *= factor;
}

// n elements in paired order to a dtype.
template <DType kDType>
static void store_from_paired(const uint32_t* in, int64_t n, void* out) {
  for (int64_t i = 0; i < n; i += kPairs) {
    Pairs p = load_paired(in, i);
    for (int k = 0; k < kVectors; ++k) {
      p.even.v[k] = codec::canonical_nan<U>(p.even.v[k], kFloatNaN);
      p.odd.v[k] = codec::canonical_nan<U>(p.odd.v[k], kFloatNaN);
    }
    store_pairs<kDType>(out, i, p);
  }
}

static void hadamard(const cpu::HadamardArgs& a, int64_t begin, int64_t end) {
  GradualUnderflow guard;
  const int64_t width = round_up(a.tile_columns, kGroup);
  Scratch scratch(width * 4);
  uint32_t* x = scratch.take<uint32_t>(width);
  const int64_t across = (a.columns + a.tile_columns - 1) / a.tile_columns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / across, column = item % across * a.tile_columns;
    const int64_t left = a.columns - column, n = left < a.tile_columns ? left : a.tile_columns;
    const int64_t start = row * a.columns + column;
    const void* in = at(a.x, a.dtype, start);
    void* out = at(a.out, a.out_dtype, start);
    if (!rotates_pairs(a.rotation, n)) {
      rotate_row(in, a.dtype, n, round_up(n, kGroup), a.rotation, column, x);
      store_row(x, n, a.out_dtype, out);
      continue;
    }
    rotate_pairs(in, a.dtype, n, a.rotation, column, x);
    switch (a.out_dtype) {
      case DType::kBF16:
        store_from_paired<DType::kBF16>(x, n, out);
        break;
      case DType::kFP16:
        store_from_paired<DType::kFP16>(x, n, out);
        break;
      default:
        store_from_paired<DType::kFP32>(x, n, out);
    }
  }
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
