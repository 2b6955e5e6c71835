// SPDX-License-Identifier: Apache-2.0
// The kernel for few tokens whose activations stay in registers.
//
// A warp owns 512 columns of k of up to eight tokens, or 256 of up to sixteen, as the right-hand
// operands of the tensor cores: 64 registers, brought once. Codes and scales of all rows of its
// block stream by, sixteen rows at once, through a ring of its own, in whole lines of 128 bytes.
// What the warps of a block have of sixteen rows meets in shared memory, where one of them adds
// it up while the others go on; two blocks of a cluster may share k, and finish tiles in turn.
//
// Sums are taken in an order that depends on the shape alone, so that a call gives the same bits
// every time; matmul_skinny.cuh's sums have another order.
#pragma once

#include <type_traits>

#include "matmul_skinny_warp.cuh"

namespace pyfmt {
namespace cuda {

template <class W, int kTokenTiles>
struct SkinnyStill {
  using D = typename W::D;
  static constexpr bool kServes = D::kBits == 4 && !W::kGrouped;
  static constexpr int kTiles = kTokenTiles;     // of eight tokens
  static constexpr int kMostWarps = 16;          // of a block
  static constexpr int kRows = 16;               // of a tile
  static constexpr int kColumns = 512 / kTiles;  // of a warp
  static constexpr int kSteps = 8 / D::kBits;    // of a slot
  static constexpr int kSlotColumns = kSteps * W::kStep, kSlots = kColumns / kSlotColumns;
  static constexpr int kLine = kSlotColumns * D::kBits / 8;  // bytes of a row of a slot
  static constexpr int kSlot = kRows * kLine;
  static constexpr int kStepScales = W::kStep / (W::kScale == Scale::kE4M3 ? 16 : 32);
  static constexpr int kRowScales = kSlots * kSteps * kStepScales;  // of a tile, bytes
  static constexpr int kScaleLanes = kSlots;                        // that copy a row's
  static constexpr int kScaleUnit = kRowScales / kScaleLanes;
  static constexpr int kStage = kSlots * kSlot + kRows * kRowScales;  // a warp's part of a tile
  static constexpr int kStages = kTiles == 1 ? 2 : 4;
  // Sums: of tiles that are under way; tiles that are finished together.
  static constexpr int kPitch = kRows + 4, kPlaces = 4, kRound = 2;
  static constexpr int kInboxTile = 4 * 8 * kTiles * kRows;      // the other block's sums
  static constexpr int kSignals = 8 * (2 * 2 + 2 * 8 * kTiles);  // bytes
  static constexpr int kRoundColumns = 128, kRoundBytes = 2 * kRoundColumns;  // of x, at once
  static_assert(kRoundBytes <= kPlaces * 4 * kPitch, "x in the places of sums");

  static int shared_bytes(int tokens, int warps, int split) {
    const int sums = kPlaces * warps * tokens * kPitch * 4;
    return warps * kStages * kStage + sums + (split > 1 ? 2 * kInboxTile : 0) + kSignals;
  }
};

// What one warp does: copies of its codes and scales, and products.
template <class W, int kTiles>
struct SkinnyStillWarp {
  using Still = SkinnyStill<W, kTiles>;
  using D = typename W::D;
  static constexpr int kSteps = Still::kSteps, kSlots = Still::kSlots;
  static constexpr int kSpan = kSteps * kSlots;  // steps of a tile
  static constexpr int kWords = 4 * W::kVectors * kSteps;

  const SkinnyParams& p;
  int lane, t;
  int first_column, slots;  // slots of this warp that k has
  uint32_t x[kTiles][kSpan][W::kUnits][D::kPairs];
  float sums[kTiles][4];
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

  // Two tokens by 128 columns a load; what is beyond k is not used.
  static constexpr int kRounds = Still::kColumns / Still::kRoundColumns, kLoads = 4 * kTiles;
  static_assert(W::kStep == Still::kRoundColumns, "a step of x at a time");

  PYFMT_DEVICE uint32_t* raw(int round, int load) { return x[load / 4][round][load % 4]; }

