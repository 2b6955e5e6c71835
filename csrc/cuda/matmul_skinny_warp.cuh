// SPDX-License-Identifier: Apache-2.0
// What one warp of the kernel for few tokens does: it fetches packed rows and their scales ahead,
// decodes them and multiplies them with the activations that wait in shared memory.
#pragma once

#include "decode.cuh"
#include "warp.cuh"

namespace pyfmt {
namespace cuda {

struct SkinnyParams {
  const void* x = nullptr;
  int64_t x_stride = 0;
  DType x_dtype = DType::kBF16;
  bool x_wide = false;                         // 16-byte aligned rows
  int terms = 1, tokens = 0, tile_tokens = 0;  // bfloat16 terms of an activation; in all; a tile's
  const uint8_t* codes = nullptr;
  int64_t row_bytes = 0;
  const void* scales = nullptr;
  int64_t row_scales = 0;      // of a row
  Scale scale = Scale::kE8M0;  // of groups: bf16, fp16 or fp32
  uint64_t group_share = 0;    // 2^32 over the steps, or runs of 32, of a group
  const float* tensor_scale = nullptr;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFP32;
  void* out = nullptr;
  DType out_dtype = DType::kBF16;
  int64_t n = 0;
  int k = 0, padded = 0;
  int cluster = 1, k_warps = 1, row_warps = 1;
  int even_steps = 0, longer_parts = 0;  // of a part; how many have one more
  int part_steps = 0;                    // of the longest part, a multiple of the kernel's depth
  int slice_steps = 0;                   // that shared memory holds at a time
  int columns = 0;                       // of shared memory
  int x_at = 0, sums_at = 0;             // where they start in shared memory, in bytes
};

enum class Grouping { kBlocks, kSteps, k32 };

// kBF16: bfloat16 activations; kAny: of any dtype; kGuarded: and rows or scales of any alignment.
enum class Inputs { kBF16, kAny, kGuarded };

// E, its scales, and how groups with float scales divide a step: kBlocks for none.
template <class E, Scale kScaleKind, Grouping kGroups>
struct Weights {
  using D = Decoder<E, kScaleKind>;
  static constexpr Grouping kGrouping = kGroups;
  static constexpr bool kGrouped = kGroups != Grouping::kBlocks;
  static constexpr Scale kScale = kScaleKind;
  static constexpr int kVectors = D::kBits == 6 ? 3 : 1;   // of 16 bytes, a lane's share of a row
  static constexpr int kLane = kVectors * 128 / D::kBits;  // elements of it
  static constexpr int kStep = 4 * kLane;
  static constexpr int kUnits = kLane / D::kElements;
  static constexpr int kFragments = kLane / 8;  // of 8 elements of x a lane, two matrix steps
  static constexpr int kUnitFragments = D::kElements / 8;
  static constexpr int kFactors = D::kBits == 6 || kScale == Scale::kE4M3 ? 2 : 1;  // of a lane

  // Where unit u of lane t of four starts inside a step.
  PYFMT_DEVICE static int unit_start(int t, int u) {
    if constexpr (kGroups == Grouping::k32) {
      return D::kBits == 4 ? 32 * u + 8 * t : 16 * (2 * u + (t & 1)) + 8 * (t >> 1);
    } else {
      return t * kLane + u * D::kElements;
    }
  }
};

// Rows of 16 in a warp, steps in flight, most warps of a block and blocks of a multiprocessor, for
// kTiles tiles of 8 columns. Small blocks: one starts while its neighbour streams.
template <class W, int kTiles>
struct SkinnyShape {
  static constexpr bool kMany = kTiles > 2;
  static constexpr int kRowTiles = W::kGrouped || W::D::kBits == 6 || kMany ? 1 : 2;
  // Activations need the room that more steps in flight would take.
  static constexpr int kDepth = kMany || (kTiles == 2 && kRowTiles == 2) ? 2
                                : W::kVectors == 3                       ? 3
                                                                         : 4;
  static constexpr int kWarps = 16;
  static constexpr int kBlocks = 1;
};

template <class W, int kTiles, Inputs kInputs>
struct SkinnyWarp {
  using D = typename W::D;
  using Shape = SkinnyShape<W, kTiles>;
  static constexpr bool kGuard = kInputs == Inputs::kGuarded;
  static constexpr int kRowTiles = Shape::kRowTiles, kRows = 2 * kRowTiles;
  // Of one step in flight: the rows' vectors of 16 bytes, each vector's lanes side by side.
  static constexpr int kSlotBytes = kRows * W::kVectors * 512;

