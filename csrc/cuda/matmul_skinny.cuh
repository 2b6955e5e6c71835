// SPDX-License-Identifier: Apache-2.0
// The kernel for few tokens: packed weights stream through shared memory into tensor cores.
//
// The weight is the left operand, 16 rows of it a tensor-core tile, and up to 8 * kTiles columns
// (tokens, or the two or three bfloat16 terms of wider ones) the right one. The order of k inside a
// step is free as long as both sides agree, so a lane takes 16, 32 or 48 contiguous bytes of a row
// and brings the activations into the order in which those bytes are decoded.
//
// A block takes a run of rows; each of its warps takes a part of k of all of them, with a ring of
// its own for codes, scales and activations, so that warps meet only to add up what they have, in
// the order of k. How k is cut depends on k alone, so a token's result does not depend on what else
// is in the batch.
//
// Code that runs once has to be fetched, and a block that waits for its first bytes or for the last
// sum does nothing: hence one rolled loop, and copies that start before the launch ahead ends.
#pragma once

#include "matmul_skinny_long.cuh"
#include "matmul_skinny_still.cuh"

namespace pyfmt {
namespace cuda {

template <class W, int kTiles, Inputs kInputs>
__global__ void __launch_bounds__(32 * SkinnyShape<W, kTiles>::kWarps,
                                  SkinnyShape<W, kTiles>::kBlocks)
    skinny(const __grid_constant__ SkinnyParams p) {
  using Warp = SkinnyWarp<W, kTiles, kInputs>;
  using Shape = SkinnyShape<W, kTiles>;
  constexpr int kWarps = Shape::kWarps, kDepth = Shape::kDepth, kStrips = Shape::kStrips;
  constexpr int kLines = Warp::kAllRows, kPitch = kLines + 4;
  char* const shared = dynamic_shared();
  const int me = int(threadIdx.x >> 5), ring_bytes = kDepth * p.slot;
  const int warp_bytes = ring_bytes + kDepth * Warp::kScaleBytes + p.terms_bytes;
  constexpr int kTurns = Shape::kTurns;
  static_assert(kTurns <= 2, "sums of one earlier part are kept");
  int first_step = part_start(p, kTurns * me);
  int steps = part_start(p, kTurns * (me + 1)) - first_step;
  keep(first_step);
  keep(steps);
  const int turn = part_start(p, kTurns * me + 1) - first_step;  // where the second part starts
  const int longest = part_start(p, kTurns);                     // of any warp
  const int first_token = int(blockIdx.y) * p.tile_tokens;
  const int tokens = min(p.tile_tokens, p.tokens - first_token), columns = tokens * p.terms;
  const int from = int(int64_t(p.strips) * blockIdx.x / gridDim.x);
  const int to = int(int64_t(p.strips) * (blockIdx.x + 1) / gridDim.x);
  Warp warp(p, shared_address(shared + me * warp_bytes), columns);
  const typename Warp::X x(p, warp.lane, first_token);
  // Rows that a round starts with; the last one may repeat rows of the one before.
  const auto first_row = [&](int strip) {
    return max(0, min(strip * Warp::kStrip, p.n - min(kStrips, to - strip) * Warp::kStrip));
  };

  // Scales come for several steps at once; copying and using them go through the same places.
  struct Chunks {
    int chunk = -1;
    unsigned at;

    PYFMT_DEVICE bool next(int to) {
      if (to == chunk) return false;
      chunk = to;
      at = at + Warp::kScaleBytes == kDepth * Warp::kScaleBytes ? 0 : at + Warp::kScaleBytes;
      return true;
    }
  };
  const SharedAddress scales = warp.ring + unsigned(ring_bytes);
  Chunks copied{-1, 0}, used_scales{-1, 0};

  // The ring is filled kDepth - 1 steps ahead, across rounds of kStrips strips. All warps take
  // equally many turns, so that all are at the same slot when they meet.
  int next_strip = from, next_step = 0, next_row = first_row(from);
  unsigned next_slot = 0;
  const auto load = [&](bool activations) {
    if (next_step < steps && next_strip < to) {
      const SharedAddress slot = warp.ring + next_slot;
      const int step = first_step + next_step, strips = min(kStrips, to - next_strip);
      warp.load_codes(slot, step, next_row, strips);
      if (copied.next(warp.scale_chunk(step)))
        warp.load_scales(scales + copied.at, step, next_row, strips);
      if (activations)
        x.load(p, slot + unsigned(Warp::kCodeBytes), warp.lane, first_token, tokens, step);
    }
    close_copies();
    next_slot = int(next_slot) + p.slot == ring_bytes ? 0 : next_slot + unsigned(p.slot);
    if (++next_step == longest) {
      next_step = 0;
      next_strip += kStrips;
      next_row = first_row(next_strip);
      warp.seek(first_step, next_row);
      copied.chunk = -1;
    }
  };
  warp.seek(first_step, next_row);
#pragma unroll 1
  for (int d = 0; d < kDepth - 1; ++d) load(false);
  wait_for_earlier_launch();
  allow_next_launch();
  // The same steps once more, for x.
  {
    int step = 0, strip = from;
#pragma unroll 1
    for (int d = 0; d < kDepth - 1; ++d) {
      if (step < steps && strip < to)
        x.load(p, warp.ring + unsigned(d * p.slot + Warp::kCodeBytes), warp.lane, first_token,
               tokens, first_step + step);
      close_copies();
      if (++step == longest) step = 0, strip += kStrips;
    }
  }

  const float factor = (p.tensor_scale ? *p.tensor_scale : 1.0f) * float(1 << W::D::kDown);
  unsigned slot = 0;
#pragma unroll 1
  for (int strip = from; strip < to; strip += kStrips) {
    const int strips = min(kStrips, to - strip), row = first_row(strip);
    warp.clear();
    float early[kTurns > 1 ? Warp::kSums : 1] = {};
    used_scales.chunk = -1;
    unsigned used = 0;
#pragma unroll 1
    for (int step = 0; step < longest; ++step) {
      copies_arrived<kDepth - 2>();
      warp_barrier();
      load(true);
      if (kTurns > 1 && step == turn) {
#pragma unroll
        for (int i = 0; i < Warp::kSums; ++i) early[i] = warp.sum(i);
        warp.clear();
      }
      if (step < steps) {
        const int s = first_step + step;
        used_scales.next(warp.scale_chunk(s));
        const int inside = Warp::kLaneScales ? 0 : warp.scales_at(s) & ((1 << p.scale_shift) - 1);
        SharedAddress activations = warp.ring + slot + unsigned(Warp::kCodeBytes);
        if constexpr (Warp::X::kAny) {
          const SharedAddress terms = warp.ring + unsigned(ring_bytes + kDepth * Warp::kScaleBytes);
          Warp::X::convert(p, activations, terms, warp.lane, tokens);
          activations = terms;
          warp_barrier();
        }
        warp.multiply_step(warp.ring + slot, scales + used_scales.at + unsigned(inside),
                           activations, s, row, strips);
      }
      used = slot;
      slot = int(slot) + p.slot == ring_bytes ? 0 : slot + unsigned(p.slot);
    }

    if (kTurns > 1 && turn < longest) {
#pragma unroll
      for (int i = 0; i < Warp::kSums; ++i) warp.sum(i) = early[i] + warp.sum(i);
    }

    // The warps' sums, [column][row], each warp's in the slot that it has just used.
    warp_barrier();
    float* const partial = reinterpret_cast<float*>(shared + used);
#pragma unroll
    for (int i = 0; i < Warp::kSums; ++i) {
      const int c = i % 4, tile = i / 4 % kTiles, row_tile = i / 4 / kTiles;
      const int at = 8 * tile + 2 * warp.t + (c & 1);
      const int line = 16 * row_tile + (warp.lane >> 2) + 8 * (c >> 1);
      if (at < columns) {
        partial[me * (warp_bytes / 4) + at * kPitch + line] = warp.sum(i);
      }
    }
    block_barrier();
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kLines * tokens; i += 32 * kWarps) {
      const int line = i % kLines, token = i / kLines, n = row + line;
      if (n >= p.n || line >= strips * Warp::kStrip) continue;
      float sum = 0.0f;
#pragma unroll 1
      for (int term = p.terms - 1; term >= 0; --term) {
        const float* const column = partial + (token * p.terms + term) * kPitch + line;
#pragma unroll
        for (int w = 0; w < kWarps; w += 2 / kTurns) {
          float two = column[w * (warp_bytes / 4)];
          if (kTurns == 1) two = two + column[(w + 1) * (warp_bytes / 4)];
          sum = sum + two;
        }
      }
      float y = sum * factor;
      if (p.bias) y = y + load_element(p.bias, p.bias_dtype, n);
      store_element(p.out, p.out_dtype, int64_t(first_token + token) * p.n + n, y);
    }
    if (strip + kStrips < to) block_barrier();
  }
}

// ---- launch -----------------------------------------------------------------------------------

// One of the compiled kernels and what its launch must know of it.
struct SkinnyKernel {
  void (*run)(SkinnyParams) = nullptr;
  int step = 0, depth = 0, codes = 0, scales = 0, strip = 0, strips = 0, warps = 0, parts = 0,
      blocks = 0, tiles = 0;
  int (*shared)(int tokens) = nullptr;  // of blocks with many rows
  int columns = 0, early = 0;           // of a warp that keeps its activations; SkinnyParams'
  int (*still)(int tokens, int warps, int split) = nullptr;
  void (*turns)(SkinnyParams) =
      nullptr;  // the same where there are two warps more than columns for
};

template <class W, int kTiles, Inputs kInputs>
SkinnyKernel describe_skinny() {
  using Shape = SkinnyShape<W, kTiles>;
  using Warp = SkinnyWarp<W, kTiles, kInputs>;
  return {skinny<W, kTiles, kInputs>,
          W::kStep,
          Shape::kDepth,
          Warp::kCodeBytes,
          Warp::kScaleBytes,
          Warp::kStrip,
          Shape::kStrips,
          Shape::kWarps,
          Shape::kWarps * Shape::kTurns,
          Shape::kBlocks,
          kTiles};
}

template <class W>
SkinnyKernel describe_skinny_long() {
  SkinnyKernel kernel;
  if constexpr (W::kVectors != 3) {
    kernel = describe_skinny<W, 1, Inputs::kBF16>();
    kernel.run = skinny_long<W>;
    kernel.shared = SkinnyLong<W>::shared_bytes;
  }
  return kernel;
}

template <class W>
SkinnyKernel describe_skinny_still() {
  SkinnyKernel kernel;
  if constexpr (kStillServes<W>) {
    kernel.run = skinny_still<W, false>;
    kernel.columns = SkinnyStill<W>::kColumns;
    kernel.early = SkinnyStill<W>::kEarly;
    kernel.still = SkinnyStill<W>::shared_bytes;
    if constexpr (W::D::kBits == 4 && !W::kGrouped) kernel.turns = skinny_still<W, true>;
  }
  return kernel;
}

template <class W>
SkinnyKernel skinny_kernel(int columns, Inputs inputs) {
  if (inputs == Inputs::kStill) return describe_skinny_still<W>();
  if (inputs == Inputs::kLong) return describe_skinny_long<W>();
  if (inputs == Inputs::kGuarded) return describe_skinny<W, 2, Inputs::kGuarded>();
  if (inputs == Inputs::kAny) {
    return columns <= 8 ? describe_skinny<W, 1, Inputs::kAny>()
                        : describe_skinny<W, 2, Inputs::kAny>();
  }
  return columns <= 8 ? describe_skinny<W, 1, Inputs::kBF16>()
                      : describe_skinny<W, 2, Inputs::kBF16>();
}

SkinnyKernel skinny_fp4(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_fp6(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_fp8(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_mxint(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_int4(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_int8(const FormatSpec&, int columns, Inputs);

}  // namespace cuda
}  // namespace pyfmt
