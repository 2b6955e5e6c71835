// SPDX-License-Identifier: Apache-2.0
// How the sums of matmul_wide.h become rows of y. Once a block, so the code is small: what runs
// once costs what it takes to bring it.
#pragma once

#include "matmul_wide_tiles.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

// Writes four neighbours of a row of y; `here` of them exist.
PYFMT_DEVICE void store_four(void* y, DType dtype, int width, int64_t at, const float (&v)[4],
                             int here) {
  if (here == 4 && width % 4 == 0) {
    if (dtype == DType::kFP32) {
      reinterpret_cast<uint4*>(y)[at / 4] =
          make_uint4(canonical(v[0]), canonical(v[1]), canonical(v[2]), canonical(v[3]));
    } else {
      const bool bf16 = dtype == DType::kBF16;
      reinterpret_cast<uint2*>(y)[at / 4] = make_uint2(
          bf16 ? to_halves<DType::kBF16>(v[0], v[1]) : to_halves<DType::kFP16>(v[0], v[1]),
          bf16 ? to_halves<DType::kBF16>(v[2], v[3]) : to_halves<DType::kFP16>(v[2], v[3]));
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < here && i < 4; ++i) {
      store_element(y, dtype, at + i, i == 0 ? v[0] : i == 1 ? v[1] : i == 2 ? v[2] : v[3]);
    }
  }
}

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
PYFMT_DEVICE void finish(const Params& p, const Place& at, float (&sums)[kTokens / 2],
                         int row = int(threadIdx.x) % 32 / 4) {
  constexpr int kHalf = kTokens / 4, kWarpsHere = kConsumers / 32;
  uint32_t staged = at.base + kHeader;
  if (p.split > 1) {
    exchange<kTokens>(p, at, sums);
    staged += uint32_t(kHalf * kConsumers * 4);
  } else {
    stage_sums<kHalf, kHalf>(staged, sums, row);
  }
  stage_sums<0, kHalf>(staged, sums, row);
  hopper::partial_sync<kConsumers>();

  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  const int n = at.n0 + 4 * lane, here = p.n - n < 4 ? p.n - n : 4;
  const int count = kTokens / p.split, m0 = at.m0 + at.part * count;
  const int live = p.m - m0 < count ? p.m - m0 : count;
  if (here <= 0) return;
  const float scale = p.tensor_scale ? *p.tensor_scale : 1.0f;
  float factor[4], bias[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    factor[i] = p.w_scale && i < here ? p.up * p.w_scale[n + i] : p.up;
    bias[i] = p.bias && i < here ? p.bias[n + i] : 0.0f;
  }
#pragma unroll 2
  for (int token = warp; token < live; token += kWarpsHere) {
    const float4 s = hopper::load_floats(staged + uint32_t((token * kPitch + 4 * lane) * 4));
    float v[4] = {s.x, s.y, s.z, s.w};
    const float of_row = p.x_scale ? p.x_scale[m0 + token] : 1.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = v[e] * (factor[e] * of_row) * scale + bias[e];
    store_four(p.y, p.dtype, p.n, int64_t(m0 + token) * p.n + n, v, here);
  }
}

// The same, once this warp's products are over: nothing is written to before all others' are.
template <int kTokens>
PYFMT_DEVICE void meet_and_finish(const Params& p, const Place& at, float (&sums)[kTokens / 2],
                                  int row) {
  if (threadIdx.x == 0 && p.split > 1) expect_sums<kTokens>(at);
  // No block leaves, or is written to, while another of its cluster may still need its tiles.
  if (p.share * p.split > 1) {
    hopper::cluster_meet();
  } else {
    hopper::partial_sync<kConsumers>();
  }
  finish<kTokens>(p, at, sums, row);
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
