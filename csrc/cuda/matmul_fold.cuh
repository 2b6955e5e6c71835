// SPDX-License-Identifier: Apache-2.0
// The kernel of matmul_fold.h. A block owns 128 rows of w and kTokens rows of a; two warpgroups of
// 64 rows each decode codes into fragments and multiply, one more warp brings a.
//
// K goes by chunks of 128 columns. Of each row, lane t of a quad takes the block of 32 codes at 32
// t, so that a lane needs one scale a row; the panel's columns are in that order.
#pragma once

#include "fold_weights.cuh"
#include "matmul_fold.h"
#include "matmul_wide_finish.cuh"
#include "wgmma_fp8.cuh"

namespace pyfmt {
namespace cuda {
namespace folding {

using wide::kChunk;
using wide::kHeader;
using wide::kPitch;
using wide::kRows;
using wide::Place;

struct Params : wide::Params {
  const float* a_scale = nullptr;
  const float* w_scale = nullptr;
  const void* added = nullptr;  // the bias
  DType added_dtype = DType::kFP32;
};

// Registers come by warpgroups, so a whole one brings a and hands most of its own over.
constexpr int kConsumers = 8, kFoldThreads = 32 * (kConsumers + 4);
constexpr uint32_t kTableAt = 512;  // behind the barriers

// Tiles of a of one chunk, and chunks of codes, under way or in use.
template <int kTokens>
constexpr int stages() {
  return kTokens == 64 ? 8 : 6;
}
template <class W>
constexpr int depth() {
  return W::kBits == 4 ? 6 : 5;
}

template <class W, int kTokens>
constexpr int shared_bytes() {
  using R = wide::Ring<W, depth<W>()>;
  const int loop = kHeader + stages<kTokens>() * kTokens * 128 + kConsumers * int(R::kBytes);
  const int epilogue = kHeader + kTokens * kPitch * 4;
  return loop > epilogue ? loop : epilogue;
}

// Chunk i of this block's part of K: its tile of a, the barriers of that tile's place.
template <int kTokens>
struct Step {
  static constexpr uint32_t kPlaces = uint32_t(stages<kTokens>()), kTile = kTokens * 128;
  uint32_t place = 0, parity = 0;

  PYFMT_DEVICE void next() {
    if (++place == kPlaces) {
      place = 0;
      parity ^= 1;
    }
  }
  PYFMT_DEVICE uint32_t full(uint32_t base) const { return base + 8 * place; }
  PYFMT_DEVICE uint32_t empty(uint32_t base) const { return base + 64 + 8 * place; }
  PYFMT_DEVICE uint32_t tile(uint32_t base) const { return base + kHeader + kTile * place; }
};

// One thread: brings the tiles of a, each block of a cluster its part for all that share it.
template <int kTokens>
PYFMT_DEVICE void produce(const Params& p, const Place& at) {
  const uint32_t bytes = uint32_t(kTokens * 128 / p.share), mine = uint32_t(at.sub) * bytes;
  const uint32_t mask = ((1u << p.share) - 1) << (at.part * p.share);
  const int64_t pitch = int64_t(p.panel_rows) * 128;
  const uint8_t* from = p.panel + int64_t(at.first) * pitch + int64_t(at.m0) * 128 + mine;
  hopper::wait_for_previous();
  Step<kTokens> step;
#pragma unroll 1
  for (int c = at.first; c < at.last; ++c, from += pitch, step.next()) {
    const uint32_t full = step.full(at.base);
    hopper::barrier_wait(step.empty(at.base), step.parity ^ 1);
    hopper::barrier_expect(full, uint32_t(kTokens * 128));
    hopper::bulk_copy(step.tile(at.base) + mine, from, bytes, full, mask, p.share > 1);
  }
}

// A warp: sums of this block's part of K, as product fragments.
template <class W, int kTokens, bool kE5M2>
struct Consumer {
  static constexpr int kBits = W::kBits, kDepth = depth<W>(), kCount = kTokens / 2;
  using R = wide::Ring<W, kDepth>;
  using Product = hopper::Fp8Product<kTokens, W::kE5M2, kE5M2>;

  const Params& p;
  const Place& at;
  int lane;
  R ring;
  Step<kTokens> step;
  uint32_t table, peer = 0;  // peer: what turns an address of this block into another's
  int offset[2] = {0, 0};    // of both rows

