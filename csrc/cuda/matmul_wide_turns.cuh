// SPDX-License-Identifier: Apache-2.0
// A second kernel of matmul_wide.h, for groups of integers: sums of each group are kept apart, and
// multiplied by its scale. A block owns 128 rows of w and kTokens rows of x; two warpgroups of 64
// rows each decode codes into fragments, in registers, and multiply. They take turns at the tensor
// cores: while one has its products of a group there, the other scales those it had and decodes
// what comes next. A third warpgroup has the copy engine bring x and codes, and scales.
#pragma once

#include "decode.cuh"
#include "launch.cuh"
#include "matmul_wide_finish.cuh"
#include "matmul_wide_panel.cuh"
#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace turns {

// ---- codes ------------------------------------------------------------------------------------

// Integers of kBits, in groups of a multiple of 4 kRun columns (matmul_wide_panel.cuh), to bfloat16
// times 2^-kDown.
template <int kBitsOfCode, int kRunOfLane>
struct Integers {
  static constexpr int kBits = kBitsOfCode, kRun = kRunOfLane, kDown = 6;
  static_assert(kBits == 4 || kBits == 8, "integers have 4 or 8 bits");

  // Below 2^-125 bfloat16 is evenly spaced: the lower byte of each half, with its sign turned into
  // an offset, is a number of steps of 2^-133 as it stands. out: kBits == 4 ? 4 : 2 pairs.
  PYFMT_DEVICE static void decode(uint32_t word, uint32_t* out) {
    const uint32_t up = word >> 8;
    if constexpr (kBits == 4) {
      constexpr uint32_t kLow = both(0x7f00u), kHigh = both(0x7d00u), kOff = both(0xbe00u);
      out[0] = fused_pairs((word & both(0x0fu)) ^ both(0x08u), kLow, kOff);
      out[1] = fused_pairs((word & both(0xf0u)) ^ both(0x80u), kHigh, kOff);
      out[2] = fused_pairs((up & both(0x0fu)) ^ both(0x08u), kLow, kOff);
      out[3] = fused_pairs((up & both(0xf0u)) ^ both(0x80u), kHigh, kOff);
    } else {
      constexpr uint32_t kBy = both(0x7f00u), kOff = both(0xc000u);
      out[0] = fused_pairs((word & both(0xffu)) ^ both(0x80u), kBy, kOff);
      out[1] = fused_pairs((up & both(0xffu)) ^ both(0x80u), kBy, kOff);
    }
  }
};

// ---- shared memory ----------------------------------------------------------------------------

constexpr int kThreadsHere = kConsumers + 128;

template <class F, int kTokens>
struct Room {
  static constexpr int kParts = 32 / F::kRun;  // of a chunk, with sums of their own
  static constexpr uint32_t kStages = kTokens == 64 ? 6 : 4;
  static constexpr uint32_t kTile = kTokens * 128, kFactors = kParts * kRows * 4;
  static constexpr uint32_t kStage = 2 * kTile;
  static constexpr uint32_t kFactorsAt = kHeader + kStages * kStage;
  // Codes come in rows of 128 bytes: of one chunk, or of two.
  static constexpr uint32_t kSpan = 8 / F::kBits, kRowBytes = 128, kSlot = kRows * kRowBytes;
  static constexpr uint32_t kCodesAt = (kFactorsAt + kStages * kFactors + 1023) / 1024 * 1024;
  static constexpr uint32_t kDepth = kTokens == 64 ? 5 : 4;
  static constexpr uint32_t kLoop = kCodesAt + kDepth * kSlot;
  static constexpr uint32_t kEnd = kHeader + kTokens * kPitch * 4;
  static constexpr uint32_t kBytes = kLoop > kEnd ? kLoop : kEnd;
  static_assert(kBytes <= hopper::kMostShared, "the block's shared memory");
};

// Barriers of the header: of stages (full, empty), of slots of codes (full, empty), for sums
// (sums_barrier), of turns.
constexpr uint32_t kFull = 0, kEmpty = 64, kCodesFull = 128, kCodesEmpty = 256, kTurns = 320;

// A place of a ring, in turn.
template <uint32_t kCount>
struct Ring {
  uint32_t place = 0, parity = 0;

  PYFMT_DEVICE void next() {
    if (++place == kCount) {
      place = 0;
      parity ^= 1;
    }
  }
};

