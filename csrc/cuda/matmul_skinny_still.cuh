// SPDX-License-Identifier: Apache-2.0
// The kernel for few tokens whose activations stay in registers.
//
// A warp owns 512 columns of k of up to eight tokens, as the right-hand operands of the tensor
// cores: 64 registers, brought once. Codes and scales of all rows of its block stream by, sixteen
// rows at once, through a ring of its own, by 128 or 192 bytes of a row. What the warps have of two
// tiles of rows meets in shared memory, where some of them add it up while the others go on. Two
// blocks of a cluster may share k: each finishes every other tile.
//
// Activations are what a launch waits for, so little is copied and done ahead of them, and they
// come by whole sectors: two tokens by 256 bytes a load of a warp, turned from lane to lane in
// shared memory.
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
  static constexpr int kSlots = Still::kSlots, kLine = Still::kLine, kRun = Still::kRun;
  static constexpr bool kSix = D::kBits == 6;

  const SkinnyParams& p;
  int lane, t;
  int first_column, slots;  // slots of this warp that k has
  uint32_t x[Still::kColumns / 8];
  struct Sums {
    float of[4];
  } sums;
  // Of the next tile, as this lane copies them: whole lines of 128 bytes, and what is beside them.
  const uint8_t *codes, *beside, *scales;
  uint32_t four_rows, scale_row;
  unsigned to, beside_to, scales_to;
  // Where this lane reads: even and odd vectors, scales.
  unsigned from[2], scales_from;

  PYFMT_DEVICE SkinnyStillWarp(const SkinnyParams& p, int part, int first_tile)
      : p(p), lane(int(threadIdx.x & 31)), first_column(part * Still::kColumns) {
    keep(lane);
    t = lane & 3;
    slots = max(0, min(kSlots, (p.k - first_column) / Still::kSlotColumns));
    keep(slots);
    const int first = Still::kRows * first_tile, row = lane >> 2;
    const uint8_t* const part_codes =
        p.codes + int64_t(first) * p.row_bytes + first_column / 8 * D::kBits;
    codes = part_codes + int64_t(lane >> 3) * p.row_bytes + 16 * (lane & 7);
    four_rows = 4 * uint32_t(p.row_bytes);
    if constexpr (kSix) {
      to = unsigned(kLine * (lane >> 3) + 16 * (lane & 7));
      beside = part_codes + int64_t(row) * p.row_bytes + 16 * t;
      beside_to = unsigned(kLine * row + 16 * t);
      keep(beside);
      keep(beside_to);
      from[0] = from[1] = unsigned(kLine * row + 48 * t);
      keep(from[0]);
    } else {
      // Halves, or neighbours, of every other row change places, against conflicts.
      constexpr unsigned kApart = D::kBits == 4 ? 64 : 16;
      to = unsigned(16 * lane) ^ (lane & 8 ? kApart : 0);
#pragma unroll
      for (unsigned v = 0; v < 2; ++v) {
        from[v] = unsigned(kLine * row + (D::kBits == 4 ? 16 : 32) * t) + kApart * (v ^ (row & 1));
        keep(from[v]);
      }
    }
    scale_row = uint32_t(p.row_scales) * (W::kGrouped ? 2 : 1);
    scales = static_cast<const uint8_t*>(p.scales) + int64_t(first + (lane >> 1)) * scale_row +
             first_column / Still::kScaleSpan * Still::kFactors + (lane & 1) * Still::kScaleUnit;
    scales_to = unsigned(lane * Still::kScaleUnit);
    scales_from =
        unsigned(row * Still::kRowScales + (W::kGrouped ? 0 : kRun / 32 * Still::kFactors * t));
    keep(codes);
    keep(four_rows);
    keep(scales);
    keep(to);
    keep(scales_from);
  }

  // ---- activations, once ------------------------------------------------------------------------

  // A load of a warp is of two tokens by 128 columns. What is beyond k is not used.
  static constexpr int kLoads = Still::kMostTokens / 2;
  PYFMT_DEVICE void ask_for_x(int first_token, int tokens) {
    const int first = min(first_column, p.k - 256);
    const int second = min(first_column + 256, p.k - 256) - first;  // the other 256 columns
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (2 * j >= tokens) break;
      const int token = first_token + min(2 * j + (lane >> 4), tokens - 1);
      const uint16_t* const from =
          static_cast<const uint16_t*>(p.x) + int64_t(token) * p.x_stride + first + 8 * (lane & 15);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        put(load_later16(from + (c < 2 ? 0 : second) + c % 2 * 128), x + 16 * c + 4 * j);
      }
    }
  }
  // Sixteen bytes of a token's 128 columns, placed against conflicts.
  PYFMT_DEVICE static unsigned x_place(int token, int chunk) {
    return unsigned(Still::kTokenBytes * token + 16 * (chunk ^ chunk >> 3 ^ (token & 1) << 1));
  }
  // From lane to lane, the runs of four lanes at once; of 256 columns the second half goes through
  // a room of its own. Tokens beyond the last are as the last: what they give is never stored.
  PYFMT_DEVICE void turn_x(SharedAddress first, SharedAddress second, int tokens) {
    const int token = min(lane >> 2, tokens - 1), column = kRun * t % 128;
    const SharedAddress room = kRun * t / 128 ? second : first;
#pragma unroll
    for (int w = 0; w < Still::kColumns / 8; w += kRun / 2) {
#pragma unroll
      for (int c = 0; c < kRun / 32; ++c) {
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          if (2 * j >= tokens) break;
          const uint32_t* const four = x + w + 16 * c + 4 * j;
          store_shared16(
              (c ? second : first) + x_place(min(2 * j + (lane >> 4), tokens - 1), lane & 15),
              make_uint4(four[0], four[1], four[2], four[3]));
        }
      }
      warp_barrier();
#pragma unroll
      for (int u = 0; u < kRun / D::kElements; ++u) {
        uint32_t raw[D::kPairs];
#pragma unroll
        for (int i = 0; i < D::kPairs; i += 4) {
          put(load_shared16(room + x_place(token, (column + u * D::kElements + 2 * i) / 8)),
              raw + i);
        }
        order_pairs<D>(raw, x + w + u * D::kPairs);
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

  PYFMT_DEVICE void load_slot(SharedAddress slot, int which) const {
    if (which >= slots) return;
    // Of rows of 192 bytes one slot begins with a line, the other ends with one; they share the one
    // between.
    const int line = kSix ? 256 * which : kLine * which, place = kSix ? 64 * which : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      start_copy<16>(slot + to + unsigned(place + 4 * kLine * i),
                     codes + uint64_t(four_rows) * unsigned(i) + line, 16);
    }
    if constexpr (kSix) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        start_copy_line(slot + beside_to + unsigned(128 - 128 * which + 8 * kLine * i),
                        beside + uint64_t(four_rows) * unsigned(2 * i) + (128 + 64 * which), 16);
      }
    }
  }
  // Of a tile.
  PYFMT_DEVICE void load_scales(SharedAddress to) const {
    if ((lane & 1) * (256 / Still::kSlotColumns) < slots) {
      start_copy<Still::kScaleUnit>(to + scales_to, scales, Still::kScaleUnit);
    }
  }
  PYFMT_DEVICE void next_tile() {
    codes += int64_t(Still::kRows) * p.row_bytes;
    if constexpr (kSix) beside += int64_t(Still::kRows) * p.row_bytes;
    scales += int64_t(Still::kRows) * scale_row;
  }

  // ---- products ---------------------------------------------------------------------------------

  // Of rows lane / 4 and 8 more, of each 32 columns of this lane: one, or two of 16 columns, or the
  // one of a group. As many slots' as are read at once.
  using Scales = uint32_t[2][Still::kBlocks * Still::kScaleSlots];

  // Scales of `which` slot and those that are read with it. Whether one of them asks for
  // `scaled<true>`.
  PYFMT_DEVICE bool read_scales(SharedAddress tile, int which, Scales& scale) const {
    constexpr int kOfRun = kRun / 32;  // blocks
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < Still::kBlocks * Still::kScaleSlots; ++i) {
      const int b = which * Still::kBlocks + i;
      const int place = (W::kGrouped ? b : b / kOfRun * 4 * kOfRun + b % kOfRun) * Still::kFactors;
      uint32_t here = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale[r][i] = load_small<Still::kFactors>(tile + scales_from +
                                                  unsigned(8 * r * Still::kRowScales + place));
        here |= scale[r][i] - unsigned(D::kLowest);
      }
      if (b / Still::kBlocks < slots) found |= here;
    }
    if constexpr (W::kScale == Scale::kE8M0) {
      static_assert(D::kHighest >= D::kLowest + 127, "bytes that one factor serves");
      return any_lane(found > 127);
    }
    return false;
  }

  PYFMT_DEVICE void multiply_slot(SharedAddress slot, int which, const Scales& scale,
                                  bool special) {
    constexpr bool kMay = W::kScale == Scale::kE8M0 && !W::kGrouped;
    if (!kMay || !special) {
      const Sums before = sums;
      const uint32_t largest = multiply<false>(slot, which, scale);
      // Codes that are no numbers are found on the way; then what they gave is taken back.
      if constexpr (D::kHasSpecials) {
        special = any_lane(D::found_special(largest));
        if (special) sums = before;
      }
    }
    if (kMay && special) multiply<true>(slot, which, scale);
  }

  template <bool kEverything>
  PYFMT_DEVICE uint32_t multiply(SharedAddress slot, int which, const Scales& scale) {
    uint32_t words[2][4 * Still::kVectors];  // of rows lane / 4 and 8 more
#pragma unroll
    for (int v = 0; v < Still::kVectors; ++v) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        put(load_shared16(slot + from[kSix ? 0 : v] +
                          unsigned(8 * kLine * r + (kSix ? 16 * v : 0))),
            words[r] + 4 * v);
      }
    }
    uint32_t largest = 0;
    // Elements that come as they are want sums that are not scaled down.
    constexpr bool kApart = kEverything && D::kSubnormal;
    constexpr int kBlockUnits = 32 / D::kElements, kBlocks = Still::kBlocks;
    if constexpr (kApart) scale_sums(float(1 << D::kDown));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      Factor f[2][2];
      float group[4] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t code = scale[r][which % Still::kScaleSlots * kBlocks + b];
        if constexpr (W::kGrouped) {
          f[r][0] = f[r][1] = D::unit_factor();
        } else if constexpr (W::kScale == Scale::kE4M3) {
          D::factors(code, f[r]);
        } else {
          f[r][0] = f[r][1] = D::template factor<kEverything>(code);
        }
      }
