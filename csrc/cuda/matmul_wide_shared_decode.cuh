// SPDX-License-Identifier: Apache-2.0
// The warps of matmul_wide_shared.cuh that decode: each takes the packed codes of its 32 rows from
// shared memory, and writes their values where products read them. They have no part in copies: a
// fence that shows their stores to the tensor cores would wait for the copies under way.
#pragma once

#include "matmul_wide_shared_room.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace shared {

// A lane of a warp that decodes: half of the columns of one row of each pass.
struct Lane {
  int team, warp, lane, row, half;  // row: of a pass

  PYFMT_DEVICE Lane()
      : team(hopper::uniform((int(threadIdx.x) - kConsumers) >> 7)),
        warp(int(threadIdx.x) >> 5 & 3),
        lane(int(threadIdx.x) & 31),
        row(lane % 8 + lane / 16 * 8),
        half(lane / 8 % 2) {}
};

// A warp's part of the tiles that its team decodes: of each batch of four, two. The codes and
// scales of the next one are read before what was decoded is stored, so that nobody waits for them.
template <class F>
struct Producer {
  using S = Layout<F>;
  static constexpr int kPasses = S::kPasses, kTeams = S::kTeams;
  static constexpr int kTurns = S::kTurns;  // of the team in a batch
  static constexpr int kSpan = int(S::kSpan), kRunBytes = 4 * F::kBits;

  const Params& p;
  const Place& at;
  const Lane l;
  Stage<F> stage;
  uint32_t slot = 0, parity = 0;         // of codes
  uint32_t batch = 0, batch_parity = 0;  // of scales, by their slots
  // Where this lane writes in a stage, and where its codes and scales start, but for turns.
  uint32_t mine, codes, scales;
  uint32_t words[kPasses][kRunBytes / 4], raw[kPasses];

  PYFMT_DEVICE Producer(const Params& p, const Place& at) : p(p), at(at) {
    const uint32_t row = uint32_t(S::kWarpRows * l.warp + l.row);
    mine = S::kTileOfX + row * 128 + uint32_t((4 * l.half ^ (l.row & 7)) * 16);
    codes = at.base + S::kCodesAt + row * S::kRowBytes + uint32_t(l.half * kRunBytes) +
            uint32_t(l.team % kSpan) * S::kTileRow;
    scales =
        at.base + S::kScalesAt + row * S::kScalePitch + uint32_t((2 * l.team + l.half) * F::kEntry);
    hopper::keep(mine);
    hopper::keep(codes);
    hopper::keep(scales);
    stage.place = uint32_t(l.team);
    slot = uint32_t(l.team / kSpan);
  }

  // Codes and scales of the team's tile kTurn (0 or 1) of the batch are there.
  template <int kTurn>
  PYFMT_DEVICE void wait() const {
    if (kTurn == 0) hopper::barrier_wait(scales_barrier(at.base, batch), batch_parity);
    hopper::barrier_wait(codes_barrier(at.base, slot), parity);
  }
  template <int kTurn>
  PYFMT_DEVICE void read(int pass) {
    uint32_t from = codes + slot * S::kSlot;
    constexpr int kWide = kRunBytes % 16 ? 8 : 16;
#pragma unroll
    for (int b = 0; b < kRunBytes; b += kWide) {
      const uint32_t there =
          hopper::turned<S::kRowBytes>(from + uint32_t(b)) + uint32_t(pass * kPass) * S::kRowBytes;
      uint32_t* to = words[pass] + b / 4;
      if constexpr (kWide == 16) {
        const uint4 v = hopper::load_shared16(there);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      } else {
        const uint2 v = hopper::load_shared8(there);
        to[0] = v.x, to[1] = v.y;
      }
    }
    raw[pass] = hopper::load_shared_small<F::kEntry>(
        scales + batch * S::kScaleSlot +
        uint32_t(pass * kPass * S::kScalePitch + 2 * kTeams * kTurn * F::kEntry));
  }
  // By one lane: the warp has read that tile, and slots with it.
  template <int kTurn>
  PYFMT_DEVICE void release() const {
    uint32_t seen = 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      seen |= raw[pass];
#pragma unroll
      for (int b = 0; b < kRunBytes / 4; b += 2) seen |= words[pass][b];
    }
    hopper::barrier_arrive_here(
        hopper::after_reading(read_barrier(at.base, slot), seen, p.nothing));
    if (kTurn + 1 == kTurns) {
      hopper::barrier_arrive_here(
          hopper::after_reading(scales_read_barrier(at.base, batch), seen, p.nothing));
    }
  }
  // From the team's tile kTurn to the next.
  template <int kTurn>
  PYFMT_DEVICE void turn() {
    slot += kTeams / kSpan;
    if (slot >= S::kDepth) {
      slot -= S::kDepth;
      parity ^= 1;
    }
    if (kTurn + 1 == kTurns && ++batch == S::kScaleDepth) {
      batch = 0;
      batch_parity ^= 1;
    }
  }

  // What was read, to its stage.
  template <int kTurn, bool kAll>
  PYFMT_DEVICE void decode(bool more) {
    constexpr int kNext = (kTurn + 1) % kTurns;
    const uint32_t here = stage.x(at.base) + mine;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      uint32_t out[16];
      F::template decode<kAll>(words[pass], raw[pass], out);
      if (pass == 0) {
        hopper::barrier_wait(stage.empty(at.base), stage.parity ^ 1);
        turn<kTurn>();
        if (more) wait<kNext>();
      }
      read<kNext>(pass);
      const uint32_t to = here + uint32_t(pass * kPass * 128);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        hopper::store_shared16(to ^ uint32_t(16 * q), out[4 * q], out[4 * q + 1], out[4 * q + 2],
                               out[4 * q + 3]);
      }
    }
  }

  // more: another tile follows.
  template <int kTurn>
  PYFMT_DEVICE void tile(bool more) {
    bool special = false;
    if constexpr (F::kHasSpecials) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) special |= F::special(words[pass], raw[pass]);
      special = hopper::any_lane(special);
    }
    if (special) {
      decode<kTurn, F::kHasSpecials>(more);
    } else {
      decode<kTurn, false>(more);
    }
    hopper::stores_fence();
    hopper::warp_sync();
    if (l.lane == 0) {
      hopper::barrier_arrive_here(stage.full(at.base));
      if (more) release<(kTurn + 1) % kTurns>();
    }
    stage.next(kTeams);
  }

  PYFMT_DEVICE void run(int steps) {
    if (l.team >= steps) return;
    wait<0>();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) read<0>(pass);
    hopper::warp_sync();
    if (l.lane == 0) release<0>();
#pragma unroll 1
    for (int i = l.team; i < steps; i += kBatch) {
      tile<0>(i + kTeams < steps);
      if (i + kTeams >= steps) break;
      tile<1>(i + kBatch < steps);
    }
  }
};

}  // namespace shared
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
