// SPDX-License-Identifier: Apache-2.0
// How the sums of matmul_wide.h become rows of y. Once a block, so the code is small: what runs
// once costs what it takes to bring it.
#pragma once

#include "matmul_wide_tiles.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

// Four neighbours of a row of y, of kType, where they are aligned to four.
template <DType kType>
PYFMT_DEVICE void store_four(void* to, const float (&v)[4]) {
  if constexpr (kType == DType::kFP32) {
    *static_cast<uint4*>(to) =
        make_uint4(canonical(v[0]), canonical(v[1]), canonical(v[2]), canonical(v[3]));
  } else {
    *static_cast<uint2*>(to) =
        make_uint2(to_halves<kType>(v[0], v[1]), to_halves<kType>(v[2], v[3]));
  }
}

// The first `here` of four neighbours of y, from element `at` on, one by one.
PYFMT_DEVICE void store_some(void* y, DType dtype, int64_t at, const float (&v)[4], int here) {
#pragma unroll 1
  for (int i = 0; i < here && i < 4; ++i) {
    store_element(y, dtype, at + i, i == 0 ? v[0] : i == 1 ? v[1] : i == 2 ? v[2] : v[3]);
  }
}

// The same in one store where rows of `width` elements and `here` allow it.
PYFMT_DEVICE void store_four(void* y, DType dtype, int width, int64_t at, const float (&v)[4],
                             int here) {
  if (here < 4 || width % 4) return store_some(y, dtype, at, v, here);
  if (dtype == DType::kFP32) return store_four<DType::kFP32>(static_cast<float*>(y) + at, v);
  uint16_t* const to = static_cast<uint16_t*>(y) + at;
  if (dtype == DType::kBF16) return store_four<DType::kBF16>(to, v);
  store_four<DType::kFP16>(to, v);
}

// Which part of y a warp of kConsumers / 32 writes: every so many tokens, a lane four columns. And
// what it multiplies sums by, asked for before anything is waited for.
template <int kTokens>
struct Ending {
  static constexpr int kWarpsHere = kConsumers / 32;
  static_assert(kTokens <= 32 * kWarpsHere, "a lane knows the scale of one token");
  int warp, lane, n, here, count, m0, live;
  float of_token = 1.0f;  // of the warp's token number `lane`
  float factor[4], bias[4], scale = 1.0f;
  bool whole = true;  // no column of the lane's has scale 0

  PYFMT_DEVICE Ending(const Params& p, const Place& at) : Ending(p, at, at.part) {}
  // half: of the tokens, of two parts of K.
  PYFMT_DEVICE Ending(const Params& p, const Place& at, int half)
      : warp(int(threadIdx.x) >> 5), lane(int(threadIdx.x) & 31) {
    n = at.n0 + 4 * lane;
    here = p.n - n < 4 ? p.n - n : 4;
    count = kTokens >> (p.split - 1);
    m0 = at.m0 + (p.split > 1 ? half : 0) * count;
    live = p.m - m0 < count ? p.m - m0 : count;
    const int token = warp + lane * kWarpsHere;
    if (p.x_scale && token < live) of_token = p.x_scale[m0 + token];
    if (p.tensor_scale) scale = *p.tensor_scale;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      factor[i] = p.w_scale && i < here ? p.up * p.w_scale[n + i] : p.up;
      bias[i] = p.bias && i < here ? p.bias[n + i] : 0.0f;
      whole = whole && factor[i] != 0.0f;
    }
  }

  // Four sums of the warp's token number i, of all, as numbers of y; whether the token's scale is
  // not 0. All lanes call.
  PYFMT_DEVICE bool finish_four(uint32_t staged, int i, float (&v)[4]) const {
    const int token = min(warp + i * kWarpsHere, live - 1);
    const float4 sums = hopper::load_floats(staged + uint32_t((token * kPitch + 4 * lane) * 4));
    const float of_row = hopper::from_lane(of_token, i);
    v[0] = sums.x, v[1] = sums.y, v[2] = sums.z, v[3] = sums.w;
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = v[e] * (factor[e] * of_row) * scale + bias[e];
    return of_row != 0.0f;
  }
  // Of four neighbours of y, from element `at` on, those whose columns' scales are not 0.
  PYFMT_DEVICE void write_some(const Params& p, int64_t at, const float (&v)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < here && factor[e] != 0.0f) store_element(p.y, p.dtype, at + e, v[e]);
    }
  }

  // Four tokens at once, so that none waits for another.
  template <DType kType>
  PYFMT_DEVICE void write_aligned(const Params& p, uint32_t staged) const {
    constexpr int kAtOnce = 4, kBytes = kType == DType::kFP32 ? 4 : 2;
    const int64_t step = int64_t(kWarpsHere) * p.n * kBytes;
    char* to = static_cast<char*>(p.y) + (int64_t(m0 + warp) * p.n + n) * kBytes;
#pragma unroll 1
    for (int i = 0; warp + i * kWarpsHere < live; i += kAtOnce) {
      float v[kAtOnce][4];
      bool counts[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) counts[j] = finish_four(staged, i + j, v[j]);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int token = warp + (i + j) * kWarpsHere;
        if (here == 4 && token < live && counts[j]) {
          whole ? store_four<kType>(to, v[j]) : write_some(p, int64_t(m0 + token) * p.n + n, v[j]);
        }
        to += step;
      }
    }
  }

  // staged: sums as stage_sums leaves them.
  PYFMT_DEVICE void write(const Params& p, uint32_t staged) const {
    if (p.n % 4 == 0) {
      if (p.dtype == DType::kBF16) return write_aligned<DType::kBF16>(p, staged);
      if (p.dtype == DType::kFP16) return write_aligned<DType::kFP16>(p, staged);
      return write_aligned<DType::kFP32>(p, staged);
    }
#pragma unroll 1
    for (int i = 0; warp + i * kWarpsHere < live; ++i) {
      float v[4];
      const bool counts = finish_four(staged, i, v);
      if (counts) write_some(p, int64_t(m0 + warp + i * kWarpsHere) * p.n + n, v);
    }
  }
};

