// SPDX-License-Identifier: Apache-2.0
// What lies where in the shared memory of matmul_wide_turns.cuh, and the warps that fill it.
#pragma once

#include "matmul_wide_turns_codes.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace turns {

// ---- shared memory ----------------------------------------------------------------------------

constexpr int kThreadsHere = kConsumers + 128;

template <class F, int kTokens>
struct Room {
  static constexpr int kParts = 32 / F::kRun;  // of a chunk, with sums of their own
  // Fresh sums of more tokens find no registers: these go by halves.
  static constexpr int kHalves = kTokens > 128 ? 2 : 1, kWide = kTokens / kHalves;
  static constexpr bool kLarge = kTokens == 256 && F::kOut == 16;  // stages of 64 KB
  static constexpr uint32_t kStages = kLarge                          ? kParts == 1 ? 3 : 2
                                      : kTokens == 256                ? 5
                                      : kTokens < 128 || F::kOut == 8 ? 6
                                                                      : 4;
  // Fragments become those of the next chunk in place.
  static constexpr bool kInPlace = kHalves == 2 && F::kFolded;
  static constexpr int kTiles = F::kOut / 8;  // of x, of 128 bytes a row, in a chunk
  static constexpr uint32_t kTile = kTokens * 128, kStage = kTiles * kTile;
  static constexpr uint32_t kFactors = F::kGroups ? kParts * kRows * 4 : 0;
  static constexpr uint32_t kFactorsAt = kHeader + kStages * kStage;
  // Codes of one chunk come at once, or of two: the copy engine takes its time for each row.
  static constexpr uint32_t kSpan = 8 / F::kBits, kRowBytes = kSpan * kChunk * F::kBits / 8;
  static constexpr uint32_t kSlot = kRows * kRowBytes;
  static constexpr uint32_t kPlaces = F::kFolded ? kSpan * kRows * 4 : 0;
  static constexpr uint32_t kCodesAt = (kFactorsAt + kStages * kFactors + 1023) / 1024 * 1024;
  static constexpr uint32_t kDepth = kTokens == 64               ? 5
                                     : kLarge && kParts == 1     ? 2
                                     : !kLarge && kTokens == 256 ? 3
                                                                 : 4;
  static constexpr uint32_t kPlacesAt = kCodesAt + kDepth * kSlot;
  static constexpr uint32_t kLoop = kPlacesAt + kDepth * kPlaces;
  static constexpr uint32_t kEnd = kHeader + kTokens * kPitch * 4;
  static constexpr uint32_t kBytes = kLoop > kEnd ? kLoop : kEnd;
  static_assert(kBytes <= hopper::kMostShared, "the block's shared memory");
  // Sums of half of the tokens take two stages.
  static constexpr uint32_t kRoomForSums = kTokens / 4 * kConsumers * 4;
  static_assert(!kInPlace || kRoomForSums == 2 * kStage, "the stages that sums are sent to");
};

// Barriers of the header: of stages (full, empty), of slots of codes (full, empty), for sums
// (sums_barrier), of the stages that the other part of K sends its sums to, of the word at
// kAnyMarked, of turns.
constexpr uint32_t kFull = 0, kEmpty = 64, kCodesFull = 128, kMaySend = 200, kMarksSeen = 208,
                   kCodesEmpty = 256, kTurns = 320;
// Whether any row does not fold.
constexpr uint32_t kAnyMarked = 384;

template <class F, int kTokens>
PYFMT_DEVICE void init_barriers(const Params& p, uint32_t base) {
  const uint32_t i = threadIdx.x, at = 8 * i;
  if (i >= 48) return;
  if (i == 0) hopper::store_shared(base + kAnyMarked, 0);
  const uint32_t arrivals = at < kEmpty         ? (F::kGroups ? 3 : 1)
                            : at < kCodesFull   ? 8 * uint32_t(p.share)
                            : at < 192          ? (F::kFolded ? 3 : 1)
                            : at == kMarksSeen  ? 2
                            : at >= kTurns      ? 4
                            : at >= kCodesEmpty ? 8
                                                : 1;
  hopper::barrier_init(base + at, arrivals);
  hopper::barrier_init_fence();
}

