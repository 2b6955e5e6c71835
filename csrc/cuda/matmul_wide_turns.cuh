// SPDX-License-Identifier: Apache-2.0
// A second kernel of matmul_wide.h, for sums that are kept apart: those of groups of integers,
// which their scales multiply, and those of 128 columns of fp8 products (matmul_fold.h). A block
// owns 128 rows of w and kTokens rows of x; two warpgroups of 64 rows each decode codes into
// fragments, in registers, and multiply. They take turns at the tensor cores: while one has its
// products of a group there, the other scales those it had and decodes what comes next. Of 256 rows
// of x half are multiplied at a time, and fragments decoded after both halves, those of fp8 in
// place and without turns. A third warpgroup has the copy engine bring x and codes, and scales.
#pragma once

#include "matmul_wide.cuh"
#include "matmul_wide_finish.cuh"
#include "matmul_wide_turns_in_place.cuh"
#include "matmul_wide_turns_room.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace turns {

// ---- what multiplies --------------------------------------------------------------------------

template <class F, int kTokens>
struct Multiplier {
  using R = Room<F, kTokens>;
  using Product = hopper::RegisterProduct<typename F::Type, R::kWide>;
  static constexpr int kCount = R::kWide / 2, kAll = kTokens / 2, kParts = R::kParts;
  static constexpr int kSteps = F::kOut / 2 / kParts;        // of a part
  static constexpr int kMost = R::kHalves == 2 ? 240 : 232;  // registers
  using Fragments = uint32_t[F::kOut / 2][4];

  const Params& p;
  const Place& at;
  int lane, group, steps;
  uint32_t peer = 0;  // what turns an address of this block into that of another, for some lanes
  uint32_t codes, factors, places;  // where this lane reads, but for turns
  uint32_t turned = 0;              // which of the 16-byte pieces of its row
  Ring<R::kStages> stage;
  Ring<R::kDepth> slot;
  uint32_t turn, seen = 0;  // seen: what was read of a slot, for after_reading

  PYFMT_DEVICE Multiplier(const Params& p, const Place& at)
      : p(p),
        at(at),
        lane(int(threadIdx.x) & 31),
        group(hopper::uniform(int(threadIdx.x) >> 7)),
        steps(at.last - at.first) {
    if (p.share > 1 && lane < p.share) {
      peer = hopper::cluster_address(at.base, uint32_t(at.part * p.share + lane)) - at.base;
    }
    const uint32_t row = uint32_t(16 * (threadIdx.x >> 5) + row_of<F>(lane));
    turned = row & 7;
    codes = at.base + R::kCodesAt + row * R::kRowBytes;
    factors = at.base + R::kFactorsAt + row * 4;
    places = at.base + R::kPlacesAt + row * 4 + uint32_t(lane % 4);
    turn = uint32_t(group) ^ 1;
    hopper::keep(codes);
    hopper::keep(F::kFolded ? places : factors);
  }

  // kCodes of this lane's 32 codes of a chunk, from code kFrom on, of row r of its two. half: where
  // the chunk starts in the slot's rows.
  template <int kFrom, int kCodes, int kWords>
  PYFMT_DEVICE void read(uint32_t half, int r, uint32_t (&words)[kWords]) {
    constexpr int kTogether = F::kBits * F::kRun / 32;
    constexpr int kWide = kTogether % 4 == 0 ? 4 : kTogether % 2 == 0 ? 2 : 1;
    const uint32_t row = codes + slot.place * R::kSlot + uint32_t(r * 8) * R::kRowBytes;
    const uint32_t mine = half + uint32_t(lane % 4 * 4 * kTogether);
#pragma unroll
    for (int i = 0; i < kWords; i += kWide) {
      const int word = kFrom * F::kBits / 32 + i, block = word / kTogether;
      const uint32_t byte = mine + uint32_t(block * 16 * kTogether + word % kTogether * 4);
      const uint32_t there = row + (R::kRowBytes == 128 ? byte ^ turned << 4 : byte);
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
      seen |= words[i];
    }
  }