#pragma unroll
      for (int i = 0; i < kBlockUnits; ++i) {
        const int u = b * kBlockUnits + i;
        uint32_t a[2][D::kPairs];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t* const unit = words[r] + u * D::kWords;
          if constexpr (D::kHasSpecials && !kEverything) {
            D::scaled_finding(unit, f[r][0], a[r], largest);
          } else {
            D::template scaled<kEverything>(unit, f[r][2 * i / kBlockUnits], a[r]);
          }
        }
        const uint32_t* const by = x + (which * Still::kUnits + u) * D::kPairs;
#pragma unroll
        for (int j = 0; j < D::kPairs; j += 2) {
          mma16816(W::kGrouped ? group : sums.of, a[0][j], a[1][j], a[0][j + 1], a[1][j + 1], by[j],
                   by[j + 1]);
        }
      }
      if constexpr (W::kGrouped) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const uint32_t half = scale[c / 2][which % Still::kScaleSlots * kBlocks + b];
          const float by = p.scale == Scale::kBF16 ? as_float(half << 16) : from_half(half);
          sums.of[c] = fused(by, group[c], sums.of[c]);
        }
      }
    }
    if constexpr (kApart) scale_sums(1.0f / float(1 << D::kDown));
    return largest;
  }

  // ---- sums -------------------------------------------------------------------------------------

  PYFMT_DEVICE void clear() {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums.of[c] = 0;
  }
  PYFMT_DEVICE void scale_sums(float by) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums.of[c] = sums.of[c] * by;
  }
  // [token][row]; mine: this lane's first
  PYFMT_DEVICE void store_sums(SharedAddress mine, int tokens) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (2 * t + c >= tokens) continue;
      const SharedAddress at = mine + unsigned(4 * c * Still::kPitch);
      store_small<4>(at, as_uint(sums.of[c]));
      store_small<4>(at + 32, as_uint(sums.of[2 + c]));
    }
  }
};

