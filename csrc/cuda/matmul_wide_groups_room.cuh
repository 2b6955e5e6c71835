// SPDX-License-Identifier: Apache-2.0
// What lies where in the shared memory of matmul_wide_groups.cuh, and the warps that bring things.
//
//   header     barriers
//   stages     a tile of x and a tile of w, as matrix products read them (wgmma.cuh)
//   factors    of the rows of w, for each stage
//   codes      packed, those of the next few tiles
//   staged     sums on their way to y
//
// A tile is 128 bytes of each row, 64 columns.
#pragma once

#include "matmul_wide_tiles.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace groups {

constexpr int kColumns = 64;           // of a tile
constexpr int kDecoders = kConsumers;  // the first thread of those that decode
constexpr int kBringers = kDecoders + 128;
constexpr int kThreadsHere = kBringers + 128;
constexpr int kWarpsThatDecode = 4, kWarpsOfFactors = 2;

// Codes of kBits; kPacked: that are decoded here, or else were written out as bfloat16 before. Of
// kTokens rows of x a block; sums of 128 / kParts columns are kept apart.
template <int kCodeBits, bool kPackedCodes, int kPartsOfChunk, int kTokensOfTile>
struct Layout {
  static constexpr int kBits = kCodeBits, kTokens = kTokensOfTile, kParts = kPartsOfChunk;
  static constexpr bool kPacked = kPackedCodes;
  // Fresh sums of more tokens find no registers: these go by halves.
  static constexpr int kHalves = kTokens > 192 ? 2 : 1, kWide = kTokens / kHalves;
  static constexpr int kStageParts = kParts > 2 ? kParts / 2 : 1;  // factors of a stage and row
  static constexpr uint32_t kTileOfX = kTokens * 128, kTileOfW = kRows * 128;
  static constexpr uint32_t kTiles = kTileOfX + kTileOfW;
  static constexpr uint32_t kStages = 4, kStageAt = kHeader;
  static constexpr uint32_t kFactors = kStageParts * kRows * 4;
  static constexpr uint32_t kFactorsAt = kStageAt + kStages * kTiles;
  static constexpr uint32_t kStaged = 4096;  // of a warpgroup: twice 16 tokens by 64 rows of w
  static constexpr uint32_t kStagedAt = kFactorsAt + kStages * kFactors;
  // Codes of one tile come at once, or of two.
  static constexpr uint32_t kTileRow = kColumns * kBits / 8, kRowBytes = kPacked ? 64 : 128;
  static constexpr int kSpan = kPacked ? int(kRowBytes / kTileRow) : 1;
  static constexpr uint32_t kSlot = kRows * kRowBytes;
  static constexpr uint32_t kCodesAt =
      (kStagedAt + kConsumers / 128 * kStaged + 1023) / 1024 * 1024;
  static constexpr uint32_t kMost = (hopper::kMostShared - kCodesAt) / kSlot;
  static constexpr uint32_t kDepth = !kPacked ? 1 : kMost < 6 ? kMost : 6;
  static constexpr uint32_t kBytes = kCodesAt + (kPacked ? kDepth * kSlot : 0);
  static_assert(kBytes <= hopper::kMostShared && kDepth > 0, "the block's shared memory");
};

// Barriers of the header: of stages (full: both tiles and factors are there; empty), of slots of
// codes, of turns.
constexpr uint32_t kFull = 0, kEmpty = 64, kCodesFull = 128, kCodesEmpty = 192, kTurns = 256,
                   kStagedFull = 272;

template <class S>
PYFMT_DEVICE void init_barriers(uint32_t base) {
  const uint32_t i = threadIdx.x, at = 8 * i;
  if (i >= 36) return;
  // Of whole chunks every other stage has factors.
  const uint32_t factors = S::kParts > 1 || i % 2 == 0 ? kWarpsOfFactors : 0;
  const uint32_t arrivals = at < kEmpty        ? 1 + factors + (S::kPacked ? kWarpsThatDecode : 0)
                            : at < kCodesFull  ? kConsumers / 32
                            : at < kCodesEmpty ? 1
                                               : 4;
  hopper::barrier_init(base + at, arrivals);
  hopper::barrier_init_fence();
}

// Which tiles of y a block works on, one after the other: blocks that run together have eight
// tiles of x, if there are as many, and as many of w as that takes.
template <class S>
struct Walk {
  static constexpr int kTogether = 8;
  uint32_t base, tile, count, of_n, of_m;
  int steps;  // of 64 columns, for each tile

  PYFMT_DEVICE explicit Walk(const Params& p)
      : base(hopper::shared_start()),
        tile(blockIdx.x),
        of_n(uint32_t(p.n + kRows - 1) / kRows),
        of_m(uint32_t(p.m + S::kTokens - 1) / S::kTokens),
        steps(p.tiles) {
    hopper::keep(base);
    count = of_n * of_m;
  }
  PYFMT_DEVICE bool more() const { return tile < count; }
  PYFMT_DEVICE void next() { tile += gridDim.x; }
  PYFMT_DEVICE void place(int& n0, int& m0) const {
    const uint32_t band = tile / (kTogether * of_n), first = band * kTogether;
    const uint32_t high = min(uint32_t(kTogether), of_m - first), left = tile - first * of_n;
    n0 = int(left / high) * kRows;
    m0 = int(first + left % high) * S::kTokens;
  }
};

