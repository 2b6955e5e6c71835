// SPDX-License-Identifier: Apache-2.0
// The kernel for few rows of codes by a weight of codes.
//
// One tensor-core step of bytes is one block of 32 products, whose sum is an exact integer; it is
// multiplied by the two scales of its blocks in float32. Codes of four bits become bytes in a few
// instructions (integers: a mask, E2M1: two lookups whose sum it is, by two steps).
//
// A warp owns 512 or 1024 columns of k of all rows of x, as the right-hand operands of the tensor
// cores, in registers, as matmul_skinny_still.cuh does. Codes and scales of all rows of the weight
// of its block stream by, sixteen rows at once, through a ring of its own, in whole lines of 128
// bytes. What the warps have of a tile of rows meets in shared memory, where some of them add it
// up. Sums are taken in an order that depends on k alone.
//
// Registers are left for the small blocks that write x (matmul_codes_x.cuh) beside this one's.
#pragma once

#include "matmul_codes_warp.cuh"

namespace pyfmt {
namespace cuda {

// Sums of the warps to y: a token's of a tile is a warp's job, two lanes a row.
template <class S>
struct CodesSums {
  using Warp = CodesWarp<S>;
  const CodesParams& p;
  const int warps, first_tile, count;  // count: of tiles
  const SharedAddress places, signals;
  float factor;        // of sums
  int token;           // whose sums this warp adds up next
  int place = 0;       // of the tile that is added up next
  unsigned phase = 0;  // how often that place was used before

  PYFMT_DEVICE SharedAddress at(int place, int warp) const {
    return places + unsigned((place * warps + warp) * S::kSums);
  }
  PYFMT_DEVICE SharedAddress written(int place) const { return signals + unsigned(16 * place); }
  PYFMT_DEVICE SharedAddress taken(int place) const { return signals + unsigned(16 * place + 8); }

  // All threads of the block.
  PYFMT_DEVICE void meet() const {
    const int i = int(threadIdx.x);
    if (i < S::kPlaces) {
      signal_init(written(i), warps);
      signal_init(taken(i), p.tokens);
    }
    block_barrier();
  }

