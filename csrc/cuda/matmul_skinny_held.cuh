// SPDX-License-Identifier: Apache-2.0
// The kernel for few tokens by 4-bit blocks, where all activations fit a multiprocessor's memory.
//
// Each warp brings the activations of its part of k once, in the order of the decoded weights, and
// then needs nothing but codes and scales: whole lines of 128 bytes of sixteen rows a slot of its
// ring, so that one short loop serves every slot. A few warps add up the sums of sixty-four rows
// behind signals while the others go on. Sums are taken in the order of matmul_skinny.cuh, so that
// the results are the same bits.
#pragma once

#include "matmul_skinny_warp.cuh"

namespace pyfmt {
namespace cuda {

// kSlots: of a warp's ring. With two, the next launch's blocks find room beside this one's, and
// bring their first slots meanwhile.
template <class W, int kSlots>
struct SkinnyHeld {
  using D = typename W::D;
  static constexpr bool kServes = D::kBits == 4 && !W::kGrouped;
  static constexpr int kWarps = SkinnyShape<W, 1>::kWarps, kDepth = kSlots;
  static constexpr int kBlocks = kSlots == 2 ? 2 : 1;  // of a multiprocessor
  static constexpr int kRows = 16, kTiles = 4, kLines = kRows * kTiles, kPitch = kLines + 4;
  static constexpr int kSteps = 2;  // of a slot
  static constexpr int kCodeBytes = kRows * 128;
  static constexpr int kScaleUnit = W::kScale == Scale::kE4M3 ? 8 : 4;  // of a row and a step
  static constexpr int kSlot = kCodeBytes + kRows * kSteps * kScaleUnit;
  static constexpr int kShares = kLines / 32;             // of a token's sums
  static constexpr int kTokenStep = 2 * W::kStep;         // bytes of a token's x of a step
  static constexpr int kTokenSlot = kSteps * kTokenStep;  // and of a slot

  // Of a token's activations of a part of so many steps.
  PYFMT_HD static constexpr int held_bytes(int steps) {
    return (steps + kSteps - 1) / kSteps * kTokenSlot;
  }
  static int shared_bytes(int tokens, int longest) {
    return kWarps * (kDepth * kSlot + tokens * (held_bytes(longest) + 4 * kPitch)) + 16;
  }
};

template <class W, int kSlots>
struct SkinnyHeldWarp {
  using Held = SkinnyHeld<W, kSlots>;
  using D = typename W::D;
  static constexpr int kSteps = Held::kSteps;

  const SkinnyParams& p;
  const int tokens, first_step, steps;
  int lane, t;
  SharedAddress ring;
  SharedAddress x[2];  // this lane's activations of even and odd units of the first step
  float sums[4];

