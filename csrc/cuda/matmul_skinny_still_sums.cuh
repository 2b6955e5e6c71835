// SPDX-License-Identifier: Apache-2.0
// What matmul_skinny_still.cuh has in shared memory, and how the sums of its warps become y.
#pragma once

#include "matmul_skinny_x.cuh"

namespace pyfmt {
namespace cuda {

// Whether there is such a kernel: for elements with scales of their blocks, and for integers in
// groups of 128 with scales of two bytes.
template <class W>
constexpr bool kStillServes = !W::kGrouped || W::kGrouping == Grouping::kSteps;

// How a warp's columns lie: slots of its ring, which are sixteen rows of a tile by 256 columns, or
// by 128 of eight bits. A lane of four takes runs of 32 columns, a block; 64 of six bits, since
// that many make whole vectors of 16 bytes.
template <class W>
struct SkinnyStill {
  using D = typename W::D;
  static constexpr int kMostTokens = 8;
  static constexpr int kMostWarps = 16;  // of a block
  static constexpr int kRows = 16;       // of a tile
  static constexpr int kColumns = 512;   // of a warp
  static constexpr int kSlotColumns = D::kBits == 8 ? 128 : 256;
  static constexpr int kSlots = kColumns / kSlotColumns;     // of a tile
  static constexpr int kLine = kSlotColumns * D::kBits / 8;  // bytes of a row of a slot
  static constexpr int kSlot = kRows * kLine;
  static constexpr int kDepth = D::kBits == 4 ? 4 : D::kBits == 6 ? 3 : 5;  // slots in the ring
  static constexpr int kRun = D::kBits == 6 ? 64 : 32;  // columns of a lane that lie together
  // Slots that are filled ahead of activations: more where memory is what takes the time.
  static constexpr int kEarly = D::kBits == 8 ? 3 : 1;
  static constexpr int kVectors = kLine / 64;                     // of 16 bytes, a lane's of a row
  static constexpr int kUnits = kSlotColumns / 4 / D::kElements;  // of a lane in a row
  // Scales of a tile: of those a warp's ring has two.
  static constexpr int kScaleSpan = W::kGrouped ? 128 : 32;           // columns
  static constexpr int kFactors = W::kScale == Scale::kE8M0 ? 1 : 2;  // bytes of them
  static constexpr int kBlocks = kSlotColumns / 128;  // of 32 columns, a lane's of a slot
  // Slots whose scales are read at once, before the next copies take their place.
  static constexpr int kScaleSlots = kDepth > kSlots + 1 ? kSlots : 1;
  static constexpr int kRowScales = kColumns / kScaleSpan * kFactors;
  static constexpr int kScaleUnit = kRowScales / 2;  // of a copy
  static constexpr int kTileScales = kRows * kRowScales;
  static constexpr int kRing = kDepth * kSlot + 2 * kTileScales;
  // Sums: of tiles that are under way; tiles that are finished together.
  static constexpr int kPitch = kRows + 4, kPlaces = 4, kRound = 2;
  static constexpr int kInboxTile = 4 * kMostTokens * kRows;      // the other block's sums
  static constexpr int kSignals = 8 * (2 * 2 + 2 * kMostTokens);  // bytes
  static constexpr int kTokenBytes = 256;                         // of 128 columns of x
  static_assert(kTokenBytes <= kPlaces * 4 * kPitch, "x in the places of sums");
  static_assert(kTokenBytes * kMostTokens <= kSlot, "x in the slot that is filled last");

  static int shared_bytes(int tokens, int warps, int split) {
    const int sums = kPlaces * warps * tokens * kPitch * 4;
    return warps * kRing + sums + (split > 1 ? 2 * kInboxTile : 0) + kSignals;
  }
};

// Which tiles a warp takes of its part of k: all of them. But where two schedulers of four would
// have one warp more than the others, the last two parts have two warps each, by turns.
template <bool kTurns>
struct SkinnyTurns {
  int part, warps, parts;  // this warp's; in all
  bool shared;             // with another warp
  int first, step;         // of this warp's tiles

  PYFMT_DEVICE SkinnyTurns(int me, int warps, int parts) : warps(warps), parts(parts) {
    const int more = kTurns ? warps - parts : 0;
    part = kTurns && me >= parts ? me - more : me;
    shared = kTurns && part >= parts - more;
    first = kTurns && me >= parts;
    step = shared ? 2 : 1;
  }
  // Warps that add up sums are those that see all tiles.
  PYFMT_DEVICE int adding() const { return kTurns ? 2 * parts - warps : warps; }
  PYFMT_DEVICE int token(int me) const { return shared ? 1 << 30 : me; }
};

// Sums of the warps to y, a round of two tiles at a time: a warp takes a token, a lane a row.
template <class Still, bool kTurns>
struct SkinnyStillSums {
  static constexpr int kPlaces = Still::kPlaces, kRound = Still::kRound, kRows = Still::kRows;

  const SkinnyParams& p;
  const SkinnyTurns<kTurns> turns;
  const int tokens, me, rank, first_token, first_tile, count;  // count: of tiles
  const SharedAddress places, inbox, signals;
  const int bytes;  // of a warp's sums of a tile
  int token;        // whose sums this warp adds up next
  int waits = -1;   // the round of which the other block's are to come
  float kept = 0;

