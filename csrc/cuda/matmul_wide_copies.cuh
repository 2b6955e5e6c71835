// SPDX-License-Identifier: Apache-2.0
// What two threads of matmul_wide.cuh have the copy engine bring: tiles of x and of packed codes.
#pragma once

#include "matmul_wide_tiles.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

// By the first thread of each warpgroup that multiplies: one brings x, the other codes. Parts of K
// take the halves of the tokens in different order: each finishes the half that it has first.
template <class F, int kTokens>
struct Copies {
  using S = Layout<F, kTokens>;

  const Params& p;
  const Place& at;
  Stage<F, kTokens> stage;      // for the next tile of x
  uint32_t slot = 0;            // for the next tile of codes
  int steps, x = 0, codes = 0;  // tiles of this part of K, and how many are asked for
  int first_half, second_half;  // rows of x
  uint32_t mine, mask;

  PYFMT_DEVICE Copies(const Params& p, const Place& at) : p(p), at(at), steps(at.last - at.first) {
    const int rows = kTokens >> (p.share_bits + p.split - 1);
    first_half = at.m0 + at.part * (kTokens / 2) + at.sub * rows;
    second_half = at.m0 + (at.part ^ 1) * (kTokens / 2) + at.sub * rows;
    mine = uint32_t(at.sub * rows * 128);
    mask = ((1u << p.share) - 1) << (at.part << p.share_bits);
  }

  PYFMT_DEVICE void bring_codes() {
    if (!p.copied_codes || codes >= steps) return;
    const uint32_t bar = codes_barrier(at.base, slot);
    hopper::barrier_expect(bar, S::kSlot);
    hopper::copy_box(at.base + S::kCodesAt + slot * S::kSlot, p.codes_map,
                     (at.first + codes) * int(S::kTileRow), at.n0, bar, 0, false);
    codes += S::kSpan;
    if (++slot == S::kDepth) slot = 0;
  }

  PYFMT_DEVICE void bring_x() {
    const uint32_t full = stage.full(at.base), to = stage.x(at.base) + mine;
    const int column = (at.first + x) * 128;
    const bool shared = p.share > 1;
    hopper::barrier_expect(full, S::kTileOfX);
    hopper::copy_box(to, p.x, column, first_half, full, mask, shared);
    if (p.split > 1) {
      const uint32_t half = S::kTileOfX / 2;
      hopper::copy_box(to + half, p.x, column, second_half, full, mask, shared);
    }
    ++x;
    stage.next();
  }

  // As many as there are places for.
  PYFMT_DEVICE void start() {
    if (threadIdx.x == 0) {
#pragma unroll 1
      while (x < int(S::kStages) && x < steps) bring_x();
    } else if (threadIdx.x == kConsumers / 2) {
#pragma unroll 1
      for (int i = 0; i < int(S::kDepth); ++i) bring_codes();
    }
  }

  // While products of tile i are under way: its codes have been read, and this warp has released
  // the stage of tile i - 2.
  PYFMT_DEVICE void more(int i) {
    if (threadIdx.x == 0) {
      if (i < 2 || x == steps) return;
      hopper::barrier_wait(stage.empty(at.base), stage.parity ^ 1);
      bring_x();
    } else if (threadIdx.x == kConsumers / 2 && (i + 1) % int(S::kSpan) == 0) {
      bring_codes();
    }
  }
};

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
