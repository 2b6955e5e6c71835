// SPDX-License-Identifier: Apache-2.0
// The warps of matmul_wide.cuh that decode: each takes the packed codes of its 16 or 32 rows from
// shared memory, and writes their values where products read them. They have no part in copies: a
// fence that shows their stores to the tensor cores would wait for the copies under way.
#pragma once

#include "matmul_wide_tiles.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

// A lane of a warp that decodes: half of the columns of one row of each pass.
struct Lane {
  int team, warp, lane, row, half;  // row: of a pass

  PYFMT_DEVICE Lane()
      : team((int(threadIdx.x) - kConsumers) >> 7),
        warp(int(threadIdx.x) >> 5 & 3),
        lane(int(threadIdx.x) & 31),
        row(lane % 8 + lane / 16 * 8),
        half(lane / 8 % 2) {}
};

// ---- codes ------------------------------------------------------------------------------------

template <class F, int kTokens>
struct Codes {
  using S = Layout<F, kTokens>;
  static constexpr int kRunBytes = F::kRun * F::kBits / 8;

  const Params& p;
  const Place& at;
  const Lane l;
  uint32_t mine;  // where this lane's codes start in the ring, but for turns
  uint32_t slot = 0, parity = 0, tile = 0;  // tile: of a slot

  PYFMT_DEVICE Codes(const Params& p, const Place& at, const Lane& l)
      : p(p),
        at(at),
        l(l),
        mine(at.base + S::kCodesAt + uint32_t(S::kWarpRows * l.warp + l.row) * S::kRowBytes +
             uint32_t(l.half * kRunBytes)) {
    hopper::keep(mine);
    if (l.team) next(1);
  }

  PYFMT_DEVICE uint32_t place(int pass, int byte) const {
    const uint32_t here = mine + slot * S::kSlot + tile * S::kTileRow + uint32_t(byte);
    return hopper::turned<S::kRowBytes>(here) + uint32_t(pass * kPass) * S::kRowBytes;
  }

  // Tile i, this team's next, is there.
  PYFMT_DEVICE void wait(int i) const {
    if (p.copied_codes) {
      hopper::barrier_wait(codes_barrier(at.base, slot), parity);
      return;
    }
    // Rows that the copy engine does not take, for want of alignment.
#pragma unroll 1
    for (int pass = 0; pass < S::kPasses; ++pass) {
      const int n = at.n0 + S::kWarpRows * l.warp + pass * kPass + l.row;
      const int64_t first = int64_t(at.first + i) * S::kTileRow + l.half * kRunBytes;
      const uint8_t* from = p.codes + n * p.row_bytes + first;
#pragma unroll 1
      for (int b = 0; b < kRunBytes; ++b) {
        const bool inside = n < p.n && first + b < p.row_bytes;
        hopper::store_shared_byte(place(pass, b), inside ? from[b] : 0u);
      }
    }
    hopper::warp_sync();
  }

  // This lane's codes.
  PYFMT_DEVICE void read(int pass, uint32_t (&words)[kRunBytes / 4]) const {
    constexpr int kWide = kRunBytes % 16 ? 8 : 16;
#pragma unroll
    for (int b = 0; b < kRunBytes; b += kWide) {
      if constexpr (kWide == 16) {
        const uint4 v = hopper::load_shared16(place(pass, b));
        words[b / 4] = v.x;
        words[b / 4 + 1] = v.y;
        words[b / 4 + 2] = v.z;
        words[b / 4 + 3] = v.w;
      } else {
        const uint2 v = hopper::load_shared8(place(pass, b));
        words[b / 4] = v.x;
        words[b / 4 + 1] = v.y;
      }
    }
  }

  PYFMT_DEVICE void next(int by) {
#pragma unroll
    for (int i = 0; i < by; ++i) {
      if (++tile < S::kSpan) continue;
      tile = 0;
      if (++slot == S::kDepth) {
        slot = 0;
        parity ^= 1;
      }
    }
  }
};

// ---- scales -----------------------------------------------------------------------------------