  PYFMT_DEVICE SkinnyHeldWarp(const SkinnyParams& p, int tokens, int first_step, int steps,
                              SharedAddress ring, SharedAddress held)
      : p(p),
        tokens(tokens),
        first_step(first_step),
        steps(steps),
        lane(int(threadIdx.x & 31)),
        ring(ring) {
    keep(lane);
    keep(this->ring);
    t = lane & 3;
    const int token = min(lane >> 2, tokens - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = held + place(token, i, t) - unsigned(64 * i);
  }

  // ---- activations, once ------------------------------------------------------------------------

  // Of a unit's sixteen bytes in a step: neighbouring tokens lie in different banks.
  PYFMT_DEVICE static unsigned place(int token, int unit, int t) {
    return unsigned(token * Held::kTokenSlot + 64 * (unit ^ (token & 1)) + 16 * t);
  }
  PYFMT_DEVICE unsigned step_place(int step) const {
    return unsigned(step / kSteps * tokens * Held::kTokenSlot + step % kSteps * Held::kTokenStep);
  }

  // All tokens' of this warp's steps.
  PYFMT_DEVICE void hold(SharedAddress held, int first_token) const {
    const int unit = lane >> 2 & 3, start = W::unit_start(t, unit);
    int token = lane >> 4, step = 0;
    const auto wrap = [&] {
      while (token >= tokens) {
        token -= tokens;
        ++step;
      }
    };
    wrap();
    while (step < steps) {
      constexpr int kAtOnce = 4;
      uint4 raw[kAtOnce];
      SharedAddress to[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int column = (first_step + step) * W::kStep + start;
        to[i] = step < steps ? held + step_place(step) + place(token, unit, t) : 0;
        raw[i] = make_uint4(0, 0, 0, 0);
        if (step < steps) {
          raw[i] = load_once16(static_cast<const uint16_t*>(p.x) +
                               int64_t(first_token + token) * p.x_stride + column);
        }
        token += 2;
        wrap();
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t four[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
        uint32_t w[4];
        order_pairs<D>(four, w);
        if (to[i]) store_shared16(to[i], make_uint4(w[0], w[1], w[2], w[3]));
      }
    }
  }

  // ---- codes and scales, in the background ------------------------------------------------------

  // Where the next slot's come from, as this lane copies them.
  struct Copies {
    const uint8_t *codes, *scales;
    uint32_t four_rows;
    int left;  // bytes of a row from this lane's first to the end of the part
  };

  PYFMT_DEVICE void seek(Copies& c, int tile) const {
    const int first = min(Held::kRows * tile, p.n - Held::kRows);
    c.codes =
        p.codes + int64_t(first + (lane >> 3)) * p.row_bytes + 64 * first_step + 16 * (lane & 7);
    c.left = 64 * steps - 16 * (lane & 7);
    c.four_rows = 4 * uint32_t(p.row_bytes);
    c.scales = static_cast<const uint8_t*>(p.scales) +
               int64_t(first + lane / kSteps) * p.row_scales +
               (first_step + lane % kSteps) * Held::kScaleUnit;
    keep(c.codes);
    keep(c.left);
    keep(c.four_rows);
    keep(c.scales);
  }

  // The q-th slot of a tile. What lies beyond the part is neither copied nor used.
  PYFMT_DEVICE void load(Copies& c, SharedAddress slot, int q) const {
    if (128 * q < c.left) {
      // The halves of every other row change places, against conflicts.
      const SharedAddress to = slot + unsigned((16 * lane) ^ ((lane & 8) << 3));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        start_copy<16>(to + unsigned(512 * i), c.codes + uint64_t(c.four_rows) * unsigned(i), 16);
      }
    }
    c.codes += 128;
    if (kSteps * q + lane % kSteps < steps) {
      start_copy<Held::kScaleUnit>(slot + unsigned(Held::kCodeBytes + lane * Held::kScaleUnit),
                                   c.scales, Held::kScaleUnit);
    }
    c.scales += kSteps * Held::kScaleUnit;
  }
  // To the next tile, after `slots` slots of the one before.
  PYFMT_DEVICE void advance(Copies& c, int tile, int slots) const {
    if (Held::kRows * (tile + 1) > p.n) {
      seek(c, tile);
      return;
    }
    c.codes += int64_t(Held::kRows) * p.row_bytes - 128 * slots;
    c.scales += int64_t(Held::kRows) * p.row_scales - slots * (kSteps * Held::kScaleUnit);
  }

  // ---- products ---------------------------------------------------------------------------------

  using Words = uint32_t[2][4 * kSteps];  // of rows lane / 4 and 8 more, step by step

  PYFMT_DEVICE void multiply_slot(SharedAddress slot, int q) {
    Words words;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int r = i & 1, v = i >> 1, row = lane >> 2;
      const uint4 four = load_shared16(
          slot + unsigned(128 * row + 1024 * r + ((16 * t + 64 * v) ^ ((row & 1) << 6))));
      uint32_t* const w = words[r] + 4 * v;
      w[0] = four.x;
      w[1] = four.y;
      w[2] = four.z;
      w[3] = four.w;
    }
    const bool both_steps = kSteps * q + 1 < steps;
    uint32_t codes[2][kSteps], found = 0;  // of scales: one of 32 elements, or two of 16
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int r = i & 1, v = i >> 1;
      const SharedAddress of_step =
          slot +
          unsigned(Held::kCodeBytes + (((lane >> 2) + 8 * r) * kSteps + v) * Held::kScaleUnit);
      codes[r][v] = load_small<W::kFactors>(of_step + unsigned(W::kFactors * t));
      if (v == 0 || both_steps) found |= codes[r][v] - unsigned(D::kLowest);
    }
    if constexpr (W::kScale == Scale::kE8M0) {
      static_assert(D::kHighest >= D::kLowest + 127, "bytes that one factor serves");
      if (any_lane(found > 127)) {
        multiply<true>(words, codes, q, both_steps);
        return;
      }
    }
    multiply<false>(words, codes, q, both_steps);
  }

