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
  static constexpr int kPitch = kRows + 4, kPlaces = 4;  // of sums
  static constexpr int kInbox = 2;                       // tiles' sums of the other block
  static constexpr int kInboxTile = 4 * 8 * kTiles * kRows;
  static constexpr int kSignals = 128;  // bytes

  static int shared_bytes(int tokens, int warps, int split) {
    const int sums = kPlaces * warps * tokens * kPitch * 4;
    return warps * kStages * kStage + sums + (split > 1 ? kInbox * kInboxTile : 0) + kSignals;
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

  // Asked for in one go: what is beyond k is not used.
  PYFMT_DEVICE void ask_for_x(const uint16_t* const (&rows)[kTiles][kSlots]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int s = 0; s < kSpan; ++s) {
#pragma unroll
        for (int u = 0; u < W::kUnits; ++u) {
#pragma unroll
          for (int i = 0; i < D::kPairs; i += 4) {
            const uint4 q = load_once16(rows[j][s / kSteps] + s % kSteps * W::kStep +
                                        W::unit_start(0, u) + 2 * i);
            x[j][s][u][i] = q.x;
            x[j][s][u][i + 1] = q.y;
            x[j][s][u][i + 2] = q.z;
            x[j][s][u][i + 3] = q.w;
          }
        }
      }
    }
  }
  // Where this lane's are. Tokens beyond the last are read as the last: what they give is never
  // stored.
  PYFMT_DEVICE void find_x(int first_token, int tokens,
                           const uint16_t* (&rows)[kTiles][kSlots]) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int token = first_token + min(8 * j + (lane >> 2), tokens - 1);
#pragma unroll
      for (int v = 0; v < kSlots; ++v) {
        const int column = min(first_column + v * Still::kSlotColumns, p.k - Still::kSlotColumns);
        rows[j][v] = static_cast<const uint16_t*>(p.x) + int64_t(token) * p.x_stride + column +
                     W::unit_start(t, 0);
        keep(rows[j][v]);
      }
    }
  }
  PYFMT_DEVICE void order_x() {
#pragma unroll
    for (int i = 0; i < kTiles * kSpan * W::kUnits; ++i) {
      uint32_t (&pairs)[D::kPairs] = x[i / W::kUnits / kSpan][i / W::kUnits % kSpan][i % W::kUnits];
      uint32_t raw[D::kPairs];
#pragma unroll
      for (int j = 0; j < D::kPairs; ++j) raw[j] = pairs[j];
      order_pairs<D>(raw, pairs);
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

// Four elements to a place aligned to all of them.
PYFMT_DEVICE void store_four(void* out, DType dtype, int64_t i, const float (&v)[4]) {
  if (dtype == DType::kFP32) {
    *reinterpret_cast<uint4*>(static_cast<uint32_t*>(out) + i) =
        make_uint4(canonical(v[0]), canonical(v[1]), canonical(v[2]), canonical(v[3]));
  } else {
    const bool bf16 = dtype == DType::kBF16;
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out) + i) = make_uint2(
        bf16 ? to_halves<DType::kBF16>(v[0], v[1]) : to_halves<DType::kFP16>(v[0], v[1]),
        bf16 ? to_halves<DType::kBF16>(v[2], v[3]) : to_halves<DType::kFP16>(v[2], v[3]));
  }
}

// Sums of the warps to y, a tile at a time.
template <class Still>
struct SkinnyStillSums {
  static constexpr int kTiles = Still::kTiles, kPlaces = Still::kPlaces;
  using Sums = float[kTiles][4];  // four rows of a token

  const SkinnyParams& p;
  const int tokens, warps, rank, first_token, first_tile, count;  // count: of tiles
  const SharedAddress places, inbox, signals;
  const int bytes;  // of a warp's place

  PYFMT_DEVICE SharedAddress place(int i, int warp) const {
    return places + unsigned(((i & (kPlaces - 1)) * warps + warp) * bytes);
  }
  PYFMT_DEVICE SharedAddress written(int i) const {
    return signals + unsigned(8 * (i & (kPlaces - 1)));
  }
  PYFMT_DEVICE SharedAddress taken(int i) const { return written(i) + 8 * kPlaces; }
  PYFMT_DEVICE static unsigned round(int i) { return unsigned(i) / kPlaces; }
  // The other block's sums are there; it may send those of four tiles later.
  PYFMT_DEVICE SharedAddress sent(int i) const {
    return signals + unsigned(16 * kPlaces + 4 * (i & 2));
  }
  PYFMT_DEVICE SharedAddress room(int i) const { return sent(i) + 16; }