  // Those codes of chunk i as fragments.
  template <int kFrom>
  PYFMT_DEVICE void decode(int i, Fragments& to) {
    constexpr int kWords = F::kBits * F::kPiece / 32, kOut = F::kOut * F::kPiece / 32;
    const uint32_t which = R::kSpan == 2 ? uint32_t(i & 1) : 0;
    uint32_t words[2][kWords], place[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      read<kFrom, F::kPiece>(which * 64, r, words[r]);
      if constexpr (F::kFolded) {
        place[r] = hopper::load_shared_small<1>(places + slot.place * R::kPlaces +
                                                which * (kRows * 4) + uint32_t(r * 32));
        seen |= place[r];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t out[kOut];
      F::decode(words[r], place[r], at.base + kTableAt, out);
#pragma unroll
      for (int j = 0; j < kOut; ++j) {
        const int word = F::kOut * kFrom / 32 + j;
        to[word / 2][r + 2 * (word & 1)] = out[j];
      }
    }
  }
  // Part kPart of a chunk's decoding.
  template <int kPart>
  PYFMT_DEVICE void decode_part(int i, Fragments& to) {
    constexpr int kCodes = 32 / kParts, kFrom = kPart * kCodes;
    decode<kFrom>(i, to);
    if constexpr (kCodes > F::kPiece) decode<kFrom + F::kPiece>(i, to);
  }

  PYFMT_DEVICE void wait_codes() const {
    hopper::barrier_wait(at.base + kCodesFull + 8 * slot.place, slot.parity);
  }
  // Chunk i's codes have been read.
  PYFMT_DEVICE void release_codes(int i) {
    if ((i + 1) % int(R::kSpan) && i + 1 < steps) return;
    hopper::warp_sync();
    const uint32_t empty = at.base + kCodesEmpty + 8 * slot.place;
    if (lane == 0) hopper::barrier_arrive_here(hopper::after_reading(empty, seen, p.nothing));
    seen = 0;
    slot.next();
  }

  PYFMT_DEVICE void wait_x(const Ring<R::kStages>& of) const {
    hopper::barrier_wait(at.base + kFull + 8 * of.place, of.parity);
  }
  PYFMT_DEVICE void wait_turn() {
    hopper::barrier_wait(at.base + kTurns + 8 * uint32_t(group), turn);
    turn ^= 1;
  }
  PYFMT_DEVICE void pass_turn() const {
    if (lane == 0) hopper::barrier_arrive_here(at.base + kTurns + 8 * uint32_t(group ^ 1));
  }

  // The warp has no more use for a stage, of which it read these factors.
  PYFMT_DEVICE void release_stage(const float (&factor)[2]) {
    uint32_t empty = at.base + kEmpty + 8 * stage.place;
    if constexpr (F::kGroups) {
      hopper::warp_sync();
      empty = hopper::after_reading(empty, as_uint(factor[0]) | as_uint(factor[1]), p.nothing);
    }
    if (lane < p.share) hopper::barrier_arrive(empty + peer);
    stage.next();
  }

  // Starts the products of part kPart of a chunk and half kHalf of the tokens.
  template <int kPart, int kHalf>
  PYFMT_DEVICE void multiply(float (&fresh)[kCount], const Fragments& now) {
    const uint32_t x = at.base + kHeader + stage.place * R::kStage + kHalf * (R::kWide * 128);
    wait_turn();
    if constexpr (kPart == 0 && kHalf == 0) wait_x(stage);
    hopper::products_fence();
#pragma unroll
    for (int s = kPart * kSteps; s < (kPart + 1) * kSteps; ++s) {
      const uint32_t tile = hopper::tile_code(x + uint32_t(s / 4) * R::kTile);
      if (s == (kPart + 1) * kSteps - 1) pass_turn();
      Product::add_to(fresh, now[s], hopper::tile_descriptor(tile, s % 4),
                      s > kPart * kSteps ? 1 : 0);
    }
    hopper::products_commit();
  }
  template <int kPart>
  PYFMT_DEVICE void read_factors(float (&factor)[2]) const {
    factor[0] = factor[1] = 1.0f;
    if constexpr (F::kGroups) {
      const uint32_t from = factors + stage.place * R::kFactors + uint32_t(kPart * kRows * 4);
      factor[0] = as_float(hopper::load_shared_small<4>(from));
      factor[1] = as_float(hopper::load_shared_small<4>(from + 32));
    }
  }
  // kHalf of the tokens; kLast: the stage has no more use.
  template <int kHalf, bool kLast>
  PYFMT_DEVICE void add(float (&sums)[kAll], float (&fresh)[kCount], const float (&factor)[2]) {
    hopper::products_wait<0>();
    hopper::pin(fresh);
    if constexpr (kLast) release_stage(factor);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float& sum = sums[kHalf * kCount + j];
      sum = F::kGroups ? fused(factor[j >> 1 & 1], fresh[j], sum) : sum + fresh[j];
    }
  }