// The row of w, of the first eight of its warp, that a lane has: rows change places, so that lanes
// which read together never share a bank.
template <class F>
PYFMT_DEVICE int row_of(int lane) {
  const int g = lane / 4;
  if (F::kBits * F::kRun > 128) return g;                       // 24 or 32 bytes of a row
  if (F::kBits * F::kRun == 128) return g >> 1 | (g & 1) << 2;  // 16
  return g >> 2 | (g & 3) << 1;                                 // 8 and 4
}

// ---- what brings things -----------------------------------------------------------------------

// Codes of a block's rows to the slots of R's ring, behind barriers at kFull and kEmpty. One
// thread.
template <class R, uint32_t kFull, uint32_t kEmpty>
PYFMT_DEVICE void bring_codes(const Params& p, const Place& at, int steps) {
  Ring<R::kDepth> ring;
  if (!p.copied_codes) hopper::wait_for_previous();  // a copy was made of them
#pragma unroll 1
  for (int i = 0; i < steps; i += int(R::kSpan), ring.next()) {
    const uint32_t full = at.base + kFull + 8 * ring.place;
    hopper::barrier_wait(at.base + kEmpty + 8 * ring.place, ring.parity ^ 1);
    hopper::barrier_expect(full, R::kSlot);
    hopper::copy_box(at.base + R::kCodesAt + ring.place * R::kSlot, p.codes_map,
                     (at.first + i) * int(R::kRowBytes / R::kSpan), at.n0, full, 0, false);
  }
}

template <class F, int kTokens>
struct Bringer {
  using R = Room<F, kTokens>;
  const Params& p;
  const Place& at;
  int steps;

  // Stages that no chunk takes any more are where the other part of K sends sums of half of the
  // tokens, while the last chunks are multiplied here.
  PYFMT_DEVICE void give_room(Ring<R::kStages> ring) const {
    const uint32_t there = hopper::cluster_address(
        at.base + kMaySend, uint32_t((at.part ^ 1) << p.share_bits | at.sub));
    hopper::barrier_expect(sums_barrier(at.base), R::kRoomForSums);
#pragma unroll 1
    for (int i = 0; i < 2; ++i, ring.next()) {
      hopper::barrier_wait(at.base + kEmpty + 8 * ring.place, ring.parity ^ 1);
    }
    hopper::barrier_arrive(there);
  }

  // One thread. Parts of K take the halves of the tokens in different order (finish).
  PYFMT_DEVICE void bring_x() const {
    const uint32_t bytes = R::kTile >> (p.share_bits + p.split - 1),
                   mine = uint32_t(at.sub) * bytes;
    const uint32_t mask = ((1u << p.share) - 1) << (at.part << p.share_bits);
    const int64_t pitch = int64_t(p.panel_rows) * 128;
    const uint8_t* first =
        p.panel + int64_t(at.first) * R::kTiles * pitch + int64_t(at.m0) * 128 + mine;
    const uint8_t* second = first + (at.part ^ 1) * (R::kTile / 2);
    first += at.part * (R::kTile / 2);
    Ring<R::kStages> ring;
    hopper::wait_for_previous();
    // What comes next may read what the launch before this one wrote, without waiting for this one.
    hopper::start_dependents();
#pragma unroll 1
    for (int i = 0; i < steps; ++i, ring.next()) {
      const uint32_t full = at.base + kFull + 8 * ring.place;
      // All stages at once would hold up what the first decoding waits for.
      if (F::kFolded && i == 1) hopper::barrier_wait(at.base + kFull, 0);
      uint32_t to = at.base + kHeader + ring.place * R::kStage + mine;
      hopper::barrier_wait(at.base + kEmpty + 8 * ring.place, ring.parity ^ 1);
      hopper::barrier_expect(full, R::kStage);
#pragma unroll
      for (int h = 0; h < R::kTiles; ++h) {
        hopper::bulk_copy(to, first, bytes, full, mask, p.share > 1);
        if (p.split > 1) {
          hopper::bulk_copy(to + R::kTile / 2, second, bytes, full, mask, p.share > 1);
        }
        first += pitch;
        second += pitch;
        to += R::kTile;
      }
    }
    if constexpr (R::kInPlace) {
      if (p.split > 1) give_room(ring);
    }
  }

