// SPDX-License-Identifier: Apache-2.0
// What one warp of the kernel for few tokens does: it copies packed rows, their scales and the
// activations ahead into a ring of its own, decodes and multiplies.
#pragma once

#include "matmul_skinny_x.cuh"

namespace pyfmt {
namespace cuda {

template <class W, int kTiles, Inputs kInputs>
struct SkinnyWarp {
  using D = typename W::D;
  using Shape = SkinnyShape<W, kTiles>;
  using X = SkinnyX<W, kTiles, kInputs>;
  static constexpr bool kGuard = kInputs == Inputs::kGuarded;
  static constexpr int kRowTiles = Shape::kRowTiles, kStrips = Shape::kStrips;
  static constexpr int kRows = 2 * kRowTiles;  // of a lane in a strip
  static constexpr int kStrip = 16 * kRowTiles, kAllRows = kStrips * kStrip;
  static constexpr int kCodeBytes = kAllRows * W::kVectors * 64;  // of a slot; activations follow
  static constexpr int kScaleBytes = kAllRows * 16;               // of a slot of scales
  static constexpr int kRowScales = W::kStep / (W::kScale == Scale::kE4M3 ? 16 : 32);
  static constexpr bool kLaneScales = W::kGrouping == Grouping::k32;
  static constexpr int kParts = W::kVectors == 3 ? 2 : 1;  // of a step, so that x fits registers
  using Fragments = typename X::template Fragments<kParts>;
  // Neighbouring lanes copy neighbouring 16 bytes to neighbouring places, whoever uses them: what
  // takes a 32-byte sector apart fetches it twice.
  static constexpr int kKinds = W::kVectors == 3 ? 3 : 1;     // of copies, which take turns
  static constexpr int kCopyRows = W::kVectors == 2 ? 4 : 8;  // of each turn

  const SkinnyParams& p;
  const int columns;
  int lane, t;
  SharedAddress ring;
  const uint8_t* codes[kKinds];  // where this lane's next copies start
  float sums[kStrips][kRowTiles][kTiles][4];

  PYFMT_DEVICE SkinnyWarp(const SkinnyParams& p, SharedAddress ring, int columns)
      : p(p), columns(columns), lane(int(threadIdx.x & 31)), ring(ring) {
    keep(lane);
    keep(this->ring);
    t = lane & 3;
  }

  static constexpr int kSums = kStrips * kRowTiles * kTiles * 4;
  PYFMT_DEVICE float& sum(int i) {
    return sums[i / 4 / kTiles / kRowTiles][i / 4 / kTiles % kRowTiles][i / 4 % kTiles][i % 4];
  }
  PYFMT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum(i) = 0;
  }

  // ---- codes ----------------------------------------------------------------------------------

  PYFMT_DEVICE int copied_row(int j) const { return (32 * j + lane) / (4 * W::kVectors); }
  PYFMT_DEVICE int copied_chunk(int j) const { return (32 * j + lane) % (4 * W::kVectors); }

  // The next copies are of this step and of the rows that start at `first`.
  PYFMT_DEVICE void seek(int step, int first) {
#pragma unroll
    for (int j = 0; j < kKinds; ++j) {
      codes[j] = p.codes + int64_t(first + copied_row(j)) * p.row_bytes + 16 * copied_chunk(j) +
                 step * (64 * W::kVectors);
      keep(codes[j]);
    }
  }

  // Codes of a step of the `strips` strips that start at row `first`.
  PYFMT_DEVICE void load_codes(SharedAddress slot, int step, int first, int strips) {
    if constexpr (kGuard) {
      load_codes_carefully(slot, step, first, strips);
      return;
    }
#pragma unroll
    for (int j = 0; j < kKinds; ++j) {
      // Beyond the end codes are zeros.
      const bool inside = 4 * W::kVectors * step + copied_chunk(j) < p.row_bytes / 16;
      const uint8_t* from = inside ? codes[j] : p.codes;
      uint32_t stride = inside ? uint32_t(p.row_bytes) * kCopyRows : 0;
      keep(stride);
      const SharedAddress to = slot + unsigned(512 * j + turned(16 * lane));
#pragma unroll
      for (int q = 0; q < kAllRows / kCopyRows; ++q) {
        const int r = kCopyRows * q;
        if (r && r % kStrip == 0 && r / kStrip >= strips) break;
        start_copy<16>(to + unsigned(r * 64 * W::kVectors), from, inside ? 16 : 0);
        from += stride;
      }
      codes[j] += 64 * W::kVectors;
    }
  }
  // Where rows have 128 bytes, the halves of every other one change places, against conflicts.
  PYFMT_DEVICE static int turned(int at) { return W::kVectors == 2 ? at ^ (at >> 1 & 64) : at; }