template <class F, int kTokens>
PYFMT_DEVICE void init_barriers(const Params& p, uint32_t base) {
  const uint32_t i = threadIdx.x;
  if (i >= 48) return;
  const uint32_t at = 8 * i;
  const uint32_t arrivals = at < kEmpty         ? 3
                            : at < kCodesFull   ? 8 * uint32_t(p.share)
                            : at >= kTurns      ? 4
                            : at >= kCodesEmpty ? 8
                                                : 1;
  hopper::barrier_init(base + at, arrivals);
  hopper::barrier_init_fence();
}

// ---- what brings things -----------------------------------------------------------------------

template <class F, int kTokens>
struct Bringer {
  using R = Room<F, kTokens>;
  const Params& p;
  const Place& at;
  int steps;

  // One thread. Parts of K take the halves of the tokens in different order (finish).
  PYFMT_DEVICE void bring_x() const {
    const uint32_t bytes = R::kTile >> (p.share_bits + p.split - 1),
                   mine = uint32_t(at.sub) * bytes;
    const uint32_t mask = ((1u << p.share) - 1) << (at.part << p.share_bits);
    const int64_t pitch = int64_t(p.panel_rows) * 128;
    const uint8_t* first = p.panel + int64_t(at.first) * 2 * pitch + int64_t(at.m0) * 128 + mine;
    const uint8_t* second = first + (at.part ^ 1) * (R::kTile / 2);
    first += at.part * (R::kTile / 2);
    Ring<R::kStages> ring;
    hopper::wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < steps; ++i, ring.next()) {
      const uint32_t full = at.base + kFull + 8 * ring.place;
      uint32_t to = at.base + kHeader + ring.place * R::kStage + mine;
      hopper::barrier_wait(at.base + kEmpty + 8 * ring.place, ring.parity ^ 1);
      hopper::barrier_expect(full, R::kStage);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        hopper::bulk_copy(to, first, bytes, full, mask, p.share > 1);
        if (p.split > 1)
          hopper::bulk_copy(to + R::kTile / 2, second, bytes, full, mask, p.share > 1);
        first += pitch;
        second += pitch;
        to += R::kTile;
      }
    }
  }

  // One thread.
  PYFMT_DEVICE void bring_codes() const {
    Ring<R::kDepth> ring;
#pragma unroll 1
    for (int i = 0; i < steps; i += int(R::kSpan), ring.next()) {
      const uint32_t full = at.base + kCodesFull + 8 * ring.place;
      hopper::barrier_wait(at.base + kCodesEmpty + 8 * ring.place, ring.parity ^ 1);
      hopper::barrier_expect(full, R::kSlot);
      hopper::copy_box(at.base + R::kCodesAt + ring.place * R::kSlot, p.codes_map,
                       (at.first + i) * (kChunk * F::kBits / 8), at.n0, full, 0, false);
    }
  }

  PYFMT_DEVICE uint32_t read_scale(int64_t row, int group) const {
    if (group >= p.blocks) return 0;
    const int64_t i = row * p.blocks + group;
    return p.scale == Scale::kFP32 ? reinterpret_cast<const uint32_t*>(p.scales)[i]
                                   : reinterpret_cast<const uint16_t*>(p.scales)[i];
  }
  PYFMT_DEVICE float as_factor(uint32_t raw) const {
    return p.scale == Scale::kFP32   ? as_float(raw)
           : p.scale == Scale::kBF16 ? as_float(raw << 16)
                                     : from_half(raw);
  }

  // Two warps, a lane two rows. The next chunk's scales are under way while one's are laid down.
  PYFMT_DEVICE void bring_factors(int thread) const {
    const int64_t row[2] = {min(at.n0 + thread, p.n - 1), min(at.n0 + thread + 64, p.n - 1)};
    // Parts (of 4 kRun columns) of a group, the next part to load: its group, parts left of that.
    const int size = p.group_runs / (F::kRun / 8);
    int group = at.first * R::kParts / size, left = size - at.first * R::kParts % size;
    uint32_t raw[R::kParts][2];
    const auto load = [&] {
#pragma unroll
      for (int s = 0; s < R::kParts; ++s) {
#pragma unroll
        for (int r = 0; r < 2; ++r) raw[s][r] = read_scale(row[r], group);
        if (--left == 0) {
          left = size;
          ++group;
        }
      }
    };
    load();
    Ring<R::kStages> ring;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, ring.next()) {
      float factor[R::kParts][2];
#pragma unroll
      for (int s = 0; s < R::kParts; ++s) {
        factor[s][0] = as_factor(raw[s][0]);
        factor[s][1] = as_factor(raw[s][1]);
      }
      load();
      const uint32_t to = at.base + R::kFactorsAt + ring.place * R::kFactors + 4 * uint32_t(thread);
      hopper::barrier_wait(at.base + kEmpty + 8 * ring.place, ring.parity ^ 1);
#pragma unroll
      for (int s = 0; s < R::kParts; ++s) {
        hopper::store_shared(to + uint32_t(s * kRows * 4), as_uint(factor[s][0]));
        hopper::store_shared(to + uint32_t(s * kRows * 4 + 256), as_uint(factor[s][1]));
      }
      hopper::warp_sync();
      if (thread % 32 == 0) hopper::barrier_arrive_here(at.base + kFull + 8 * ring.place);
    }
  }

  PYFMT_DEVICE void run() const {
    const int warp = hopper::uniform(int(threadIdx.x) >> 5 & 3), lane = int(threadIdx.x) & 31;
    if (warp >= 2) {
      bring_factors(int(threadIdx.x) & 63);
    } else if (lane == 0) {
      warp ? bring_codes() : bring_x();
    }
  }
};

