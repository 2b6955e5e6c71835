// SPDX-License-Identifier: Apache-2.0
// The kernel for few tokens whose activations stay in registers.
//
// A warp owns 512 columns of k of up to eight tokens, as the right-hand operands of the tensor
// cores: 64 registers, brought once. Codes and scales of all rows of its block stream by, sixteen
// rows at once, through a ring of its own, in whole lines of 128 bytes. What the warps have of two
// tiles of rows meets in shared memory, where some of them add it up while the others go on. Two
// blocks of a cluster may share k: each finishes every other tile.
//
// Activations are what a launch waits for, so little is copied ahead of them, and they come by
// whole sectors: two tokens by 256 bytes a load of a warp, turned from lane to lane in shared
// memory.
//
// Sums are taken in an order that depends on the shape alone, so that a call gives the same bits
// every time; matmul_skinny.cuh's sums have another order.
#pragma once

#include <type_traits>

#include "matmul_skinny_still_sums.cuh"

namespace pyfmt {
namespace cuda {

// What one warp does: copies of its codes and scales, and products.
template <class W>
struct SkinnyStillWarp {
  using Still = SkinnyStill<W>;
  using D = typename W::D;
  static constexpr int kSteps = Still::kSteps, kSlots = Still::kSlots;
  static constexpr int kSpan = kSteps * kSlots;  // steps of a tile
  static constexpr int kWords = 4 * W::kVectors * kSteps;

  const SkinnyParams& p;
  int lane, t;
  int first_column, slots;  // slots of this warp that k has
  uint32_t x[kSpan][W::kUnits][D::kPairs];
  float sums[4];
  // Of the next tile, as this lane copies them.
  const uint8_t *codes, *scales;
  uint32_t four_rows;
  unsigned to, scales_to;
  // Where this lane reads: even and odd vectors, scales.
  unsigned from[2], scales_from;

  PYFMT_DEVICE SkinnyStillWarp(const SkinnyParams& p, int part, int first_tile)
      : p(p), lane(int(threadIdx.x & 31)), first_column(part * Still::kColumns) {
    keep(lane);
    t = lane & 3;
    slots = max(0, min(kSlots, (p.k - first_column) / Still::kSlotColumns));
    keep(slots);
    const int first = Still::kRows * first_tile, row = lane >> 2;
    codes = p.codes + int64_t(first + (lane >> 3)) * p.row_bytes + first_column / 8 * D::kBits +
            16 * (lane & 7);
    four_rows = 4 * uint32_t(p.row_bytes);
    // The halves of every other row change places, against conflicts.
    to = unsigned((16 * lane) ^ ((lane & 8) << 3));
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      from[v] = unsigned(Still::kLine * row + 16 * t + 64 * (row & 1) * (v ? -1 : 1));
      keep(from[v]);
    }
    const int scale_row = lane / Still::kScaleLanes, share = lane % Still::kScaleLanes;
    scales = static_cast<const uint8_t*>(p.scales) + int64_t(first + scale_row) * p.row_scales +
             first_column / W::kStep * Still::kStepScales + share * Still::kScaleUnit;
    scales_to = unsigned(kSlots * Still::kSlot + lane * Still::kScaleUnit);
    scales_from = unsigned(kSlots * Still::kSlot + row * Still::kRowScales + W::kFactors * t);
    keep(codes);
    keep(four_rows);
    keep(scales);
    keep(to);
    keep(scales_from);
  }

  // ---- activations, once ------------------------------------------------------------------------

  // A load of a warp is of two tokens by a step. What is beyond k is not used.
  static constexpr int kLoads = Still::kMostTokens / 2;
  using Rows = const uint16_t* [kLoads][kSlots];
  static_assert(W::kStep == 128 && W::kUnits * D::kPairs == 4 * kLoads, "a step of x");