  const SkinnyParams& p;
  int lane, t;
  char* ring;  // this lane's place in the warp's slots
  const uint8_t *codes[kRows], *scales[kRows];
  float sums[kRowTiles][kTiles][4];

  PYFMT_DEVICE SkinnyWarp(const SkinnyParams& p, char* shared)
      : p(p), lane(int(threadIdx.x & 31)), t(lane & 3) {
    ring = shared + int(threadIdx.x >> 5) * (Shape::kDepth * kSlotBytes) + 16 * lane;
  }

  PYFMT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles * kTiles * 4; ++i)
      sums[i / 4 / kTiles][i / 4 % kTiles][i % 4] = 0;
  }

  // Rows beyond the last are read as the last; nobody stores what they give.
  PYFMT_DEVICE void set_rows(int64_t first) {
    const int64_t bytes = p.row_scales * (W::kGrouped ? scale_bytes(p.scale) : 1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      int64_t row = first + 8 * r + (lane >> 2);
      row = row < p.n ? row : p.n - 1;
      codes[r] = p.codes + row * p.row_bytes;
      scales[r] = static_cast<const uint8_t*>(p.scales) + row * bytes;
    }
  }

  // ---- loads ----------------------------------------------------------------------------------

  PYFMT_DEVICE void load(int slot, uint32_t (&scale)[kRows], int step) const {
    int k = step * W::kStep + t * W::kLane;
    // Beyond the end codes are zeros, and the row's own first scale is as good as any.
    const bool inside = k < p.padded;
    if (!kGuard && !inside) k = 0;
    const uint32_t at = uint32_t(k / 8 * D::kBits);
    const uint32_t index = scale_index(step, k);
    char* to = ring + slot * kSlotBytes;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < W::kVectors; ++v) {
        char* const one = to + (r * W::kVectors + v) * 512;
        if constexpr (kGuard) {
          *reinterpret_cast<uint4*>(one) = careful(codes[r], at + 16 * v);
        } else {
          start_copy(one, codes[r] + at + 16 * v, inside);
        }
      }
      scale[r] = load_scale(scales[r], index);
    }
  }

  // The words of a step that has arrived.
  PYFMT_DEVICE void fetch(int slot, uint32_t (&words)[kRows][4 * W::kVectors]) const {
    const char* from = ring + slot * kSlotBytes;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < W::kVectors; ++v) {
        const uint4 q = *reinterpret_cast<const uint4*>(from + (r * W::kVectors + v) * 512);
        uint32_t* w = words[r] + 4 * v;
        w[0] = q.x;
        w[1] = q.y;
        w[2] = q.z;
        w[3] = q.w;
      }
    }
  }

  PYFMT_DEVICE uint32_t scale_index(int step, int k) const {
    if constexpr (W::kGrouping == Grouping::kSteps) {
      return uint32_t(uint64_t(step) * p.group_share >> 32);
    } else if constexpr (W::kGrouping == Grouping::k32) {
      // Four bits: lane t fetches for the t-th run of 32; eight: for the (t / 2)-th of two.
      return uint32_t(uint64_t(k / 32) * p.group_share >> 32);
    } else {
      return uint32_t(k) / (W::kScale == Scale::kE4M3 ? 16 : 32);
    }
  }

  PYFMT_DEVICE uint32_t load_scale(const uint8_t* s, uint32_t index) const {
    if constexpr (W::kGrouped) {
      index = min(index, uint32_t(p.row_scales) - 1);
      if (p.scale == Scale::kFP32) return *reinterpret_cast<const uint32_t*>(s + 4 * index);
      return *reinterpret_cast<const uint16_t*>(s + 2 * index);
    } else if constexpr (kGuard) {
      const uint32_t count = uint32_t(p.row_scales);
      uint32_t both = index < count ? s[index] : 0;
      if (W::kFactors == 2 && index + 1 < count) both |= uint32_t(s[index + 1]) << 8;
      return both;
    } else if constexpr (W::kFactors == 2) {
      return *reinterpret_cast<const uint16_t*>(s + index);
    } else {
      return s[index];
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

  // ---- one step -------------------------------------------------------------------------------

  // x: this step's fragments in shared memory, at this lane's place.
  using Words = uint32_t[kRows][4 * W::kVectors];
  using Scales = uint32_t[kRows];

  PYFMT_DEVICE void multiply_step(int slot, const Scales& scale, const char* x, int stride) {
    Words words;
    fetch(slot, words);
    if constexpr (W::kGrouped) {
      multiply_groups(words, scale, x, stride);
    } else if constexpr (W::kScale == Scale::kE8M0) {
      bool special = D::template special_codes<4 * W::kVectors * kRows>(words[0]);
      if constexpr (D::kLowest == 0) {
        // The top bit of a byte is reason enough to be careful: one comparison for all rows.
        uint32_t any = 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) any |= scale[r];
        special = special || (any & 0x8080u) != 0;
      } else {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          special = special || D::special_scale(W::kFactors == 2 ? scale[r] & 0xffu : scale[r]);
          if (W::kFactors == 2) special = special || D::special_scale(scale[r] >> 8);
        }
      }
      if (any_lane(special)) {
        multiply_blocks<true>(words, scale, x, stride);
      } else {
        multiply_blocks<false>(words, scale, x, stride);
      }
    } else {
      multiply_blocks<false>(words, scale, x, stride);
    }
  }

  template <bool kEverything>
  PYFMT_DEVICE void multiply_blocks(const Words& words, const Scales& scale, const char* x,
                                    int stride) {
    Factor factors[kRows][W::kFactors];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if constexpr (W::kScale == Scale::kE4M3) {
        D::factors(scale[r], factors[r]);
      } else {
#pragma unroll
        for (int i = 0; i < W::kFactors; ++i) {
          const uint32_t byte = W::kFactors == 1 ? scale[r] : scale[r] >> (8 * i) & 0xffu;
          factors[r][i] = D::template factor<kEverything>(byte);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < W::kUnits; ++u) {
      uint32_t a[kRows][D::kPairs];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        D::template scaled<kEverything>(words[r] + u * D::kWords,
                                        factors[r][u * W::kFactors / W::kUnits], a[r]);
      }
      multiply_unit(sums, a, x, stride, u);
    }
  }

  PYFMT_DEVICE void multiply_unit(float (&d)[kRowTiles][kTiles][4],
                                  const uint32_t (&a)[kRows][D::kPairs], const char* x, int stride,
                                  int u) const {
#pragma unroll
    for (int f = 0; f < W::kUnitFragments; ++f) {
      const char* at = x + (u * W::kUnitFragments + f) * stride;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint4 b = *reinterpret_cast<const uint4*>(at + 512 * j);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const uint32_t *top = a[2 * i] + 4 * f, *low = a[2 * i + 1] + 4 * f;
          mma16816(d[i][j], top[0], low[0], top[1], low[1], b.x, b.y);
          mma16816(d[i][j], top[2], low[2], top[3], low[3], b.z, b.w);
        }
      }
    }
  }

  // Integers as they are; each group's sum times its scale, in float32.
  PYFMT_DEVICE void multiply_groups(Words& words, const Scales& scale, const char* x, int stride) {
    constexpr bool kTurned = W::kGrouping == Grouping::k32;
    if constexpr (kTurned) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) turn(words[r]);
    }
    constexpr int kParts = kTurned ? W::kUnits : 1;