  PYFMT_DEVICE Consumer(const Params& p, const Place& at)
      : p(p),
        at(at),
        lane(int(threadIdx.x) & 31),
        ring(p, at.ring + (threadIdx.x >> 5) * R::kBytes, at.n0, int(threadIdx.x >> 5), lane,
             at.first),
        table(at.base + kTableAt) {
#pragma unroll
    for (int j = 0; j < R::kCopies; ++j) hopper::keep(ring.offset[j]);
    if (lane < p.share) {
      peer = hopper::cluster_address(at.base, uint32_t(at.part * p.share + lane)) - at.base;
    }
  }

  // Before a and the scan of w are there.
  PYFMT_DEVICE void prefetch() {
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; ++i) {
      if (at.first + i < at.last) ring.fetch(p, at.first + i, uint32_t(i) * R::kSlot, 1);
      hopper::commit_copies();
    }
  }

  PYFMT_DEVICE void read_scales() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int n = at.n0 + 16 * int(threadIdx.x >> 5) + lane / 4 + 8 * r;
      offset[r] = W::offset_of(p.w_scale[n < p.n ? n : p.n - 1]);
    }
  }

  // The fragments of chunk c, the next one.
  PYFMT_DEVICE void decode(int c, uint32_t (&a)[4][4]) {
    uint32_t words[2][kBits], scale[2];
    hopper::wait_copies<kDepth - 2>();
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      ring.read_codes(r, words[r]);
      scale[r] = ring.read_scales(r);
    }
    const int further = c + kDepth - 1;
    if (further < at.last) ring.fetch(p, further, ring.ahead, 1);
    hopper::commit_copies();
    ring.next();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t out[8];
      W::decode(words[r], scale[r], offset[r], table, out);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        a[s][r] = out[2 * s];
        a[s][r + 2] = out[2 * s + 1];
      }
    }
  }

  // The products of chunk c; meanwhile the fragments of the next one.
  PYFMT_DEVICE void multiply(int c, uint32_t (&now)[4][4], uint32_t (&next)[4][4],
                             float (&fresh)[kCount], float (&sums)[kCount]) {
    hopper::barrier_wait(step.full(at.base), step.parity);
    const uint32_t tile = hopper::tile_code(step.tile(at.base));
    hopper::products_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      Product::add_to(fresh, now[s], hopper::tile_descriptor(tile, s), s ? 1 : 0);
    }
    hopper::products_commit();
    if (c + 1 < at.last) decode(c + 1, next);
    hopper::products_wait<0>();
    hopper::pin(fresh);
    if (lane < p.share) hopper::barrier_arrive(step.empty(at.base) + peer);
    step.next();
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = sums[i] + fresh[i];
  }

  PYFMT_DEVICE void run(float (&sums)[kCount]) {
    float fresh[kCount];
    uint32_t a[2][4][4];
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = fresh[i] = 0.0f;
    hopper::pin(fresh);
    if (at.first < at.last) decode(at.first, a[0]);
#pragma unroll 1
    for (int c = at.first; c < at.last; c += 2) {
      multiply(c, a[0], a[1], fresh, sums);
      if (c + 1 < at.last) multiply(c + 1, a[1], a[0], fresh, sums);
    }
  }
};

// Sums lie as [token][row of w] in shared memory; each part of K's block finishes some tokens, parts
// added in order.
template <int kTokens>
PYFMT_DEVICE void finish(const Params& p, const Place& at) {
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  const int n = at.n0 + 4 * lane, here = p.n - n < 4 ? p.n - n : 4;
  const int count = kTokens / p.split, first = count * at.part;
  float scale[4], bias[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scale[i] = i < here ? p.w_scale[n + i] * p.up : 0.0f;
    bias[i] = p.added && i < here ? load_element(p.added, p.added_dtype, n + i) : 0.0f;
  }
  constexpr int kBatch = 4;  // reads under way at once
#pragma unroll 1
  for (int i = warp; i < count; i += kBatch * kConsumers) {
    float v[kBatch][4];
#pragma unroll 1
    for (int part = 0; part < p.split; ++part) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int token = i + j * kConsumers < count ? i + j * kConsumers : i;
        const uint32_t from =
            at.base + kHeader + uint32_t(((first + token) * kPitch + 4 * lane) * 4);
        const float4 s = p.split == 1 ? hopper::load_floats(from)
                                      : hopper::load_cluster16(hopper::cluster_address(
                                            from, uint32_t(part * p.share + at.sub)));
        v[j][0] = part ? v[j][0] + s.x : s.x;
        v[j][1] = part ? v[j][1] + s.y : s.y;
        v[j][2] = part ? v[j][2] + s.z : s.z;
        v[j][3] = part ? v[j][3] + s.w : s.w;
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int token = i + j * kConsumers, m = at.m0 + first + token;
      if (token >= count || m >= p.m || here <= 0) continue;
      const float of_row = p.a_scale[m];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[j][e] = v[j][e] * (of_row * scale[e]) + bias[e];
      wide::store_four(p, int64_t(m) * p.n + n, v[j], here);
    }
  }
}