  // All threads of the block, or of the cluster.
  PYFMT_DEVICE void meet() const {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) {
        signal_init(written(i), warps);
        signal_init(taken(i), 1);
      }
      if (p.split > 1) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          signal_init(sent(i), 1);
          signal_init(room(i), 1);
        }
        signal_init_fence();
      }
    }
    if (p.split > 1) {
      cluster_barrier();
    } else {
      block_barrier();
    }
  }

  // An address, once what this warp has read for s is there: an arrival does not wait for reads
  // under way, and what they read may be written over after it.
  PYFMT_DEVICE SharedAddress after(SharedAddress signal, const Sums& s) const {
    const uint32_t nothing = uint32_t(p.n) >> 31;
    uint32_t words = 0;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) words |= as_uint(s[i / 4][i % 4]);
    return signal + (words & nothing);
  }

  // A lane has four rows of a token; where there are few tokens, of a share of the warps.
  struct Lane {
    int line, at_once, token, share;

    PYFMT_DEVICE explicit Lane(int tokens) {
      const int lane = int(threadIdx.x & 31);
      line = 4 * (lane & 3);
      at_once = tokens > 4 ? 8 : tokens > 2 ? 4 : tokens;
      token = (lane >> 2) & (at_once - 1);
      share = (lane >> 2) / at_once;
    }
  };

  // Some time after tile i, by warp i modulo `warps`.
  PYFMT_DEVICE void finish(int i, float factor) const {
    const Lane lane(tokens);
    const bool ours = p.split == 1 || (i & 1) == rank;
    signal_wait(written(i), round(i));
    Sums s = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int token = min(8 * j + lane.token, tokens - 1), shares = 8 / lane.at_once;
      SharedAddress at = place(i, lane.share) + unsigned(4 * (token * Still::kPitch + lane.line));
#pragma unroll 4
      for (int w = lane.share; w < warps; w += shares) {
        add(s[j], at);
        at += unsigned(shares * bytes);
      }
      // The same bits in all shares.
#pragma unroll 1
      for (int far = 4 * lane.at_once; far < 32; far *= 2) {
#pragma unroll
        for (int c = 0; c < 4; ++c) s[j][c] = s[j][c] + as_float(lane_xor(as_uint(s[j][c]), far));
      }
    }
    warp_barrier();
    if ((threadIdx.x & 31) == 0) signal_arrive(after(taken(i), s));
    if (!ours) {
      send(i, s);
      return;
    }
    if (p.split > 1) receive(i, s);
    write(i, lane, s, factor);
  }

  PYFMT_DEVICE static void add(float (&s)[4], SharedAddress at) {
    const uint4 v = load_shared16(at);
    s[0] = s[0] + as_float(v.x);
    s[1] = s[1] + as_float(v.y);
    s[2] = s[2] + as_float(v.z);
    s[3] = s[3] + as_float(v.w);
  }

  // The blocks of a cluster finish tiles in turn.
  PYFMT_DEVICE SharedAddress inbox_of(int i) const {
    return inbox + unsigned((i >> 1 & 1) * Still::kInboxTile + 16 * int(threadIdx.x & 31));
  }
  PYFMT_DEVICE void send(int i, const Sums& s) const {
    const int turn = i >> 2, owner = i & 1;
    if (turn) signal_wait(room(i), unsigned(turn - 1));
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      send16(address_in_block(inbox_of(i) + unsigned(512 * j), owner), s[j],
             address_in_block(sent(i), owner));
    }
  }
  PYFMT_DEVICE void receive(int i, Sums& s) const {
    const bool first = (threadIdx.x & 31) == 0;
    if (first) signal_expect(sent(i), 512 * kTiles);
    signal_wait(sent(i), unsigned(i >> 2));
#pragma unroll
    for (int j = 0; j < kTiles; ++j) add(s[j], inbox_of(i) + unsigned(512 * j));
    warp_barrier();
    // Only where the other block waits for it: else it might have ended.
    if (first && i + 4 < count) signal_arrive_there(after(address_in_block(room(i), 1 - rank), s));
  }

  PYFMT_DEVICE void write(int i, const Lane& lane, const Sums& s, float factor) const {
    const int row = Still::kRows * (first_tile + i) + lane.line;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int token = 8 * j + lane.token;
      if (lane.share || token >= tokens) continue;
      float y[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        y[c] = s[j][c] * factor;
        if (p.bias) y[c] = y[c] + load_element(p.bias, p.bias_dtype, row + c);
      }
      store_four(p.out, p.out_dtype, int64_t(first_token + token) * p.n + row, y);
    }
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
  const SharedAddress signals =
      inbox + unsigned(p.split > 1 ? Still::kInbox * Still::kInboxTile : 0);
  const SkinnyStillSums<Still> sums{p,     tokens, warps, rank,    first_token, first_tile,
                                    count, places, inbox, signals, bytes};
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
  const uint16_t* rows[kTiles][kSlots];
  warp.find_x(first_token, tokens, rows);
  sums.meet();
  wait_for_earlier_launch();
  allow_next_launch();
  warp.ask_for_x(rows);
  const float tensor_scale = p.tensor_scale ? *p.tensor_scale : 1.0f;
  fill_to(kSlots * kStages - 1);
  warp.order_x();

  const SharedAddress mine =
      sums.place(0, me) + unsigned(4 * (2 * warp.t * Still::kPitch + (warp.lane >> 2)));
  int next_mine = me;  // the next tile that this warp finishes
  const auto finish = [&] {
    sums.finish(next_mine, tensor_scale * float(1 << W::D::kDown));
    next_mine += warps;
  };
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
    if (i >= Still::kPlaces) signal_wait(sums.taken(i), sums.round(i) - 1);
    warp.store_sums(mine + unsigned((i & (Still::kPlaces - 1)) * warps * bytes), tokens);
    warp_barrier();
    if (warp.lane == 0) signal_arrive(sums.written(i));
    // A tile later, so that nobody waits for the slowest warp; two where the other block's sums
    // have to come.
    if (next_mine == i - 1 - (p.split > 1 && next_mine % 2 == rank)) finish();
  }
  if (next_mine < count) finish();
}

}  // namespace cuda
}  // namespace pyfmt