// ---- what multiplies --------------------------------------------------------------------------

template <class F, int kTokens>
struct Multiplier {
  using R = Room<F, kTokens>;
  using Product = hopper::RegisterProduct<hopper::Bf16, kTokens>;
  static constexpr int kCount = kTokens / 2, kParts = R::kParts, kSteps = 8 / kParts;
  using Fragments = uint32_t[8][4];  // of the steps of a chunk

  const Params& p;
  const Place& at;
  int lane, group, steps;
  uint32_t peer = 0;  // what turns an address of this block into that of another, for some lanes
  uint32_t codes, factors;  // where this lane reads, but for turns
  uint32_t turned = 0;      // which of the 16-byte pieces of its row
  Ring<R::kStages> stage;
  Ring<R::kDepth> slot;
  uint32_t turn;

  // Rows change places within eight, so that lanes which read together never share a bank.
  PYFMT_DEVICE static int row_of(int lane) {
    const int g = lane / 4;
    if (F::kBits * F::kRun == 256) return g;                      // 32 bytes of a row
    if (F::kBits * F::kRun == 128) return g >> 1 | (g & 1) << 2;  // 16
    return g >> 2 | (g & 3) << 1;                                 // 8 and 4
  }

  PYFMT_DEVICE Multiplier(const Params& p, const Place& at)
      : p(p),
        at(at),
        lane(int(threadIdx.x) & 31),
        group(hopper::uniform(int(threadIdx.x) >> 7)),
        steps(at.last - at.first) {
    if (p.share > 1 && lane < p.share) {
      peer = hopper::cluster_address(at.base, uint32_t(at.part * p.share + lane)) - at.base;
    }
    const uint32_t row = uint32_t(16 * (threadIdx.x >> 5) + row_of(lane));
    turned = row & 7;
    codes = at.base + R::kCodesAt + row * R::kRowBytes;
    factors = at.base + R::kFactorsAt + row * 4;
    turn = uint32_t(group) ^ 1;
    hopper::keep(codes);
    hopper::keep(factors);
  }

  // Words kFrom to kFrom + kWords - 1 of this lane's 32 codes of a chunk, of row r of its two.
  // half: where the chunk starts in the slot's rows.
  template <int kFrom, int kWords>
  PYFMT_DEVICE void read(uint32_t half, int r, uint32_t (&words)[kWords]) const {
    constexpr int kTogether = F::kBits * F::kRun / 32, kWide = kTogether < 4 ? kTogether : 4;
    const uint32_t row = codes + slot.place * R::kSlot + uint32_t(r * 8) * R::kRowBytes;
    const uint32_t mine = half + uint32_t(lane % 4 * 4 * kTogether);
#pragma unroll
    for (int i = 0; i < kWords; i += kWide) {
      const int word = kFrom + i, block = word / kTogether;
      const uint32_t byte = mine + uint32_t(block * 16 * kTogether + word % kTogether * 4);
      const uint32_t there = row + (byte ^ turned << 4);
      if constexpr (kWide == 4) {
        const uint4 v = hopper::load_shared16(there);
        words[i] = v.x;
        words[i + 1] = v.y;
        words[i + 2] = v.z;
        words[i + 3] = v.w;
      } else if constexpr (kWide == 2) {
        const uint2 v = hopper::load_shared8(there);
        words[i] = v.x;
        words[i + 1] = v.y;
      } else {
        words[i] = hopper::load_shared_small<4>(there);
      }
    }
  }