// Of the rows of one pass. A batch of four tiles is eight runs a row. Each lane loads those of four
// runs one batch ahead into registers; from shared memory each takes that of its run, tile by tile.
template <class F, int kTokens>
struct Scales {
  using S = Layout<F, kTokens>;
  static constexpr int kBytes = 4 * F::kEntry;  // a lane's of a batch

  const uint8_t* row;  // its scales
  uint32_t to, mine;   // in shared memory: the runs it loads, its run of the first tile
  int half;
  int64_t next = 0;         // where the row's bytes of the batch to load start
  int group = 0, left = 0;  // of the next run to load: its group, runs up to the next one
  uint32_t held[F::kEntry], same = 0;

  PYFMT_DEVICE void start(const Params& p, const Place& at, const Lane& l, int pass) {
    half = l.half;
    const int in_block = S::kWarpRows * l.warp + kPass * pass + l.row, n = at.n0 + in_block;
    const int64_t bytes = F::kGroups ? p.blocks * scale_bytes(p.scale) : p.blocks;
    row = p.scales + (n < p.n ? n : p.n - 1) * bytes;
    const int place = (kRows * l.team + in_block) * F::kScalePitch;
    to = at.base + S::kScalesAt + uint32_t(place + half * kBytes);
    mine = at.base + S::kScalesAt + uint32_t(place + half * F::kEntry);
    hopper::keep(to);
    hopper::keep(mine);
    if constexpr (F::kGroups) {
      const int run = 2 * at.first + 4 * half;
      group = run / p.group_runs;
      left = p.group_runs - run % p.group_runs;
    } else {
      next = int64_t(2 * at.first + 4 * half) * F::kEntry;
    }
    load(p);
  }

  PYFMT_DEVICE void next_run(const Params& p) {
    if (--left == 0) {
      left = p.group_runs;
      ++group;
    }
  }

  // What a run takes from the one before is not loaded again.
  PYFMT_DEVICE void load(const Params& p) {
    if constexpr (F::kGroups) {
      int before = -1;
      same = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (group == before) {
          same |= 1u << j;
        } else {
          held[j] = group >= p.blocks         ? 0u
                    : p.scale == Scale::kFP32 ? reinterpret_cast<const uint32_t*>(row)[group]
                                              : reinterpret_cast<const uint16_t*>(row)[group];
        }
        before = group;
        next_run(p);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) next_run(p);
    } else if (p.wide_scales) {
#pragma unroll
      for (int i = 0; i < F::kEntry; ++i) held[i] = 0;
      if (next + kBytes <= p.blocks) hopper::load_words<F::kEntry>(row + next, held);
      next += 2 * kBytes;
    }
  }

  PYFMT_DEVICE static uint32_t as_factor(const Params& p, uint32_t raw) {
    return p.scale == Scale::kFP32   ? raw
           : p.scale == Scale::kBF16 ? raw << 16
                                     : as_uint(from_half(raw));
  }

  // Lays down the batch that was loaded and starts loading another.
  // Lanes must meet before and after.
  PYFMT_DEVICE void turn(const Params& p) {
    if constexpr (F::kGroups) {
#pragma unroll
      for (int j = 1; j < 4; ++j) held[j] = same >> j & 1 ? held[j - 1] : held[j];
      hopper::store_shared16(to, as_factor(p, held[0]), as_factor(p, held[1]),
                             as_factor(p, held[2]), as_factor(p, held[3]));
    } else if (p.wide_scales) {
      if constexpr (F::kEntry == 1) {
        hopper::store_shared(to, held[0]);
      } else {
        hopper::store_shared8(to, held[0], held[1]);
      }
    } else {
      // Past the end codes are zeros: any scale but NaN serves.
#pragma unroll 1
      for (int i = 0; i < kBytes; ++i) {
        hopper::store_shared_byte(to + uint32_t(i), next + i < p.blocks ? row[next + i] : 0u);
      }
      next += 2 * kBytes;
    }
    load(p);
  }

  // Of this lane's run of the batch's tile j.
  PYFMT_DEVICE uint32_t read(int j) const {
    return hopper::load_shared_small<F::kEntry>(mine + uint32_t(2 * j * F::kEntry));
  }
};