#pragma unroll
    for (int g = 0; g < kParts; ++g) {
      float part[kRowTiles][kTiles][4] = {};
#pragma unroll
      for (int u = g; u < (kTurned ? g + 1 : W::kUnits); ++u) {
        uint32_t a[kRows][D::kPairs];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          D::template scaled<false>(words[r] + u * D::kWords, D::unit_factor(), a[r]);
        }
        multiply_unit(part, a, x, stride, u);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // Only here, so that nothing waited for the scale to arrive.
        uint32_t factor = p.scale == Scale::kFP32   ? scale[r]
                          : p.scale == Scale::kBF16 ? scale[r] << 16
                                                    : as_uint(from_half(scale[r]));
        if (kTurned) factor = from_lane(factor, (lane & ~3) + g * (D::kBits == 8 ? 2 : 1));
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int c = 2 * (r & 1); c < 2 * (r & 1) + 2; ++c) {
            sums[r / 2][j][c] = fused(as_float(factor), part[r / 2][j][c], sums[r / 2][j][c]);
          }
        }
      }
    }
  }

  // Exchange words among four lanes so that each holds a share of every run of 32 elements.
  PYFMT_DEVICE void turn(uint32_t* w) const {
    const bool high = t & 2, odd = t & 1;
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
};

}  // namespace cuda
}  // namespace pyfmt
