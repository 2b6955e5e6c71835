// SPDX-License-Identifier: Apache-2.0
// Rotations of sixteen groups of 128 elements side by side, one to a lane: butterflies and largest
// magnitudes need no shuffles then, only the input is turned. AVX-512.
#pragma once

#include "kernels_rotate.h"

namespace pyfmt {
namespace PYFMT_ISA {

#if PYFMT_AVX512
constexpr int kLaneGroup = 128, kLaneTile = kLanes * kLaneGroup;
// How far ahead input is asked for, in the order of memory and all the time: in bursts it waits.
constexpr int kLanesAhead = 8192;

// v[4 i + k], of 128-bit pieces p: piece p of v[4 i + k] goes to piece i of v[4 p + k].
PYFMT_INLINE void turn_pieces(__m512i v[16]) {
#pragma GCC unroll 16
  for (int k = 0; k < 4; ++k) {
    const __m512i a = _mm512_shuffle_i32x4(v[k], v[4 + k], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(v[k], v[4 + k], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(v[8 + k], v[12 + k], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(v[8 + k], v[12 + k], 0xdd);
    v[k] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[4 + k] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[8 + k] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[12 + k] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}
// Within each piece: lane k of v[j] goes to lane j of v[k].
PYFMT_INLINE void turn_lanes(__m512i v[4]) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c);
  v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d);
  v[3] = _mm512_unpackhi_epi64(b, d);
}

// a + b and a - b, with kFused as a fused multiply-add by 1, which other units compute.
template <bool kFused>
PYFMT_INLINE void cross(__m512* a, __m512* b) {
  const __m512 sum = _mm512_add_ps(*a, *b);
  *b = kFused ? _mm512_fnmadd_ps(*b, _mm512_set1_ps(1.0f), *a) : _mm512_sub_ps(*a, *b);
  *a = sum;
}

// Butterflies of vectors kStride apart; spelt out, so that the vectors stay in registers. Strides
// in turn on two kinds of units and on one: the others multiply too.
template <int kStride, int kCount>
PYFMT_INLINE void cross_all(__m512* v) {
  constexpr bool kFused = kStride == 1 || kStride == 4;
#pragma GCC unroll 16
  for (int m = 0; m < kCount / 2; ++m) {
    __m512* const a = v + m / kStride * 2 * kStride + m % kStride;
    cross<kFused>(a, a + kStride);
  }
}

PYFMT_INLINE U magnitude(__m512 v) {
  return (U)v & 0x7fffffffu;
}
// The larger magnitude of two. Of a NaN and a number it is the number: see where it is used.
PYFMT_INLINE U larger_magnitude(__m512 a, __m512 b) {
  return (U)_mm512_range_ps(a, b, 0b1011);
}

// The largest magnitude of 16 vectors after their last butterflies. A butterfly's results are both
// NaN, or one of them is infinite, or none is NaN: as a pair they hide none.
PYFMT_INLINE U largest_of(const __m512* v, int size, U most) {
  if (size == 16) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) most = max_u(most, larger_magnitude(v[k], v[k + 8]));
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) most = max_u(most, magnitude(v[k]));
  }
  return most;
}

// The same for vectors 16 elements apart, eight of them, each to its block. Pairs are 16 elements
// apart here, so that a butterfly's results may lie in different pairs; but if one of its terms was
// infinite or NaN before these last three strides, so is a result in the first two vectors.
template <int kBlocks>
PYFMT_INLINE void largest_of_blocks(const __m512* d, U* most) {
  if constexpr (kBlocks == 4) {
    most[0] = max_u(most[0], max_u(magnitude(d[0]), magnitude(d[1])));
#pragma GCC unroll 3
    for (int b = 1; b < 4; ++b) {
      most[b] = max_u(most[b], larger_magnitude(d[2 * b], d[2 * b + 1]));
    }
  } else {
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) most[b] = max_u(most[b], magnitude(d[b]));
  }
}