// One thread: tiles of x, and of w where that is not packed.
template <class S>
PYFMT_DEVICE void bring_tiles(const Params& p, Walk<S> walk) {
  Ring<S::kStages> ring;
  for (; walk.more(); walk.next()) {
    int n0, m0;
    walk.place(n0, m0);
#pragma unroll 1
    for (int i = 0; i < walk.steps; ++i, ring.next()) {
      const uint32_t full = walk.base + kFull + 8 * ring.place;
      const uint32_t to = walk.base + S::kStageAt + ring.place * S::kTiles;
      hopper::barrier_wait(walk.base + kEmpty + 8 * ring.place, ring.parity ^ 1);
      hopper::barrier_expect(full, S::kPacked ? S::kTileOfX : S::kTiles);
      hopper::copy_box(to, p.x, i * 128, m0, full, 0, false);
      if constexpr (!S::kPacked) {
        hopper::copy_box(to + S::kTileOfX, p.codes_map, i * 128, n0, full, 0, false);
      }
    }
  }
}

// One thread.
template <class S>
PYFMT_DEVICE void bring_codes(const Params& p, Walk<S> walk) {
  Ring<S::kDepth> ring;
  if (!p.copied_codes) hopper::wait_for_previous();  // a copy was made of them
  for (; walk.more(); walk.next()) {
    int n0, m0;
    walk.place(n0, m0);
#pragma unroll 1
    for (int i = 0; i < walk.steps; i += S::kSpan, ring.next()) {
      const uint32_t full = walk.base + kCodesFull + 8 * ring.place;
      hopper::barrier_wait(walk.base + kCodesEmpty + 8 * ring.place, ring.parity ^ 1);
      hopper::barrier_expect(full, S::kSlot);
      hopper::copy_box(walk.base + S::kCodesAt + ring.place * S::kSlot, p.codes_map,
                       i * int(S::kTileRow), n0, full, 0, false);
    }
  }
}

// Two warps, a lane two rows. The next chunk's scales are under way while one's are laid down.
template <class S>
struct Factors {
  static constexpr int kParts = S::kParts;
  const Params& p;
  Walk<S> walk;
  int thread, bytes;               // of a scale
  int size, left = 0, groups = 0;  // parts of a group, those left of it, groups left of the row
  const uint8_t *low = nullptr, *high = nullptr;  // the next scale of either row
  uint32_t raw[kParts][2] = {};

  PYFMT_DEVICE Factors(const Params& p, const Walk<S>& walk)
      : p(p),
        walk(walk),
        thread(int(threadIdx.x) & 63),
        bytes(p.scale == Scale::kFP32 ? 4 : 2),
        size(p.group_runs * kParts / 4) {}

  PYFMT_DEVICE void start() {
    int n0, m0;
    walk.place(n0, m0);
    low = p.scales + min(n0 + thread, p.n - 1) * p.blocks * bytes;
    high = p.scales + min(n0 + thread + 64, p.n - 1) * p.blocks * bytes;
    left = size;
    groups = int(p.blocks);
  }
  PYFMT_DEVICE uint32_t read(const uint8_t* from) const {
    if (groups <= 0) return 0;
    return bytes == 4 ? *reinterpret_cast<const uint32_t*>(from)
                      : *reinterpret_cast<const uint16_t*>(from);
  }
  PYFMT_DEVICE void load() {
#pragma unroll
    for (int s = 0; s < kParts; ++s) {
      raw[s][0] = read(low);
      raw[s][1] = read(high);
      if (--left == 0) {
        left = size;
        --groups;
        low += bytes;
        high += bytes;
      }
    }
  }
  PYFMT_DEVICE uint32_t as_factor(uint32_t bits) const {
    return p.scale == Scale::kFP32   ? bits
           : p.scale == Scale::kBF16 ? bits << 16
                                     : as_uint(from_half(bits));
  }
  // Of a stage, its parts from kFrom of the chunk on.
  template <int kFrom>
  PYFMT_DEVICE void lay_down(const uint32_t (&factor)[kParts][2],
                             const Ring<S::kStages>& to) const {
    const uint32_t here = walk.base + S::kFactorsAt + to.place * S::kFactors + 4 * uint32_t(thread);
    hopper::barrier_wait(walk.base + kEmpty + 8 * to.place, to.parity ^ 1);
#pragma unroll
    for (int s = 0; s < S::kStageParts; ++s) {
      hopper::store_shared(here + uint32_t(s * kRows * 4), factor[kFrom + s][0]);
      hopper::store_shared(here + uint32_t(s * kRows * 4 + 256), factor[kFrom + s][1]);
    }
    hopper::warp_sync();
    if (thread % 32 == 0) hopper::barrier_arrive_here(walk.base + kFull + 8 * to.place);
  }
  PYFMT_DEVICE void bring() {
    if (!walk.more()) return;
    start();
    load();
    Ring<S::kStages> ring;
    while (walk.more()) {
#pragma unroll 1
      for (int k = 0; k < walk.steps; k += 2) {
        uint32_t factor[kParts][2];
#pragma unroll
        for (int s = 0; s < kParts; ++s) {
          factor[s][0] = as_factor(raw[s][0]);
          factor[s][1] = as_factor(raw[s][1]);
        }
        if (k + 2 < walk.steps) {
          load();
        } else {
          walk.next();
          if (walk.more()) {
            start();
            load();
          }
        }
        lay_down<0>(factor, ring);
        ring.next();
        if constexpr (kParts > 1) lay_down<kParts / 2>(factor, ring);
        ring.next();
      }
    }
  }
};

}  // namespace groups
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