template <int kTokens>
PYFMT_DEVICE void expect_sums(const Place& at) {
  hopper::barrier_expect(sums_barrier(at.base), uint32_t(kTokens / 4 * kConsumers * 4));
}

// Two parts of K: each gives the other the half of the tokens that it has last, and adds what it
// is given to its first half. Two summands: the order does not matter.
template <int kTokens>
PYFMT_DEVICE void exchange(const Params& p, const Place& at, float (&sums)[kTokens / 2]) {
  constexpr int kHalf = kTokens / 4;
  const uint32_t here = at.base + kHeader + threadIdx.x * 16;
  const uint32_t rank = uint32_t((at.part ^ 1) * p.share + at.sub);
  const uint32_t peer = hopper::cluster_address(here, rank);
  const uint32_t bar = hopper::cluster_address(sums_barrier(at.base), rank);
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    hopper::store_counted(peer + uint32_t(i * kConsumers * 4), sums[kHalf + i], sums[kHalf + i + 1],
                          sums[kHalf + i + 2], sums[kHalf + i + 3], bar);
  }
  hopper::barrier_wait(sums_barrier(at.base), 0);
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    const float4 v = hopper::load_floats(here + uint32_t(i * kConsumers * 4));
    sums[i] += v.x;
    sums[i + 1] += v.y;
    sums[i + 2] += v.z;
    sums[i + 3] += v.w;
  }
}

// Sums as [token][row of w] in shared memory. row: this lane's, of the first eight of its warp.
template <int kFrom, int kCount, int kAll>
PYFMT_DEVICE void stage_sums(uint32_t to, const float (&sums)[kAll], int row) {
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  to += uint32_t((lane % 4 * 2 * kPitch + 16 * warp + row) * 4);
#pragma unroll
  for (int i = kFrom; i < kFrom + kCount; ++i) {
    const int there = (8 * (i / 4) + (i & 1)) * kPitch + (i & 2) * 4;
    hopper::store_shared(to + uint32_t(there * 4), as_uint(sums[i]));
  }
}

// By all warps that hold sums, once the products of the block are over.
template <int kTokens>
PYFMT_DEVICE void finish(const Params& p, const Place& at, const Ending<kTokens>& ending,
                         float (&sums)[kTokens / 2], int row) {
  constexpr int kHalf = kTokens / 4;
  uint32_t staged = at.base + kHeader;
  if (p.split > 1) {
    exchange<kTokens>(p, at, sums);
    staged += uint32_t(kHalf * kConsumers * 4);
  } else {
    stage_sums<kHalf, kHalf>(staged, sums, row);
  }
  stage_sums<0, kHalf>(staged, sums, row);
  hopper::partial_sync<kConsumers>();
  ending.write(p, staged);
}

// The same, once this warp's products are over: nothing is written to before all others' are.
template <int kTokens>
PYFMT_DEVICE void meet_and_finish(const Params& p, const Place& at, float (&sums)[kTokens / 2],
                                  int row) {
  if (threadIdx.x == 0 && p.split > 1) expect_sums<kTokens>(at);
  const Ending<kTokens> ending(p, at);
  // No block leaves, or is written to, while another of its cluster may still need its tiles.
  if (p.share * p.split > 1) {
    hopper::cluster_meet();
  } else {
    hopper::partial_sync<kConsumers>();
  }
  finish<kTokens>(p, at, ending, sums, row);
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
