// SPDX-License-Identifier: Apache-2.0
// What a block of matmul_wide.cuh works on, and what lies where in its shared memory.
//
//   header     barriers
//   stages     a tile of x, a tile of w, and of some formats the scales of w's tile
//   codes      packed, those of the next few tiles
//   scales     likewise
//
// A tile is 128 bytes of each row, as matrix products read it (wgmma.cuh). Nothing here knows what
// kind of numbers those bytes are.
#pragma once

#include "matmul_wide.h"
#include "tensor_map.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

constexpr int kRows = 128;  // of w, in a block
constexpr int kPass = 16;   // of them, that a warp decodes at a time
constexpr int kBatch = 4;   // tiles whose scales are brought at once

// Threads that multiply, and warpgroups that take turns at decoding tiles.
constexpr int kConsumers = 256, kTeams = 2, kThreadsOfBlock = kConsumers + 128 * kTeams;

struct Params {
  hopper::TensorMap x, codes_map;
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  const float* tensor_scale = nullptr;
  const float* x_scale = nullptr;  // of each row, or null
  const float* w_scale = nullptr;
  const float* bias = nullptr;
  void* y = nullptr;
  DType dtype = DType::kBF16;
  Scale scale = Scale::kE8M0;
  int64_t row_bytes = 0, blocks = 0;        // of a row of w
  bool copied_codes = false;                // aligned for codes_map
  bool wide_scales = false;                 // aligned for loads of a batch
  int group_runs = 1;                       // groups: of so many runs of 32 columns
  bool half_tiles = false;                  // a tile is of more groups than one
  bool two_tiles = false;                   // a group is of pairs of tiles
  int m = 0, n = 0, tiles = 0, middle = 0;  // middle: where the second part of K begins
  unsigned n_clusters = 1;
  int share = 1, split = 1, share_bits = 0;  // split: 1 or 2
  float up = 1.0f;                           // what the decoder leaves out
};

// How the host asks for a launch: matrices without their boxes.
struct WideCall {
  hopper::MatrixBox x, codes;
  int tokens = 64;
};

// The cluster of a block: `share` neighbours along w read each tile of x together, times `split`
// parts of K.
struct Place {
  uint32_t base;
  int sub, part, n0, m0, first, last;  // tiles first to last - 1

  template <int kTokens>
  PYFMT_DEVICE static Place of(const Params& p) {
    Place at;
    at.base = hopper::shared_start();
    hopper::keep(at.base);
    const int rank = p.share * p.split > 1 ? int(hopper::cluster_rank()) : 0;
    const unsigned cluster = blockIdx.x >> (p.share_bits + p.split - 1);
    const unsigned m_tile = cluster / p.n_clusters;
    at.sub = rank & (p.share - 1);
    at.part = rank >> p.share_bits;
    at.n0 = int((cluster - m_tile * p.n_clusters) << p.share_bits | unsigned(at.sub)) * kRows;
    at.m0 = int(m_tile) * kTokens;
    at.first = at.part ? p.middle : 0;
    at.last = at.part + 1 == p.split ? p.tiles : p.middle;
    return at;
  }
};

// ---- shared memory ----------------------------------------------------------------------------

constexpr int kHeader = 1024, kPitch = kRows + 4;

template <class F, int kTokens>
struct Layout {
  static constexpr int kWarps = 4, kWarpRows = kRows / kWarps, kPasses = kWarpRows / kPass;
  static constexpr uint32_t kStages = kTokens == 64 ? 6 : 4;
  static constexpr uint32_t kTileOfX = kTokens * 128, kTileOfW = kRows * 128;
  static constexpr uint32_t kFactors = F::kGroups ? 1024 : 0;  // two floats a row
  static constexpr uint32_t kStage = kTileOfX + kTileOfW + kFactors;
  static constexpr uint32_t kStageAt = kHeader, kCodesAt = kStageAt + kStages * kStage;

  // The copy engine takes its time for each row, however short: where there is room, codes of two
  // or four tiles come together.
  static constexpr uint32_t kTileRow = F::kColumns * F::kBits / 8;
  static constexpr uint32_t kSpan = kTokens < 256 ? 128 / kTileRow : F::kBits == 4 ? 2 : 1;
  static constexpr uint32_t kRowBytes = kSpan * kTileRow, kSlot = kRows * kRowBytes;
  static constexpr uint32_t kScaleBytes = kTeams * kRows * F::kScalePitch;
  static constexpr uint32_t kMost = (hopper::kMostShared - kCodesAt - kScaleBytes) / kSlot;
  static constexpr uint32_t kDepth = kMost * kSpan > 16 ? 16 / kSpan : kMost;
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
template <class F, int kTokens>
struct Stage {
  using S = Layout<F, kTokens>;
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
  PYFMT_DEVICE uint32_t factors(uint32_t base) const { return w(base) + S::kTileOfW; }
};

// Up to 256 bytes for decoding, behind the barriers.
constexpr uint32_t kTableAt = 768;

PYFMT_DEVICE uint32_t codes_barrier(uint32_t base, uint32_t slot) {
  return base + 128u + 8u * slot;
}

// For the sums of the other part of K.
PYFMT_DEVICE uint32_t sums_barrier(uint32_t base) {
  return base + 192u;
}

// By the first threads of a block.
template <class F, int kTokens>
PYFMT_DEVICE void init_barriers(const Params& p, uint32_t base) {
  const uint32_t i = threadIdx.x;
  if (i > 24) return;
  const uint32_t arrivals = i < 8    ? Layout<F, kTokens>::kWarps + 1
                            : i < 16 ? uint32_t(kConsumers / 32 * p.share)
                                     : 1;
  hopper::barrier_init(base + 8 * i, arrivals);
  hopper::barrier_init_fence();
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