  // kCodes of this lane's 32 codes of chunk i from code kFrom on, as fragments.
  template <int kFrom, int kCodes>
  PYFMT_DEVICE void decode(int i, Fragments& to) const {
    constexpr int kWords = F::kBits * kCodes / 32, kPairs = 16 / F::kBits;  // of a word
    const uint32_t half = R::kSpan == 2 ? uint32_t(i & 1) * 64 : 0;
    uint32_t words[2][kWords];
#pragma unroll
    for (int r = 0; r < 2; ++r) read<kFrom * F::kBits / 32>(half, r, words[r]);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t pairs[kPairs];
        F::decode(words[r][w], pairs);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const int pair = kFrom / 2 + w * kPairs + j;
          to[pair / 2][r + 2 * (pair & 1)] = pairs[j];
        }
      }
    }
  }
  // Part kPart of a chunk's decoding.
  template <int kPart>
  PYFMT_DEVICE void decode_part(int i, Fragments& to) const {
    if constexpr (kParts == 1 && F::kBits == 4) {
      decode<0, 32>(i, to);
    } else if constexpr (kParts == 1) {
      decode<0, 16>(i, to);
      decode<16, 16>(i, to);
    } else {
      decode<32 / kParts * kPart, 32 / kParts>(i, to);
    }
  }

  PYFMT_DEVICE void wait_codes() const {
    hopper::barrier_wait(at.base + kCodesFull + 8 * slot.place, slot.parity);
  }
  // Chunk i's codes have been read.
  PYFMT_DEVICE void release_codes(int i) {
    if ((i + 1) % int(R::kSpan) && i + 1 < steps) return;
    hopper::warp_sync();
    if (lane == 0) hopper::barrier_arrive_here(at.base + kCodesEmpty + 8 * slot.place);
    slot.next();
  }

  PYFMT_DEVICE void wait_turn() {
    hopper::barrier_wait(at.base + kTurns + 8 * uint32_t(group), turn);
    turn ^= 1;
  }
  PYFMT_DEVICE void pass_turn() const {
    if (lane == 0) hopper::barrier_arrive_here(at.base + kTurns + 8 * uint32_t(group ^ 1));
  }

  // The warp has no more use for a stage.
  PYFMT_DEVICE void release_stage() {
    const uint32_t empty = at.base + kEmpty + 8 * stage.place;
    if (p.share > 1) {
      if (lane < p.share) hopper::barrier_arrive(empty + peer);
    } else if (lane == 0) {
      hopper::barrier_arrive_here(empty);
    }
    stage.next();
  }

  // Part kPart of chunk i, by fragments `now`; those of the next chunk become `next`.
  template <int kPart>
  PYFMT_DEVICE void part(int i, float (&sums)[kCount], float (&fresh)[kCount], Fragments& now,
                         Fragments& next) {
    const uint32_t x = at.base + kHeader + stage.place * R::kStage;
    wait_turn();
    if constexpr (kPart == 0) {
      hopper::barrier_wait(at.base + kFull + 8 * stage.place, stage.parity);
    }
    hopper::products_fence();
#pragma unroll
    for (int s = kPart * kSteps; s < (kPart + 1) * kSteps; ++s) {
      const uint32_t tile = hopper::tile_code(x + uint32_t(s / 4) * R::kTile);
      if (s == (kPart + 1) * kSteps - 1) pass_turn();
      Product::add_to(fresh, now[s], hopper::tile_descriptor(tile, s % 4),
                      s > kPart * kSteps ? 1 : 0);
    }
    hopper::products_commit();
    if (i + 1 < steps) {
      constexpr bool kFirst = kPart == 0, kLast = kPart == kParts - 1;
      if constexpr (kFirst) wait_codes();
      decode_part<kPart>(i + 1, next);
      if constexpr (kLast) release_codes(i + 1);
    }
    const uint32_t from = factors + stage.place * R::kFactors + uint32_t(kPart * kRows * 4);
    const float factor[2] = {as_float(hopper::load_shared_small<4>(from)),
                             as_float(hopper::load_shared_small<4>(from + 32))};
    hopper::products_wait<0>();
    hopper::pin(fresh);
    if constexpr (kPart == kParts - 1) {
      release_stage();
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums[j] = fused(factor[j >> 1 & 1], fresh[j], sums[j]);
  }

  PYFMT_DEVICE void chunk(int i, float (&sums)[kCount], float (&fresh)[kCount], Fragments& now,
                          Fragments& next) {
    part<0>(i, sums, fresh, now, next);
    if constexpr (kParts > 1) part<1>(i, sums, fresh, now, next);
    if constexpr (kParts > 2) {
      part<2>(i, sums, fresh, now, next);
      part<3>(i, sums, fresh, now, next);
    }
  }

  PYFMT_DEVICE void run(float (&sums)[kCount]) {
    float fresh[kCount];
    Fragments a, b;
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums[j] = 0.0f;
    if (steps > 0) {
      wait_codes();
      decode_part<0>(0, a);
      if constexpr (kParts > 1) decode_part<1>(0, a);
      if constexpr (kParts > 2) decode_part<2>(0, a);
      if constexpr (kParts > 2) decode_part<3>(0, a);
      release_codes(0);
    }
#pragma unroll 1
    for (int i = 0; i < steps; i += 2) {
      chunk(i, sums, fresh, a, b);
      if (i + 1 < steps) chunk(i + 1, sums, fresh, b, a);
    }
  }
};

