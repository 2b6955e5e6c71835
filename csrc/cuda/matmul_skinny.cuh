// SPDX-License-Identifier: Apache-2.0
// The kernel for few tokens: packed weights stream from memory through registers into tensor cores.
//
// The weight is the left operand, 16 rows of it a tensor-core tile, and up to 8 * kTiles columns
// (tokens, or the two or three bfloat16 terms of wider ones) the right one. The order of k inside a
// step is free as long as both sides agree, so a lane takes 16 or 48 contiguous bytes of a row and
// the activations lie in shared memory in the order in which those bytes are decoded.
//
// k is cut into parts: the blocks of a cluster take neighbouring ones, and so do the groups of
// warps in a block. Each part adds up in its own accumulators; the parts meet in shared memory and
// are summed in the order of k. How many parts there are depends on n and k alone, never on the
// number of tokens, so a token's result does not depend on what else is in the batch.
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
  static constexpr int kRowTiles = W::kGrouped || W::D::kBits == 6 ? 1 : 2;
  static constexpr int kDepth = W::kVectors == 3 || kMany ? 3 : 4;
  static constexpr int kWarps = kMany ? 12 : 16;
  static constexpr int kBlocks = 1;
};

// Steps whose scales wait in registers: those of the codes wait in shared memory, kDepth steps.
constexpr int kScaleDepth = 2;

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
  PYFMT_DEVICE int64_t row_of(int64_t first, int r) const {
    const int64_t row = first + 8 * r + (lane >> 2);
    return row < p.n ? row : p.n - 1;
  }
  PYFMT_DEVICE void set_codes(int64_t first) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) codes[r] = p.codes + row_of(first, r) * p.row_bytes;
  }
  PYFMT_DEVICE void set_scales(int64_t first) {
    const int64_t bytes = p.row_scales * (W::kGrouped ? scale_bytes(p.scale) : 1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      scales[r] = static_cast<const uint8_t*>(p.scales) + row_of(first, r) * bytes;
    }
  }

  // ---- loads ----------------------------------------------------------------------------------

  PYFMT_DEVICE void load_codes(int slot, int step) const {
    const int k = step * W::kStep + t * W::kLane;
    const uint32_t at = uint32_t(k / 8 * D::kBits);
    char* to = ring + slot * kSlotBytes;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < W::kVectors; ++v) {
        char* const one = to + (r * W::kVectors + v) * 512;
        if constexpr (kGuard) {
          *reinterpret_cast<uint4*>(one) = careful(codes[r], at + 16 * v);
        } else {
          start_copy(one, codes[r] + at + 16 * v, k < p.padded);
        }
      }
    }
  }

  PYFMT_DEVICE void load_scales(uint32_t (&scale)[kRows], int step) const {
    int k = step * W::kStep + t * W::kLane;
    // Beyond the end codes are zeros, and the row's own first scale is as good as any.
    if (!kGuard && k >= p.padded) k = 0;
    const uint32_t index = scale_index(step, k);
#pragma unroll
    for (int r = 0; r < kRows; ++r) scale[r] = load_scale(scales[r], index);
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

// ---- activations ------------------------------------------------------------------------------

// x's elements of a unit as bfloat16 terms, in the order in which the weights are decoded.
template <class W, DType kIn>
struct SkinnyInput {
  using D = typename W::D;
  static constexpr int kBytes = dtype_bytes(kIn), kVectors = D::kElements * kBytes / 16;
  static constexpr int kTerms = kIn == DType::kBF16 ? 1 : kIn == DType::kFP16 ? 2 : 3;
  uint32_t raw[4 * kVectors];

  PYFMT_DEVICE void load(const SkinnyParams& p, int token, int k) {
    const char* row = static_cast<const char*>(p.x) + int64_t(token) * p.x_stride * kBytes;
    if (p.x_wide && k + D::kElements <= p.k) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint4 q = *reinterpret_cast<const uint4*>(row + k * kBytes + 16 * v);
        raw[4 * v] = q.x;
        raw[4 * v + 1] = q.y;
        raw[4 * v + 2] = q.z;
        raw[4 * v + 3] = q.w;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < D::kElements; ++i) {
      const bool inside = k + i < p.k;
      if constexpr (kBytes == 4) {
        raw[i] = inside ? reinterpret_cast<const uint32_t*>(row)[k + i] : 0;
      } else {
        const uint32_t half = inside ? reinterpret_cast<const uint16_t*>(row)[k + i] : 0;
        raw[i / 2] = i & 1 ? raw[i / 2] | half << 16 : half;
      }
    }
  }

  // Element i in its terms, the largest first: float32 bits of which the low half is zero.
  PYFMT_DEVICE void split(int i, uint32_t (&term)[kTerms]) const {
    if constexpr (kIn == DType::kBF16) {
      term[0] = i & 1 ? raw[i / 2] & 0xffff0000u : raw[i / 2] << 16;
    } else {
      float rest = kIn == DType::kFP32 ? as_float(raw[i]) : half_at<kIn>(raw[i / 2], i & 1);
      const uint32_t magnitude = as_uint(rest) & 0x7fffffffu;
      if (magnitude >= kFloatInf) {
        // A NaN must not lose the bits that make it one; an infinity has no other terms.
        term[0] = magnitude > kFloatInf ? kFloatNaN : as_uint(rest);
#pragma unroll
        for (int j = 1; j < kTerms; ++j) term[j] = 0;
        return;
      }
#pragma unroll
      for (int j = 0; j < kTerms; ++j) {
        term[j] = as_uint(rest) & 0xffff0000u;
        rest = rest - as_float(term[j]);
      }
    }
  }

  // to: the unit's first fragment at this lane's place, of the token's first column.
  PYFMT_DEVICE void store(char* to, int stride) const {
#pragma unroll
    for (int f = 0; f < W::kUnitFragments; ++f) {
      uint32_t words[kTerms][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t low[kTerms], high[kTerms];
        split(D::element(4 * f + j, 0), low);
        split(D::element(4 * f + j, 1), high);
#pragma unroll
        for (int i = 0; i < kTerms; ++i) words[i][j] = pick_bytes(low[i], high[i], 0x7632);
      }
#pragma unroll
      for (int i = 0; i < kTerms; ++i) {
        *reinterpret_cast<uint4*>(to + f * stride + 64 * i) =
            make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
      }
    }
  }
};