template <bool kFactor, int kCount>
PYFMT_INLINE void put_lanes(const __m512* v, float factor, int64_t stride, float* out) {
#pragma GCC unroll 16
  for (int k = 0; k < kCount; ++k) {
    _mm512_store_ps(out + k * stride * kLanes,
                    kFactor ? _mm512_mul_ps(v[k], _mm512_set1_ps(factor)) : v[k]);
  }
}
template <int kCount>
PYFMT_INLINE void get_lanes(const float* in, int64_t stride, __m512* v) {
#pragma GCC unroll 16
  for (int k = 0; k < kCount; ++k) v[k] = _mm512_load_ps(in + k * stride * kLanes);
}

// 32 bytes of row a and of row b.
PYFMT_INLINE __m512i two_rows(const char* a, const char* b) {
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a));
  return _mm512_mask_loadu_epi32(low, 0xff00, b - 32);  // what is masked is not touched
}
// Sixteen elements of each group, turned up to turn_lanes, in steps k from 0 to 3: each gives the
// vectors k, k + 4, ... of v.
template <int kBytes>
PYFMT_INLINE void load_step(const char* x, int k, __m512i* v) {
  constexpr int kStride = kLaneGroup * kBytes;
  x += k * kStride;
#pragma GCC unroll 2
  for (int at = 0; at < 16 * kBytes; at += 32, x += 32, v += 8) {
    const __m512i low = two_rows(x, x + 4 * kStride);
    const __m512i high = two_rows(x + 8 * kStride, x + 12 * kStride);
    v[k] = _mm512_shuffle_i32x4(low, high, 0x88);
    v[k + 4] = _mm512_shuffle_i32x4(low, high, 0xdd);
  }
}

// Those as float32, times their signs.
template <int kBytes, bool kSigns>
PYFMT_INLINE void widen_lanes(__m512i* v, const float* signs, int64_t place, int64_t period,
                              __m512* e) {
#pragma GCC unroll 4
  for (int k = 0; k < 4 * kBytes; k += 4) turn_lanes(v + k);
#pragma GCC unroll 16
  for (int k = 0; k < 4 * kBytes; ++k) {
    if constexpr (kBytes == 2) {
      e[2 * k] = _mm512_castsi512_ps(_mm512_slli_epi32(v[k], 16));
      e[2 * k + 1] = _mm512_castsi512_ps((__m512i)((U)v[k] & 0xffff0000u));
    } else {
      e[k] = _mm512_castsi512_ps(v[k]);
    }
  }
  if constexpr (kSigns) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) e[k] *= _mm512_set1_ps(signs[(place + k) % period]);
  }
}

// The stride of 16 of a rotation of 32, of whose elements the first sixteen lie before `to`.
template <int kBlocks, bool kFactor>
PYFMT_INLINE void finish_pair(__m512* e, float factor, float* to, U* amax) {
  U lower{}, upper{};
  float* const before = to - 16 * kLanes;
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    __m512 a = _mm512_load_ps(before + k * kLanes);
    cross<true>(&a, e + k);
    if constexpr (kBlocks == 4) {
      upper = max_u(upper, larger_magnitude(a, e[k]));
    } else {
      lower = max_u(lower, magnitude(a));
      upper = max_u(upper, magnitude(e[k]));
    }
    put_lanes<kFactor, 1>(&a, factor, 1, before + k * kLanes);
    put_lanes<kFactor, 1>(e + k, factor, 1, to + k * kLanes);
  }
  amax[0] = upper;
  if (kBlocks == 8) amax[-1] = lower;
}

// The strides from 16 on of larger ones, in place; `between` is called sixteen times meanwhile.
template <int kBlocks, bool kFactor, class Between>
PYFMT_INLINE void rotate_across(int size, float factor, float* x, U* amax, const Between& between) {
  U most[kBlocks] = {};
  for (int i = 0; i < 16; ++i, x += kLanes) {
    __m512 d[8];
    get_lanes<8>(x, 16, d);
    cross_all<1, 8>(d);
    cross_all<2, 8>(d);
    if (size > 64) cross_all<4, 8>(d);
    between.run(i);
    largest_of_blocks<kBlocks>(d, most);
    put_lanes<kFactor, 8>(d, factor, 16, x);
  }
  for (int b = 0; b < kBlocks; ++b) amax[b] = most[b];
}
struct Nothing {
  PYFMT_HD void run(int) const {}
};
using AcrossFn = void (*)(int size, float factor, float* x, U* amax);
template <int kBlocks, bool kFactor>
static void rotate_across_alone(int size, float factor, float* x, U* amax) {
  rotate_across<kBlocks, kFactor>(size, factor, x, amax, Nothing{});
}