template <class F, int kTokens>
PYFMT_DEVICE void take_turns(const Params& p) {
  const Place at = Place::of<kTokens>(p);
  turns::init_barriers<F, kTokens>(p, at.base);
  if (threadIdx.x == 0) hopper::prefetch_map(p.codes_map);
  if (p.share > 1) hopper::cluster_meet();
  if (p.share == 1) __syncthreads();
  // Registers: 168 for each of 384 threads, shared out anew.
  if (threadIdx.x >= kConsumers) {
    hopper::fewer_registers<40>();
    hopper::start_dependents();
    Bringer<F, kTokens>{p, at, at.last - at.first}.run();
  } else {
    hopper::more_registers<232>();
    float sums[kTokens / 2];
    Multiplier<F, kTokens>(p, at).run(sums);
    if (threadIdx.x == 0 && p.split > 1) expect_sums<kTokens>(at);
    // No block leaves, or is written to, while another of its cluster may still need its tiles.
    if (p.share * p.split > 1) {
      hopper::cluster_meet();
    } else {
      hopper::partial_sync<kConsumers>();
    }
    const int row = Multiplier<F, kTokens>::row_of(int(threadIdx.x) & 31);
    finish<kTokens>(p, at, sums, row);
  }
}

#if defined(PYFMT_SM90A)
#define PYFMT_TURNS_THREADS kThreadsHere
#else
#define PYFMT_TURNS_THREADS 32  // tells the host that there is nothing to launch
#endif

template <class F, int kTokens>
__global__ void __launch_bounds__(PYFMT_TURNS_THREADS, 1)
    matmul_turns_kernel(const __grid_constant__ Params p) {
#if defined(PYFMT_SM90A)
  take_turns<F, kTokens>(p);
#endif
}

template <class F, int kTokens>
void launch_turns(Params& p, const WideCall& call, Stream stream) {
  using R = Room<F, kTokens>;
  hopper::MatrixBox codes = call.codes;
  codes.box_bytes = int(R::kRowBytes);
  codes.box_rows = kRows;
  p.codes_map = hopper::encode(codes);
  p.up = L::as_float(power_of_two_bits(F::kDown));
  const int cluster = p.share * p.split;
  const int blocks = int(p.n_clusters) * ((p.m + kTokens - 1) / kTokens) * cluster;
  const auto kernel = matmul_turns_kernel<F, kTokens>;
#if defined(__CUDACC__)
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, R::kBytes),
        "shared memory");
  cudaLaunchAttribute attributes[2];
  // Starts beside the kernel that writes the panel, and waits for it before reading anything.
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = unsigned(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreadsHere);
  config.dynamicSmemBytes = R::kBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, p), "launch");
#else
  (void)stream;
  emulation::launch_clusters(kernel, blocks, kThreadsHere, cluster, p);
#endif
}

template <int kBits, int kRun>
void launch_run(Params& p, const WideCall& call, Stream stream) {
  const int64_t units = int64_t(p.panel_rows / 8) * p.tiles, k = call.x.row_bytes / 2;
  const bool aligned = aligned16(call.x.data) && k % 8 == 0;
  launch(write_panel<kBits, kRun>, (units + kWarps - 1) / kWarps, kThreads, stream,
         static_cast<const uint16_t*>(call.x.data), const_cast<uint8_t*>(p.panel), p.m, k,
         p.panel_rows, p.tiles, aligned);
  using F = Integers<kBits, kRun>;
  if (call.tokens == 128) return launch_turns<F, 128>(p, call, stream);
  launch_turns<F, 64>(p, call, stream);
}

// A lane takes as many codes that lie together as a group allows.
template <int kBits>
void launch_groups(Params& p, const WideCall& call, Stream stream) {
  if (p.group_runs % 4 == 0) return launch_run<kBits, 32>(p, call, stream);
  if (p.group_runs % 2 == 0) return launch_run<kBits, 16>(p, call, stream);
  launch_run<kBits, 8>(p, call, stream);
}

}  // namespace turns
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
