// SPDX-License-Identifier: Apache-2.0
// The kernel of matmul_wide.h. A block owns 128 rows of w and kTokens rows of x; two warpgroups of
// 64 rows each decode codes into fragments and multiply, one more warp brings x.
//
// K goes by chunks of 128 columns. Of each row, lane t of a quad takes the 32 codes that lie
// together at 32 t, so that loads are wide and a lane needs few scales. A fragment however wants
// column 2t of step 0, and so on: x is stored with its columns permuted to match (panel_column).
#pragma once

#include "matmul_wide_finish.cuh"
#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

// ---- where a column goes ----------------------------------------------------------------------

// The column of x, within a chunk, that belongs at place `i` (0 to 127) of the panel. Products take
// 16 places a step; lane t multiplies places 2t, 2t + 1 (its pair 2 s) and 2t + 8, 2t + 9 (2 s +
// 1).
template <int kBits>
PYFMT_HD constexpr int panel_column(int i) {
  const int step = i / 16, half = i / 8 % 2, t = i % 8 / 2;
  return 32 * t + code_of<kBits>(2 * step + half, i % 2);
}

// The byte of the panel where 16-byte piece `q` (0 to 7) of 64 places of a token lies: steps of 64
// places, each with all tokens, as the tile in shared memory (hopper::tile_descriptor) wants it.
PYFMT_HD constexpr int64_t panel_piece(int64_t step64, int64_t token, int q, int64_t panel_rows) {
  return (step64 * panel_rows + token) * 128 + ((q ^ int(token & 7)) * 16);
}

// ---- the kernel -------------------------------------------------------------------------------

// How many chunks of codes a team has under way or in use.
template <class F, int kTokens>
constexpr int depth() {
  return kTokens == 64 && teams<F, kTokens>() == 1 ? 8 : kTokens >= 192 || F::kBits > 4 ? 4 : 5;
}

// Tiles of x of 64 columns under way or in use; a power of two.
template <int kTokens>
constexpr int stages() {
  return kTokens >= 192 ? 4 : 8;
}

template <class F, int kTokens>
constexpr int shared_bytes() {
  using R = Ring<F, depth<F, kTokens>()>;
  const int loop =
      kHeader + stages<kTokens>() * kTokens * 128 + consumers<F, kTokens>() * int(R::kBytes);
  const int epilogue = kHeader + teams<F, kTokens>() * kTokens * kPitch * 4;
  return loop > epilogue ? loop : epilogue;
}

// Step i of this block's part of K, 64 columns: its tile of x, the barriers of that tile's place.
template <int kTokens>
struct Step {
  static constexpr uint32_t kPlaces = uint32_t(stages<kTokens>());
  static constexpr uint32_t kTile = kTokens * 128;
  uint32_t place, parity;

  PYFMT_DEVICE explicit Step(uint32_t i) : place(i % kPlaces), parity(i / kPlaces & 1) {}
  PYFMT_DEVICE uint32_t full(uint32_t base) const { return base + 8 * place; }
  PYFMT_DEVICE uint32_t empty(uint32_t base) const { return base + 64 + 8 * place; }
  PYFMT_DEVICE uint32_t tile(uint32_t base) const { return base + kHeader + kTile * place; }
};

// One thread: brings the tiles of x, each block of a cluster its part for all that share it.
template <int kTokens>
PYFMT_DEVICE void produce(const Params& p, const Place& at) {
  const uint32_t bytes = uint32_t(kTokens * 128 / p.share), mine = uint32_t(at.sub) * bytes;
  const uint32_t mask = ((1u << p.share) - 1) << (at.part * p.share);
  const int64_t pitch = int64_t(p.panel_rows) * 128;
  const uint8_t* from = p.panel + int64_t(at.first) * 2 * pitch + int64_t(at.m0) * 128 + mine;
  hopper::wait_for_previous();
  const uint32_t steps = 2 * uint32_t(at.last - at.first);
#pragma unroll 1
  for (uint32_t i = 0; i < steps; ++i, from += pitch) {
    const Step<kTokens> step(i);
    const uint32_t full = step.full(at.base);
    hopper::barrier_wait(step.empty(at.base), step.parity ^ 1);
    hopper::barrier_expect(full, uint32_t(kTokens * 128));
    hopper::bulk_copy(step.tile(at.base) + mine, from, bytes, full, mask, p.share > 1);
  }
}