PYFMT_DEVICE int part_start(const SkinnyParams& p, int part) {
  return part * p.even_steps + min(part, p.longer_parts);
}

// Put the slice of x that starts at `from` steps into each part of this block in shared memory.
// A thread takes what one lane of a fragment holds, so that neighbours store side by side.
template <class W, DType kIn>
PYFMT_DEVICE void stage(const SkinnyParams& p, char* shared, int first_token, int tokens, int rank,
                        int from) {
  // As many loads at once as hide their latency without crowding out the weights.
  constexpr int kBatch = kIn == DType::kFP32 || W::D::kBits == 6 ? 1 : W::kUnits;
  const int stride = 64 * p.columns;
  const unsigned all = unsigned(p.k_warps * p.slice_steps) * 4u * unsigned(tokens);
  for (unsigned index = threadIdx.x; index < all; index += blockDim.x) {
    const int t = int(index & 3);
    const unsigned local = (index >> 2) / unsigned(tokens);
    const int token = int((index >> 2) - local * unsigned(tokens));
    const unsigned of_k = local / unsigned(p.slice_steps);
    const int part = rank * p.k_warps + int(of_k);
    const int step = part_start(p, part) + from + int(local - of_k * unsigned(p.slice_steps));
    if (step >= part_start(p, part + 1)) continue;
    char* const to = shared + int(local) * W::kFragments * stride + 64 * token * p.terms + 16 * t;
#pragma unroll
    for (int u = 0; u < W::kUnits; u += kBatch) {
      SkinnyInput<W, kIn> units[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        units[i].load(p, first_token + token, step * W::kStep + W::unit_start(t, u + i));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        units[i].store(to + (u + i) * W::kUnitFragments * stride, stride);
      }
    }
  }
}

// ---- the kernel -------------------------------------------------------------------------------