  template <bool kEverything>
  PYFMT_DEVICE void multiply(const Words& words, const uint32_t (&codes)[2][kSteps], int q,
                             bool both_steps) {
    const unsigned slot_x = unsigned(q * tokens) * Held::kTokenSlot;
    const SharedAddress at[2] = {x[0] + slot_x, x[1] + slot_x};
    // Elements that come as they are have their own sums, which are scaled down to the others.
    constexpr bool kApart = kEverything && D::kSubnormal;
    float apart[4] = {};
    float (&d)[4] = kApart ? apart : sums;
#pragma unroll
    for (int v = 0; v < kSteps; ++v) {
      if (v && !both_steps) break;
      Factor f[2][2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (W::kScale == Scale::kE4M3) {
          D::factors(codes[r][v], f[r]);
        } else {
          f[r][0] = f[r][1] = D::template factor<kEverything>(codes[r][v]);
        }
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        uint32_t a[2][4];
        D::template scaled<kEverything>(words[0] + 4 * v + u, f[0][u / 2], a[0]);
        D::template scaled<kEverything>(words[1] + 4 * v + u, f[1][u / 2], a[1]);
        const uint4 b = load_shared16(at[u & 1] + unsigned(v * Held::kTokenStep + 64 * u));
        mma16816(d, a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
        mma16816(d, a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
      }
    }
    if constexpr (kApart) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[c] = fused(apart[c], 1.0f / float(1 << D::kDown), sums[c]);
      }
    }
  }
};

template <class W, int kSlots>
__global__ void __launch_bounds__(32 * SkinnyHeld<W, kSlots>::kWarps,
                                  SkinnyHeld<W, kSlots>::kBlocks)
    skinny_held(const __grid_constant__ SkinnyParams p) {
  using Held = SkinnyHeld<W, kSlots>;
  using Warp = SkinnyHeldWarp<W, kSlots>;
  constexpr int kWarps = Held::kWarps, kDepth = Held::kDepth, kTiles = Held::kTiles;
  constexpr int kPitch = Held::kPitch, kShares = Held::kShares;
  char* const shared = dynamic_shared();
  const int me = int(threadIdx.x >> 5);
  int first_step = part_start(p, me);
  int steps = part_start(p, me + 1) - first_step;
  keep(first_step);
  keep(steps);
  const int first_token = int(blockIdx.y) * p.tile_tokens;
  const int tokens = min(p.tile_tokens, p.tokens - first_token);
  const int from = int(blockIdx.x) * p.even_tiles + min(int(blockIdx.x), p.longer_blocks);
  const int to = from + p.even_tiles + (int(blockIdx.x) < p.longer_blocks);
  const int held_bytes = Held::held_bytes(part_start(p, 1)) * tokens;
  const SharedAddress rings = shared_address(shared);
  const SharedAddress held =
      rings + unsigned(kWarps * kDepth * Held::kSlot) + unsigned(me * held_bytes);
  Warp warp(p, tokens, first_step, steps, rings + unsigned(me * kDepth * Held::kSlot), held);
  const int slots = (steps + Held::kSteps - 1) / Held::kSteps;  // of a tile

  // The ring is filled kDepth - 1 slots ahead, across tiles.
  typename Warp::Copies copies;
  int next_tile = slots ? from : to, next = 0;
  const auto load = [&](SharedAddress to_slot) {
    if (next_tile < to) {
      warp.load(copies, to_slot, next);
      if (++next == slots) {
        next = 0;
        warp.advance(copies, ++next_tile, slots);
      }
    }
    close_copies();
  };
  warp.seek(copies, next_tile);
#pragma unroll 1
  for (int d = 0; d < kDepth - 1; ++d) load(warp.ring + unsigned(d * Held::kSlot));

  // The sums, and whether they have been written and read.
  const int pitch = tokens * kPitch, readers = min(tokens * kShares, kWarps);
  float* const partial =
      reinterpret_cast<float*>(shared + kWarps * (kDepth * Held::kSlot + held_bytes));
  const SharedAddress written = shared_address(partial + kWarps * pitch), taken = written + 8;
  if (threadIdx.x == 0) {
    signal_init(written, kWarps);
    signal_init(taken, readers);
  }
  block_barrier();
  wait_for_earlier_launch();
  allow_next_launch();
  warp.hold(held, first_token);
  warp_barrier();

  const float factor = (p.tensor_scale ? *p.tensor_scale : 1.0f) * float(1 << W::D::kDown);
  SharedAddress slot = warp.ring, used = warp.ring + unsigned((kDepth - 1) * Held::kSlot);
  const SharedAddress last_slot = used;
  unsigned round = 0;
  int reader = me;  // a share of a token whose sums this warp adds up, modulo kWarps
  float* const mine = partial + me * pitch + 2 * warp.t * kPitch + (warp.lane >> 2);
  const bool even = 2 * warp.t < tokens, odd = 2 * warp.t + 1 < tokens;
#pragma unroll 1
  for (int group = from; group < to; group += kTiles) {
    const int tiles = min(kTiles, to - group);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 4; ++c) warp.sums[c] = 0;
#pragma unroll 1
      for (int q = 0; q < slots; ++q) {
        copies_arrived<kDepth - 2>();
        warp_barrier();
        load(used);
        warp.multiply_slot(slot, q);
        used = slot;
        slot = slot == last_slot ? warp.ring : slot + unsigned(Held::kSlot);
      }
      // The warps' sums, [token][row]; one warp adds up each share of a token's.
      if (round && tile == 0) signal_wait(taken, round - 1);
      float* const lines = mine + Held::kRows * tile;
      if (even) {
        lines[0] = warp.sums[0];
        lines[8] = warp.sums[2];
      }
      if (odd) {
        lines[kPitch] = warp.sums[1];
        lines[kPitch + 8] = warp.sums[3];
      }
    }
    warp_barrier();
    if (warp.lane == 0) signal_arrive(written);
    if (reader < readers) {
      signal_wait(written, round);
#pragma unroll 1
      for (int share = reader; share < tokens * kShares; share += kWarps) {
        const int token = share / kShares, line = share % kShares * 32 + warp.lane;
        if (line >= tiles * Held::kRows) continue;
        const int tile = group + line / Held::kRows;
        const int n = min(Held::kRows * tile, p.n - Held::kRows) + line % Held::kRows;
        const float* const column = partial + token * kPitch + line;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; w += 2) {
          sum = sum + (column[w * pitch] + column[(w + 1) * pitch]);
        }
        float y = sum * factor;
        if (p.bias) y = y + load_element(p.bias, p.bias_dtype, n);
        store_element(p.out, p.out_dtype, int64_t(first_token + token) * p.n + n, y);
      }
      warp_barrier();
      if (warp.lane == 0) signal_arrive(taken);
    }
    reader = reader < readers ? reader - readers + kWarps : reader - readers;
    ++round;
  }
}

}  // namespace cuda
}  // namespace pyfmt