  // Rows of any alignment and number. Rows beyond the last are read as the last; nobody stores what
  // they give.
  PYFMT_DEVICE void load_codes_carefully(SharedAddress slot, int step, int first,
                                         int strips) const {
#pragma unroll 1
    for (int at = 16 * lane; at < strips * kStrip * 64 * W::kVectors; at += 512) {
      const int row = at / (64 * W::kVectors), byte = at - row * (64 * W::kVectors);
      const uint8_t* from = p.codes + uint64_t(min(first + row, p.n - 1)) * uint32_t(p.row_bytes);
      store_shared16(slot + unsigned(turned(at)),
                     careful(from, uint32_t(step * 64 * W::kVectors + byte)));
    }
  }

  // Sixteen bytes of a row of any alignment, zero beyond its end.
  PYFMT_DEVICE uint4 careful(const uint8_t* row, uint32_t at) const {
    uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      const uint32_t byte = at + uint32_t(i) < uint32_t(p.row_bytes) ? row[at + i] : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j == i / 4) w[j] |= byte << (8 * (i % 4));
      }
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
  }

  // ---- scales ---------------------------------------------------------------------------------

  // Which scale of its row the lane t of four uses.
  PYFMT_DEVICE uint32_t group_index(int step) const {
    const uint32_t units =
        W::kGrouping == Grouping::kSteps ? uint32_t(step) : uint32_t(4 * step + t);
    return min(uint32_t(uint64_t(units) * p.group_share >> 32), uint32_t(p.row_scales) - 1);
  }
  PYFMT_DEVICE int group_bytes() const { return p.scale == Scale::kFP32 ? 4 : 2; }
  // Where a step's scales start in their row, in bytes.
  PYFMT_DEVICE int scales_at(int step) const {
    if constexpr (W::kGrouping == Grouping::kSteps) return int(group_index(step)) * group_bytes();
    return step * kRowScales;
  }
  // Steps of one number share the scales that were copied at once.
  PYFMT_DEVICE int scale_chunk(int step) const {
    return W::kGrouping == Grouping::k32 ? step : scales_at(step) >> p.scale_shift;
  }

  // The scales of a step and of its chunk: 16 bytes a row in shared memory, not all used.
  PYFMT_DEVICE void load_scales(SharedAddress slot, int step, int first, int strips) const {
    if constexpr (W::kGrouping == Grouping::k32) {
      load_lane_scales(slot, step, first, strips);
      return;
    }
    const int size = W::kGrouped ? group_bytes() : 1, row_bytes = p.row_scales * size;
    const int at = scale_chunk(step) << p.scale_shift;
#pragma unroll
    for (int i = 0; i < (kAllRows + 31) / 32; ++i) {
      const int row = 32 * i + lane;
      if (row >= strips * kStrip) break;
      const SharedAddress to = slot + unsigned(16 * row);
      const uint8_t* from = static_cast<const uint8_t*>(p.scales) +
                            uint64_t(min(first + row, p.n - 1)) * uint32_t(row_bytes);
      if (!kGuard && p.scale_copies) {
        const int real = at < row_bytes ? 1 << p.scale_shift : 0;
        from += real ? at : 0;
        if (p.scale_shift == 4) {
          start_copy<16>(to, from, real);
        } else if (p.scale_shift == 3) {
          start_copy<8>(to, from, real);
        } else {
          start_copy<4>(to, from, real);
        }
      } else {
        load_row_scales(to, from, at, row_bytes);
      }
    }
  }
  PYFMT_DEVICE void load_row_scales(SharedAddress to, const uint8_t* from, int at,
                                    int row_bytes) const {
    if constexpr (W::kGrouped) {
      if (p.scale == Scale::kFP32) {
        store_small<4>(to, *reinterpret_cast<const uint32_t*>(from + at));
      } else {
        store_small<2>(to, *reinterpret_cast<const uint16_t*>(from + at));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRowScales; i += 4) {
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (at + i + j < row_bytes) word |= uint32_t(from[at + i + j]) << (8 * j);
        }
        store_small<4>(to + unsigned(i), word);
      }
    }
  }
  // A scale for each run of 32. Two bytes come with their neighbours, aligned.
  PYFMT_DEVICE void load_lane_scales(SharedAddress slot, int step, int first, int strips) const {
    const bool narrow = p.scale != Scale::kFP32;
#pragma unroll
    for (int i = 0; i < kAllRows / 8; ++i) {
      const int row = 8 * i + (lane >> 2);
      if (row >= strips * kStrip) break;
      const uint64_t index =
          uint64_t(min(first + row, p.n - 1)) * uint32_t(p.row_scales) + group_index(step);
      const uint8_t* from =
          static_cast<const uint8_t*>(p.scales) + (narrow ? 2 * (index & ~uint64_t(1)) : 4 * index);
      start_copy<4>(slot + unsigned(16 * row + 4 * t), from, narrow && !(index & 1) ? 2 : 4);
    }
  }

  // The factors of row r of a strip, or the two: a byte each.
  PYFMT_DEVICE uint32_t scale_of(SharedAddress scales, int strip, int r) const {
    const SharedAddress row = scales + unsigned(16 * (strip * kStrip + 8 * r));
    if constexpr (W::kVectors == 2) {
      const uint32_t four = load_small<4>(row) >> (8 * (t >> 1));
      return pick_bytes(four, 0, 0x4420);
    } else {
      return load_small<W::kFactors>(row + unsigned(W::kFactors * t));
    }
  }
  PYFMT_DEVICE float group_scale(SharedAddress scales, bool odd, int strip, int r) const {
    const SharedAddress row = scales + unsigned(16 * (strip * kStrip + 8 * r));
    if (p.scale == Scale::kFP32) {
      return as_float(load_small<4>(W::kGrouping == Grouping::k32 ? row + unsigned(4 * t) : row));
    }
    const uint32_t half =
        load_small<2>(W::kGrouping == Grouping::k32 ? row + unsigned(4 * t + (odd ? 2 : 0)) : row);
    return p.scale == Scale::kBF16 ? as_float(half << 16) : from_half(half);
  }

  // ---- one step -------------------------------------------------------------------------------

  using Words = uint32_t[kRows][4 * W::kVectors];

  PYFMT_DEVICE void fetch(SharedAddress slot, int strip, Words& words) const {
    constexpr int kRow = 64 * W::kVectors;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < W::kVectors; ++v) {
        const int at =
            (lane >> 2) * kRow + (W::kVectors == 2 ? 16 * t + 64 * v : 16 * (W::kVectors * t + v));
        const uint4 q =
            load_shared16(slot + unsigned(turned(at)) + unsigned((strip * kStrip + 8 * r) * kRow));
        uint32_t* w = words[r] + 4 * v;
        w[0] = q.x;
        w[1] = q.y;
        w[2] = q.z;
        w[3] = q.w;
      }
    }
  }

  // Not 0 where one of a row's scales of a step asks for `scaled<true>`.
  PYFMT_DEVICE static uint32_t special_scales(SharedAddress row) {
    constexpr uint32_t kEach = 0x01010101u;
    static_assert(D::kLowest <= 128 && D::kHighest >= 127, "bytes around 127 are ordinary");
    uint32_t found = 0;
#pragma unroll
    for (int j = 0; j < kRowScales; j += 4) {
      const uint32_t four = load_small<4>(row + unsigned(j)), low = four & 0x7f7f7f7fu;
      found |= (low + (255 - D::kHighest) * kEach) & four;
      if constexpr (D::kLowest > 0) found |= ~((low + (128 - D::kLowest) * kEach) | four);
    }
    return found & 0x80808080u;
  }

  // Whether a scale or a code of the step asks for `scaled<true>`, or may do so.
  PYFMT_DEVICE bool special(SharedAddress slot, SharedAddress scales, int strips) const {
    if constexpr (W::kGrouped || W::kScale != Scale::kE8M0) {
      return false;
    } else {
      uint32_t found = 0;
#pragma unroll
      for (int i = 0; i < (kAllRows + 31) / 32; ++i) {
        if (32 * i + lane >= strips * kStrip) break;
        found |= special_scales(scales + unsigned(16 * (32 * i + lane)));
      }
      if constexpr (D::kHasSpecials) {
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          if (s >= strips) break;
          Words words;
          fetch(slot, s, words);
          found |= D::template special_codes<4 * W::kVectors * kRows>(words[0]);
        }
      }
      return any_lane(found != 0);
    }
  }

  // scales: those of this step, in the first row; activations: its bfloat16 columns.
  PYFMT_DEVICE void multiply_step(SharedAddress slot, SharedAddress scales,
                                  SharedAddress activations, int step, int first, int strips) {
    if (special(slot, scales, strips)) {
      multiply<true>(slot, scales, activations, step, first, strips);
    } else {
      multiply<false>(slot, scales, activations, step, first, strips);
    }
  }

  template <bool kEverything>
  PYFMT_DEVICE void multiply(SharedAddress slot, SharedAddress scales, SharedAddress activations,
                             int step, int first, int strips) {
    const SharedAddress mine = scales + unsigned(16 * (lane >> 2));
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Fragments x;
      X::template fetch<kParts>(activations, lane, columns, part, x);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        if (s >= strips) break;
        Words words;
        fetch(slot, s, words);
        if constexpr (W::kGrouped) {
          multiply_groups(words, mine, step, first, s, x);
        } else {
          multiply_blocks<kEverything>(words, mine, s, part, x);
        }
      }
    }
  }

  template <bool kEverything>
  PYFMT_DEVICE void multiply_blocks(const Words& words, SharedAddress scales, int strip, int part,
                                    const Fragments& x) {
    Factor factors[kRows][W::kFactors];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint32_t scale = scale_of(scales, strip, r);
      if constexpr (W::kScale == Scale::kE4M3) {
        D::factors(scale, factors[r]);
      } else {
#pragma unroll
        for (int i = 0; i < W::kFactors; ++i) {
          const uint32_t byte = W::kFactors == 1 ? scale : scale >> (8 * i) & 0xffu;
          factors[r][i] = D::template factor<kEverything>(byte);
        }
      }
    }
    constexpr int kUnits = W::kUnits / kParts;
    // Elements that come as they are have their own sums, which are scaled down to the others.
    constexpr bool kApart = kEverything && D::kSubnormal;
    float part_sums[kRowTiles][kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int u = part * kUnits + i;
      uint32_t a[kRows][D::kPairs];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        D::template scaled<kEverything>(words[r] + u * D::kWords,
                                        factors[r][u * W::kFactors / W::kUnits], a[r]);
      }
      multiply_unit(kApart ? part_sums : sums[strip], a, x, i);
    }
    if constexpr (kApart) {
      constexpr float kScaled = 1.0f / float(1 << D::kDown);
#pragma unroll
      for (int i = 0; i < kRowTiles * kTiles * 4; ++i) {
        const int r = i / 4 / kTiles, j = i / 4 % kTiles, c = i % 4;
        sums[strip][r][j][c] = fused(part_sums[r][j][c], kScaled, sums[strip][r][j][c]);
      }
    }
  }

  PYFMT_DEVICE static void multiply_unit(float (&d)[kRowTiles][kTiles][4],
                                         const uint32_t (&a)[kRows][D::kPairs], const Fragments& x,
                                         int u) {
#pragma unroll
    for (int f = 0; f < 2 * W::kUnitFragments; ++f) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint32_t* b = x.words[j][u * W::kUnitFragments + f / 2] + 2 * (f & 1);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const uint32_t *top = a[2 * i] + 2 * f, *low = a[2 * i + 1] + 2 * f;
          mma16816(d[i][j], top[0], low[0], top[1], low[1], b[0], b[1]);
        }
      }
    }
  }

  // Integers as they are; each group's sum times its scale, in float32.
  PYFMT_DEVICE void multiply_groups(Words& words, SharedAddress scales, int step, int first,
                                    int strip, const Fragments& x) {
    constexpr bool kTurned = W::kGrouping == Grouping::k32;
    if constexpr (kTurned) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) turn(words[r]);
    }
    constexpr int kGroups = kTurned ? W::kUnits : 1;
    const bool odd =
        (uint32_t(first + (lane >> 2)) * uint32_t(p.row_scales) + group_index(step)) & 1;
    float factors[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) factors[r] = group_scale(scales, odd, strip, r);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float part[kRowTiles][kTiles][4] = {};
