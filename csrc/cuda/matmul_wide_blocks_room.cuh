// SPDX-License-Identifier: Apache-2.0
// What lies where in the shared memory of matmul_wide_blocks.cuh, and the warps that fill it.
#pragma once

#include "matmul_wide_panel.cuh"
#include "matmul_wide_turns_room.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace blocks {

using turns::kThreadsHere;

// ---- shared memory ----------------------------------------------------------------------------

template <class F, int kTokens>
struct Room {
  // A stage has 64 columns of x, half a chunk.
  static constexpr uint32_t kStages = kTokens == 128 ? 8 : kTokens == 192 ? 6 : 5;
  static constexpr uint32_t kStage = kTokens * 128;
  // Codes of one chunk, or of two where that makes rows of 128 bytes, with their scales.
  static constexpr uint32_t kSpan = F::kBits == 4 ? 2 : 1;
  static constexpr uint32_t kHalf = kChunk * F::kBits / 8, kRowBytes = kHalf * kSpan;
  static constexpr uint32_t kSlot = kRows * kRowBytes;
  static constexpr uint32_t kRowScales = 4 * F::kEntry * kSpan, kScales = kRows * kRowScales;
  static constexpr uint32_t kDepth = kTokens == 256 ? 3 : 4;
  static constexpr uint32_t kCodesAt = kHeader + kStages * kStage;
  static constexpr uint32_t kScalesAt = kCodesAt + kDepth * kSlot;
  static constexpr uint32_t kLoop = kScalesAt + kDepth * kScales;
  static constexpr uint32_t kEnd = kHeader + kTokens * kPitch * 4;
  static constexpr uint32_t kBytes = kLoop > kEnd ? kLoop : kEnd;
  static_assert(kBytes <= hopper::kMostShared, "the block's shared memory");
};

// Barriers of the header: of stages (full, empty), of slots of codes (full, empty), of turns;
// sums_barrier is among them.
constexpr uint32_t kFull = 0, kEmpty = 96, kCodesFull = 200, kCodesEmpty = 256, kTurns = 320;

template <class F, int kTokens>
PYFMT_DEVICE void init_barriers(const Params& p, uint32_t base) {
  using R = Room<F, kTokens>;
  const uint32_t i = threadIdx.x;
  if (i >= 48) return;
  const uint32_t at = 8 * i;
  const uint32_t arrivals = at < kEmpty        ? 1
                            : at < kEmpty + 96 ? 8 * uint32_t(p.share)
                            : at < kCodesFull  ? 1
                            : at < kCodesEmpty ? 3
                            : at < kTurns      ? 8
                                               : 4;
  hopper::barrier_init(base + at, arrivals);
  hopper::barrier_init_fence();
}

// ---- what brings things -----------------------------------------------------------------------

template <class F, int kTokens>
struct Bringer {
  using R = Room<F, kTokens>;
  const Params& p;
  const Place& at;
  int steps;

  // One thread. Parts of K take the halves of the tokens in different order (finish).
  PYFMT_DEVICE void bring_x() const {
    const uint32_t bytes = R::kStage >> (p.share_bits + p.split - 1),
                   mine = uint32_t(at.sub) * bytes;
    const uint32_t mask = ((1u << p.share) - 1) << (at.part << p.share_bits);
    const int64_t pitch = int64_t(p.panel_rows) * 128;
    const uint8_t* first = p.panel + int64_t(at.first) * 2 * pitch + int64_t(at.m0) * 128 + mine;
    const uint8_t* second = first + (at.part ^ 1) * (R::kStage / 2);
    first += at.part * (R::kStage / 2);
    Ring<R::kStages> ring;
    hopper::wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < 2 * steps; ++i, ring.next()) {
      const uint32_t full = at.base + kFull + 8 * ring.place;
      const uint32_t to = at.base + kHeader + ring.place * R::kStage + mine;
      hopper::barrier_wait(at.base + kEmpty + 8 * ring.place, ring.parity ^ 1);
      hopper::barrier_expect(full, R::kStage);
      hopper::bulk_copy(to, first, bytes, full, mask, p.share > 1);
      if (p.split > 1) {
        hopper::bulk_copy(to + R::kStage / 2, second, bytes, full, mask, p.share > 1);
      }
      first += pitch;
      second += pitch;
    }
  }

  // Of a row and the chunks of a slot. Past the end codes are zeros: any scale but NaN serves.
  PYFMT_DEVICE void load_scales(const uint8_t* row, int i, uint32_t* words) const {
    constexpr int kBytes = 4 * F::kEntry;
#pragma unroll
    for (int h = 0; h < int(R::kSpan); ++h) {
      const int64_t from = int64_t(at.first + i + h) * kBytes;
      uint32_t* to = words + h * F::kEntry;
#pragma unroll
      for (int j = 0; j < F::kEntry; ++j) to[j] = 0;
      if (p.wide_scales) {
        if (from + kBytes <= p.blocks) hopper::load_words<F::kEntry>(row + from, to);
      } else {
#pragma unroll
        for (int j = 0; j < kBytes; ++j) {
          if (from + j < p.blocks) to[j / 4] |= uint32_t(row[from + j]) << (j % 4 * 8);
        }
      }
    }
  }
  PYFMT_DEVICE static void store_scales(uint32_t to, const uint32_t* words) {
    if constexpr (R::kRowScales == 4) {
      hopper::store_shared(to, words[0]);
    } else if constexpr (R::kRowScales == 8) {
      hopper::store_shared8(to, words[0], words[1]);
    } else {
      hopper::store_shared16(to, words[0], words[1], words[2], words[3]);
    }
  }

  // Two warps, a lane two rows. The next slot's scales are under way while one's are laid down.
  PYFMT_DEVICE void bring_scales(int thread) const {
    const uint8_t* row[2];
    uint32_t held[2][R::kRowScales / 4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = p.scales + int64_t(min(at.n0 + thread + 64 * r, p.n - 1)) * p.blocks;
      load_scales(row[r], 0, held[r]);
    }
    const uint32_t to = at.base + R::kScalesAt + uint32_t(thread) * R::kRowScales;
    Ring<R::kDepth> ring;
#pragma unroll 1
    for (int i = 0; i < steps; i += int(R::kSpan), ring.next()) {
      hopper::barrier_wait(at.base + kCodesEmpty + 8 * ring.place, ring.parity ^ 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        store_scales(to + ring.place * R::kScales + uint32_t(64 * r) * R::kRowScales, held[r]);
        load_scales(row[r], i + int(R::kSpan), held[r]);
      }
      hopper::warp_sync();
      if (thread % 32 == 0) hopper::barrier_arrive_here(at.base + kCodesFull + 8 * ring.place);
    }
  }

  PYFMT_DEVICE void run() const {
    const int warp = hopper::uniform(int(threadIdx.x) >> 5 & 3), lane = int(threadIdx.x) & 31;
    if (warp >= 2) {
      bring_scales(int(threadIdx.x) & 63);
    } else if (lane == 0) {
      warp ? turns::bring_codes<R, kCodesFull, kCodesEmpty>(p, at, steps) : bring_x();
    }
  }
};

}  // namespace blocks
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
