// SPDX-License-Identifier: Apache-2.0
// What lies where in the shared memory of matmul_wide_tall.cuh, and the warps that fill it.
#pragma once

#include "matmul_wide_panel.cuh"
#include "matmul_wide_turns_room.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace tall {

constexpr int kGroups = 4;  // warpgroups that multiply
constexpr int kMultipliers = 128 * kGroups, kBlockThreads = kMultipliers + 128;

// ---- shared memory ----------------------------------------------------------------------------

template <class F, int kTokens>
struct Room {
  // Each warpgroup has a ring of its own of slots: a box of its rows of one chunk, or of two where
  // that makes rows of 128 bytes, and their scales. A stage is a chunk of x, or, of few rows, those
  // of a slot: at least as many as a warpgroup that takes turns goes on by, since it must not wait
  // for a phase of a barrier two ahead (64 tokens: turns of two).
  static constexpr uint32_t kSpan = F::kBits == 4 ? 2 : 1;
  static constexpr uint32_t kJoined = kTokens == 16 ? kSpan : 1, kStep = kSpan / kJoined;
  static constexpr uint32_t kStages = kTokens == 16 ? 16 / kJoined : kTokens == 32 ? 9 : 5;
  static constexpr uint32_t kTile = kTokens * 128, kStage = 2 * kTile * kJoined;
  static constexpr uint32_t kHalf = kChunk * F::kBits / 8, kRowBytes = kHalf * kSpan;
  static constexpr uint32_t kSlot = 64 * kRowBytes;
  static constexpr uint32_t kHalfScales = 4 * F::kEntry, kRowScales = kHalfScales * kSpan;
  static constexpr uint32_t kScales = 64 * kRowScales;
  static constexpr uint32_t kCodesAt = kHeader + kStages * kStage;
  static constexpr uint32_t kFit = (hopper::kMostShared - kCodesAt) / (kGroups * (kSlot + kScales));
  static constexpr uint32_t kDepth = kFit < 8 ? kFit : 8;
  static constexpr uint32_t kScalesAt = kCodesAt + kDepth * kGroups * kSlot;
  static constexpr uint32_t kLoop = kScalesAt + kDepth * kGroups * kScales;
  // What a warp has of sums: there is room for those of all warps.
  static constexpr uint32_t kSums = kTokens * 64;
  static_assert(kHeader + 4 * kGroups * kSums <= kLoop, "sums");
  // And for those of half of another block's, where nothing else lies if that fits: then it may
  // send them at any time.
  static constexpr uint32_t kInbox = 2 * kGroups * kSums;
  static constexpr bool kApart = kLoop + kInbox <= hopper::kMostShared;
  static constexpr uint32_t kInboxAt = kApart ? kLoop : kHeader + 4 * kGroups * kSums;
  static constexpr uint32_t kBytes = kApart ? kLoop + kInbox : kLoop;
  static_assert(kBytes <= hopper::kMostShared && kInboxAt + kInbox <= kBytes && kDepth >= 3,
                "the block's shared memory");
};

// Barriers of the header: of slots (full, empty; [place][warpgroup]), of stages (as they come, in
// order, empty), for sums.
constexpr uint32_t kCodesFull = 0, kCodesEmpty = 256, kRaw = 512, kFull = 640, kEmpty = 768,
                   kSumsThere = 896;

// kCount barriers in a row.
template <int kCount>
PYFMT_DEVICE void init_row(uint32_t at, uint32_t arrivals) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) hopper::barrier_init(at + uint32_t(8 * i), arrivals);
}
// By one lane of each of four warps, at addresses that are known when compiled: what comes before
// the first copy is waited for once a launch.
template <class F, int kTokens>
PYFMT_DEVICE void init_barriers(const Params& p) {
  using R = Room<F, kTokens>;
  constexpr int kSlots = int(R::kDepth) * kGroups, kStages = int(R::kStages);
  const uint32_t base = hopper::shared_start();
  if (threadIdx.x == 0) init_row<kSlots>(base + kCodesFull, 1 + 32);
  if (threadIdx.x == 32) init_row<kSlots>(base + kCodesEmpty, 4);
  if (threadIdx.x == 64) {
    init_row<kStages>(base + kRaw, 1);
    init_row<kStages>(base + kFull, p.ordered ? 1 : 2);
  }
  if (threadIdx.x == 96) {
    init_row<kStages>(base + kEmpty, 4 * uint32_t(p.share));
    init_row<1>(base + kSumsThere, 1);
    hopper::barrier_expect(base + kSumsThere, uint32_t(2 * p.share) * R::kSums);
  }
  if (threadIdx.x < 128 && threadIdx.x % 32 == 0) hopper::barrier_init_fence();
}

