// SPDX-License-Identifier: Apache-2.0
// Block Hadamard rotation of float32 in place: signs, butterflies at strides 1, 2, 4, ..., scale.
#pragma once

#include "lanes.h"

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

// The strides below min(lanes, kLanes) within vectors, then those across kCount vectors.
template <int kCount>
PYFMT_INLINE void butterflies(F v[kCount], int lanes) {
  for (int i = 0; i < kCount; ++i) {
    v[i] = butterfly_lanes<1>(v[i]);
    if (lanes > 2) v[i] = butterfly_lanes<2>(v[i]);
    if (lanes > 4) v[i] = butterfly_lanes<4>(v[i]);
    if (lanes > 8) v[i] = butterfly_lanes<8>(v[i]);
  }
  for (int stride = 1; stride < kCount; stride *= 2) {
    for (int i = 0; i < kCount; ++i) {
      if (i & stride) continue;
      const F a = v[i], b = v[i + stride];
      v[i] = a + b;
      v[i + stride] = a - b;
    }
  }
}

// kLanes elements of a dtype as float32.
template <DType kDType>
PYFMT_INLINE F load_lanes(const void* x, int64_t i) {
  if constexpr (kDType == DType::kFP32) return load<F>((const float*)x + i);
  const U half = load_u16_lanes((const uint16_t*)x + i);
  return (F)(kDType == DType::kBF16 ? codec::float_from_bf16<U>(half)
                                    : codec::float_from_half<U>(half));
}

template <int kCount, DType kDType>
PYFMT_INLINE void rotate_in_registers(const void* in, float* x, int64_t n, int lanes, F factor) {
  for (int64_t i = 0; i < n; i += kCount * kLanes) {
    F v[kCount];
    for (int k = 0; k < kCount; ++k) v[k] = load_lanes<kDType>(in, i + k * kLanes);
    butterflies<kCount>(v, lanes);
    for (int k = 0; k < kCount; ++k) store<F>(x + i + k * kLanes, v[k] * factor);
  }
}

// One pass of butterflies at `stride`, both halves whole vectors.
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

template <DType kDType>
static void rotate_from(const void* in, float* x, int64_t n, int size) {
  const F one = (F)broadcast(0x3f800000u);
  const F factor = (F)broadcast(codec::Lane<uint32_t>::as_uint(rotation_factor(size)));
  if (size < kLanes) return rotate_in_registers<1, kDType>(in, x, n, size, factor);
  if (size == kLanes) return rotate_in_registers<1, kDType>(in, x, n, kLanes, factor);
  if (size == 2 * kLanes) return rotate_in_registers<2, kDType>(in, x, n, kLanes, factor);
  if (size == 4 * kLanes) return rotate_in_registers<4, kDType>(in, x, n, kLanes, factor);
  // Larger sizes: eight vectors in registers, then one pass a stride; the last one scales.
  rotate_in_registers<8, kDType>(in, x, n, kLanes, size == 8 * kLanes ? factor : one);
  for (int64_t stride = 8 * kLanes; stride < size; stride *= 2) {
    butterfly_pass(x, n, stride, 2 * stride == size ? factor : one);
  }
}

static void apply_signs(float* x, int64_t n, const Rotation& r, int64_t column) {
  int64_t s = column % r.signs_length;
  for (int64_t i = 0; i < n;) {
    const int64_t run = r.signs_length - s < n - i ? r.signs_length - s : n - i;
    for (int64_t k = 0; k < run; ++k) x[i + k] *= r.signs[s + k];
    i += run;
    s = 0;
  }
}

// Rotate n elements of `in`, a multiple of the size, into x, padded with zeros to `padded` (a
// multiple of 16); `column` is the first one's place in its row.
static void rotate_row(const void* in, DType dtype, int64_t n, int64_t padded, const Rotation& r,
                       int64_t column, uint32_t* x) {
  float* y = (float*)x;
  if (r.signs || n % kGroup || dtype == DType::kFP16) {
    load_row(in, dtype, n, padded, x);
    if (r.signs) apply_signs(y, n, r, column);
    // The padding rotates among itself and stays zero.
    return rotate_from<DType::kFP32>(x, y, round_up(n, r.size > kGroup ? r.size : kGroup), r.size);
  }
  if (dtype == DType::kBF16) {
    rotate_from<DType::kBF16>(in, y, n, r.size);
  } else {
    rotate_from<DType::kFP32>(in, y, n, r.size);
  }
  memset(x + n, 0, size_t(padded - n) * 4);
}

static void hadamard(const cpu::HadamardArgs& a, int64_t begin, int64_t end) {
  GradualUnderflow guard;
  Scratch scratch(round_up(a.tile_columns, kGroup) * 4);
  uint32_t* x = scratch.take<uint32_t>(round_up(a.tile_columns, kGroup));
  const int64_t across = (a.columns + a.tile_columns - 1) / a.tile_columns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / across, column = item % across * a.tile_columns;
    const int64_t left = a.columns - column, n = left < a.tile_columns ? left : a.tile_columns;
    const int64_t start = row * a.columns + column;
    rotate_row(at(a.x, a.dtype, start), a.dtype, n, round_up(n, kGroup), a.rotation, column, x);
    store_row(x, n, a.out_dtype, at(a.out, a.out_dtype, start));
  }
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
