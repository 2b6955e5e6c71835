// SPDX-License-Identifier: Apache-2.0
// The kernel for few tokens where blocks have many rows: no warp waits for the others.
//
// As in matmul_skinny.cuh, but a slot of a warp's ring is a single strip, so that copies are under
// way all the time; activations go straight to registers, a step ahead; and the sums have a place
// of their own, where a few warps add them up behind signals while the others go on. Sums are taken
// in the same order, so that the results are the same bits.
#pragma once

#include "matmul_skinny_warp.cuh"

namespace pyfmt {
namespace cuda {

// A warp whose slots are single strips.
template <class W>
struct SkinnyLongWarp : SkinnyWarp<W, 1, Inputs::kBF16> {
  using Base = SkinnyWarp<W, 1, Inputs::kBF16>;
  using Base::Base;
  using D = typename W::D;
  using Words = typename Base::Words;
  using Fragments = typename Base::Fragments;

  // Codes of a step of one strip of a round, for a slot of its own.
  PYFMT_DEVICE void load_strip(SharedAddress slot, int step, int strip) const {
    static_assert(Base::kKinds == 1, "a lane copies one place of several rows");
    const bool inside = 4 * W::kVectors * step + this->copied_chunk(0) < this->p.row_bytes / 16;
    const uint8_t* from = inside ? this->codes[0] + uint64_t(uint32_t(strip * Base::kStrip)) *
                                                        uint32_t(this->p.row_bytes)
                                 : this->p.codes;
    uint32_t stride = inside ? uint32_t(this->p.row_bytes) * Base::kCopyRows : 0;
    keep(stride);
    const SharedAddress to = slot + unsigned(Base::turned(16 * this->lane));
#pragma unroll
    for (int r = 0; r < Base::kStrip; r += Base::kCopyRows) {
      if constexpr (W::kVectors == 1) {
        start_copy_line(to + unsigned(r * 64), from, inside ? 16 : 0);
      } else {
        start_copy<16>(to + unsigned(r * 64 * W::kVectors), from, inside ? 16 : 0);
      }
      from += stride;
    }
  }
  // The next copies are of the next step.
  PYFMT_DEVICE void advance() { this->codes[0] += 64 * W::kVectors; }

  // A step of a strip; scales: those of this step, in the first row of the round.
  PYFMT_DEVICE void multiply_strip(SharedAddress slot, SharedAddress scales, int strip, int step,
                                   int first, const Fragments& x) {
    const SharedAddress mine = scales + unsigned(16 * (this->lane >> 2));
    Words words;
    this->fetch(slot, 0, words);
    if constexpr (W::kGrouped) {
      this->multiply_groups(words, mine, step, first, strip, x);
    } else if (special_strip(words, scales + unsigned(16 * strip * Base::kStrip))) {
      this->template multiply_blocks<true>(words, mine, strip, 0, x);
    } else {
      this->template multiply_blocks<false>(words, mine, strip, 0, x);
    }
  }
  PYFMT_DEVICE bool special_strip(const Words& words, SharedAddress scales) const {
    if constexpr (W::kGrouped || W::kScale != Scale::kE8M0) {
      return false;
    } else {
      uint32_t found =
          this->lane < Base::kStrip ? Base::special_scales(scales + unsigned(16 * this->lane)) : 0;
      if constexpr (D::kHasSpecials) {
        found |= D::template special_codes<4 * W::kVectors * Base::kRows>(words[0]);
      }
      return any_lane(found != 0);
    }
  }
};

template <class W>
struct SkinnyLong {
  using Warp = SkinnyLongWarp<W>;
  static constexpr int kWarps = Warp::Shape::kWarps, kStrips = Warp::kStrips;
  static constexpr int kDepth = W::D::kBits == 8 ? 5 : 4;        // strips of a step in the ring
  static constexpr int kCodeBytes = Warp::kCodeBytes / kStrips;  // of a slot
  static constexpr int kWarpBytes = kDepth * (kCodeBytes + Warp::kScaleBytes);
  static constexpr int kLines = Warp::kAllRows, kPitch = kLines + 4;
  static constexpr int kShares = (kLines + 31) / 32;  // of a token's sums
  static_assert(Warp::Shape::kTurns == 1 && W::kVectors != 3, "a part of k for each warp");