  PYFMT_DEVICE void find_x(int first_token, int tokens,
                           const uint16_t* (&rows)[kLoads][kSlots]) const {
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
  PYFMT_DEVICE void ask_for_x(const uint16_t* const (&rows)[kLoads][kSlots], int tokens) {
#pragma unroll
    for (int s = 0; s < kRounds; ++s) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (2 * j >= tokens) break;
        const uint4 q = load_once16(rows[j][s / kSteps] + s % kSteps * Still::kRoundColumns);
        uint32_t* const words = raw(s, j);
        words[0] = q.x;
        words[1] = q.y;
        words[2] = q.z;
        words[3] = q.w;
      }
    }
  }
  // Sixteen bytes of a token in `room`, placed against conflicts.
  PYFMT_DEVICE static unsigned x_place(int token, int chunk) {
    const int turn = W::kVectors == 2 ? token & 1 : chunk >> 3 ^ (token & 1) << 1;
    return unsigned(Still::kRoundBytes * token + 16 * (chunk ^ turn));
  }
  // From lane to lane. Tokens beyond the last are as the last: what they give is never stored.
  PYFMT_DEVICE void turn_x(SharedAddress room, int tokens) {
#pragma unroll
    for (int s = 0; s < kRounds; ++s) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (2 * j >= tokens) break;
        const uint32_t* const words = raw(s, j);
        store_shared16(room + x_place(min(2 * j + (lane >> 4), tokens - 1), lane & 15),
                       make_uint4(words[0], words[1], words[2], words[3]));
      }
      warp_barrier();
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int token = min(8 * j + (lane >> 2), tokens - 1);
#pragma unroll
        for (int u = 0; u < W::kUnits; ++u) {
          uint32_t raw[D::kPairs];
#pragma unroll
          for (int i = 0; i < D::kPairs; i += 4) {
            const uint4 q = load_shared16(room + x_place(token, W::unit_start(t, u) / 8 + i / 4));
            raw[i] = q.x;
            raw[i + 1] = q.y;
            raw[i + 2] = q.z;
            raw[i + 3] = q.w;
          }
          order_pairs<D>(raw, x[j][s][u]);
        }
      }
      warp_barrier();
    }
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
    if (which == 0 && lane % Still::kScaleLanes < slots && lane < 16 * Still::kScaleLanes) {
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
      const uint4 four = load_shared16(
          stage + from[v & 1] + unsigned(kWhich * Still::kSlot + 8 * Still::kLine * r + 64 * v));
      uint32_t* const w = words[r] + 4 * v;
      w[0] = four.x;
      w[1] = four.y;
      w[2] = four.z;
      w[3] = four.w;
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
    float apart[kTiles][4] = {};
    float (&d)[kTiles][4] = kApart ? apart : sums;
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
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint32_t (&b)[D::kPairs] = x[j][kWhich * kSteps + s][u];
#pragma unroll
          for (int i = 0; i < D::kPairs; i += 2) {
            mma16816(d[j], a[0][i], a[1][i], a[0][i + 1], a[1][i + 1], b[i], b[i + 1]);
          }
        }
      }
    }
    if constexpr (kApart) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        sums[i / 4][i % 4] =
            fused(apart[i / 4][i % 4], 1.0f / float(1 << D::kDown), sums[i / 4][i % 4]);
      }
    }
  }

  // ---- sums -------------------------------------------------------------------------------------

  PYFMT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) sums[i / 4][i % 4] = 0;
  }
  // [token][row]; mine: this lane's first
  PYFMT_DEVICE void store_sums(SharedAddress mine, int tokens) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (8 * j + 2 * t + c >= tokens) continue;
        const SharedAddress at = mine + unsigned(4 * (8 * j + c) * Still::kPitch);
        store_small<4>(at, as_uint(sums[j][c]));
        store_small<4>(at + 32, as_uint(sums[j][2 + c]));
      }
    }
  }
};

// Sums of the warps to y, a round of two tiles at a time: a warp takes a token, a lane a row.
template <class Still>
struct SkinnyStillSums {
  static constexpr int kPlaces = Still::kPlaces, kRound = Still::kRound, kRows = Still::kRows;

  const SkinnyParams& p;
  const int tokens, warps, me, rank, first_token, first_tile, count;  // count: of tiles
  const SharedAddress places, inbox, signals;
  const int bytes;  // of a warp's sums of a tile
  int token;        // whose sums this warp adds up next
  int waits = -1;   // the round of which the other block's are to come
  float kept = 0;

  PYFMT_DEVICE SharedAddress place(int i, int warp) const {
    return places + unsigned((warp * kPlaces + (i & (kPlaces - 1))) * bytes);
  }
  PYFMT_DEVICE SharedAddress written(int r) const { return signals + unsigned(8 * (r & 1)); }
  PYFMT_DEVICE SharedAddress taken(int r) const { return signals + unsigned(16 + 8 * (r & 1)); }
  PYFMT_DEVICE SharedAddress sent(int r, int token) const {
    return signals + unsigned(32 + 8 * (2 * token + (r & 1)));
  }