  // This warp's tokens of tile i, in the order of tiles.
  PYFMT_DEVICE void add_up(int i) {
#pragma unroll 1
    for (; token < p.tokens; token += warps) add_up_token(i);
    token -= p.tokens;
    if (++place == S::kPlaces) {
      place = 0;
      ++phase;
    }
  }
  PYFMT_DEVICE void add_up_token(int i) const {
    const int lane = int(threadIdx.x & 31), row = lane & 15, upper = lane >> 4;
    const int half = (warps + 1) / 2, count = upper ? warps - half : half;
    signal_wait(written(place), phase);
    SharedAddress from = at(place, upper ? half : 0) + Warp::sum_place(token, row);
    keep(from);
    const SharedAddress apart =
        S::kApart
            ? at(place, upper ? half : 0) + Warp::sum_place(token + CodesLayout::kApartRows, row)
            : 0;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      v[j] = j < count ? as_float(load_small<4>(from + unsigned(j * S::kSums))) : 0.0f;
      if constexpr (S::kApart) {
        if (j < count) v[j] = v[j] + as_float(load_small<4>(apart + unsigned(j * S::kSums)));
      }
    }
    const float s = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    const float other = as_float(lane_xor(as_uint(s), 16));
    // An arrival does not wait for reads under way, and what they read may be written over after
    // it: hence the address that depends on them, by way of the exchange on all lanes'.
    warp_barrier();
    if (lane == 0) signal_arrive(taken(place) + (as_uint(other) & uint32_t(p.n) >> 31));
    if (upper) return;
    const int n = S::kRows * (first_tile + i) + row;
    float y = (s + other) * factor;
    if (p.bias) y = y + load_element(p.bias, p.bias_dtype, n);
    store_element(p.out, p.out_dtype,
                  int64_t(uint64_t(unsigned(token)) * unsigned(p.n) + unsigned(n)), y);
  }
};

// So few registers that a warp of matmul_codes_x.cuh finds room beside four of these.
template <class E, Scale kScale, int kTiles, int kSlots>
__global__ void __maxnreg__(120) matmul_codes_kernel(const __grid_constant__ CodesParams p) {
  using S = CodesShape<E, kScale, kTiles, kSlots>;
  using Warp = CodesWarp<S>;
  constexpr int kStages = S::kStages;
  const int warps = int(blockDim.x >> 5), me = int(threadIdx.x >> 5), block = int(blockIdx.x);
  const int first_tile = block * p.even_tiles + min(block, p.longer_blocks);
  const int count = p.even_tiles + (block < p.longer_blocks);
  const SharedAddress base = (shared_address(dynamic_shared()) + 127) & ~SharedAddress(127);
  const SharedAddress ring = base + unsigned(me * kStages * S::kStage);
  const SharedAddress last = ring + unsigned((kStages - 1) * S::kStage);
  const SharedAddress numbers = base + unsigned(warps * kStages * S::kStage);
  const SharedAddress places = numbers + unsigned(warps * (S::kFloats + S::kXScales));
  const SharedAddress signals = places + unsigned(warps * S::kPlaces * S::kSums);
  CodesSums<S> sums{p, warps, first_tile, count, places, signals, p.factor, me};
  Warp warp(p, me, first_tile, numbers + unsigned(me * (S::kFloats + S::kXScales)));

  // The ring is filled but for the slot that was used last.
  int ahead = count;  // tiles to be copied
  const auto fill = [&](SharedAddress to, int which) {
    if (ahead > 0) warp.load_slot(to, which);
    close_copies();
    if (which == kSlots - 1) {
      warp.next_tile();
      --ahead;
    }
  };
  SharedAddress stage = ring;
  int next = 0;
  const auto fill_to = [&](int slots) {
#pragma unroll 1
    for (; next < slots; ++next) {
      fill(stage, next % kSlots);
      if (next % kSlots == kSlots - 1) stage += unsigned(S::kStage);
    }
  };
  constexpr int kAhead = kSlots * kStages - 1;
  fill_to(min(p.early, kAhead));
  sums.meet();
  allow_next_launch();
  wait_for_earlier_launch();
  warp.load_x(p.tokens);
  uint32_t whole[2] = {as_uint(1.0f), as_uint(1.0f)};
  if constexpr (S::kApart) {
    if (p.x_tensor_scale) whole[0] = as_uint(*p.x_tensor_scale);
    if (p.tensor_scale) whole[1] = as_uint(*p.tensor_scale);
    if (p.slots) clear_slots(p.slots, p.slot_count);
  }
  fill_to(kAhead);
  warp.place_x_scales();
  if constexpr (S::kApart) {
    // Not before the copies have started, which would wait for them.
    keep(whole[0]);
    keep(whole[1]);
    sums.factor = p.factor * as_float(whole[0]) * as_float(whole[1]);
  }

  SharedAddress before = last;
  stage = ring;
  int place = 0;
  unsigned phase = 0;
  const auto slot = [&](auto which) {
    constexpr int kWhich = decltype(which)::value;
    if constexpr (kWhich > 0) {
      copies_arrived<kAhead - 1>();
      warp_barrier();
      fill(stage, kWhich - 1);
    }
    if (kWhich < warp.slots) warp.template multiply_slot<kWhich>(stage);
  };
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    warp.clear();
    copies_arrived<kAhead - 1>();
    warp_barrier();
    fill(before, kSlots - 1);
    warp.decode_scales(stage);
    warp_barrier();
    slot(std::integral_constant<int, 0>());
    slot(std::integral_constant<int, 1>());
    if constexpr (kSlots > 2) {
      slot(std::integral_constant<int, 2>());
      slot(std::integral_constant<int, 3>());
    }
    before = stage;
    stage = stage == last ? ring : stage + unsigned(S::kStage);
    if (phase) signal_wait(sums.taken(place), phase - 1);
    warp.store_sums(sums.at(place, me));
    warp_barrier();
    if (warp.lane == 0) signal_arrive(sums.written(place));
    if (++place == S::kPlaces) {
      place = 0;
      ++phase;
    }
    // A tile later than possible, so that nobody waits for the slowest warp.
    if (i) sums.add_up(i - 1);
  }
  if (count) sums.add_up(count - 1);
}

}  // namespace cuda
}  // namespace pyfmt