template <class W, int kTokens, bool kE5M2>
PYFMT_DEVICE void run_block(const Params& p) {
  const Place at = Place::of<kTokens>(p, stages<kTokens>());
  const bool clustered = p.share * p.split > 1;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int s = 0; s < stages<kTokens>(); ++s) {
      hopper::barrier_init(at.base + 8u * uint32_t(s), 1);
      hopper::barrier_init(at.base + 64u + 8u * uint32_t(s), uint32_t(kConsumers * p.share));
    }
    hopper::barrier_init_fence();
  }
  W::fill_table(at.base + kTableAt, int(threadIdx.x));
  const auto start = [&] {
    if (clustered) {
      // Orders the barriers alone: the table is for this block's threads.
      hopper::cluster_start();
    }
    __syncthreads();
  };
  if (threadIdx.x >= kConsumers * 32) {
    hopper::fewer_registers<40>();
    start();
    if (threadIdx.x == kConsumers * 32) produce<kTokens>(p, at);
    __syncwarp();
    if (clustered) hopper::cluster_sync();
    if (p.split > 1) hopper::cluster_sync();
    return;
  }
  hopper::more_registers<232>();
  {
    Consumer<W, kTokens, kE5M2> consumer(p, at);
    consumer.prefetch();
    start();
    hopper::wait_for_previous();
    consumer.read_scales();
    float sums[kTokens / 2];
    consumer.run(sums);
    hopper::partial_sync<32 * kConsumers>();
    wide::stage_sums<kTokens>(at, sums);
  }
  // Also: no block leaves while another of its cluster may still arrive at its barriers.
  if (clustered) {
    hopper::cluster_sync();
  } else {
    hopper::partial_sync<32 * kConsumers>();
  }
  finish<kTokens>(p, at);
  if (p.split > 1) hopper::cluster_sync();
}

#if defined(PYFMT_SM90A)
#define PYFMT_FOLD_THREADS kFoldThreads
#else
#define PYFMT_FOLD_THREADS 32  // tells the host that there is nothing to launch
#endif

template <class W, int kTokens, bool kE5M2>
__global__ void __launch_bounds__(PYFMT_FOLD_THREADS, 1)
    matmul_fold_kernel(const __grid_constant__ Params p) {
#if defined(PYFMT_SM90A)
  run_block<W, kTokens, kE5M2>(p);
#endif
}

template <class W, int kTokens, bool kE5M2>
void launch_tile(Params p, const MatmulFoldPlan& plan, Stream stream) {
  p.up = L::as_float(power_of_two_bits(W::kDown));
  const int clusters = p.n_clusters * ((p.m + kTokens - 1) / kTokens);
  const int blocks = clusters * plan.share * plan.split;
  const auto kernel = matmul_fold_kernel<W, kTokens, kE5M2>;
#if defined(__CUDACC__)
  constexpr int kBytes = shared_bytes<W, kTokens>();
  static_assert(kBytes <= hopper::kMostShared, "the block's shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "shared memory");
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = unsigned(plan.share * plan.split);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  // Starts beside the kernel that folds a, and waits for it before reading what it writes.
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kFoldThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, p), "launch");
#else
  (void)stream;
  emulation::launch_clusters(kernel, blocks, kFoldThreads, plan.share * plan.split, p);
#endif
}

template <class E, int kTokens>
void launch_format(const Params& p, const MatmulFoldPlan& plan, bool e5m2, Stream stream) {
  if (e5m2) {
    launch_tile<FoldWeights<E>, kTokens, true>(p, plan, stream);
  } else {
    launch_tile<FoldWeights<E>, kTokens, false>(p, plan, stream);
  }
}

template <class E>
void launch_element(const Params& p, const MatmulFoldPlan& plan, bool e5m2, Stream stream) {
  if (plan.tokens == 64) {
    launch_format<E, 64>(p, plan, e5m2, stream);
  } else {
    launch_format<E, 128>(p, plan, e5m2, stream);
  }
}

using Launch = void (*)(const Params&, const MatmulFoldPlan&, bool e5m2, Stream);

// By element; two files, so that they compile side by side.
Launch fold4_launch(const ElementSpec&);
Launch fold6_launch(const ElementSpec&);

// Whether kernels were compiled, or left empty for want of architecture 90a.
bool compiled();

}  // namespace folding
}  // namespace cuda
}  // namespace pyfmt
