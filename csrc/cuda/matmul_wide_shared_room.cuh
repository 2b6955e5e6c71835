// SPDX-License-Identifier: Apache-2.0
// What lies where in the shared memory of matmul_wide_shared.cuh.
//
//   header     barriers
//   stages     a tile of x and a tile of w
//   codes      packed, those of the next few tiles
//   scales     likewise
//
// A tile is 128 bytes of each row, 64 columns, as matrix products read it (wgmma.cuh).
#pragma once

#include "matmul_wide_tiles.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace shared {

constexpr int kTokens = 256, kColumns = 64;  // of a tile
constexpr int kPass = 16;                    // rows of w that a warp decodes at a time

template <class F>
struct Layout {
  // Warpgroups that take turns at decoding tiles; one more brings what they need.
  static constexpr int kTeams = 2, kTurns = kBatch / kTeams;
  static constexpr int kBringers = kConsumers + 128 * kTeams, kThreads = kBringers + 128;

  static constexpr int kWarps = 4, kWarpRows = kRows / kWarps, kPasses = kWarpRows / kPass;
  static constexpr uint32_t kStages = 4, kTileOfX = kTokens * 128, kTileOfW = kRows * 128;
  static constexpr uint32_t kStage = kTileOfX + kTileOfW;
  static constexpr uint32_t kStageAt = kHeader, kCodesAt = kStageAt + kStages * kStage;

  // The copy engine takes its time for each row, however short: codes of two tiles come together
  // where there is room.
  static constexpr uint32_t kSpan = F::kBits == 4 ? 2 : 1;
  static constexpr uint32_t kTileRow = kColumns * F::kBits / 8, kRowBytes = kSpan * kTileRow;
  static constexpr uint32_t kSlot = kRows * kRowBytes;
  static constexpr uint32_t kScalePitch = 2 * kBatch * F::kEntry;  // of a row and kBatch tiles
  static constexpr uint32_t kScaleSlot = kRows * kScalePitch, kScaleDepth = 2;
  static constexpr uint32_t kScaleBytes = kScaleDepth * kScaleSlot;
  static constexpr uint32_t kMost = (hopper::kMostShared - kCodesAt - kScaleBytes) / kSlot;
  static constexpr uint32_t kDepth = kMost < 8 ? kMost : 8;
  static_assert(kDepth * kSpan >= 4, "codes are read two tiles ahead");
  static constexpr uint32_t kScalesAt = kCodesAt + kDepth * kSlot;
  static constexpr uint32_t kLoop = kScalesAt + kScaleBytes;
  // Sums on their way to y; parts of K exchange a half of them first.
  static constexpr uint32_t kEnd = kHeader + kTokens * kPitch * 4;
  static constexpr uint32_t kBytes = kLoop > kEnd ? kLoop : kEnd;
  static_assert(kBytes <= hopper::kMostShared, "the block's shared memory");
};

// One of the stages in turn, with its barriers: full (codes decoded, x there) and empty (products
// over).
template <class F>
struct Stage {
  using S = Layout<F>;
  uint32_t place = 0, parity = 0;

  PYFMT_DEVICE void next(uint32_t by = 1) {
    place += by;
    if (place >= S::kStages) {
      place -= S::kStages;
      parity ^= 1;
    }
  }
  PYFMT_DEVICE uint32_t full(uint32_t base) const { return base + 8 * place; }
  PYFMT_DEVICE uint32_t empty(uint32_t base) const { return base + 64 + 8 * place; }
  PYFMT_DEVICE uint32_t x(uint32_t base) const { return base + S::kStageAt + S::kStage * place; }
  PYFMT_DEVICE uint32_t w(uint32_t base) const { return x(base) + S::kTileOfX; }
};

// Codes are there.
PYFMT_DEVICE uint32_t codes_barrier(uint32_t base, uint32_t slot) {
  return base + 128u + 8u * slot;
}
// They have been read.
PYFMT_DEVICE uint32_t read_barrier(uint32_t base, uint32_t slot) {
  return base + 200u + 8u * slot;
}
// Likewise of scales.
PYFMT_DEVICE uint32_t scales_barrier(uint32_t base, uint32_t slot) {
  return base + 264u + 8u * slot;
}
PYFMT_DEVICE uint32_t scales_read_barrier(uint32_t base, uint32_t slot) {
  return base + 296u + 8u * slot;
}

// By the first threads of a block; sums_barrier is among them.
template <class F>
PYFMT_DEVICE void init_barriers(const Params& p, uint32_t base) {
  using S = Layout<F>;
  const uint32_t i = threadIdx.x;
  if (i > 40) return;
  const uint32_t arrivals = i < 8    ? S::kWarps + 1
                            : i < 16 ? uint32_t(kConsumers / 32 * p.share)
                            : i < 25 ? 1
                            : i < 33 ? S::kWarps * S::kSpan
                            : i < 37 ? 2
                                     : S::kWarps * S::kTeams;
  hopper::barrier_init(base + 8 * i, arrivals);
  hopper::barrier_init_fence();
}

}  // namespace shared
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
