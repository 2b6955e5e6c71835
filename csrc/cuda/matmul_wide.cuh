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

template <class F, int kTokens>
constexpr int shared_bytes(int stages) {
  using R = Ring<F, depth<F, kTokens>()>;
  const int loop = kHeader + stages * kTokens * 128 + consumers<F, kTokens>() * int(R::kBytes);
  const int epilogue = kHeader + teams<F, kTokens>() * kTokens * kPitch * 4;
  return loop > epilogue ? loop : epilogue;
}

template <class F, int kTokens>
constexpr int most_stages() {
  int stages = kStages;
  while (shared_bytes<F, kTokens>(stages) > hopper::kMostShared) --stages;
  return stages;
}

// Goes round the stages: where a tile lies, its barrier for "full" and 64 bytes on that for
// "empty".
template <int kTokens>
struct Turn {
  static constexpr uint32_t kTile = kTokens * 128;
  uint32_t first, last, full, tile, parity = 0;  // tile: by tile_code

  PYFMT_DEVICE Turn(const Params& p, const Place& at)
      : first(at.base),
        last(at.base + 8u * uint32_t(p.stages - 1)),
        full(at.base),
        tile(hopper::tile_code(at.base + kHeader)) {
    hopper::keep(last);
  }
  PYFMT_DEVICE uint32_t empty() const { return full + 64; }
  PYFMT_DEVICE void next() {
    if (full == last) {
      full = first;
      tile = hopper::tile_code(first + kHeader);
      parity ^= 1;
    } else {
      full += 8;
      tile += kTile >> 4;
    }
  }
};

// One thread: brings the tiles of x, each block of a cluster its part for all that share it.
template <int kTokens>
PYFMT_DEVICE void produce(const Params& p, const Place& at) {
  const uint32_t bytes = uint32_t(kTokens * 128 / p.share), mine = uint32_t(at.sub) * bytes;
  const uint32_t mask = ((1u << p.share) - 1) << (at.part * p.share);
  const int64_t pitch = int64_t(p.panel_rows) * 128;
  const uint8_t* from = p.panel + int64_t(at.first) * 2 * pitch + int64_t(at.m0) * 128 + mine;
  hopper::wait_for_previous();
  Turn<kTokens> turn(p, at);
  uint32_t to = at.base + kHeader;
  for (int i = 2 * (at.last - at.first); i > 0; --i, from += pitch) {
    hopper::barrier_wait(turn.empty(), turn.parity ^ 1);
    hopper::barrier_expect(turn.full, uint32_t(kTokens * 128));
    hopper::bulk_copy(to + mine, from, bytes, turn.full, mask, p.share > 1);
    turn.next();
    to = turn.full == at.base ? at.base + kHeader : to + kTokens * 128;
  }
}

// sums[i] += step's product: half a chunk, four steps of 16.
template <int kTokens>
PYFMT_DEVICE void multiply_half(float (&sums)[kTokens / 2], const uint32_t (&a)[4][4],
                                uint32_t tile, int add) {
  hopper::products_fence();
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    hopper::Product<kTokens>::add_to(sums, a[s], hopper::tile_descriptor(tile, s), s ? 1 : add);
  }
  hopper::products_commit();
}

// Four fragments from half a chunk: codes 16 kHalf to 16 kHalf + 15 of both rows' 32.
template <class F, int kHalf, bool kAll>
PYFMT_DEVICE void decode_half(const uint32_t (&words)[2][F::kBits], const Factor (&factor)[2],
                              uint32_t (&a)[4][4]) {
  using D = typename F::D;
  uint32_t pairs[2][8];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int u = 0; u < 8 / D::kPairs; ++u) {
      D::template scaled<kAll>(words[r] + kHalf * (F::kBits / 2) + u * D::kWords, factor[r],
                               pairs[r] + u * D::kPairs);
    }
  }
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    a[s][0] = pairs[0][2 * s];
    a[s][1] = pairs[1][2 * s];
    a[s][2] = pairs[0][2 * s + 1];
    a[s][3] = pairs[1][2 * s + 1];
  }
}

// The factors of half a chunk's codes from a row's scale bytes.
template <class F, int kHalf, bool kAll>
PYFMT_DEVICE Factor factor_of(uint32_t raw) {
  using D = typename F::D;
  if constexpr (F::kScaleBytes == 1) {
    return D::template factor<kAll>(raw);
  } else if constexpr (F::kScaleBytes == 2) {
    Factor two[2];
    D::factors(raw, two);
    return two[kHalf];
  } else {
    return D::unit_factor();
  }
}

// special: some scale or code of the warp's needs more than the usual steps.
template <class F, int kHalf>
PYFMT_DEVICE void decode_half(const uint32_t (&words)[2][F::kBits], const uint32_t (&raw)[2],
                              bool special, uint32_t (&a)[4][4]) {
  constexpr bool kCanBe = F::kScaleBytes == 1 || F::D::kHasSpecials;
  if (kCanBe && special) {
    const Factor factor[2] = {factor_of<F, kHalf, true>(raw[0]), factor_of<F, kHalf, true>(raw[1])};
    decode_half<F, kHalf, true>(words, factor, a);
  } else {
    const Factor factor[2] = {factor_of<F, kHalf, false>(raw[0]),
                              factor_of<F, kHalf, false>(raw[1])};
    decode_half<F, kHalf, false>(words, factor, a);
  }
}