template <class W, int kTiles, Inputs kInputs>
__global__ void __launch_bounds__(32 * SkinnyShape<W, kTiles>::kWarps,
                                  SkinnyShape<W, kTiles>::kBlocks)
    skinny(const __grid_constant__ SkinnyParams p) {
  using Warp = SkinnyWarp<W, kTiles, kInputs>;
  constexpr int kDepth = SkinnyShape<W, kTiles>::kDepth, kRows = 16 * Warp::kRowTiles;
  char* const ring = dynamic_shared();
  char* const shared = ring + p.x_at;
  float* const partial = reinterpret_cast<float*>(ring + p.sums_at);
  const int rank = int(blockIdx.x % unsigned(p.cluster)),
            cluster = int(blockIdx.x / unsigned(p.cluster));
  const int clusters = int(gridDim.x / unsigned(p.cluster));
  const int of_k = int((threadIdx.x >> 5) / unsigned(p.row_warps));
  const int of_n = int(threadIdx.x >> 5) - of_k * p.row_warps;
  const int part = rank * p.k_warps + of_k;
  const int first_step = part_start(p, part), steps = part_start(p, part + 1) - first_step;
  const int first_token = int(blockIdx.y) * p.tile_tokens;
  const int tokens = min(p.tile_tokens, p.tokens - first_token);
  const int columns = tokens * p.terms, stride = 64 * p.columns;
  const int group_rows = kRows * p.row_warps, pitch = group_rows + 4;

  Warp warp(p, ring);
  typename Warp::Scales scales[kScaleDepth];
  const int64_t first_row = int64_t(cluster) * group_rows + of_n * kRows;
  const int64_t row_step = int64_t(clusters) * group_rows;
  // What is fetched next: codes kDepth steps ahead and scales kScaleDepth, also of the next rows.
  int64_t codes_row = first_row, scales_row = first_row;
  int codes_step = 0, scales_step = 0, slot_in = 0, slot_out = 0;
  const auto fetch_codes = [&] {
    if (codes_row < p.n && codes_step < steps) warp.load_codes(slot_in, first_step + codes_step);
    close_copies();
    slot_in = slot_in + 1 == kDepth ? 0 : slot_in + 1;
    if (++codes_step == p.part_steps) {
      codes_step = 0;
      codes_row += row_step;
      if (codes_row < p.n) warp.set_codes(codes_row);
    }
  };
  const auto fetch_scales = [&](int which) {
    if (scales_row < p.n && scales_step < steps) {
      warp.load_scales(scales[which], first_step + scales_step);
    }
    if (++scales_step == p.part_steps) {
      scales_step = 0;
      scales_row += row_step;
      if (scales_row < p.n) warp.set_scales(scales_row);
    }
  };
  if (first_row < p.n) {
    warp.set_codes(first_row);
    warp.set_scales(first_row);
  }
#pragma unroll 1
  for (int d = 0; d < kDepth; ++d) fetch_codes();
#pragma unroll
  for (int d = 0; d < kScaleDepth; ++d) fetch_scales(d);
  wait_for_earlier_launch();
  allow_next_launch();

  // One column for all where fewer than eight are there: what the others give is never stored.
  const int column = kTiles > 1 ? warp.lane >> 2 : min(warp.lane >> 2, p.columns - 1);
  const char* const x =
      shared + of_k * p.slice_steps * W::kFragments * stride + 64 * column + 16 * warp.t;
  const bool once = p.slice_steps >= p.part_steps;
  bool staged = false;
  for (int64_t row = first_row; row - of_n * kRows < p.n; row += row_step) {
    const bool working = row < p.n;
    if (working) warp.clear();
    for (int slice = 0; slice < p.part_steps; slice += p.slice_steps) {
      if (!(once && staged)) {
        if (staged) block_barrier();
        if (kInputs == Inputs::kBF16 || p.x_dtype == DType::kBF16) {
          stage<W, DType::kBF16>(p, shared, first_token, tokens, rank, slice);
        } else if (p.x_dtype == DType::kFP16) {
          stage<W, DType::kFP16>(p, shared, first_token, tokens, rank, slice);
        } else {
          stage<W, DType::kFP32>(p, shared, first_token, tokens, rank, slice);
        }
        staged = true;
        block_barrier();
      }
      if (!working) continue;
      const int end = min(slice + p.slice_steps, p.part_steps);
#pragma unroll 1
      for (int base = slice; base < end; base += kScaleDepth) {
#pragma unroll
        for (int d = 0; d < kScaleDepth; ++d) {
          copies_arrived<kDepth - 1>();
          if (base + d < steps) {
            warp.multiply_step(slot_out, scales[d],
                               x + (base + d - slice) * (W::kFragments * stride), stride);
          }
          slot_out = slot_out + 1 == kDepth ? 0 : slot_out + 1;
          fetch_scales(d);
          fetch_codes();
        }
      }
    }

    // The parts' sums, column by column: [part of this block][column][row].
    if (working) {
#pragma unroll
      for (int i = 0; i < Warp::kRowTiles * kTiles * 4; ++i) {
        const int tile = i / 4 % kTiles, row_tile = i / 4 / kTiles, c = i % 4;
        const int at = 8 * tile + 2 * warp.t + (c & 1);
        const int line = of_n * kRows + 16 * row_tile + (warp.lane >> 2) + 8 * (c >> 1);
        if (at < columns)
          partial[(of_k * columns + at) * pitch + line] = warp.sums[row_tile][tile][c];
      }
    }
    p.cluster > 1 ? cluster_barrier() : block_barrier();
    const float factor = (p.tensor_scale ? *p.tensor_scale : 1.0f) * float(1 << W::D::kDown);
    for (int i = rank * int(blockDim.x) + int(threadIdx.x); i < group_rows * tokens;
         i += p.cluster * int(blockDim.x)) {
      const int line = i % group_rows, token = i / group_rows;
      const int64_t n = row - of_n * kRows + line;
      if (n >= p.n) continue;
      float sum = 0.0f;
      for (int term = p.terms - 1; term >= 0; --term) {
        for (int from = 0; from < p.cluster; ++from) {
          for (int k = 0; k < p.k_warps; ++k) {
            const float* one = partial + (k * columns + token * p.terms + term) * pitch + line;
            sum = sum + (p.cluster > 1 ? from_block(one, from) : *one);
          }
        }
      }
      float y = sum * factor;
      if (p.bias) y = y + load_element(p.bias, p.bias_dtype, n);
      store_element(p.out, p.out_dtype, int64_t(first_token + token) * p.n + n, y);
    }
    // Nobody overwrites, or leaves, what another still reads.
    p.cluster > 1 ? cluster_barrier() : block_barrier();
  }
}

