// SPDX-License-Identifier: Apache-2.0
// The kernel of matmul_wide.h for elements with scales of their blocks, whose products are bfloat16
// numbers: all sums in one accumulator. A block owns 128 rows of w and kTokens rows of x. Two
// warpgroups of 64 rows each decode codes into fragments, in registers, and multiply. They take
// turns at the tensor cores, so that products of one are under way while the other decodes. Another
// warpgroup brings x, codes and scales.
#pragma once

#include "matmul_wide.cuh"
#include "matmul_wide_blocks_room.cuh"
#include "matmul_wide_finish.cuh"
#include "matmul_wide_weights.cuh"
#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace blocks {

// ---- what multiplies --------------------------------------------------------------------------

template <class F, int kTokens>
struct Multiplier {
  using R = Room<F, kTokens>;
  using Product = hopper::RegisterProduct<hopper::Bf16, kTokens>;
  static constexpr int kCount = kTokens / 2;
  static constexpr int kTogether = F::kBits == 6 ? 2 : 4;  // words of a load
  using Fragments = uint32_t[8][4];                        // of the steps of a chunk

  const Params& p;
  const Place& at;
  int lane, group, steps;
  uint32_t peer = 0;       // what turns an address of this block into that of another
  uint32_t codes, scales;  // where this lane reads, but for turns
  uint32_t turned = 0;     // which of the 16-byte pieces of its row
  Ring<R::kStages> stage, done;
  Ring<R::kDepth> slot;
  uint32_t turn;

  // Rows change places within eight, so that lanes which read together never share a bank.
  PYFMT_DEVICE static int row_of(int lane) {
    const int g = lane / 4;
    return F::kBits == 4 ? g >> 1 | (g & 1) << 2 : g;
  }

  PYFMT_DEVICE Multiplier(const Params& p, const Place& at)
      : p(p),
        at(at),
        lane(int(threadIdx.x) & 31),
        group(hopper::uniform(int(threadIdx.x) >> 7)),
        steps(at.last - at.first) {
    if (p.share > 1 && lane < p.share) {
      peer = hopper::cluster_address(at.base, uint32_t(at.part * p.share + lane)) - at.base;
    }
    const uint32_t row = uint32_t(16 * (threadIdx.x >> 5 & 7) + row_of(lane));
    turned = F::kBits == 6 ? 0 : (row & 7) << 4;
    codes = at.base + R::kCodesAt + row * R::kRowBytes;
    scales = at.base + R::kScalesAt + row * R::kRowScales + uint32_t(lane % 4 * F::kEntry);
    turn = group ? 0 : 1;
    hopper::keep(codes);
    hopper::keep(scales);
  }

  // This lane's 32 codes of row r of its two, of a chunk that starts at `half` in the slot's rows.
  PYFMT_DEVICE void read(uint32_t half, int r, uint32_t (&words)[F::kBits]) const {
    const uint32_t row = codes + slot.place * R::kSlot + uint32_t(r * 8) * R::kRowBytes;
    const uint32_t mine = half * R::kHalf + uint32_t(lane % 4 * 4 * F::kBits);
#pragma unroll
    for (int i = 0; i < F::kBits; i += kTogether) {
      const uint32_t there = row + ((mine + uint32_t(4 * i)) ^ turned);
      if constexpr (kTogether == 4) {
        const uint4 v = hopper::load_shared16(there);
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
      } else {
        const uint2 v = hopper::load_shared8(there);
        words[i] = v.x, words[i + 1] = v.y;
      }
    }
  }

  template <bool kAll>
  PYFMT_DEVICE static void to_fragments(const uint32_t (&words)[F::kBits], uint32_t raw, int r,
                                        Fragments& to) {
    uint32_t pairs[16];
    F::template decode<kAll>(words, raw, pairs);
#pragma unroll
    for (int j = 0; j < 16; ++j) to[j / 2][r + 2 * (j & 1)] = pairs[j];
  }

