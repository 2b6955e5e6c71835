// SPDX-License-Identifier: Apache-2.0
// Parts of K that different blocks of matmul_wide_tall.cuh have multiplied, added in their order.
#pragma once

#include "matmul_wide_finish.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

// A warp's sums of 16 rows of w by 8 rows of x are 128 floats as its lanes held them; of more rows
// of x they follow, then those of the next warp, of the next tile, of the next part.
struct Partials {
  const float* sums = nullptr;
  int tokens = 64;  // of a tile
  int strips = 1;   // of 64 rows of w by a tile, in all
  const float *tensor_scale = nullptr, *bias = nullptr;
  void* y = nullptr;
  DType dtype = DType::kBF16;
  int m = 0, n = 0, strips_of_n = 1;
  float up = 1.0f;
};

constexpr int kSumThreads = 128, kSumTokens = 16, kSumPitch = 68;

template <int kParts>
PYFMT_DEVICE void load_parts(const float4* from, int64_t part, float (&sums)[2][4]) {
  float4 v[kParts][2];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    v[i][0] = from[i * part];
    v[i][1] = from[i * part + 32];
  }
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    sums[u][0] = v[0][u].x, sums[u][1] = v[0][u].y, sums[u][2] = v[0][u].z, sums[u][3] = v[0][u].w;
#pragma unroll
    for (int i = 1; i < kParts; ++i) {
      sums[u][0] += v[i][u].x, sums[u][1] += v[i][u].y;
      sums[u][2] += v[i][u].z, sums[u][3] += v[i][u].w;
    }
  }
}

// A block adds 64 rows of w by 16 rows of x.
template <int kParts>
__global__ void __launch_bounds__(kSumThreads) add_parts_of_k(const Partials p) {
  __shared__ float staged[kSumTokens * kSumPitch];
  hopper::start_dependents();
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  const int pairs = p.tokens / kSumTokens;
  const int strip = int(blockIdx.x) / pairs, pair = int(blockIdx.x) - strip * pairs;
  const int m0 = strip / p.strips_of_n * p.tokens + pair * kSumTokens;
  const int n0 = strip % p.strips_of_n * 64;
  if (m0 >= p.m) return;
  const int units = p.tokens / 8;
  const float4* from = reinterpret_cast<const float4*>(p.sums) +
                       (int64_t(strip * 4 + warp) * units + 2 * pair) * 32 + lane;
  hopper::wait_for_previous();
  float sums[2][4];
  load_parts<kParts>(from, int64_t(p.strips) * 4 * units * 32, sums);
  float* to = staged + (lane & 3) * 2 * kSumPitch + 16 * warp + lane / 4;
#pragma unroll
  for (int u = 0; u < 2; ++u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[(8 * u + (i & 1)) * kSumPitch + (i & 2) * 4] = sums[u][i];
    }
  }
  __syncthreads();
  const float scale = p.tensor_scale ? *p.tensor_scale : 1.0f;
  const int n = n0 + int(threadIdx.x) % 16 * 4, here = min(p.n - n, 4);
  if (here <= 0) return;
  float bias[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bias[i] = p.bias && i < here ? p.bias[n + i] : 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = int(threadIdx.x) / 16 + 8 * i;
    if (m0 + token >= p.m) continue;
    const float4 s =
        *reinterpret_cast<const float4*>(staged + token * kSumPitch + int(threadIdx.x) % 16 * 4);
    const float v[4] = {s.x * p.up * scale + bias[0], s.y * p.up * scale + bias[1],
                        s.z * p.up * scale + bias[2], s.w * p.up * scale + bias[3]};
    store_four(p.y, p.dtype, p.n, int64_t(m0 + token) * p.n + n, v, here);
  }
}

// After the launch whose blocks wrote p's partial sums.
inline void launch_sum(const Params& p, int tokens, Stream stream) {
  Partials q;
  q.sums = p.partials;
  q.tokens = tokens;
  q.strips_of_n = int(p.n_clusters) * p.share;
  q.strips = q.strips_of_n * ((p.m + tokens - 1) / tokens);
  q.tensor_scale = p.tensor_scale;
  q.bias = p.bias;
  q.y = p.y;
  q.dtype = p.dtype;
  q.m = p.m;
  q.n = p.n;
  q.up = p.up;
  const auto kernel = p.parts == 4 ? add_parts_of_k<4> : add_parts_of_k<8>;
  launch_after(launches_overlap(), kernel, int64_t(q.strips) * (tokens / kSumTokens), kSumThreads,
               stream, q);
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
