// SPDX-License-Identifier: Apache-2.0
// The warps of matmul_wide.cuh that bring tiles of x, packed codes and scales. They do nothing
// else: a warp that waits for a free place must keep nobody waiting.
#pragma once

#include "matmul_wide_tiles.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

// One thread. Parts of K take the halves of the tokens in different order: each finishes the half
// that it has first.
template <class F, int kTokens>
PYFMT_DEVICE void bring_x(const Params& p, const Place& at) {
  using S = Layout<F, kTokens>;
  const int rows = kTokens >> (p.share_bits + p.split - 1);
  const int first_half = at.m0 + at.part * (kTokens / 2) + at.sub * rows;
  const int second_half = at.m0 + (at.part ^ 1) * (kTokens / 2) + at.sub * rows;
  const uint32_t mine = uint32_t(at.sub * rows * 128);
  const uint32_t mask = ((1u << p.share) - 1) << (at.part << p.share_bits);
  const bool shared = p.share > 1;
  Stage<F, kTokens> stage;
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

// What the copy engine does not take, for want of alignment: codes of a slot, kUnit bytes at a time.
template <class F, int kTokens, int kUnit>
PYFMT_DEVICE void load_codes(const Params& p, const Place& at, int tile, uint32_t to) {
  using S = Layout<F, kTokens>;
  const int64_t first = int64_t(tile) * S::kTileRow;
#pragma unroll 1
  for (int row = int(threadIdx.x) & 31; row < kRows; row += 32) {
    const int n = at.n0 + row;
    const uint8_t* from = p.codes + n * p.row_bytes + first;
#pragma unroll 1
    for (int b = 0; b < int(S::kRowBytes); b += kUnit) {
      const bool inside = n < p.n && first + b < p.row_bytes;
      const uint32_t place = hopper::turned<S::kRowBytes>(to + uint32_t(row * S::kRowBytes + b));
      if constexpr (kUnit == 4) {
        hopper::store_shared(place, inside ? *reinterpret_cast<const uint32_t*>(from + b) : 0u);
      } else {
        hopper::store_shared_byte(place, inside ? from[b] : 0u);
      }
    }
  }
}

// One warp.
template <class F, int kTokens>
PYFMT_DEVICE void bring_codes(const Params& p, const Place& at) {
  using S = Layout<F, kTokens>;
  const bool first_lane = (threadIdx.x & 31) == 0;
  const bool words = p.row_bytes % 4 == 0 && reinterpret_cast<uintptr_t>(p.codes) % 4 == 0;
  if (p.copied_codes && !first_lane) return;
  uint32_t slot = 0, parity = 0;
#pragma unroll 1
  for (int tile = at.first; tile < at.last; tile += int(S::kSpan)) {
    hopper::barrier_wait(read_barrier(at.base, slot), parity ^ 1);
    const uint32_t bar = codes_barrier(at.base, slot);
    const uint32_t to = at.base + S::kCodesAt + slot * S::kSlot;
    if (p.copied_codes) {
      hopper::barrier_expect(bar, S::kSlot);
      hopper::copy_box(to, p.codes_map, tile * int(S::kTileRow), at.n0, bar, 0, false);
    } else {
      if (words) {
        load_codes<F, kTokens, 4>(p, at, tile, to);
      } else {
        load_codes<F, kTokens, 1>(p, at, tile, to);
      }
      hopper::warp_sync();
      if (first_lane) hopper::barrier_arrive_here(bar);
    }
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
  PYFMT_DEVICE void store(int /*tile*/, uint32_t to) const {
    if constexpr (F::kEntry == 1) {
      hopper::store_shared8(to, held[0], held[1]);
    } else {
      hopper::store_shared16(to, held[0], held[1], held[2], held[3]);
    }
  }
};

// Of groups, whose neighbours are near in memory: nothing is held.
template <class F>
struct RowOfGroups {
  const Params& p;
  const uint8_t* row;

  PYFMT_DEVICE RowOfGroups(const Params& p, int n) : p(p) {
    row = p.scales + (n < p.n ? n : p.n - 1) * p.blocks * scale_bytes(p.scale);
  }
  PYFMT_DEVICE void load(int /*tile*/) {}

  PYFMT_DEVICE uint32_t factor(int group) const {
    if (group >= p.blocks) return 0;
    if (p.scale == Scale::kFP32) return reinterpret_cast<const uint32_t*>(row)[group];
    const uint32_t half = reinterpret_cast<const uint16_t*>(row)[group];
    return p.scale == Scale::kBF16 ? half << 16 : as_uint(from_half(half));
  }
  PYFMT_DEVICE void store(int tile, uint32_t to) const {
    int group = 2 * tile / p.group_runs, left = p.group_runs - 2 * tile % p.group_runs;
    uint32_t now = factor(group);
#pragma unroll 2
    for (int j = 0; j < 8; ++j) {
      hopper::store_shared(to + uint32_t(4 * j), now);
      if (--left == 0 && j < 7) {
        left = p.group_runs;
        now = factor(++group);
      }
    }
  }
};

// Two warps; `thread` of 64.
template <class F, int kTokens>
PYFMT_DEVICE void bring_scales(const Params& p, const Place& at, int thread) {
  using S = Layout<F, kTokens>;
  using Row = std::conditional_t<F::kGroups, RowOfGroups<F>, RowOfScales<F>>;
  Row rows[2] = {{p, at.n0 + thread}, {p, at.n0 + 64 + thread}};
  const uint32_t to = at.base + S::kScalesAt + uint32_t(thread * F::kScalePitch);
  rows[0].load(at.first);
  rows[1].load(at.first);
  uint32_t slot = 0, parity = 0;
#pragma unroll 1
  for (int tile = at.first; tile < at.last; tile += kBatch) {
    hopper::barrier_wait(scales_read_barrier(at.base, slot), parity ^ 1);
    const uint32_t here = to + slot * S::kScaleSlot;
    rows[0].store(tile, here);
    rows[1].store(tile, here + 64 * F::kScalePitch);
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

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