// The factors of a lane's codes of one row, for each half of them.
template <class F>
struct Factors {
  using D = typename F::D;
  // Codes of NaN and infinity take more steps; such scales are always prepared for.
  static constexpr bool kAnyScale = F::kScaleBytes == 1 && !D::kHasSpecials;
  Factor half[F::kScaleBytes == 2 ? 2 : 1];

  template <bool kAll>
  PYFMT_DEVICE void set(uint32_t raw) {
    if constexpr (F::kScaleBytes == 1) {
      half[0] = D::template factor < kAll || kAnyScale > (raw);
    } else if constexpr (F::kScaleBytes == 2) {
      D::factors(raw, half);
    } else {
      half[0] = D::unit_factor();
    }
  }
};

// The fragment of step kStep (0 to 7) of a chunk: pairs 2 kStep and 2 kStep + 1 of both rows.
template <class F, int kStep, bool kAll>
PYFMT_DEVICE void decode(const uint32_t (&words)[2][F::kBits], const Factors<F> (&factors)[2],
                         uint32_t (&a)[4]) {
  using D = typename F::D;
  constexpr int kUnit = 2 * kStep / D::kPairs, kPair = 2 * kStep % D::kPairs;
  constexpr int kHalf = F::kScaleBytes == 2 ? kStep / 4 : 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t pairs[D::kPairs];
    D::template scaled<kAll>(words[r] + kUnit * D::kWords, factors[r].half[kHalf], pairs);
    a[r] = pairs[kPair];
    a[2 + r] = pairs[kPair + 1];
  }
}

// The same; special: some code or scale of the warp's asks for all steps.
template <class F, int kStep>
PYFMT_DEVICE void decode(const uint32_t (&words)[2][F::kBits], const uint32_t (&raw)[2],
                         const Factors<F> (&factors)[2], bool special, uint32_t (&a)[4]) {
  if constexpr (F::D::kHasSpecials) {
    if (special) {
      Factors<F> all[2];
      all[0].template set<true>(raw[0]);
      all[1].template set<true>(raw[1]);
      decode<F, kStep, true>(words, all, a);
      return;
    }
  }
  decode<F, kStep, Factors<F>::kAnyScale>(words, factors, a);
}

template <class F>
PYFMT_DEVICE bool any_special(const uint32_t (&words)[2][F::kBits], const uint32_t (&raw)[2]) {
  using D = typename F::D;
  if constexpr (!D::kHasSpecials) return false;
  return __any_sync(kAll, D::special_scale(raw[0]) || D::special_scale(raw[1]) ||
                              D::template special_codes<F::kBits>(words[0]) ||
                              D::template special_codes<F::kBits>(words[1]));
}

// A team's warp: sums of its chunks of this block's part of K, as product fragments.
template <class F, int kTokens>
struct Consumer {
  static constexpr int kBits = F::kBits, kDepth = depth<F, kTokens>();
  static constexpr bool kGroups = F::kScaleBytes == 0;
  static constexpr int kCount = kTokens / 2, kTeams = teams<F, kTokens>();
  using R = Ring<F, kDepth>;

  const Params& p;
  const Place& at;
  int lane, team;
  R ring;
  uint32_t peer = 0;  // what turns an address of this block into a peer's

  PYFMT_DEVICE Consumer(const Params& p, const Place& at)
      : p(p),
        at(at),
        lane(int(threadIdx.x) & 31),
        team(int(threadIdx.x) >> 8),
        ring(p, at.ring + (threadIdx.x >> 5) * R::kBytes, at.n0, int(threadIdx.x >> 5) & 7, lane,
             at.first + team) {
    if (lane < p.share) {
      peer = hopper::cluster_address(at.base, uint32_t(at.part * p.share + lane)) - at.base;
    }
  }

