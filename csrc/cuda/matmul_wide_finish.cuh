// SPDX-License-Identifier: Apache-2.0
// Where a block of matmul_wide.cuh stands in the grid, and how its sums become rows of y.
#pragma once

#include "matmul_wide_ring.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

constexpr int kHeader = 1024, kPitch = kRows + 4;

// Few tokens leave the tensor cores waiting for decoded weights: two teams of two warpgroups then
// take turns at the chunks.
template <class F, int kTokens>
constexpr int teams() {
  return kTokens == 64 && F::kScaleBytes ? 2 : 1;
}
template <class F, int kTokens>
constexpr int consumers() {
  return 8 * teams<F, kTokens>();
}

struct Place {
  uint32_t base, ring;
  int sub, part, n0, m0, first, last;

  template <int kTokens>
  PYFMT_DEVICE static Place of(const Params& p, int stages) {
    Place at;
    at.base = hopper::shared_start();
    hopper::keep(at.base);
    at.ring = at.base + kHeader + uint32_t(stages * kTokens * 128);
    const int size = p.share * p.split, rank = int(hopper::cluster_rank());
    const int cluster = int(blockIdx.x) / size;
    at.sub = rank % p.share;
    at.part = rank / p.share;
    at.n0 = (cluster % p.n_clusters * p.share + at.sub) * kRows;
    at.m0 = cluster / p.n_clusters * kTokens;
    at.first = int(int64_t(p.chunks) * at.part / p.split);
    at.last = int(int64_t(p.chunks) * (at.part + 1) / p.split);
    return at;
  }
};

// Writes four neighbours of a row of y; `here` of them exist. Small on purpose: code that runs once
// a block costs what it takes to bring it.
PYFMT_DEVICE void store_four(const Params& p, int64_t at, const float (&v)[4], int here) {
  if (here == 4 && p.n % 4 == 0) {
    if (p.dtype == DType::kFP32) {
      reinterpret_cast<uint4*>(p.y)[at / 4] =
          make_uint4(canonical(v[0]), canonical(v[1]), canonical(v[2]), canonical(v[3]));
    } else {
      const bool bf16 = p.dtype == DType::kBF16;
      reinterpret_cast<uint2*>(p.y)[at / 4] = make_uint2(
          bf16 ? to_halves<DType::kBF16>(v[0], v[1]) : to_halves<DType::kFP16>(v[0], v[1]),
          bf16 ? to_halves<DType::kBF16>(v[2], v[3]) : to_halves<DType::kFP16>(v[2], v[3]));
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < here && i < 4; ++i) {
      store_element(p.y, p.dtype, at + i, i == 0 ? v[0] : i == 1 ? v[1] : i == 2 ? v[2] : v[3]);
    }
  }
}

// Sums lie as [team][token][row of w] in shared memory; each part of K's block finishes some
// tokens, parts and teams added in order.
template <class F, int kTokens>
PYFMT_DEVICE void finish(const Params& p, const Place& at) {
  constexpr int kTeams = teams<F, kTokens>(), kWarpsHere = consumers<F, kTokens>();
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  const int n = at.n0 + 4 * lane, here = p.n - n < 4 ? p.n - n : 4;
  const float scale = p.tensor_scale ? *p.tensor_scale : 1.0f;
  float bias[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bias[i] = p.bias && i < here ? p.bias[n + i] : 0.0f;
  const int count = kTokens / p.split, first = count * at.part;
  const int parts = p.split * kTeams;
  constexpr int kBatch = 4;  // reads under way at once
#pragma unroll 1
  for (int i = warp; i < count; i += kBatch * kWarpsHere) {
    float v[kBatch][4];
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int token = i + j * kWarpsHere < count ? i + j * kWarpsHere : i;
        const uint32_t from =
            at.base + kHeader +
            uint32_t(((part % kTeams * kTokens + first + token) * kPitch + 4 * lane) * 4);
        const float4 s = p.split == 1 ? hopper::load_floats(from)
                                      : hopper::load_cluster16(hopper::cluster_address(
                                            from, uint32_t(part / kTeams * p.share + at.sub)));
        v[j][0] = part ? v[j][0] + s.x : s.x;
        v[j][1] = part ? v[j][1] + s.y : s.y;
        v[j][2] = part ? v[j][2] + s.z : s.z;
        v[j][3] = part ? v[j][3] + s.w : s.w;
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int token = i + j * kWarpsHere, m = at.m0 + first + token;
      if (token >= count || m >= p.m || here <= 0) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) v[j][e] = v[j][e] * p.up * scale + bias[e];
      store_four(p, int64_t(m) * p.n + n, v[j], here);
    }
  }
}

// The fragments of one warpgroup to shared memory.
template <int kTokens>
PYFMT_DEVICE void stage_sums(const Place& at, const float (&sums)[kTokens / 2]) {
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  const int row = 16 * (warp & 7) + lane / 4, token = lane % 4 * 2 + warp / 8 * kTokens;
  const uint32_t to = at.base + kHeader + uint32_t((token * kPitch + row) * 4);
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int there = (8 * (i / 4) + (i & 1)) * kPitch + (i & 2) * 4;
    hopper::store_shared(to + uint32_t(there * 4), as_uint(sums[i]));
  }
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