template <class F>
PYFMT_DEVICE bool any_special(const uint32_t (&words)[2][F::kBits], const uint32_t (&raw)[2]) {
  using D = typename F::D;
  bool special = false;
  if constexpr (F::kScaleBytes == 1) {
    special = D::special_scale(raw[0]) || D::special_scale(raw[1]);
  }
  if constexpr (D::kHasSpecials) {
    special = special || D::template special_codes<F::kBits>(words[0]) ||
              D::template special_codes<F::kBits>(words[1]);
  }
  if constexpr (F::kScaleBytes == 1 || D::kHasSpecials) return __any_sync(kAll, special);
  return false;
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
  Turn<kTokens> turn;
  uint32_t held = 0;  // the barrier for "empty" of the stage that products under way read
  uint32_t peer = 0;  // what turns it into a peer's

  PYFMT_DEVICE Consumer(const Params& p, const Place& at)
      : p(p),
        at(at),
        lane(int(threadIdx.x) & 31),
        team(int(threadIdx.x) >> 8),
        ring(p, at.ring + (threadIdx.x >> 5) * R::kBytes, at.n0, int(threadIdx.x >> 5) & 7, lane,
             at.first + team),
        turn(p, at) {
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

  // The products before the last ones are over: their stage may be filled anew.
  PYFMT_DEVICE void release() {
    if (held && lane < p.share) hopper::barrier_arrive(held + peer);
  }

  PYFMT_DEVICE void half(float (&sums)[kCount], const uint32_t (&a)[4][4], int add) {
    hopper::barrier_wait(turn.full, turn.parity);
    multiply_half<kTokens>(sums, a, turn.tile, add);
    hopper::products_wait<1>();
    release();
    held = turn.empty();
    turn.next();
  }

  // Adds what a chunk's products gave, once they are over, times its group's scale.
  template <int kFresh>
  PYFMT_DEVICE void add_chunk(float (&sums)[kCount], float (&fresh)[kFresh],
                              const float (&scale)[2]) {
    hopper::products_wait<0>();
    hopper::pin(fresh);
    release();
    held = 0;
#pragma unroll
    for (int i = 0; i < kFresh; ++i) sums[i] = fused(scale[i >> 1 & 1], fresh[i], sums[i]);
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
    for (int i = 0; i < 2 * team; ++i) turn.next();
#pragma unroll 1
    for (int c = at.first + team; c < at.last; c += kTeams) {
      uint32_t words[2][kBits];
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
      const int further = c + (kDepth - 1) * kTeams;
      if (further < at.last) ring.fetch(p, further, ring.ahead, kTeams);
      hopper::commit_copies();
      ring.next();

      uint32_t a[2][4][4];
      decode_half<F, 0>(words, raw, special, a[0]);
      if constexpr (kGroups) {
        add_chunk(sums, fresh, scale);
        scale[0] = next_scale[0];
        scale[1] = next_scale[1];
        half(fresh, a[0], 0);
      } else {
        half(sums, a[0], 1);
      }
      hopper::pin(words[0]);
      hopper::pin(words[1]);
      decode_half<F, 1>(words, raw, special, a[1]);
      if constexpr (kGroups) {
        half(fresh, a[1], 1);
        if (++in_group == p.group_chunks) {
          in_group = 0;
          ++groups;
        }
      } else {
        half(sums, a[1], 1);
      }
#pragma unroll
      for (int i = 0; i < 2 * (kTeams - 1); ++i) turn.next();
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
  const Place at = Place::of<kTokens>(p);
  const bool clustered = p.share * p.split > 1;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int s = 0; s < p.stages; ++s) {
      hopper::barrier_init(at.base + 8u * uint32_t(s), 1);
      hopper::barrier_init(at.base + 64u + 8u * uint32_t(s), uint32_t(8 * p.share));
    }
    hopper::barrier_init_fence();
  }
  if (threadIdx.x >= kConsumers * 32) {
    if constexpr (moves_registers<F, kTokens>()) hopper::fewer_registers<kTwoTeams ? 32 : 40>();
    if (clustered) {
      hopper::cluster_sync();
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
      hopper::cluster_sync();
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
  p.stages = most_stages<F, kTokens>();
  p.up = L::as_float(power_of_two_bits(F::D::kDown));
  const int clusters = p.n_clusters * ((p.m + kTokens - 1) / kTokens);
  const int blocks = clusters * plan.share * plan.split;
  const auto kernel = matmul_wide_kernel<F, kTokens>;
#if defined(__CUDACC__)
  constexpr int kBytes = shared_bytes<F, kTokens>(most_stages<F, kTokens>());
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