  // Before x is there.
  PYFMT_DEVICE void prefetch() {
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; ++i) {
      const int chunk = at.first + team + i * kTeams;
      if (chunk < at.last) ring.fetch(p, chunk, uint32_t(i) * R::kSlot, kTeams);
      hopper::commit_copies();
    }
  }

  // Half a chunk, step i of x: four products, under way while the next fragments are decoded.
  // before: the step of this team before this one, if any; its products are over by the end, so
  // that its place may be filled anew.
  template <int kHalf>
  PYFMT_DEVICE void half(float (&sums)[kCount], const uint32_t (&a)[4][4], uint32_t i,
                         uint32_t before, bool any_before) {
    const Step<kTokens> step(i);
    hopper::barrier_wait(step.full(at.base), step.parity);
    const uint32_t tile = hopper::tile_code(step.tile(at.base));
    hopper::products_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      hopper::Product<kTokens>::add_to(sums, a[s], hopper::tile_descriptor(tile, s),
                                       kGroups && kHalf == 0 && s == 0 ? 0 : 1);
    }
    hopper::products_commit();
    hopper::products_wait<1>();
    if (any_before && lane < p.share) {
      hopper::barrier_arrive(Step<kTokens>(before).empty(at.base) + peer);
    }
  }

  // The fragments of half a chunk.
  template <int kHalf>
  PYFMT_DEVICE static void decode_half(const uint32_t (&words)[2][kBits], const uint32_t (&raw)[2],
                                       const Factors<F> (&factors)[2], bool special,
                                       uint32_t (&a)[4][4]) {
    decode<F, 4 * kHalf>(words, raw, factors, special, a[0]);
    decode<F, 4 * kHalf + 1>(words, raw, factors, special, a[1]);
    decode<F, 4 * kHalf + 2>(words, raw, factors, special, a[2]);
    decode<F, 4 * kHalf + 3>(words, raw, factors, special, a[3]);
  }

  // Adds what a chunk's products gave, once they are over, times its group's scale.
  template <int kFresh>
  PYFMT_DEVICE void add_chunk(float (&sums)[kCount], float (&fresh)[kFresh],
                              const float (&scale)[2]) {
    hopper::products_wait<0>();
    hopper::pin(fresh);
#pragma unroll
    for (int i = 0; i < kFresh; ++i) sums[i] = fused(scale[i >> 1 & 1], fresh[i], sums[i]);
  }

  // What products add to: a chunk's own sums where its scale comes later.
  template <bool kFresh, int kSums, int kOwn>
  PYFMT_DEVICE static auto& target(float (&sums)[kSums], float (&fresh)[kOwn]) {
    if constexpr (kFresh) return fresh;
    if constexpr (!kFresh) return sums;
  }

  PYFMT_DEVICE void run(float (&sums)[kCount]) {
    float fresh[kGroups ? kCount : 1];
    float scale[2] = {0.0f, 0.0f};  // of the chunk under way
    uint32_t groups = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
    hopper::pin(sums);
    if constexpr (kGroups) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) fresh[i] = 0.0f;
      hopper::pin(fresh);
    }
    int in_group = kGroups ? at.first % p.group_chunks : 0;
#pragma unroll 1
    for (int c = at.first + team; c < at.last; c += kTeams) {
      uint32_t words[2][kBits], a[2][4][4];
      hopper::wait_copies<kDepth - 2>();
      __syncwarp();
#pragma unroll
      for (int r = 0; r < 2; ++r) ring.read_codes(r, words[r]);
      uint32_t raw[2] = {0, 0};
      float next_scale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (kGroups) {
          next_scale[r] = ring.read_group_scale(r, p.scale, groups);
        } else {
          raw[r] = ring.read_scales(r);
        }
      }
      const bool special = any_special<F>(words, raw);
      Factors<F> factors[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) factors[r].template set<false>(raw[r]);
      const int further = c + (kDepth - 1) * kTeams;
      if (further < at.last) ring.fetch(p, further, ring.ahead, kTeams);
      hopper::commit_copies();
      ring.next();

      decode_half<0>(words, raw, factors, special, a[0]);
      if constexpr (kGroups) {
        add_chunk(sums, fresh, scale);
        scale[0] = next_scale[0];
        scale[1] = next_scale[1];
        if (++in_group == p.group_chunks) {
          in_group = 0;
          ++groups;
        }
      }
      auto& into = target<kGroups>(sums, fresh);
      const uint32_t i = 2 * uint32_t(c - at.first);
      half<0>(into, a[0], i, i - 2 * kTeams + 1, c >= at.first + kTeams);
      hopper::pin(words[0]);
      hopper::pin(words[1]);
      decode_half<1>(words, raw, factors, special, a[1]);
      half<1>(into, a[1], i + 1, i, true);
    }
    if constexpr (kGroups) {
      add_chunk(sums, fresh, scale);
    } else {
      hopper::products_wait<0>();
      hopper::pin(sums);
    }
  }
};

// Registers come by warpgroups, out of what the block starts with (168 or 96 for each thread): many
// sums, or many warps, take those of a whole one that only
// brings x.
template <class F, int kTokens>
constexpr bool moves_registers() {
  return teams<F, kTokens>() > 1 || kTokens * (F::kScaleBytes ? 1 : 2) >= 192;
}
template <class F, int kTokens>
constexpr int threads_of() {
  return 32 * (consumers<F, kTokens>() + (moves_registers<F, kTokens>() ? 4 : 1));
}

