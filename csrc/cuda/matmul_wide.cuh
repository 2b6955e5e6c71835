// SPDX-License-Identifier: Apache-2.0
// The kernel of matmul_wide.h. A block owns 128 rows of w and kTokens rows of x. Two warpgroups of
// 64 rows each multiply tiles in shared memory; two of their threads have the copy engine bring
// tiles of x and packed codes, which two more warpgroups decode to tiles of w. They meet at
// barriers alone, so decoding runs beside the products, several tiles ahead.
#pragma once

#include "matmul_wide_copies.cuh"
#include "matmul_wide_finish.cuh"
#include "matmul_wide_operands.cuh"
#include "matmul_wide_producer.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

// A warp of the two warpgroups that multiply.
template <class F, int kTokens>
struct Consumer {
  static constexpr int kCount = kTokens / 2;
  // Products of 256 would need more registers than the block starts with.
  static constexpr int kMost = kTokens < 128 ? kTokens : 128;
  using Product = hopper::Product<typename F::Type, kMost>;
  using Sums = float[kMost / 2];

  const Params& p;
  const Place& at;
  int lane = int(threadIdx.x) & 31, group = hopper::uniform(int(threadIdx.x) >> 7);
  bool releases;      // this lane, for one block of the cluster
  uint32_t peer = 0;  // what turns an address of this block into that one's
  Stage<F, kTokens> stage;
  Copies<F, kTokens> copies;

  PYFMT_DEVICE Consumer(const Params& p, const Place& at) : p(p), at(at), copies(p, at) {
    releases = lane < p.share;
    if (p.share > 1 && releases) {
      peer = hopper::cluster_address(at.base, uint32_t(at.part * p.share + lane)) - at.base;
    }
  }

  // The warp has no more use for a stage.
  PYFMT_DEVICE void release(const Stage<F, kTokens>& used) const {
    if constexpr (F::kGroups) hopper::warp_sync();  // all lanes have read their rows' factors
    if (releases) hopper::barrier_arrive(used.empty(at.base) + peer);
  }

  // The products of 32-byte steps kFrom to kTo - 1 of the tiles, as one group. fresh: not added.
  template <int kFrom, int kTo>
  PYFMT_DEVICE void multiply(float (&sums)[kCount], bool fresh) const {
    const uint32_t x = hopper::tile_code(stage.x(at.base));
    const uint32_t w = hopper::tile_code(stage.w(at.base) + uint32_t(group * 64 * 128));
    hopper::products_fence();
#pragma unroll
    for (int s = kFrom; s < kTo; ++s) {
#pragma unroll
      for (int t = 0; t < kTokens; t += kMost) {
        const uint32_t part = x + uint32_t(t * 128 >> 4);
        Product::add_to(reinterpret_cast<Sums&>(sums[t / 2]), hopper::tile_descriptor(w, s),
                        hopper::tile_descriptor(part, s), fresh && s == kFrom ? 0 : 1);
      }
    }
    hopper::products_commit();
  }

  // All of the sums in one accumulator; a stage is released when the products after it are under
  // way.
  PYFMT_DEVICE void run_on(float (&sums)[kCount], int steps) {
    Stage<F, kTokens> before;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      hopper::barrier_wait(stage.full(at.base), stage.parity);
      multiply<0, 4>(sums, false);
      copies.more(i);
      hopper::products_wait<1>();
      if (i) release(before);
      before = stage;
      stage.next();
    }
    hopper::products_wait<0>();
    hopper::pin(sums);
  }

  // Adds the sums of a tile, or of half `half` of it, times the factors of this lane's two rows.
  PYFMT_DEVICE void add_fresh(float (&sums)[kCount], const float (&fresh)[kCount],
                              const float (&factor)[2]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sums[i] = F::kGroups ? fused(factor[i >> 1 & 1], fresh[i], sums[i]) : sums[i] + fresh[i];
    }
  }
  PYFMT_DEVICE void read_factors(int half, float (&factor)[2]) const {
    if constexpr (F::kGroups) {
      const uint32_t row = uint32_t(16 * (threadIdx.x >> 5) + lane / 4);
      const uint32_t from = stage.factors(at.base) + (uint32_t(half) * kRows + row) * 4;
      factor[0] = as_float(hopper::load_shared_small<4>(from));
      factor[1] = as_float(hopper::load_shared_small<4>(from + 32));
    }
  }

  // Sums of two tiles, of one or of half of one in an accumulator of their own.
  PYFMT_DEVICE void run_apart(float (&sums)[kCount], int steps) {
    float fresh[kCount], factor[2] = {1.0f, 1.0f};
#pragma unroll 1
    for (int i = 0; i < steps; ++i, stage.next()) {
      hopper::barrier_wait(stage.full(at.base), stage.parity);
      read_factors(0, factor);
      if (F::kGroups && p.half_tiles) {
        multiply<0, 2>(fresh, true);
        hopper::products_wait<0>();
        hopper::pin(fresh);
        add_fresh(sums, fresh, factor);
        read_factors(1, factor);
        multiply<2, 4>(fresh, true);
      } else {
        multiply<0, 4>(fresh, true);
      }
      copies.more(i);
      if (F::kGroups && p.two_tiles && i + 1 < steps) {
        const Stage<F, kTokens> before = stage;
        ++i;
        stage.next();
        hopper::barrier_wait(stage.full(at.base), stage.parity);
        multiply<0, 4>(fresh, false);
        copies.more(i);
        hopper::products_wait<1>();
        release(before);
      }
      hopper::products_wait<0>();
      hopper::pin(fresh);
      release(stage);
      add_fresh(sums, fresh, factor);
    }
  }

  PYFMT_DEVICE void run(float (&sums)[kCount]) {
    copies.start();
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
    hopper::pin(sums);
    if constexpr (F::kFresh) {
      run_apart(sums, at.last - at.first);
    } else {
      run_on(sums, at.last - at.first);
    }
  }
};