// Where a is -0 and b a zero: only there can a rotation give -0, a and b being its first terms.
PYFMT_INLINE __mmask16 negative_zeros(__m512 a, __m512 b) {
  const __m512i sign = _mm512_set1_epi32(int(0x80000000u));
  const __mmask16 first = _mm512_cmpeq_epi32_mask(_mm512_castps_si512(a), sign);
  return _mm512_mask_testn_epi32_mask(first, _mm512_castps_si512(b), _mm512_set1_epi32(0x7fffffff));
}

// A rotation of x, without its factor: vector e of `out` holds element e of each group, times
// `factor` with kFactor, amax the largest magnitudes of the groups' blocks (not times it). Of
// rotations above 32 these are the strides below 16 only: rotate_across does the rest. Returns
// whether a result may be -0. Signs repeat in a group.
//
// While sixteen elements' butterflies are computed, the next sixteen are loaded and turned, a step
// after each stride: the processor looks ahead some hundred instructions only, and its units for
// sums and for shuffles would wait for each other in turn.
template <DType kDType, bool kSigns, int kBlocks, bool kFactor>
static bool rotate_lanes(const void* x, const Rotation& r, float factor, float* out, U* amax) {
  constexpr int kBytes = dtype_bytes(kDType), kSize = kLaneGroup / kBlocks;
  constexpr bool kAhead = kBytes == 2;  // registers for both
  const int size = r.size;
  const char* p = (const char*)x;
  __m512i v[4 * kBytes];
  U most{};
  __mmask16 negative = 0;
#pragma GCC unroll 4
  for (int k = 0; kAhead && k < 4; ++k) load_step<kBytes>(p, k, v);
  for (int i = 0; i < kLaneGroup; i += 16) {
    float* const to = out + i * kLanes;
    __m512 e[16];
#pragma GCC unroll 4
    for (int k = 0; !kAhead && k < 4; ++k) load_step<kBytes>(p, k, v);
    widen_lanes<kBytes, kSigns>(v, r.signs, i, r.signs_length, e);
    // The last time there is no next one: any will do.
    p = i < kLaneGroup - 16 ? p + 16 * kBytes : (const char*)x;
#pragma GCC unroll 16
    for (int at = 0; at < 256 * kBytes; at += 64) {
      __builtin_prefetch((const char*)x + kLanesAhead + i * 16 * kBytes + at);
    }
    negative |= negative_zeros(e[0], e[1]);
    if (size < 16) {
#pragma GCC unroll 7
      for (int k = 2; k < 16; k += 2) negative |= negative_zeros(e[k], e[k + 1]);
    }
    cross_all<1, 16>(e);
    if (kAhead) load_step<kBytes>(p, 0, v);
    if (size > 2) cross_all<2, 16>(e);
    if (kAhead) load_step<kBytes>(p, 1, v);
    if (size > 4) cross_all<4, 16>(e);
    if (kAhead) load_step<kBytes>(p, 2, v);
    if (size > 8) cross_all<8, 16>(e);
    if (kAhead) load_step<kBytes>(p, 3, v);
    if (size == 32 && i % 32) {
      finish_pair<kBlocks, kFactor>(e, factor, to, amax + i / kSize);
      continue;
    }
    if (size > 16) {
      put_lanes<false, 16>(e, factor, 1, to);
      continue;
    }
    most = largest_of(e, size, i % kSize ? most : U{});
    amax[i / kSize] = most;
    put_lanes<kFactor, 16>(e, factor, 1, to);
  }
  return negative != 0;
}

using RotateLanesFn = bool (*)(const void* x, const Rotation&, float factor, float* out, U* amax);

template <DType kDType, int kBlocks, bool kFactor>
static RotateLanesFn lanes_rotator_of(bool has_signs) {
  return has_signs ? rotate_lanes<kDType, true, kBlocks, kFactor>
                   : rotate_lanes<kDType, false, kBlocks, kFactor>;
}
#endif

}  // namespace PYFMT_ISA
}  // namespace pyfmt
