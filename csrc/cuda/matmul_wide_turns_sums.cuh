// SPDX-License-Identifier: Apache-2.0
// Sums of two parts of K, where matmul_wide_turns.cuh decodes in place: each block gives the other
// those of the half of the tokens that it has first, as soon as the last products of that half are
// over, and adds what it is given to the other half. Two summands: the order does not matter.
#pragma once

#include "matmul_wide_turns_room.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace turns {

// Where a thread's sums are sent to, or found: pieces of 16 bytes, those of either warpgroup in one
// of the two stages that the block there, of `steps` chunks, takes for no chunk any more. R: its
// room.
template <class R>
struct SumsAt {
  static constexpr uint32_t kPiece = kConsumers / 2 * 16;
  static_assert(R::kWide / 8 * kPiece == R::kStage, "the sums of a warpgroup fill a stage");
  uint32_t first;

  PYFMT_DEVICE SumsAt(uint32_t base, int steps) {
    const uint32_t stage = (uint32_t(steps) + threadIdx.x / 128) % R::kStages;
    first = base + kHeader + stage * R::kStage + threadIdx.x % 128 * 16;
  }
  PYFMT_DEVICE uint32_t at(int piece) const { return first + uint32_t(piece) * kPiece; }
};

template <class R, int kAll>
PYFMT_DEVICE void send_sums(const Params& p, const Place& at, const float (&sums)[kAll]) {
  const uint32_t rank = uint32_t((at.part ^ 1) << p.share_bits | at.sub);
  const uint32_t bar = hopper::cluster_address(sums_barrier(at.base), rank);
  const SumsAt<R> there(hopper::cluster_address(at.base, rank),
                        at.part ? p.middle : p.tiles - p.middle);
  hopper::barrier_wait(at.base + kMaySend, 0);
#pragma unroll
  for (int i = 0; i < kAll / 2; i += 4) {
    hopper::store_counted(there.at(i / 4), sums[i], sums[i + 1], sums[i + 2], sums[i + 3], bar);
  }
}

template <class R, int kAll>
PYFMT_DEVICE void take_sums(const Place& at, int steps, float (&sums)[kAll]) {
  constexpr int kHalf = kAll / 2;
  const SumsAt<R> here(at.base, steps);
  hopper::barrier_wait(sums_barrier(at.base), 0);
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    const float4 v = hopper::load_floats(here.at(i / 4));
    sums[kHalf + i] += v.x;
    sums[kHalf + i + 1] += v.y;
    sums[kHalf + i + 2] += v.z;
    sums[kHalf + i + 3] += v.w;
  }
}

}  // namespace turns
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