  // Whether any row of x or w does not fold. Two warps.
  PYFMT_DEVICE static uint32_t any_marked(const Folded& f, int thread) {
    uint32_t any = 0;
#pragma unroll 2
    for (int i = 16 * thread; i < int(f.padded_rows); i += 16 * 64) {
      const uint4 v = *reinterpret_cast<const uint4*>(f.marks + i);
      any |= v.x | v.y | v.z | v.w;
    }
    return any;
  }
  PYFMT_DEVICE void look_for_marks(int thread) const {
    if (any_marked(p.repair.args.w, thread) | any_marked(p.repair.args.a, thread)) {
      hopper::store_shared(at.base + kAnyMarked, 1);
    }
    hopper::warp_sync();
    if (thread % 32 == 0) hopper::barrier_arrive_here(at.base + kMarksSeen);
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
#pragma unroll 2
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

  // The scale bytes of a row, of the chunks of a slot from chunk i on.
  PYFMT_DEVICE void read_scales(int64_t row, int i, uint32_t (&to)[R::kSpan]) const {
    const int64_t first = int64_t(at.first + i) * 4;
    const uint8_t* from = p.scales + row * p.blocks;
    if (p.wide_scales && first + 4 * int(R::kSpan) <= p.blocks) {
      hopper::load_words<R::kSpan>(from + first, to);
      return;
    }
#pragma unroll
    for (int s = 0; s < int(R::kSpan); ++s) {
      to[s] = 0;
#pragma unroll 2
      for (int b = 0; b < 4; ++b) {
        const int64_t block = first + 4 * s + b;
        if (block < p.blocks) to[s] |= uint32_t(from[block]) << (8 * b);
      }
    }
  }

  // Likewise: places in the table.
  PYFMT_DEVICE void bring_places(int thread) const {
    const int64_t row[2] = {min(at.n0 + thread, p.n - 1), min(at.n0 + thread + 64, p.n - 1)};
    uint32_t raw[2][R::kSpan];
    read_scales(row[0], 0, raw[0]);
    read_scales(row[1], 0, raw[1]);
    hopper::wait_for_previous();
    const int offset[2] = {F::offset_of(p.w_scale[row[0]]), F::offset_of(p.w_scale[row[1]])};
    Ring<R::kDepth> ring;
#pragma unroll 2
    for (int i = 0; i < steps; i += int(R::kSpan), ring.next()) {
      uint32_t places[2][R::kSpan];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int s = 0; s < int(R::kSpan); ++s) places[r][s] = F::places(raw[r][s], offset[r]);
        read_scales(row[r], i + int(R::kSpan), raw[r]);
      }
      const uint32_t to = at.base + R::kPlacesAt + ring.place * R::kPlaces + 4 * uint32_t(thread);
      hopper::barrier_wait(at.base + kCodesEmpty + 8 * ring.place, ring.parity ^ 1);
#pragma unroll
      for (int s = 0; s < int(R::kSpan); ++s) {
        hopper::store_shared(to + uint32_t(s * kRows * 4), places[0][s]);
        hopper::store_shared(to + uint32_t(s * kRows * 4 + 256), places[1][s]);
      }
      hopper::warp_sync();
      if (thread % 32 == 0) hopper::barrier_arrive_here(at.base + kCodesFull + 8 * ring.place);
    }
  }

  PYFMT_DEVICE void run() const {
    const int warp = hopper::uniform(int(threadIdx.x) >> 5 & 3), lane = int(threadIdx.x) & 31;
    if (warp >= 2) {
      if constexpr (F::kFolded) {
        bring_places(int(threadIdx.x) & 63);
        look_for_marks(int(threadIdx.x) & 63);
      } else {
        bring_factors(int(threadIdx.x) & 63);
      }
    } else if (lane == 0) {
      warp ? bring_codes<R, kCodesFull, kCodesEmpty>(p, at, steps) : bring_x();
    }
  }
};

}  // namespace turns
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
