// SPDX-License-Identifier: Apache-2.0
// The warps of matmul_wide_groups.cuh that decode: each takes the packed codes of its 32 rows from
// shared memory, and writes them as bfloat16 integers where products read them. They have no part
// in copies: a fence that shows their stores to the tensor
// cores would wait for the copies under way.
#pragma once

#include "decode.cuh"
#include "matmul_wide_groups_room.cuh"
#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace groups {

// Tensor cores see weights times 2^-kDown.
constexpr int kDown = 6;

// Codes to pairs of neighbours, kPairs of them. Below 2^-125 bfloat16 is evenly spaced: a byte, or
// half of one, with its sign turned into an offset, is a number of steps of 2^-133 as it stands. A
// step at a time for all pairs: one warp a scheduler has nothing else to do while it waits.
template <int kBits, int kPairs>
PYFMT_DEVICE void decode_pairs(const uint32_t (&words)[kPairs * kBits / 16],
                               uint32_t (&out)[kPairs]) {
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const uint32_t word = words[j * kBits / 16];
    if constexpr (kBits == 4) {
      out[j] = pick_bytes(word, 0, uint32_t(j % 4) * 0x0101u + 0x4040u);
    } else {
      out[j] = pick_bytes(word, 0, j % 2 ? 0x4342u : 0x4140u);
    }
  }
  hopper::pin(out);
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    out[j] = kBits == 4 ? mask_xor(out[j], 0x00f0000fu, 0x00800008u) : out[j] ^ both(0x80u);
  }
  hopper::pin(out);
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    out[j] = kBits == 4 ? fused_pairs(out[j], 0x7d007f00u, both(0xbe00u))
                        : fused_pairs(out[j], both(0x7f00u), both(0xc000u));
  }
  hopper::pin(out);
}

// Eight codes each, of `units`, to bfloat16 integers: by thread `thread` of `threads`.
template <int kBits>
PYFMT_DEVICE void write_out(const uint8_t* codes, void* to, int64_t units, int64_t thread,
                            int64_t threads) {
  constexpr int kAtOnce = 4, kWords = kBits / 4;
#pragma unroll 1
  for (int64_t first = thread; first < units; first += kAtOnce * threads) {
    uint32_t words[kAtOnce][kWords];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t unit = first + i * threads;
      if (unit < units) hopper::load_words<kWords>(codes + unit * kBits, words[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t unit = first + i * threads;
      uint32_t out[4];
      decode_pairs<kBits, 4>(words[i], out);
      if (unit < units) static_cast<uint4*>(to)[unit] = make_uint4(out[0], out[1], out[2], out[3]);
    }
  }
}

template <class S>
struct Decoder {
  static constexpr int kPass = 16, kPasses = kRows / kWarpsThatDecode / kPass;  // rows at a time
  static constexpr int kWords = S::kBits;                                       // of 32 codes

  const Walk<S> walk;
  const uint32_t nothing;
  int left;  // tiles of w
  int lane;
  Ring<S::kStages> stage;
  Ring<S::kDepth> slot;
  int within = 0;        // the tile of a slot that is read next
  uint32_t mine, codes;  // where this lane writes in a stage, where its codes start, but for turns
  uint32_t words[kPasses][kWords];

  PYFMT_DEVICE Decoder(const Params& p, const Walk<S>& walk)
      : walk(walk), nothing(p.nothing), lane(int(threadIdx.x) & 31) {
    const uint32_t first = uint32_t(kPass * kPasses * hopper::uniform(int(threadIdx.x) >> 5 & 3));
    const uint32_t row = first + uint32_t(lane % 8 + lane / 16 * 8), half = lane / 8 % 2;
    mine = walk.base + S::kStageAt + S::kTileOfX + row * 128 + (4 * half ^ (row & 7)) * 16;
    codes = walk.base + S::kCodesAt + row * S::kRowBytes + half * (4 * S::kBits);
    hopper::keep(mine);
    hopper::keep(codes);
    left = 0;
    if (walk.more()) left = int((walk.count - walk.tile - 1) / gridDim.x + 1) * walk.steps;
  }

  // The next tile's codes, and what they lie in is free.
  PYFMT_DEVICE void read() {
    hopper::barrier_wait(walk.base + kCodesFull + 8 * slot.place, slot.parity);
    const uint32_t from = codes + slot.place * S::kSlot + uint32_t(within) * S::kTileRow;
    uint32_t seen = 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int b = 0; b < kWords; b += 4) {
        const uint4 v = hopper::load_shared16(hopper::turned<S::kRowBytes>(from + uint32_t(4 * b)) +
                                              uint32_t(pass * kPass) * S::kRowBytes);
        words[pass][b] = v.x;
        words[pass][b + 1] = v.y;
        words[pass][b + 2] = v.z;
        words[pass][b + 3] = v.w;
        seen |= v.x;
      }
    }
    if (++within < S::kSpan) return;
    within = 0;
    hopper::warp_sync();
    const uint32_t empty = walk.base + kCodesEmpty + 8 * slot.place;
    if (lane == 0) hopper::barrier_arrive_here(hopper::after_reading(empty, seen, nothing));
    slot.next();
  }

  PYFMT_DEVICE void run() {
    if (left) read();
#pragma unroll 1
    for (; left; --left) {
      uint32_t out[kPasses][16];
      decode_pairs<S::kBits, 16>(words[0], out[0]);
      hopper::barrier_wait(walk.base + kEmpty + 8 * stage.place, stage.parity ^ 1);
      const uint32_t to = mine + stage.place * S::kTiles;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        if (pass > 0) decode_pairs<S::kBits, 16>(words[pass], out[pass]);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint32_t* v = out[pass] + 4 * q;
          hopper::store_shared16((to + uint32_t(pass * kPass * 128)) ^ uint32_t(16 * q), v[0], v[1],
                                 v[2], v[3]);
        }
      }
      if (left > 1) read();
      hopper::stores_fence();
      hopper::warp_sync();
      if (lane == 0) hopper::barrier_arrive_here(walk.base + kFull + 8 * stage.place);
      stage.next();
    }
  }
};

}  // namespace groups
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