  // What a lane has of a chunk: its codes and their scales, of two rows.
  struct Packed {
    uint32_t words[2][F::kBits], raw[2];
  };
  // Chunk i, once it is there.
  PYFMT_DEVICE void load(int i, Packed& c) {
    const uint32_t half = R::kSpan == 2 ? uint32_t(i & 1) : 0;
    hopper::barrier_wait(at.base + kCodesFull + 8 * slot.place, slot.parity);
    uint32_t seen = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      c.raw[r] = hopper::load_shared_small<F::kEntry>(scales + slot.place * R::kScales +
                                                      uint32_t(r * 8) * R::kRowScales +
                                                      half * (4 * F::kEntry));
      read(half, r, c.words[r]);
      seen |= c.raw[r];
#pragma unroll
      for (int i = 0; i < F::kBits; i += kTogether) seen |= c.words[r][i];
    }
    if (R::kSpan == 2 && !(i & 1)) return;
    hopper::warp_sync();
    const uint32_t empty = at.base + kCodesEmpty + 8 * slot.place;
    if (lane == 0) hopper::barrier_arrive_here(hopper::after_reading(empty, seen, p.nothing));
    slot.next();
  }
  PYFMT_DEVICE void decode(const Packed& c, Fragments& to) const {
    bool special = false;
    if constexpr (F::kHasSpecials) {
      special = F::special(c.words[0], c.raw[0]) || F::special(c.words[1], c.raw[1]);
      special = hopper::any_lane(special);
    }
    if (special) {
#pragma unroll
      for (int r = 0; r < 2; ++r) to_fragments<F::kHasSpecials>(c.words[r], c.raw[r], r, to);
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) to_fragments<false>(c.words[r], c.raw[r], r, to);
    }
  }

  PYFMT_DEVICE void wait_turn() {
    hopper::barrier_wait(at.base + kTurns + 8 * uint32_t(group), turn);
    turn ^= 1;
  }
  PYFMT_DEVICE void pass_turn() const {
    const uint32_t next = uint32_t(group) ^ 1;
    if (lane == 0) hopper::barrier_arrive_here(at.base + kTurns + 8 * next);
  }

  // The products of the chunk before are over: the warp has no more use for its stages.
  PYFMT_DEVICE void finish_products() {
    hopper::products_wait<0>();
#pragma unroll
    for (int h = 0; h < 2; ++h, done.next()) {
      const uint32_t empty = at.base + kEmpty + 8 * done.place;
      if (p.share > 1) {
        if (lane < p.share) hopper::barrier_arrive(empty + peer);
      } else if (lane == 0) {
        hopper::barrier_arrive_here(empty);
      }
    }
  }

  PYFMT_DEVICE void multiply(float (&sums)[kCount], const Fragments& w) {
    wait_turn();
    uint32_t x[2];
#pragma unroll
    for (int h = 0; h < 2; ++h, stage.next()) {
      hopper::barrier_wait(at.base + kFull + 8 * stage.place, stage.parity);
      x[h] = hopper::tile_code(at.base + kHeader + stage.place * R::kStage);
    }
    // Without a branch between them, which would make them two groups.
    hopper::products_fence();
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      if (s == 7) pass_turn();
      Product::add_to(sums, w[s], hopper::tile_descriptor(x[s / 4], s % 4), 1);
    }
    hopper::products_commit();
  }

  // Products of fragments `now` beside decoding of chunk i + 1 to `next`.
  PYFMT_DEVICE void chunk(int i, float (&sums)[kCount], const Fragments& now, Fragments& next) {
    if (i > 0) finish_products();
    multiply(sums, now);
    if (i + 1 < steps) {
      Packed c;
      load(i + 1, c);
      decode(c, next);
    }
  }

  PYFMT_DEVICE void run(float (&sums)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums[j] = 0.0f;
    hopper::pin(sums);
    Packed c;
    Fragments a, b;
    if (steps > 0) {
      load(0, c);
      decode(c, a);
    }
#pragma unroll 1
    for (int i = 0; i < steps; i += 2) {
      chunk(i, sums, a, b);
      if (i + 1 < steps) chunk(i + 1, sums, b, a);
    }
    hopper::products_wait<0>();
    hopper::pin(sums);
  }
};

template <class F, int kTokens>
PYFMT_DEVICE void take_turns(const Params& p) {
  using R = Room<F, kTokens>;
  const Place at = Place::of<kTokens>(p);
  blocks::init_barriers<F, kTokens>(p, at.base);
  if (threadIdx.x == 0) hopper::prefetch_map(p.codes_map);
  if (p.share > 1) hopper::cluster_meet();
  if (p.share == 1) __syncthreads();
  // Registers: 168 for each of 384 threads, shared out anew.
  if (threadIdx.x >= kConsumers) {
    hopper::fewer_registers<40>();
    hopper::start_dependents();
    Bringer<F, kTokens>{p, at, at.last - at.first}.run();
  } else {
    hopper::more_registers<232>();
    float sums[kTokens / 2];
    Multiplier<F, kTokens>(p, at).run(sums);
    hopper::wait_for_previous();
    meet_and_finish<kTokens>(p, at, sums, Multiplier<F, kTokens>::row_of(int(threadIdx.x) & 31));
  }
}

template <class F, int kTokens>
__global__ void __launch_bounds__(PYFMT_WIDE_THREADS(kThreadsHere), 1)
    matmul_blocks_kernel(const __grid_constant__ Params p) {
#if defined(PYFMT_SM90A)
  take_turns<F, kTokens>(p);
#endif
}

template <class F, int kTokens>
void launch_tokens(Params& p, const WideCall& call, Stream stream) {
  using R = Room<F, kTokens>;
  describe_codes<F>(p, call, int(R::kRowBytes), kRows);
  launch_wide(matmul_blocks_kernel<F, kTokens>, p, kTokens, kThreadsHere, R::kBytes, stream);
}

template <class F>
void launch_elements(Params& p, const WideCall& call, Stream stream) {
  launch_panel<F::kBits, 32>(p, call, stream);
  if (call.tokens == 256) return launch_tokens<F, 256>(p, call, stream);
  if (call.tokens == 192) return launch_tokens<F, 192>(p, call, stream);
  launch_tokens<F, 128>(p, call, stream);
}

}  // namespace blocks

// The kernel for elements E with scales of their blocks.
template <class E, Scale kScale>
Kernel blocks_kernel() {
  return {blocks::launch_elements<Weights<E, kScale, false>>, kChunk, true};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