template <class F, int kTokens>
PYFMT_DEVICE void run_block(const Params& p) {
  const Place at = Place::of<kTokens>(p);
  init_barriers<F, kTokens>(p, at.base);
  if constexpr (F::kFolded) F::fill_table(at.base + kTableAt, int(threadIdx.x));
  if (threadIdx.x == 0) {
    hopper::prefetch_map(p.x);
    if (p.copied_codes) hopper::prefetch_map(p.codes_map);
  }
  if (p.share > 1) hopper::cluster_meet();
  if (p.share == 1 || F::kFolded) __syncthreads();
  // Registers: 128 for each of 512 threads, shared out anew.
  if (threadIdx.x >= kConsumers) {
    hopper::fewer_registers<88>();
    hopper::wait_for_previous();
    hopper::start_dependents();
    Producer<F, kTokens>(p, at).run(at.last - at.first);
  } else {
    hopper::more_registers<168>();
    hopper::wait_for_previous();
    float sums[kTokens / 2];
    Consumer<F, kTokens>(p, at).run(sums);
    if (threadIdx.x == 0 && p.split > 1) expect_sums<kTokens>(at);
    // No block leaves, or is written to, while another of its cluster may still need its tiles.
    if (p.share * p.split > 1) {
      hopper::cluster_meet();
    } else {
      hopper::partial_sync<kConsumers>();
    }
    finish<kTokens>(p, at, sums);
  }
}

#if defined(PYFMT_SM90A)
#define PYFMT_WIDE_THREADS kThreadsOfBlock
#else
#define PYFMT_WIDE_THREADS 32  // tells the host that there is nothing to launch
#endif

template <class F, int kTokens>
__global__ void __launch_bounds__(PYFMT_WIDE_THREADS, 1)
    matmul_wide_kernel(const __grid_constant__ Params p) {
#if defined(PYFMT_SM90A)
  run_block<F, kTokens>(p);
#endif
}

template <class F, int kTokens>
void launch_tile(Params& p, const WideCall& call, Stream stream) {
  using S = Layout<F, kTokens>;
  hopper::MatrixBox x = call.x;
  x.box_bytes = 128;
  x.box_rows = kTokens / (p.share * p.split);
  p.x = hopper::encode(x);
  if (p.copied_codes) {
    hopper::MatrixBox codes = call.codes;
    codes.box_bytes = S::kRowBytes;
    codes.box_rows = kRows;
    p.codes_map = hopper::encode(codes);
  }
  p.up = L::as_float(power_of_two_bits(F::kDown));
  const int cluster = p.share * p.split;
  const int blocks = int(p.n_clusters) * ((p.m + kTokens - 1) / kTokens) * cluster;
  const auto kernel = matmul_wide_kernel<F, kTokens>;
#if defined(__CUDACC__)
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes),
        "shared memory");
  cudaLaunchAttribute attributes[2];
  // Starts beside the end of the kernel before it, and waits for it before reading anything.
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = unsigned(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreadsOfBlock);
  config.dynamicSmemBytes = S::kBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, p), "launch");
#else
  (void)stream;
  emulation::launch_clusters(kernel, blocks, kThreadsOfBlock, cluster, p);
#endif
}

// Sums kept apart need a second set of registers: half the tokens.
template <class F>
void launch_format(Params& p, const WideCall& call, Stream stream) {
  if constexpr (!F::kFresh) {
    if (call.tokens == 256) return launch_tile<F, 256>(p, call, stream);
  }
  if (call.tokens == 128) return launch_tile<F, 128>(p, call, stream);
  launch_tile<F, 64>(p, call, stream);
}

inline bool is_mx(const FormatSpec& f, const ElementSpec& e) {
  return f.element == e && f.scale == Scale::kE8M0 && f.block_columns == 32;
}
inline bool is_nv(const FormatSpec& f, const ElementSpec& e) {
  return f.element == e && f.scale == Scale::kE4M3 && f.block_columns == 16;
}
inline bool has_groups(const FormatSpec& f, const ElementSpec& e) {
  return f.element == e && f.scale != Scale::kE8M0 && f.scale != Scale::kE4M3;
}

// What a kernel needs to know to be launched.
struct Kernel {
  void (*launch)(Params&, const WideCall&, Stream) = nullptr;
  int columns = 0;  // of a tile
};
template <class F>
Kernel kernel_of() {
  return {launch_format<F>, F::kColumns};
}

// By element and scale; no launch where there is none. One a file, so that they compile side by
// side.
Kernel fp4_kernel(const FormatSpec&);
Kernel fp6_kernel(const FormatSpec&);
Kernel fp8_kernel(const FormatSpec&);
Kernel int_kernel(const FormatSpec&);
Kernel mxint_kernel(const FormatSpec&);

// Whether kernels were compiled, or left empty for want of architecture 90a.
bool compiled();

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