  PYFMT_DEVICE void find_x(int first_token, int tokens, Rows& rows) const {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int token = first_token + min(2 * j + (lane >> 4), tokens - 1);
#pragma unroll
      for (int v = 0; v < kSlots; ++v) {
        const int column = min(first_column + v * Still::kSlotColumns, p.k - Still::kSlotColumns);
        rows[j][v] = static_cast<const uint16_t*>(p.x) + int64_t(token) * p.x_stride + column +
                     8 * (lane & 15);
      }
    }
  }
  PYFMT_DEVICE void ask_for_x(const Rows& rows, int tokens) {
#pragma unroll
    for (int s = 0; s < kSpan; ++s) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (2 * j >= tokens) break;
        put(load_once16(rows[j][s / kSteps] + s % kSteps * W::kStep), x[s][0] + 4 * j);
      }
    }
  }
  // Sixteen bytes of a token's step in `room`, placed against conflicts.
  PYFMT_DEVICE static unsigned x_place(int token, int chunk) {
    return unsigned(Still::kTokenBytes * token + 16 * (chunk ^ chunk >> 3 ^ (token & 1) << 1));
  }
  // From lane to lane. Tokens beyond the last are as the last: what they give is never stored.
  PYFMT_DEVICE void turn_x(SharedAddress room, int tokens) {
    const int token = min(lane >> 2, tokens - 1);
#pragma unroll
    for (int s = 0; s < kSpan; ++s) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (2 * j >= tokens) break;
        const uint32_t* const w = x[s][0] + 4 * j;
        store_shared16(room + x_place(min(2 * j + (lane >> 4), tokens - 1), lane & 15),
                       make_uint4(w[0], w[1], w[2], w[3]));
      }
      warp_barrier();
#pragma unroll
      for (int u = 0; u < W::kUnits; ++u) {
        uint32_t raw[D::kPairs];
        put(load_shared16(room + x_place(token, W::unit_start(t, u) / 8)), raw);
        order_pairs<D>(raw, x[s][u]);
      }
      warp_barrier();
    }
  }
  PYFMT_DEVICE static void put(const uint4& from, uint32_t* to) {
    to[0] = from.x;
    to[1] = from.y;
    to[2] = from.z;
    to[3] = from.w;
  }

  // ---- codes and scales, in the background ------------------------------------------------------

  // The scales of a tile come with its first slot.
  PYFMT_DEVICE void load_slot(SharedAddress stage, int which) const {
    if (which < slots) {
      const SharedAddress slot = stage + to + unsigned(which * Still::kSlot);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        start_copy<16>(slot + unsigned(512 * i),
                       codes + uint64_t(four_rows) * unsigned(i) + which * Still::kLine, 16);
      }
    }
    if (which == 0 && lane % Still::kScaleLanes < slots) {
      start_copy<Still::kScaleUnit>(stage + scales_to, scales, Still::kScaleUnit);
    }
  }
  PYFMT_DEVICE void next_tile() {
    codes += int64_t(Still::kRows) * p.row_bytes;
    scales += int64_t(Still::kRows) * p.row_scales;
  }

  // ---- products ---------------------------------------------------------------------------------

  using Scales =
      uint32_t[2][kSpan];  // of rows lane / 4 and 8 more: one of 32 elements, or two of 16

  // All scales of a tile. Whether one of them asks for `scaled<true>`.
  PYFMT_DEVICE bool read_scales(SharedAddress stage, Scales& scale) const {
    uint32_t found = 0;
#pragma unroll
    for (int s = 0; s < kSpan; ++s) {
      uint32_t here = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale[r][s] = load_small<W::kFactors>(
            stage + scales_from + unsigned(8 * r * Still::kRowScales + s * Still::kStepScales));
        here |= scale[r][s] - unsigned(D::kLowest);
      }
      if (s / kSteps < slots) found |= here;
    }
    if constexpr (W::kScale == Scale::kE8M0) {
      static_assert(D::kHighest >= D::kLowest + 127, "bytes that one factor serves");
      return any_lane(found > 127);
    }
    return false;
  }

  template <int kWhich>
  PYFMT_DEVICE void multiply_slot(SharedAddress stage, const Scales& scale, bool special) {
    uint32_t words[2][kWords];  // of rows lane / 4 and 8 more
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      const int r = i & 1, v = i >> 1;
      put(load_shared16(stage + from[v & 1] +
                        unsigned(kWhich * Still::kSlot + 8 * Still::kLine * r + 64 * v)),
          words[r] + 4 * v);
    }
    if (W::kScale == Scale::kE8M0 && special) {
      multiply<kWhich, true>(words, scale);
    } else {
      multiply<kWhich, false>(words, scale);
    }
  }

  template <int kWhich, bool kEverything>
  PYFMT_DEVICE void multiply(const uint32_t (&words)[2][kWords], const Scales& scale) {
    // Elements that come as they are have their own sums, which are scaled down to the others.
    constexpr bool kApart = kEverything && D::kSubnormal;
    float apart[4] = {};
    float (&d)[4] = kApart ? apart : sums;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      Factor f[2][2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t code = scale[r][kWhich * kSteps + s];
        if constexpr (W::kScale == Scale::kE4M3) {
          D::factors(code, f[r]);
        } else {
          f[r][0] = f[r][1] = D::template factor<kEverything>(code);
        }
      }
#pragma unroll
      for (int u = 0; u < W::kUnits; ++u) {
        uint32_t a[2][D::kPairs];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          D::template scaled<kEverything>(words[r] + (s * W::kUnits + u) * D::kWords,
                                          f[r][2 * u / W::kUnits], a[r]);
        }
        const uint32_t (&b)[D::kPairs] = x[kWhich * kSteps + s][u];
#pragma unroll
        for (int i = 0; i < D::kPairs; i += 2) {
          mma16816(d, a[0][i], a[1][i], a[0][i + 1], a[1][i + 1], b[i], b[i + 1]);
        }
      }
    }
    if constexpr (kApart) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[c] = fused(apart[c], 1.0f / float(1 << D::kDown), sums[c]);
      }
    }
  }

  // ---- sums -------------------------------------------------------------------------------------

  PYFMT_DEVICE void clear() {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[c] = 0;
  }
  // [token][row]; mine: this lane's first
  PYFMT_DEVICE void store_sums(SharedAddress mine, int tokens) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (2 * t + c >= tokens) continue;
      const SharedAddress at = mine + unsigned(4 * c * Still::kPitch);
      store_small<4>(at, as_uint(sums[c]));
      store_small<4>(at + 32, as_uint(sums[2 + c]));
    }
  }
};