// ---- the part of a block ----------------------------------------------------------------------

// A block has 64 p.share rows of w by kTokens rows of x. K is divided between p.parts of them, or
// the two of a cluster. Where not every warpgroup has rows of its own, they take slots in turn.
struct Place {
  uint32_t base;
  // part: in the cluster; whole: of p.parts; tile: of y; first: chunk.
  int part, whole, tile, n0, m0, first, slots, turns;

  template <class R, int kTokens>
  PYFMT_DEVICE static Place of(const Params& p) {
    Place at;
    at.base = hopper::shared_start();
    hopper::keep(at.base);
    at.part = p.split > 1 ? hopper::uniform(int(hopper::cluster_rank())) : 0;
    // Divisions would be waited for by all that follows.
    const unsigned index = blockIdx.x >> (p.split - 1);
    const unsigned m_tile = p.m > kTokens ? (index >> p.parts_bits) / p.n_clusters : 0;
    const unsigned n_tile = (index >> p.parts_bits) - m_tile * p.n_clusters;
    at.whole = int(index & (unsigned(p.parts) - 1));
    at.tile = int(index >> p.parts_bits);
    at.n0 = int(n_tile) * (64 * p.share);
    at.m0 = int(m_tile) * kTokens;
    const int slots = (p.tiles + int(R::kSpan) - 1) / int(R::kSpan);
    const int part = at.whole * p.split + at.part, bits = p.split - 1 + p.parts_bits;
    const int first = slots * part >> bits;
    at.first = first * int(R::kSpan);
    at.slots = (slots * (part + 1) >> bits) - first;
    at.turns = kGroups >> p.share_bits;
    return at;
  }
};

// ---- what brings things -----------------------------------------------------------------------

template <class F, int kTokens>
struct Bringer {
  using R = Room<F, kTokens>;
  // With 64 rows of x, weights that come faster hold up more than they gain. With few rows and
  // 8 bits a product waits for memory, and so asks for all that it has room for.
  static constexpr bool kFew = kTokens < 64;
  static constexpr bool kWaits = kFew && (kTokens == 32 || F::kBits < 8);
  const Params& p;
  const Place& at;

  // The barriers of stages as x comes.
  PYFMT_DEVICE uint32_t arrivals() const { return at.base + (p.ordered ? kFull : kRaw); }

  // One thread: x as it lies, by halves of chunks.
  PYFMT_DEVICE void bring_x() const {
    const uint32_t arrived = arrivals();
    hopper::wait_for_previous();
    Ring<R::kStages> ring;
    const int stages = at.slots * int(R::kStep);
#pragma unroll 1
    for (int i = 0; i < stages; ++i, ring.next()) {
      const uint32_t raw = arrived + 8 * ring.place;
      const uint32_t to = at.base + kHeader + ring.place * R::kStage;
      hopper::barrier_wait(at.base + kEmpty + 8 * ring.place, ring.parity ^ 1);
      hopper::barrier_expect(raw, R::kStage);
      const int column = (at.first + i * int(R::kJoined)) * (2 * kChunk);
#pragma unroll
      for (int h = 0; h < 2 * int(R::kJoined); ++h) {
        hopper::copy_box(to + uint32_t(h) * R::kTile, p.x, column + 128 * h, at.m0, raw, 0, false);
      }
    }
  }

