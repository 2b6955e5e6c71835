// SPDX-License-Identifier: Apache-2.0
// The warps of matmul_wide_shared.cuh that bring tiles of x, packed codes and scales. They do
// nothing else: a warp that waits for a free place must keep nobody waiting.
#pragma once

#include "matmul_wide_shared_room.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace shared {

// One thread. Parts of K take the halves of the tokens in different order: each finishes the half
// that it has first.
template <class F>
PYFMT_DEVICE void bring_x(const Params& p, const Place& at) {
  using S = Layout<F>;
  const int rows = kTokens >> (p.share_bits + p.split - 1);
  const int first_half = at.m0 + at.part * (kTokens / 2) + at.sub * rows;
  const int second_half = at.m0 + (at.part ^ 1) * (kTokens / 2) + at.sub * rows;
  const uint32_t mine = uint32_t(at.sub * rows * 128);
  const uint32_t mask = ((1u << p.share) - 1) << (at.part << p.share_bits);
  const bool shared = p.share > 1;
  Stage<F> stage;
#pragma unroll 1
  for (int tile = at.first; tile < at.last; ++tile, stage.next()) {
    hopper::barrier_wait(stage.empty(at.base), stage.parity ^ 1);
    const uint32_t full = stage.full(at.base), to = stage.x(at.base) + mine;
    hopper::barrier_expect(full, S::kTileOfX);
    hopper::copy_box(to, p.x, tile * 128, first_half, full, mask, shared);
    if (p.split > 1) {
      hopper::copy_box(to + S::kTileOfX / 2, p.x, tile * 128, second_half, full, mask, shared);
    }
  }
}

// One thread.
template <class F>
PYFMT_DEVICE void bring_codes(const Params& p, const Place& at) {
  using S = Layout<F>;
  uint32_t slot = 0, parity = 0;
  if (!p.copied_codes) hopper::wait_for_previous();  // a copy was made of them
#pragma unroll 1
  for (int tile = at.first; tile < at.last; tile += int(S::kSpan)) {
    hopper::barrier_wait(read_barrier(at.base, slot), parity ^ 1);
    const uint32_t bar = codes_barrier(at.base, slot);
    hopper::barrier_expect(bar, S::kSlot);
    hopper::copy_box(at.base + S::kCodesAt + slot * S::kSlot, p.codes_map, tile * int(S::kTileRow),
                     at.n0, bar, 0, false);
    if (++slot == S::kDepth) {
      slot = 0;
      parity ^= 1;
    }
  }
}

// Scales of a row of w, by batches of four tiles, which are eight runs. Past the end codes are
// zeros: any scale but NaN serves.
template <class F>
struct RowOfScales {
  static constexpr int kWords = 2 * F::kEntry, kHalf = 4 * F::kEntry;  // bytes of half a batch

  const Params& p;
  const uint8_t* row;
  uint32_t held[kWords];

  PYFMT_DEVICE RowOfScales(const Params& p, int n) : p(p) {
    row = p.scales + (n < p.n ? n : p.n - 1) * p.blocks;
  }

  // A batch ahead of its use.
  PYFMT_DEVICE void load(int tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t from = int64_t(2 * tile) * F::kEntry + h * kHalf;
      uint32_t* words = held + h * F::kEntry;
#pragma unroll
      for (int i = 0; i < F::kEntry; ++i) words[i] = 0;
      if (p.wide_scales) {
        if (from + kHalf <= p.blocks) hopper::load_words<F::kEntry>(row + from, words);
      } else {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
          if (from + i < p.blocks) words[i / 4] |= uint32_t(row[from + i]) << (i % 4 * 8);
        }
      }
    }
  }
  PYFMT_DEVICE void store(uint32_t to) const {
    if constexpr (F::kEntry == 1) {
      hopper::store_shared8(to, held[0], held[1]);
    } else {
      hopper::store_shared16(to, held[0], held[1], held[2], held[3]);
    }
  }
};

// Two warps; `thread` of 64.
template <class F>
PYFMT_DEVICE void bring_scales(const Params& p, const Place& at, int thread) {
  using S = Layout<F>;
  RowOfScales<F> rows[2] = {{p, at.n0 + thread}, {p, at.n0 + 64 + thread}};
  const uint32_t to = at.base + S::kScalesAt + uint32_t(thread * S::kScalePitch);
  rows[0].load(at.first);
  rows[1].load(at.first);
  uint32_t slot = 0, parity = 0;
#pragma unroll 1
  for (int tile = at.first; tile < at.last; tile += kBatch) {
    hopper::barrier_wait(scales_read_barrier(at.base, slot), parity ^ 1);
    const uint32_t here = to + slot * S::kScaleSlot;
    rows[0].store(here);
    rows[1].store(here + 64 * S::kScalePitch);
    rows[0].load(tile + kBatch);
    rows[1].load(tile + kBatch);
    hopper::warp_sync();
    if ((thread & 31) == 0) hopper::barrier_arrive_here(scales_barrier(at.base, slot));
    if (++slot == S::kScaleDepth) {
      slot = 0;
      parity ^= 1;
    }
  }
}

}  // namespace shared
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