// ---- the loop ---------------------------------------------------------------------------------

// A warp's part of the tiles that its team decodes.
template <class F, int kTokens>
struct Producer {
  using S = Layout<F, kTokens>;
  static constexpr int kPasses = S::kPasses, kStep = kTeams;

  const Params& p;
  const Place& at;
  const Lane l;
  Codes<F, kTokens> codes;
  Scales<F, kTokens> scales[kPasses];
  Stage<F, kTokens> stage;
  uint32_t mine;  // where this lane writes in a stage
  int offset[kPasses] = {};
  uint32_t words[kPasses][F::kRun * F::kBits / 32], raw[kPasses];

  PYFMT_DEVICE Producer(const Params& p, const Place& at) : p(p), at(at), codes(p, at, l) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      scales[pass].start(p, at, l, pass);
      if constexpr (F::kFolded) {
        const int n = at.n0 + S::kWarpRows * l.warp + pass * kPass + l.row;
        offset[pass] = F::offset_of(p.w_scale[n < p.n ? n : p.n - 1]);
      }
    }
    stage.place = uint32_t(l.team);
    const uint32_t row = uint32_t(S::kWarpRows * l.warp + l.row);
    mine = S::kTileOfX + row * 128 + uint32_t((4 * l.half ^ (l.row & 7)) * 16);
    hopper::keep(mine);
  }

  // Codes and scales of tile i are there.
  PYFMT_DEVICE void wait(int i) {
    if (i % kBatch == l.team) {
      hopper::warp_sync();
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) scales[pass].turn(p);
      hopper::warp_sync();
    }
    codes.wait(i);
  }
  PYFMT_DEVICE void read(int i, int pass) {
    codes.read(pass, words[pass]);
    raw[pass] = scales[pass].read(i % kBatch);
  }

  // What was read, to its stage; the next tile's is read meanwhile, so that nobody waits for it.
  template <bool kAll>
  PYFMT_DEVICE void decode(int next, int steps) {
    const uint32_t here = stage.x(at.base) + mine;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      uint32_t out[16];
      if constexpr (F::kFolded) {
        F::decode(words[pass], raw[pass], offset[pass], at.base + kTableAt, out);
      } else {
        F::template decode<kAll>(words[pass], raw[pass], out);
      }
      if constexpr (F::kGroups) {
        const uint32_t row = uint32_t(S::kWarpRows * l.warp + kPass * pass + l.row);
        hopper::store_shared(stage.factors(at.base) + (uint32_t(l.half) * kRows + row) * 4,
                             raw[pass]);
      }
      if (pass == 0 && next < steps) wait(next);
      read(next, pass);
      const uint32_t to = here + uint32_t(pass * kPass * 128);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        hopper::store_shared16(to ^ uint32_t(16 * q), out[4 * q], out[4 * q + 1], out[4 * q + 2],
                               out[4 * q + 3]);
      }
    }
  }

  PYFMT_DEVICE void run(int steps) {
    if (l.team >= steps) return;
    wait(l.team);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) read(l.team, pass);
    codes.next(kStep);
#pragma unroll 1
    for (int i = l.team; i < steps; i += kStep) {
      bool special = false;
      if constexpr (F::kHasSpecials) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) special |= F::special(words[pass], raw[pass]);
        special = hopper::any_lane(special);
      }
      hopper::barrier_wait(stage.empty(at.base), stage.parity ^ 1);
      if (special) {
        decode<F::kHasSpecials>(i + kStep, steps);
      } else {
        decode<false>(i + kStep, steps);
      }
      hopper::stores_fence();
      hopper::warp_sync();
      if (l.lane == 0) hopper::barrier_arrive_here(stage.full(at.base));
      stage.next(kStep);
      codes.next(kStep);
    }
  }
};

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