// kTurns: where there are more warps than parts of k. Two-level activations are rounded by small
// blocks beside this one's, which need registers, too.
template <class W, bool kTurns>
__global__ void __launch_bounds__(32 * SkinnyStill<W>::kMostWarps)
    __maxnreg__(W::kScale == Scale::kE4M3 ? 120 : 128)
        skinny_still(const __grid_constant__ SkinnyParams p) {
  using Still = SkinnyStill<W>;
  using Warp = SkinnyStillWarp<W>;
  constexpr int kSlots = Still::kSlots, kDepth = Still::kDepth;
  const int warps = int(blockDim.x >> 5), me = int(threadIdx.x >> 5);
  const int share = p.split - 1;  // 1 where two blocks share k
  const int rank = int(blockIdx.x) & share, group = int(blockIdx.x) >> share;
  const int first_tile = group * p.even_tiles + min(group, p.longer_blocks);
  const int count = p.even_tiles + (group < p.longer_blocks);
  const int first_token = int(blockIdx.y) * p.tile_tokens;
  const int tokens = min(p.tile_tokens, p.tokens - first_token);
  const SharedAddress base = shared_address(dynamic_shared());
  const SharedAddress places = base + unsigned(warps * Still::kRing);
  const int bytes = 4 * tokens * Still::kPitch;
  const SharedAddress inbox = places + unsigned(Still::kPlaces * warps * bytes);
  const SharedAddress signals = inbox + unsigned(p.split > 1 ? 2 * Still::kInboxTile : 0);
  const SkinnyTurns<kTurns> turns(me, warps, kTurns ? p.parts : warps);
  SkinnyStillSums<Still, kTurns> sums{p,           turns,      tokens,         me,     rank,
                                      first_token, first_tile, count,          places, inbox,
                                      signals,     bytes,      turns.token(me)};

  // The ring is filled but for the slot that was used last. A tile's scales come with its first
  // slot, to places that take turns.
  const SharedAddress ring = base + unsigned(me * Still::kRing);
  const SharedAddress last = ring + unsigned((kDepth - 1) * Still::kSlot);
  const SharedAddress all_scales = 2 * (last + unsigned(Still::kSlot)) + Still::kTileScales;
  const auto after = [&](SharedAddress slot) {
    return slot == last ? ring : slot + unsigned(Still::kSlot);
  };
  Warp warp(p, rank * turns.parts + turns.part, first_tile + turns.first);
  int ahead = turns.shared ? (count - turns.first + 1) >> 1 : count;  // tiles to be copied
  SharedAddress scales_to = last + unsigned(Still::kSlot);
  const auto fill = [&](SharedAddress to, int which) {
    if (ahead > 0) {
      warp.load_slot(to, which);
      if (which == 0) warp.load_scales(scales_to);
    }
    close_copies();
    if (which == 0) scales_to = all_scales - scales_to;
    if (which == kSlots - 1) {
      warp.next_tile();
      if (turns.shared) warp.next_tile();
      --ahead;
    }
  };
  SharedAddress slot = ring;
  int next = 0;
  const auto fill_to = [&](int slots) {
#pragma unroll 1
    for (; next < slots; ++next) {
      fill(slot, next % kSlots);
      slot += unsigned(Still::kSlot);
    }
  };
  // Few of them first: activations must not wait behind them. Whatever is not needed to ask for
  // these comes after.
  fill_to(min(p.early, kDepth - 1));
  wait_for_earlier_launch();
  allow_next_launch();
  warp.ask_for_x(first_token, tokens);
  if (p.slots) clear_slots(p.slots, p.slot_count);
  uint32_t tensor_scale = as_uint(1.0f);
  if (p.tensor_scale) tensor_scale = load_later4(p.tensor_scale);
  sums.open();
  fill_to(kDepth - 1);
  sums.meet();
  // Where warps share a part, one may store sums there while the other still waits for activations.
  warp.turn_x(kTurns ? last : sums.place(0, me), last, tokens);
  keep(tensor_scale);  // first used, and waited for, after this

  const SharedAddress mine =
      sums.place(0, turns.part) + unsigned(4 * (2 * warp.t * Still::kPitch + (warp.lane >> 2)));
  const auto factor = [&] { return as_float(tensor_scale) * float(1 << W::D::kDown); };
  SharedAddress before = last, scales = last + unsigned(Still::kSlot);
  slot = ring;
#pragma unroll 1
  for (int i = turns.first; i < count; i += turns.step) {
    typename Warp::Scales scale;
    bool special = false;
    warp.clear();
#pragma unroll
    for (int q = 0; q < kSlots; ++q) {
      copies_arrived<kDepth - 2>();
      warp_barrier();
      fill(before, (q + kDepth - 1) % kSlots);
      if (warp.slots > q) {
        if (q % Still::kScaleSlots == 0) special = warp.read_scales(scales, q, scale);
        warp.multiply_slot(slot, q, scale, special);
      }
      before = slot;
      slot = after(slot);
    }
    scales = all_scales - scales;
    sums.wait_for_place(i);
    warp.store_sums(mine + unsigned((i & (Still::kPlaces - 1)) * bytes), tokens);
    sums.stored(i);
    sums.follow(i, factor());
  }
  sums.pass();
  sums.end(factor());
}

}  // namespace cuda
}  // namespace pyfmt