  PYFMT_DEVICE SharedAddress place(int i, int part) const {
    return places + unsigned((part * kPlaces + (i & (kPlaces - 1))) * bytes);
  }
  PYFMT_DEVICE SharedAddress written(int r) const { return signals + unsigned(8 * (r & 1)); }
  PYFMT_DEVICE SharedAddress taken(int r) const { return signals + unsigned(16 + 8 * (r & 1)); }
  PYFMT_DEVICE SharedAddress sent(int r, int token) const {
    return signals + unsigned(32 + 8 * (2 * token + (r & 1)));
  }

  // All threads of the block, or of the cluster; the signals are there after `meet`.
  PYFMT_DEVICE void open() const {
    const int i = int(threadIdx.x);
    if (i < 2) signal_init(written(i), turns.warps);
    if (i >= 2 && i < 4) signal_init(taken(i), tokens);
    if (p.split > 1) {
      if (i < 2 * tokens) signal_init(sent(i, i >> 1), 1);
      signal_init_fence();
      cluster_arrive();
    }
  }
  PYFMT_DEVICE void meet() const {
    if (p.split > 1) {
      cluster_wait();
    } else {
      block_barrier();
    }
  }

  // Before a warp stores its sums of tile i, and after.
  PYFMT_DEVICE void wait_for_place(int i) const {
    const int r = i / kRound;
    if (i % kRound == turns.first && r >= 2) signal_wait(taken(r), unsigned(r / 2 - 1));
  }
  PYFMT_DEVICE void stored(int i) const {
    if (!turns.shared && i % kRound == 0 && i + 1 < count) return;
    warp_barrier();
    if ((threadIdx.x & 31) == 0) signal_arrive(written(i / kRound));
  }
  // A round whose second tile there is not, for a warp that has none but second ones.
  PYFMT_DEVICE void pass() const {
    if (turns.first == 0 || count % kRound == 0) return;
    wait_for_place(count);
    stored(count);
  }

  // What follows tile i. A tile later than possible, so that nobody waits for the slowest warp or
  // for the other block.
  PYFMT_DEVICE void follow(int i, float factor) {
    if (i % kRound) {
      receive(factor);
    } else if (i) {
      finish(i / kRound - 1, factor);
    }
  }
  PYFMT_DEVICE void end(float factor) {
    finish((count - 1) / kRound, factor);
    receive(factor);
  }

  PYFMT_DEVICE void finish(int r, float factor) {
    receive(factor);
#pragma unroll 1
    for (; token < tokens; token += turns.adding()) add_up(r, factor);
    // The blocks of a cluster meet token by token; else warps take turns.
    token = p.split > 1 ? turns.token(me) : token - tokens;
  }
  PYFMT_DEVICE void add_up(int r, float factor) {
    const int lane = int(threadIdx.x & 31), i = kRound * r + (lane >> 4), row = lane & 15;
    signal_wait(written(r), unsigned(r / 2));
    SharedAddress at = place(i, 0) + unsigned(4 * (token * Still::kPitch + row));
    float s = 0;
    if (i < count) {
#pragma unroll 1
      for (int w = 0; w < turns.parts; w += 8) {
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          v[j] = w + j < turns.parts ? as_float(load_small<4>(at)) : 0.0f;
          at += unsigned(kPlaces * bytes);
        }
        s = s + (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])));
      }
    }
    warp_barrier();
    // An arrival does not wait for reads under way, and what they read may be written over after
    // it: hence the address that depends on them.
    if (lane == 0) signal_arrive(taken(r) + (as_uint(s) & uint32_t(p.n) >> 31));
    if (p.split == 1) {
      if (i < count) write(i, row, s, factor);
      return;
    }
    // Each block finishes one of the tiles. There is room: the other block's warp has read what was
    // sent two rounds ago before it sent what this one has just received.
    const int owner = lane >> 4;
    if (owner != rank && i < count) {
      send4(address_in_block(inbox_of(r, row), owner), s, address_in_block(sent(r, token), owner));
    }
    kept = s;
    waits = kRound * r + rank < count ? r : -1;
  }

  PYFMT_DEVICE SharedAddress inbox_of(int r, int row) const {
    return inbox + unsigned((r & 1) * Still::kInboxTile + 4 * (token * kRows + row));
  }
  PYFMT_DEVICE void receive(float factor) {
    if (waits < 0) return;
    const int lane = int(threadIdx.x & 31), row = lane & 15;
    if (lane == 0) signal_expect(sent(waits, token), 4 * kRows);
    signal_wait(sent(waits, token), unsigned(waits / 2));
    if (lane >> 4 == rank) {
      const float other = as_float(load_small<4>(inbox_of(waits, row)));
      write(kRound * waits + rank, row, kept + other, factor);
    }
    waits = -1;
  }

  PYFMT_DEVICE void write(int i, int row, float s, float factor) const {
    const int n = kRows * (first_tile + i) + row;
    float y = s * factor;
    if (p.bias) y = y + load_element(p.bias, p.bias_dtype, n);
    store_element(p.out, p.out_dtype, int64_t(first_token + token) * p.n + n, y);
  }
};

}  // namespace cuda
}  // namespace pyfmt