  // Part kPart of chunk i, by fragments `now`; those of the next chunk become `next`.
  template <int kPart>
  PYFMT_DEVICE void part(int i, float (&sums)[kAll], float (&fresh)[kCount], Fragments& now,
                         Fragments& next) {
    constexpr bool kFirst = kPart == 0, kLast = kPart == kParts - 1;
    float factor[2];
    if constexpr (R::kHalves == 2) {
      multiply<kPart, 0>(fresh, now);
      read_factors<kPart>(factor);
      add<0, false>(sums, fresh, factor);
      multiply<kPart, 1>(fresh, now);
      add<1, kLast>(sums, fresh, factor);
    } else {
      multiply<kPart, 0>(fresh, now);
      if (i + 1 < steps) {
        if constexpr (kFirst) wait_codes();
        decode_part<kPart>(i + 1, next);
        if constexpr (kLast) release_codes(i + 1);
      }
      read_factors<kPart>(factor);
      add<0, kLast>(sums, fresh, factor);
    }
  }

  // What is left once all of run is over.
  PYFMT_DEVICE void end(float (&sums)[kAll]) const {
    meet_and_finish<kTokens>(p, at, sums, row_of<F>(lane));
  }

  PYFMT_DEVICE void chunk(int i, float (&sums)[kAll], float (&fresh)[kCount], Fragments& now,
                          Fragments& next) {
    part<0>(i, sums, fresh, now, next);
    if constexpr (kParts > 1) part<1>(i, sums, fresh, now, next);
    if constexpr (kParts > 2) {
      part<2>(i, sums, fresh, now, next);
      part<3>(i, sums, fresh, now, next);
    }
  }

  PYFMT_DEVICE void decode_chunk(int i, Fragments& to) {
    wait_codes();
    decode_part<0>(i, to);
    if constexpr (kParts > 1) decode_part<1>(i, to);
    if constexpr (kParts > 2) decode_part<2>(i, to);
    if constexpr (kParts > 2) decode_part<3>(i, to);
    release_codes(i);
  }

  PYFMT_DEVICE void run(float (&sums)[kAll]) {
    float fresh[kCount];
    Fragments a;
#pragma unroll
    for (int j = 0; j < kAll; ++j) sums[j] = 0.0f;
    if (steps > 0) decode_chunk(0, a);
    if constexpr (R::kHalves == 2) {
      // Registers hold the fragments of one chunk: they are decoded beside the other's products.
#pragma unroll 1
      for (int i = 0; i < steps; ++i) {
        chunk(i, sums, fresh, a, a);
        if (i + 1 < steps) decode_chunk(i + 1, a);
      }
    } else {
      Fragments b;
#pragma unroll 1
      for (int i = 0; i < steps; i += 2) {
        chunk(i, sums, fresh, a, b);
        if (i + 1 < steps) chunk(i + 1, sums, fresh, b, a);
      }
    }
  }
};