// ---- launch -----------------------------------------------------------------------------------

// One of the compiled kernels and what a plan must know of it.
struct SkinnyKernel {
  void (*run)(SkinnyParams) = nullptr;
  int step = 0, depth = 0, slot = 0, fragments = 0, row_tile = 0, warps = 0, blocks = 0, tiles = 0;
};

template <class W, int kTiles, Inputs kInputs>
SkinnyKernel describe_skinny() {
  using Shape = SkinnyShape<W, kTiles>;
  return {skinny<W, kTiles, kInputs>,
          W::kStep,
          Shape::kDepth,
          SkinnyWarp<W, kTiles, kInputs>::kSlotBytes,
          W::kFragments,
          16 * Shape::kRowTiles,
          Shape::kWarps,
          Shape::kBlocks,
          kTiles};
}

template <class W>
SkinnyKernel skinny_kernel(int columns, Inputs inputs) {
  if (inputs == Inputs::kGuarded) return describe_skinny<W, 8, Inputs::kGuarded>();
  if (inputs == Inputs::kAny) {
    return columns <= 8 ? describe_skinny<W, 1, Inputs::kAny>()
                        : describe_skinny<W, 8, Inputs::kAny>();
  }
  return columns <= 8    ? describe_skinny<W, 1, Inputs::kBF16>()
         : columns <= 16 ? describe_skinny<W, 2, Inputs::kBF16>()
         : columns <= 32 ? describe_skinny<W, 4, Inputs::kBF16>()
                         : describe_skinny<W, 8, Inputs::kBF16>();
}

SkinnyKernel skinny_fp4(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_fp6(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_fp8(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_mxint(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_int4(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_int8(const FormatSpec&, int columns, Inputs);

}  // namespace cuda
}  // namespace pyfmt