template <class W>
__global__ void __launch_bounds__(32 * SkinnyStill<W>::kMostWarps, 1)
    skinny_still(const __grid_constant__ SkinnyParams p) {
  using Still = SkinnyStill<W>;
  using Warp = SkinnyStillWarp<W>;
  constexpr int kSlots = Still::kSlots, kStages = Still::kStages;
  const int warps = int(blockDim.x >> 5), me = int(threadIdx.x >> 5);
  const int rank = int(blockIdx.x) % p.split, group = int(blockIdx.x) / p.split;
  const int first_tile = group * p.even_tiles + min(group, p.longer_blocks);
  const int count = p.even_tiles + (group < p.longer_blocks);
  const int first_token = int(blockIdx.y) * p.tile_tokens;
  const int tokens = min(p.tile_tokens, p.tokens - first_token);
  const SharedAddress base = shared_address(dynamic_shared());
  const SharedAddress places = base + unsigned(warps * kStages * Still::kStage);
  const int bytes = 4 * tokens * Still::kPitch;
  const SharedAddress inbox = places + unsigned(Still::kPlaces * warps * bytes);
  const SharedAddress signals = inbox + unsigned(p.split > 1 ? 2 * Still::kInboxTile : 0);
  SkinnyStillSums<Still> sums{p,     tokens, warps, me,      rank,  first_token, first_tile,
                              count, places, inbox, signals, bytes, me};

  // The ring is filled but for the slot that was used last.
  const SharedAddress ring = base + unsigned(me * kStages * Still::kStage);
  const SharedAddress last = ring + unsigned((kStages - 1) * Still::kStage);
  Warp warp(p, rank * warps + me, first_tile);
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
      if (next % kSlots == kSlots - 1) stage += unsigned(Still::kStage);
    }
  };
  // Few of them first: activations must not wait behind them.
  fill_to(min(p.early, kSlots * kStages - 1));
  typename Warp::Rows rows;
  warp.find_x(first_token, tokens, rows);
  sums.meet();
  wait_for_earlier_launch();
  allow_next_launch();
  warp.ask_for_x(rows, tokens);
  const float tensor_scale = p.tensor_scale ? *p.tensor_scale : 1.0f;
  fill_to(kSlots * kStages - 1);
  warp.turn_x(sums.place(0, me), tokens);

  const SharedAddress mine =
      sums.place(0, me) + unsigned(4 * (2 * warp.t * Still::kPitch + (warp.lane >> 2)));
  const auto factor = [&] { return tensor_scale * float(1 << W::D::kDown); };
  SharedAddress before = last;
  stage = ring;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    typename Warp::Scales scale;
    warp.clear();
    copies_arrived<kSlots * kStages - 2>();
    warp_barrier();
    fill(before, kSlots - 1);
    const bool special = warp.read_scales(stage, scale);
    if (warp.slots > 0) warp.template multiply_slot<0>(stage, scale, special);
    if constexpr (kSlots > 1) {
      copies_arrived<kSlots * kStages - 2>();
      warp_barrier();
      fill(stage, 0);
      if (warp.slots > 1) warp.template multiply_slot<1>(stage, scale, special);
    }
    before = stage;
    stage = stage == last ? ring : stage + unsigned(Still::kStage);
    sums.wait_for_place(i);
    warp.store_sums(mine + unsigned((i & (Still::kPlaces - 1)) * bytes), tokens);
    sums.stored(i);
    sums.follow(i, factor());
  }
  sums.end(factor());
}

}  // namespace cuda
}  // namespace pyfmt