  static int shared_bytes(int tokens) { return kWarps * (kWarpBytes + 4 * tokens * kPitch) + 16; }
};

template <class W>
__global__ void __launch_bounds__(32 * SkinnyLong<W>::kWarps, 1)
    skinny_long(const __grid_constant__ SkinnyParams p) {
  using Long = SkinnyLong<W>;
  using Warp = typename Long::Warp;
  constexpr int kWarps = Long::kWarps, kDepth = Long::kDepth, kStrips = Long::kStrips;
  constexpr int kPitch = Long::kPitch, kShares = Long::kShares;
  char* const shared = dynamic_shared();
  const int me = int(threadIdx.x >> 5);
  int first_step = part_start(p, me);
  int steps = part_start(p, me + 1) - first_step;
  keep(first_step);
  keep(steps);
  const int first_token = int(blockIdx.y) * p.tile_tokens;
  const int tokens = min(p.tile_tokens, p.tokens - first_token);
  const int from = int(int64_t(p.strips) * blockIdx.x / gridDim.x);
  const int to = int(int64_t(p.strips) * (blockIdx.x + 1) / gridDim.x);
  Warp warp(p, shared_address(shared + me * Long::kWarpBytes), tokens);
  SkinnyColumn<W> x(p, warp.lane, first_token, tokens);
  // Rows that a round starts with; the last one may repeat rows of the one before.
  const auto first_row = [&](int strip) {
    return max(0, min(strip * Warp::kStrip, p.n - min(kStrips, to - strip) * Warp::kStrip));
  };

  // Scales come for several steps at once; copying and using them go through the same places.
  struct Places {
    unsigned at = 0;
    int chunk = -1;

    PYFMT_DEVICE bool next(int to) {
      if (to == chunk) return false;
      chunk = to;
      at = at == (kDepth - 1) * Warp::kScaleBytes ? 0 : at + unsigned(Warp::kScaleBytes);
      return true;
    }
  };
  const SharedAddress scales = warp.ring + unsigned(kDepth * Long::kCodeBytes);
  Places copied, used;

  // The ring is filled kDepth - 1 strips ahead, across rounds of kStrips strips.
  int next_round = steps ? from : to, next_step = 0, next_strip = 0, next_row = first_row(from);
  unsigned next_slot = 0;
  const auto load = [&] {
    if (next_round < to) {
      const int step = first_step + next_step, strips = min(kStrips, to - next_round);
      warp.load_strip(warp.ring + next_slot, step, next_strip);
      if (next_strip == 0 && copied.next(warp.scale_chunk(step))) {
        warp.load_scales(scales + copied.at, step, next_row, strips);
      }
      next_slot = next_slot == (kDepth - 1) * Long::kCodeBytes ? 0 : next_slot + Long::kCodeBytes;
      if (++next_strip == strips) {
        next_strip = 0;
        warp.advance();
        if (++next_step == steps) {
          next_step = 0;
          next_round += kStrips;
          next_row = first_row(next_round);
          warp.seek(first_step, next_row);
          copied.chunk = -1;
        }
      }
    }
    close_copies();
  };
  warp.seek(first_step, next_row);
#pragma unroll 1
  for (int d = 0; d < kDepth - 1; ++d) load();
  // The sums, and whether they have been written and read.
  const int pitch = tokens * kPitch, readers = min(tokens * kShares, kWarps);
  float* const partial = reinterpret_cast<float*>(shared + kWarps * Long::kWarpBytes);
  const SharedAddress written = shared_address(partial + kWarps * pitch), taken = written + 8;
  if (threadIdx.x == 0) {
    signal_init(written, kWarps);
    signal_init(taken, readers);
  }
  block_barrier();
  wait_for_earlier_launch();
  allow_next_launch();
  if (steps) x.read(first_step);

  const float factor = (p.tensor_scale ? *p.tensor_scale : 1.0f) * float(1 << W::D::kDown);
  unsigned slot = 0, round = 0;
  int reader = me;  // a share of a token whose sums this warp adds up, modulo kWarps
#pragma unroll 1
  for (int strip = from; strip < to; strip += kStrips) {
    const int strips = min(kStrips, to - strip), row = first_row(strip);
    warp.clear();
    used.chunk = -1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int s = first_step + step;
      used.next(warp.scale_chunk(s));
      const int inside = Warp::kLaneScales ? 0 : warp.scales_at(s) & ((1 << p.scale_shift) - 1);
      typename Warp::Fragments mine;
      x.take(mine.words);
      x.read(step + 1 < steps ? s + 1 : first_step);
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        if (i >= strips) break;
        copies_arrived<kDepth - 2>();
        warp_barrier();
        load();
        warp.multiply_strip(warp.ring + slot, scales + used.at + unsigned(inside), i, s, row, mine);
        slot = slot == (kDepth - 1) * Long::kCodeBytes ? 0 : slot + Long::kCodeBytes;
      }
    }

    // The warps' sums, [token][row]; one warp adds up each share of a token's.
    if (round) signal_wait(taken, round - 1);
#pragma unroll
    for (int i = 0; i < Warp::kSums; ++i) {
      const int token = 2 * warp.t + (i & 1);
      const int line = 16 * (i / 4) + (warp.lane >> 2) + 8 * (i % 4 >> 1);
      if (token < tokens) partial[me * pitch + token * kPitch + line] = warp.sum(i);
    }
    warp_barrier();
    if (warp.lane == 0) signal_arrive(written);
    if (reader < readers) {
      signal_wait(written, round);
#pragma unroll 1
      for (int share = reader; share < tokens * kShares; share += kWarps) {
        const int token = share / kShares, line = share % kShares * 32 + warp.lane, n = row + line;
        if (n >= p.n || line >= strips * Warp::kStrip) continue;
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