// Products of rows that do not fold, which nobody has written: their scales are 0. All blocks share
// them.
PYFMT_DEVICE void repair_if_marked(const Params& p, const Place& at) {
  hopper::barrier_wait(at.base + kMarksSeen, 0);
  if (!hopper::load_shared_small<4>(at.base + kAnyMarked)) return;
  const auto meet = [] { hopper::partial_sync<kConsumers>(); };
  meet();
  Marked& found = *static_cast<Marked*>(hopper::shared_pointer(at.base + kHeader));
  repair_marked<1>(p.repair, found, blockIdx.x, gridDim.x, meet);
}

template <class F, int kTokens>
PYFMT_DEVICE void take_turns(const Params& p) {
  using Those = typename std::conditional<Room<F, kTokens>::kInPlace, InPlace<F, kTokens>,
                                          Multiplier<F, kTokens>>::type;
  const Place at = Place::of<kTokens>(p);
  turns::init_barriers<F, kTokens>(p, at.base);
  if constexpr (F::kFolded) F::fill_table(at.base + kTableAt, int(threadIdx.x));
  if (threadIdx.x == 0) hopper::prefetch_map(p.codes_map);
  // Before anything is sent to another block.
  if (p.share > 1 || (Room<F, kTokens>::kInPlace && p.split > 1)) hopper::cluster_meet();
  if (p.share == 1 || F::kFolded) __syncthreads();
  // Registers: 168 for each of 384 threads, shared out anew.
  if (threadIdx.x >= kConsumers) {
    hopper::fewer_registers<Those::kMost == 240 ? 24 : 40>();
    Bringer<F, kTokens>{p, at, at.last - at.first}.run();
  } else {
    hopper::more_registers<Those::kMost>();
    float sums[kTokens / 2];
    Those multiplier(p, at);
    multiplier.run(sums);
    multiplier.end(sums);
    if constexpr (F::kFolded) repair_if_marked(p, at);
  }
}

template <class F, int kTokens>
__global__ void __launch_bounds__(PYFMT_WIDE_THREADS(kThreadsHere), 1)
    matmul_turns_kernel(const __grid_constant__ Params p) {
#if defined(PYFMT_SM90A)
  take_turns<F, kTokens>(p);
#endif
}

template <class F, int kTokens>
void launch_turns(Params& p, const WideCall& call, Stream stream) {
  using R = Room<F, kTokens>;
  describe_codes<F>(p, call, int(R::kRowBytes), kRows);
  launch_wide(matmul_turns_kernel<F, kTokens>, p, kTokens, kThreadsHere, R::kBytes, stream);
}

template <class F>
void launch_tokens(Params& p, const WideCall& call, Stream stream) {
  // Of groups of 32 columns registers hold no more than 128 tokens.
  if constexpr (F::kRun > 8) {
    if (call.tokens == 256) return launch_turns<F, 256>(p, call, stream);
  }
  if constexpr (F::kFolded) {
    if (call.tokens == 192) return launch_turns<F, 192>(p, call, stream);
    if (call.tokens == 160) return launch_turns<F, 160>(p, call, stream);
    if (call.tokens == 144) return launch_turns<F, 144>(p, call, stream);
  }
  if (call.tokens == 128) return launch_turns<F, 128>(p, call, stream);
  if (call.tokens == 96) return launch_turns<F, 96>(p, call, stream);
  launch_turns<F, 64>(p, call, stream);
}

template <int kBits, int kRun>
void launch_run(Params& p, const WideCall& call, Stream stream) {
  launch_panel<kBits, kRun>(p, call, stream);
  launch_tokens<Integers<kBits, kRun>>(p, call, stream);
}

// A lane takes as many codes that lie together as a group allows.
template <int kBits>
void launch_groups(Params& p, const WideCall& call, Stream stream) {
  if (p.group_runs % 4 == 0) return launch_run<kBits, 32>(p, call, stream);
  if (p.group_runs % 2 == 0) return launch_run<kBits, 16>(p, call, stream);
  launch_run<kBits, 8>(p, call, stream);
}

template <class W>
void launch_fold(Params& p, const WideCall& call, Stream stream) {
  launch_tokens<Folding<W>>(p, call, stream);
}

}  // namespace turns
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