#pragma unroll
      for (int u = g; u < (kTurned ? g + 1 : W::kUnits); ++u) {
        uint32_t a[kRows][D::kPairs];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          D::template scaled<false>(words[r] + u * D::kWords, D::unit_factor(), a[r]);
        }
        multiply_unit(part, a, x, u);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float factor =
            kTurned ? as_float(from_lane(as_uint(factors[r]), (lane & ~3) + g)) : factors[r];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int c = 2 * (r & 1); c < 2 * (r & 1) + 2; ++c) {
            float& sum = sums[strip][r / 2][j][c];
            sum = fused(factor, part[r / 2][j][c], sum);
          }
        }
      }
    }
  }

  // Exchange words among four lanes so that each holds a share of every run of 32 elements.
  PYFMT_DEVICE void turn(uint32_t* words) const {
    const bool high = t & 2, odd = t & 1;
#pragma unroll
    for (int v = 0; v < W::kVectors; ++v) {
      uint32_t* const w = words + 4 * v;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t got = lane_xor(high ? w[i] : w[i + 2], 2);
        w[i + 2] = high ? w[i + 2] : got;
        w[i] = high ? got : w[i];
      }
      if constexpr (D::kBits == 4) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t got = lane_xor(odd ? w[i] : w[i + 1], 1);
          w[i + 1] = odd ? w[i + 1] : got;
          w[i] = odd ? got : w[i];
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace pyfmt
