// SPDX-License-Identifier: Apache-2.0
// Launches of few threads with few registers, which find room on a multiprocessor beside the blocks
// of a product and are in place when it ends: rows of bfloat16 end to end, eight elements a lane.
#pragma once

#include "rotate.cuh"
#include "scale.cuh"
#include "warp.cuh"

namespace pyfmt {
namespace cuda {

// kLong: rotations longer than a warp has.
constexpr int kWarpTurn = 256, kLongestTurn = 1024;
template <bool kLong>
constexpr int beside_threads() {
  return kLong ? kLongestTurn / 8 : 64;
}
// Blocks by eights: left to themselves, half of them gather on the few multiprocessors that a
// product leaves idle, and are late.
constexpr int kSpread = 8;
inline int64_t beside_blocks(int64_t eights, int threads) {
  return (eights + kSpread * threads - 1) / (kSpread * threads) * kSpread;
}
template <class P>
void launch_beside(void (*kernel)(P), int64_t blocks, int threads, Stream stream, const P& p) {
  if (!launches_overlap()) return launch(kernel, blocks, threads, stream, p);
  ClusterLaunch l;
  l.clusters = blocks / kSpread;
  l.cluster = kSpread;
  l.spread = true;
  l.threads = threads;
  launch_clusters(kernel, l, stream, p);
}

// The eight-th eight elements of x with their signs; zeros where there are none.
PYFMT_DEVICE void load_eight(const void* x, const RotationParams& r, uint32_t eight, bool live,
                             float (&v)[8]) {
  uint4 raw = make_uint4(0, 0, 0, 0);
  if (live) raw = static_cast<const uint4*>(x)[eight];
  uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  if (r.signs && live) {
    const uint32_t signs = r.signs[signs_word(r, eight / 4)];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = flip_pair(words[i], signs, int(eight % 4) * 4 + i);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = half_at<DType::kBF16>(words[i / 2], i & 1);
}

// All threads of the block; a rotation begins with one of its first lanes. Without the factor.
template <bool kLong>
PYFMT_DEVICE void turn_eight(float (&v)[8], const RotationParams& r) {
  if (r.size == 2) {
    near_butterflies<2, 8>(v);
  } else if (r.size == 4) {
    near_butterflies<4, 8>(v);
  } else {
    near_butterflies<8, 8>(v);
  }
  const int lanes = r.size / 8;
#pragma unroll 1
  for (int far = 1; far < (kLong ? 32 : lanes); far *= 2) far_butterfly(v, far);
  if constexpr (kLong) {
    constexpr int kCount = beside_threads<true>();
    __shared__ float places[8 * kCount];
#pragma unroll 1
    for (int far = 32; far < lanes; far *= 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) places[i * kCount + int(threadIdx.x)] = v[i];
      __syncthreads();
      const float side = int(threadIdx.x) & far ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = fused(side, v[i], places[i * kCount + (int(threadIdx.x) ^ far)]);
      }
      __syncthreads();
    }
  }
}

template <bool kLong>
PYFMT_DEVICE void rotate_eight(float (&v)[8], const RotationParams& r) {
  turn_eight<kLong>(v, r);
  multiply(v, r.factor);
}

// ---- the largest magnitude --------------------------------------------------------------------

PYFMT_DEVICE uint32_t largest_of_lanes(uint32_t mine) {
#if defined(__CUDA_ARCH__)
  return __reduce_max_sync(kAll, mine);
#else
  for (int far = 16; far; far /= 2) mine = L::max(mine, __shfl_xor_sync(kAll, mine, far));
  return mine;
#endif
}

// Of those that are finite.
PYFMT_DEVICE uint32_t largest_finite(const float (&v)[8]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t size = as_uint(v[i]) & 0x7fffffffu;
    largest = L::max(largest, size < kFloatInf ? size : 0u);
  }
  return largest;
}

struct LargestParams {
  const void* x = nullptr;
  uint32_t eights = 0;
  RotationParams rotation;
  float* partials = nullptr;  // of each block
};

// Of the rotated numbers, those that are finite. The factor multiplies the result alone: products
// with one positive number keep the order.
template <bool kLong>
__global__ void __launch_bounds__(beside_threads<kLong>(), 2048 / beside_threads<kLong>())
    largest_beside(const __grid_constant__ LargestParams p) {
  constexpr int kCount = beside_threads<kLong>();
  __shared__ uint32_t of_warp[kCount / 32];
  allow_next_launch();
  wait_for_earlier_launch();
  uint32_t largest = 0;
  const uint32_t step = gridDim.x * uint32_t(kCount);
#pragma unroll 1
  for (uint32_t first = blockIdx.x * uint32_t(kCount); first < p.eights; first += step) {
    const uint32_t eight = first + threadIdx.x;
    float v[8];
    load_eight(p.x, p.rotation, eight, eight < p.eights, v);
    if (p.rotation.size) turn_eight<kLong>(v, p.rotation);
    largest = L::max(largest, largest_finite(v));
  }
  largest = largest_of_lanes(largest);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x) return;
#pragma unroll
  for (int i = 1; i < kCount / 32; ++i) largest = L::max(largest, of_warp[i]);
  p.partials[blockIdx.x] = as_float(largest) * p.rotation.factor;
}

// Whether the kernels here read x as it lies: few rows of bfloat16, their elements by 32. Beside
// products of more rows there is no room.
constexpr int64_t kFewRows = 32;
bool few_rows(const QuantizeArgs&);
// The first launch of a dynamic tensor scale; how many partial maxima it leaves in a.partials.
int launch_largest(const QuantizeArgs& a, Stream stream);

}  // namespace cuda
}  // namespace pyfmt
