// SPDX-License-Identifier: Apache-2.0
// The kernel of matmul_wide.h for a tile of 256 rows of x, where matmul_wide_blocks.cuh's permuted
// copy of x costs more than what shared memory holds up. A block owns 128 rows of w and 256 of x.
// Two warpgroups of 64 rows each multiply tiles in shared memory; two more decode packed codes to
// tiles of w; warps of a fifth bring tiles of x, codes and scales. They meet at barriers alone, so
// decoding runs beside the products, several tiles ahead.
#pragma once

#include "matmul_wide.cuh"
#include "matmul_wide_finish.cuh"
#include "matmul_wide_shared_copies.cuh"
#include "matmul_wide_shared_decode.cuh"
#include "matmul_wide_weights.cuh"
#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace shared {

// A warp of the two warpgroups that multiply.
template <class F>
struct Consumer {
  static constexpr int kCount = kTokens / 2;
  // Products of 256 would need more registers than the block starts with.
  static constexpr int kMost = 128;
  using Product = hopper::Product<hopper::Bf16, kMost>;
  using Sums = float[kMost / 2];

  const Params& p;
  const Place& at;
  int lane = int(threadIdx.x) & 31, group = hopper::uniform(int(threadIdx.x) >> 7);
  bool releases;      // this lane, for one block of the cluster
  uint32_t peer = 0;  // what turns an address of this block into that one's
  Stage<F> stage;

  PYFMT_DEVICE Consumer(const Params& p, const Place& at) : p(p), at(at) {
    releases = lane < p.share;
    if (p.share > 1 && releases) {
      peer = hopper::cluster_address(at.base, uint32_t(at.part * p.share + lane)) - at.base;
    }
  }

  // The warp has no more use for a stage.
  PYFMT_DEVICE void release(const Stage<F>& used) const {
    if (!releases) return;
    // An arrival by way of the cluster takes some hundred cycles, at the own block too.
    if (p.share > 1) {
      hopper::barrier_arrive(used.empty(at.base) + peer);
    } else {
      hopper::barrier_arrive_here(used.empty(at.base));
    }
  }

  // The products of the stage's tiles.
  PYFMT_DEVICE void multiply(float (&sums)[kCount]) const {
    const uint32_t x = hopper::tile_code(stage.x(at.base));
    const uint32_t w = hopper::tile_code(stage.w(at.base) + uint32_t(group * 64 * 128));
    hopper::products_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int t = 0; t < kTokens; t += kMost) {
        const uint32_t part = x + uint32_t(t * 128 >> 4);
        Product::add_to(reinterpret_cast<Sums&>(sums[t / 2]), hopper::tile_descriptor(w, s),
                        hopper::tile_descriptor(part, s), 1);
      }
    }
    hopper::products_commit();
  }

  // A stage is released when the products after it are under way.
  PYFMT_DEVICE void run(float (&sums)[kCount], int steps) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
    hopper::pin(sums);
    Stage<F> before;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      hopper::barrier_wait(stage.full(at.base), stage.parity);
      multiply(sums);
      hopper::products_wait<1>();
      if (i) release(before);
      before = stage;
      stage.next();
    }
    hopper::products_wait<0>();
    hopper::pin(sums);
  }
};

template <class F>
PYFMT_DEVICE void run_block(const Params& p) {
  using S = Layout<F>;
  const Place at = Place::of<kTokens>(p);
  init_barriers<F>(p, at.base);
  if (threadIdx.x == 0) {
    hopper::prefetch_map(p.x);
    hopper::prefetch_map(p.codes_map);
  }
  if (p.share > 1) hopper::cluster_meet();
  if (p.share == 1) __syncthreads();
  // Registers, 96 for each of 640 threads, are shared out anew: with fewer than 160 where 128 are
  // sums, the compiler has products wait for each other. Weights are read before the launch ahead
  // has ended; whatever writes weights lets no other launch start early.
  if (threadIdx.x >= S::kBringers) {
    hopper::fewer_registers<32>();
    if (threadIdx.x == S::kBringers) {
      hopper::wait_for_previous();
      hopper::start_dependents();
      bring_x<F>(p, at);
    } else if (threadIdx.x >= S::kBringers + 64) {
      bring_scales<F>(p, at, int(threadIdx.x) - S::kBringers - 64);
    } else if (threadIdx.x == S::kBringers + 32) {
      bring_codes<F>(p, at);
    }
  } else if (threadIdx.x >= kConsumers) {
    hopper::fewer_registers<64>();
    Producer<F>(p, at).run(at.last - at.first);
  } else {
    hopper::more_registers<160>();
    hopper::wait_for_previous();
    float sums[kTokens / 2];
    Consumer<F>(p, at).run(sums, at.last - at.first);
    meet_and_finish<kTokens>(p, at, sums, int(threadIdx.x) % 32 / 4);
  }
}

template <class F>
__global__ void __launch_bounds__(PYFMT_WIDE_THREADS(Layout<F>::kThreads), 1)
    matmul_shared_kernel(const __grid_constant__ Params p) {
#if defined(PYFMT_SM90A)
  run_block<F>(p);
#endif
}

template <class F>
void launch(Params& p, const WideCall& call, Stream stream) {
  using S = Layout<F>;
  hopper::MatrixBox x = call.x;
  x.box_bytes = 128;
  x.box_rows = kTokens / (p.share * p.split);
  p.x = hopper::encode(x);
  describe_codes<F>(p, call, S::kRowBytes, kRows);
  launch_wide(matmul_shared_kernel<F>, p, kTokens, S::kThreads, S::kBytes, stream);
}

}  // namespace shared

// The kernel for elements E with scales of their blocks.
template <class E, Scale kScale>
Kernel shared_kernel() {
  return {shared::launch<Weights<E, kScale, true>>, shared::kColumns, false};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