template <class F, int kTokens>
PYFMT_DEVICE void run_block(const Params& p) {
  constexpr int kConsumers = consumers<F, kTokens>();
  constexpr bool kTwoTeams = teams<F, kTokens>() > 1;
  const Place at = Place::of<kTokens>(p, stages<kTokens>());
  const bool clustered = p.share * p.split > 1;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int s = 0; s < stages<kTokens>(); ++s) {
      hopper::barrier_init(at.base + 8u * uint32_t(s), 1);
      hopper::barrier_init(at.base + 64u + 8u * uint32_t(s), uint32_t(8 * p.share));
    }
    hopper::barrier_init_fence();
  }
  if (threadIdx.x >= kConsumers * 32) {
    if constexpr (moves_registers<F, kTokens>()) hopper::fewer_registers<kTwoTeams ? 32 : 40>();
    if (clustered) {
      hopper::cluster_start();
    } else {
      __syncthreads();
    }
    if (threadIdx.x == kConsumers * 32) produce<kTokens>(p, at);
    __syncwarp();
    if (clustered) hopper::cluster_sync();
    if (p.split > 1) hopper::cluster_sync();
    return;
  }
  if constexpr (moves_registers<F, kTokens>()) hopper::more_registers<kTwoTeams ? 112 : 232>();
  {
    Consumer<F, kTokens> consumer(p, at);
    consumer.prefetch();
    if (clustered) {
      hopper::cluster_start();
    } else {
      __syncthreads();
    }
    float sums[kTokens / 2];
    consumer.run(sums);
    hopper::partial_sync<32 * kConsumers>();
    stage_sums<kTokens>(at, sums);
  }
  // Also: no block leaves while another of its cluster may still arrive at its barriers.
  if (clustered) {
    hopper::cluster_sync();
  } else {
    hopper::partial_sync<32 * kConsumers>();
  }
  finish<F, kTokens>(p, at);
  if (p.split > 1) hopper::cluster_sync();
}

#if defined(PYFMT_SM90A)
#define PYFMT_WIDE_THREADS threads_of<F, kTokens>()
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
void launch_tile(Params p, const WidePlan& plan, Stream stream) {
  p.up = L::as_float(power_of_two_bits(F::D::kDown));
  const int clusters = p.n_clusters * ((p.m + kTokens - 1) / kTokens);
  const int blocks = clusters * plan.share * plan.split;
  const auto kernel = matmul_wide_kernel<F, kTokens>;
#if defined(__CUDACC__)
  constexpr int kBytes = shared_bytes<F, kTokens>();
  static_assert(kBytes <= hopper::kMostShared, "the block's shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "shared memory");
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = unsigned(plan.share * plan.split);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  // Starts beside the kernel that writes the panel, and waits for it before reading x.
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads_of<F, kTokens>());
  config.dynamicSmemBytes = kBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, p), "launch");
#else
  (void)stream;
  emulation::launch_clusters(kernel, blocks, threads_of<F, kTokens>(), plan.share * plan.split, p);
#endif
}

// Each group of integers needs a second set of sums: half the tokens.
template <class F>
constexpr bool serves_tokens(int tokens) {
  return tokens == 64 || tokens == 128 || (F::kScaleBytes && (tokens == 192 || tokens == 256));
}

template <class F>
void launch_format(const Params& p, const WidePlan& plan, Stream stream) {
  if constexpr (F::kScaleBytes != 0) {
    if (plan.tokens == 256) return launch_tile<F, 256>(p, plan, stream);
    if (plan.tokens == 192) return launch_tile<F, 192>(p, plan, stream);
  }
  if (plan.tokens == 128) return launch_tile<F, 128>(p, plan, stream);
  launch_tile<F, 64>(p, plan, stream);
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

using Launch = void (*)(const Params&, const WidePlan&, Stream);

// By element and scale; null where there is none. One a file, so that they compile side by side.
Launch fp4_launch(const FormatSpec&);
Launch fp6_launch(const FormatSpec&);
Launch fp8_launch(const FormatSpec&);
Launch int_launch(const FormatSpec&);
Launch mxint_launch(const FormatSpec&);

// Whether kernels were compiled, or left empty for want of architecture 90a.
bool compiled();

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