  // All threads of the block, or of the cluster.
  PYFMT_DEVICE void meet() const {
    const int i = int(threadIdx.x);
    if (i < 2) signal_init(written(i), warps);
    if (i >= 2 && i < 4) signal_init(taken(i), tokens);
    if (p.split > 1) {
      if (i < 2 * tokens) signal_init(sent(i, i >> 1), 1);
      signal_init_fence();
      cluster_barrier();
    } else {
      block_barrier();
    }
  }

  // Before a warp stores its sums of tile i, and after.
  PYFMT_DEVICE void wait_for_place(int i) const {
    const int r = i / kRound;
    if (i % kRound == 0 && r >= 2) signal_wait(taken(r), unsigned(r / 2 - 1));
  }
  PYFMT_DEVICE void stored(int i) const {
    if (i % kRound == 0 && i + 1 < count) return;
    warp_barrier();
    if ((threadIdx.x & 31) == 0) signal_arrive(written(i / kRound));
  }

  // What follows tile i. A tile later than possible, so that nobody waits for the slowest warp or
  // for the other block.
  PYFMT_DEVICE void follow(int i, float factor) {
    if (i % kRound) {
      receive(factor);
    } else if (i) {
      finish(i / kRound - 1, factor);
    }
  }
  PYFMT_DEVICE void end(float factor) {
    finish((count - 1) / kRound, factor);
    receive(factor);
  }

  PYFMT_DEVICE void finish(int r, float factor) {
    receive(factor);
#pragma unroll 1
    for (; token < tokens; token += warps) add_up(r, factor);
    // The blocks of a cluster meet token by token; else warps take turns.
    token = p.split > 1 ? me : token - tokens;
  }
  PYFMT_DEVICE void add_up(int r, float factor) {
    const int lane = int(threadIdx.x & 31), i = kRound * r + (lane >> 4), row = lane & 15;
    signal_wait(written(r), unsigned(r / 2));
    SharedAddress at = place(i, 0) + unsigned(4 * (token * Still::kPitch + row));
    float s = 0;
    if (i < count) {
#pragma unroll 1
      for (int w = 0; w < warps; w += 8) {
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          v[j] = w + j < warps ? as_float(load_small<4>(at)) : 0.0f;
          at += unsigned(kPlaces * bytes);
        }
        s = s + (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])));
      }
    }
    warp_barrier();
    // An arrival does not wait for reads under way, and what they read may be written over after
    // it: hence the address that depends on them.
    if (lane == 0) signal_arrive(taken(r) + (as_uint(s) & uint32_t(p.n) >> 31));
    if (p.split == 1) {
      if (i < count) write(i, row, s, factor);
      return;
    }
    // Each block finishes one of the tiles. There is room: the other block's warp has read what was
    // sent two rounds ago before it sent what this one has just received.
    const int owner = lane >> 4;
    if (owner != rank && i < count) {
      send4(address_in_block(inbox_of(r, row), owner), s, address_in_block(sent(r, token), owner));
    }
    kept = s;
    waits = kRound * r + rank < count ? r : -1;
  }

  PYFMT_DEVICE SharedAddress inbox_of(int r, int row) const {
    return inbox + unsigned((r & 1) * Still::kInboxTile + 4 * (token * kRows + row));
  }
  PYFMT_DEVICE void receive(float factor) {
    if (waits < 0) return;
    const int lane = int(threadIdx.x & 31), row = lane & 15;
    if (lane == 0) signal_expect(sent(waits, token), 4 * kRows);
    signal_wait(sent(waits, token), unsigned(waits / 2));
    if (lane >> 4 == rank) {
      const float other = as_float(load_small<4>(inbox_of(waits, row)));
      write(kRound * waits + rank, row, kept + other, factor);
    }
    waits = -1;
  }

  PYFMT_DEVICE void write(int i, int row, float s, float factor) const {
    const int n = kRows * (first_tile + i) + row;
    float y = s * factor;
    if (p.bias) y = y + load_element(p.bias, p.bias_dtype, n);
    store_element(p.out, p.out_dtype, int64_t(first_token + token) * p.n + n, y);
  }
};

template <class W, int kTiles>
__global__ void __launch_bounds__(32 * SkinnyStill<W, kTiles>::kMostWarps, 1)
    skinny_still(const __grid_constant__ SkinnyParams p) {
  using Still = SkinnyStill<W, kTiles>;
  using Warp = SkinnyStillWarp<W, kTiles>;
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
  const uint16_t* rows[Warp::kLoads][kSlots];
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