  // Scales of a row and a slot. Past the end codes are zeros: any scale but NaN serves.
  PYFMT_DEVICE void copy_scales(uint32_t to, const uint8_t* from, int left) const {
    constexpr int kBytes = int(R::kRowScales);
    left = max(0, min(left, kBytes));
    if (p.scales_align >= kBytes) {
      hopper::copy_small<kBytes>(to, from, left);
    } else if (p.scales_align >= 4) {
#pragma unroll
      for (int i = 0; i < kBytes; i += 4) {
        hopper::copy_small<4>(to + uint32_t(i), from + i, max(0, min(left - i, 4)));
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kBytes; i += 4) {
        uint32_t word = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          if (i + b < left) word |= uint32_t(from[i + b]) << (8 * b);
        }
        hopper::store_shared(to + uint32_t(i), word);
      }
    }
  }

  // Slots of all warpgroups, at a place of the ring. kWhole: none of them ends beyond k, and scales
  // are aligned: what this warp does takes turns with those that multiply.
  template <bool kWhole>
  PYFMT_DEVICE void bring_slots(int lane, int i, const Ring<R::kDepth>& ring,
                                const uint8_t* (&row)[2 * kGroups], int (&left)[kGroups],
                                int by) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int slot = i + (g >> p.share_bits), n = at.n0 + 64 * (g & (p.share - 1));
      if (!kWhole && slot >= at.slots) break;
      const uint32_t place = ring.place * kGroups + uint32_t(g);
      const uint32_t full = at.base + kCodesFull + 8 * place;
      hopper::barrier_wait(at.base + kCodesEmpty + 8 * place, ring.parity ^ 1);
      if (lane == 0) {
        hopper::barrier_expect(full, R::kSlot);
        hopper::copy_box(at.base + R::kCodesAt + place * R::kSlot, p.codes_map,
                         at.first * int(R::kHalf) + slot * int(R::kRowBytes), n, full,
                         hopper::read_once());
      }
      const uint32_t to =
          at.base + R::kScalesAt + place * R::kScales + uint32_t(lane) * R::kRowScales;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t there = to + uint32_t(r) * 32 * R::kRowScales;
        if constexpr (kWhole) {
          hopper::copy_small<int(R::kRowScales)>(there, row[2 * g + r], int(R::kRowScales));
        } else {
          copy_scales(there, row[2 * g + r], left[g]);
        }
        row[2 * g + r] += by;
      }
      left[g] -= by;
      hopper::arrive_after_copies(full);
    }
  }

  // One warp: codes, which its first lane asks for, and scales.
  PYFMT_DEVICE void bring_weights(int lane) const {
    const int64_t first = int64_t(at.first) * int(R::kHalfScales);
    const uint8_t* row[2 * kGroups];
    int left[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int turn = g >> p.share_bits, n = at.n0 + 64 * (g & (p.share - 1)) + lane;
      const int64_t from = first + turn * int(R::kRowScales);
      row[2 * g] = p.scales + int64_t(min(n, p.n - 1)) * p.blocks + from;
      row[2 * g + 1] = p.scales + int64_t(min(n + 32, p.n - 1)) * p.blocks + from;
      left[g] = int(p.blocks - from);
    }
    const int by = int(R::kRowScales) << (2 - p.share_bits);
    // So many slots are whole, of those that warpgroups take together.
    const int whole = p.scales_align >= int(R::kRowScales)
                          ? min(at.slots, int(p.blocks - first) / int(R::kRowScales)) & -at.turns
                          : 0;
    if (!p.copied_codes) hopper::wait_for_previous();  // a copy was made of them
    Ring<R::kDepth> ring;
#pragma unroll 1
    for (int i = 0; i < at.slots; i += at.turns, ring.next()) {
      // All that a ring holds, asked for at once, would hold up x, and the launch that adds the
      // parts of the product before. Of x the chunk of the slot that comes now, where it has one
      // of the first stages: that cannot have been used again.
      if (i == p.early * at.turns && (kWaits || p.parts > 1)) {
        const uint32_t stage = uint32_t(i) * R::kStep;
        hopper::wait_for_previous();
        if (stage < R::kStages) hopper::barrier_wait(arrivals() + 8 * stage, 0);
      }
      if (kFew && i < whole) {
        bring_slots<true>(lane, i, ring, row, left, by);
      } else {
        bring_slots<false>(lane, i, ring, row, left, by);
      }
    }
  }

  // Two warps put x in order, where it lies, half of the tokens each: of each token a lane takes
  // the 32 columns whose codes lane t of a quad has, and lays their pairs where that lane's
  // fragments want them.
  struct Columns {
    uint32_t words[16];
  };
  PYFMT_DEVICE static void load_x(uint32_t from, Columns& c) {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint4 v = hopper::load_shared16(from ^ 16 * i);
      c.words[4 * i] = v.x, c.words[4 * i + 1] = v.y;
      c.words[4 * i + 2] = v.z, c.words[4 * i + 3] = v.w;
    }
  }
  // to: where row lane % 8 of matrix lane / 8 goes.
  PYFMT_DEVICE static void store_x(uint32_t to, const Columns& c) {
    uint32_t pairs[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int a = element_of<F::kBits>(j, 0), b = element_of<F::kBits>(j, 1);
      const uint32_t which = (a & 1 ? 0x32u : 0x10u) | (b & 1 ? 0x7600u : 0x5400u);
      pairs[j] = pick_bytes(c.words[a / 2], c.words[b / 2], which);
    }
#pragma unroll
    for (int j = 0; j < 16; j += 4) {
      hopper::store_matrices((to ^ (j & 4 ? 64u : 0u)) + uint32_t(j / 8) * R::kTile, pairs[j],
                             pairs[j + 1], pairs[j + 2], pairs[j + 3]);
    }
  }
  // Two units of eight tokens at once, of two chunks where a chunk has one: each pass is a chain of
  // latencies, and so many warps beside it make them long. More would take registers that leave
  // room for the launch that adds parts of K.
  PYFMT_DEVICE void order_x(uint32_t warp, int lane) const {
    constexpr uint32_t kUnits = kTokens / 8 / 2;    // of a warp and a chunk
    constexpr uint32_t kAll = kUnits * R::kJoined;  // of a stage
    constexpr uint32_t kTogether = kAll < 2 ? 1 : 2;
    constexpr int kAtOnce = kAll < 2 ? 2 : 1;  // stages
    const uint32_t row = uint32_t(lane) % 8, piece = uint32_t(lane) / 8;
    const uint32_t token = uint32_t(lane) / 4, t = uint32_t(lane) % 4;
    const uint32_t start = at.base + kHeader + warp * (kUnits * 1024);
    const uint32_t from = start + t / 2 * R::kTile + token * 128 + ((t & 1) * 4 ^ token) * 16;
    const uint32_t to = start + row * 128 + (piece ^ row) * 16;
    const auto unit = [](uint32_t v) { return v / kUnits * (2 * R::kTile) + v % kUnits * 1024; };
    const int stages = at.slots * int(R::kStep);
    Ring<R::kStages> ring;
#pragma unroll 1
    for (int i = 0; i < stages; i += kAtOnce) {
      const bool both = kAtOnce == 2 && i + 1 < stages;
      Ring<R::kStages> places[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j, ring.next()) {
        places[j] = ring;
        if (j == 0 || both) hopper::barrier_wait(at.base + kRaw + 8 * ring.place, ring.parity);
      }
#pragma unroll
      for (uint32_t v = 0; v < kAll; v += kTogether) {
        Columns c[kAtOnce][kTogether];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (j && !both) break;
          const uint32_t stage = places[j].place * R::kStage;
#pragma unroll
          for (uint32_t u = 0; u < kTogether; ++u) load_x(from + stage + unit(v + u), c[j][u]);
        }
        hopper::warp_sync();
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (j && !both) break;
          const uint32_t stage = places[j].place * R::kStage;
#pragma unroll
          for (uint32_t u = 0; u < kTogether; ++u) store_x(to + stage + unit(v + u), c[j][u]);
        }
      }
      hopper::stores_fence();
      hopper::warp_sync();
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (j && !both) break;
        if (lane == 0) hopper::barrier_arrive_here(at.base + kFull + 8 * places[j].place);
      }
    }
  }

  PYFMT_DEVICE void run() const {
    const int warp = hopper::uniform((int(threadIdx.x) - kMultipliers) >> 5);
    const int lane = int(threadIdx.x) & 31;
    if (warp >= 2) {
      if (!p.ordered) order_x(uint32_t(warp - 2), lane);
    } else if (warp == 1) {
      bring_weights(lane);
    } else if (lane == 0) {
      bring_x();
    }
  }
};

}  // namespace tall
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
