// SPDX-License-Identifier: Apache-2.0
// Operands of the kernel for few tokens: how codes divide into steps, and activations as
// bfloat16 terms in the order of the decoded weights.
#pragma once

#include "matmul_skinny_decode.cuh"
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
  int row_bytes = 0;
  const void* scales = nullptr;
  int row_scales = 0;          // of a row
  Scale scale = Scale::kE8M0;  // of groups: bf16, fp16 or fp32
  int scale_shift = 0;         // log2 of the bytes of a row's scales that are copied at once
  bool scale_copies = false;   // in the background; else loaded, a step's at once
  uint64_t group_share = 0;    // 2^32 over the steps, or runs of 32, of a group
  const float* tensor_scale = nullptr;
  void* slots = nullptr;  // to be cleared
  int slot_count = 0;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFP32;
  void* out = nullptr;
  DType out_dtype = DType::kBF16;
  int n = 0, k = 0;
  int strips = 0;                        // of rows
  int even_steps = 0, longer_parts = 0;  // of a warp's part of k; how many have one more
  // kStill: tiles of a block, or of a cluster; how many have one more; blocks of a cluster, which
  // share k; parts of k of a block, a warp's or two warps'; slots that are filled ahead of
  // activations.
  int even_tiles = 0, longer_blocks = 0, split = 1, parts = 0, early = 1;
  int slot = 0, terms_bytes = 0;  // of a step in shared memory; of its bfloat16 terms
};

// The first step of a part of k.
PYFMT_DEVICE int part_start(const SkinnyParams& p, int part) {
  return part * p.even_steps + min(part, p.longer_parts);
}

enum class Grouping { kBlocks, kSteps, k32 };

// kBF16: aligned bfloat16 activations; kAny: any; kGuarded: and rows or scales of any alignment.
// kLong: as kBF16, up to 8 tokens, blocks with many rows. kStill: as kBF16, up to 8 tokens that
// stay in registers.
enum class Inputs { kBF16, kAny, kGuarded, kLong, kStill };

// E, its scales, and how groups with float scales divide a step: kBlocks for none.
template <class E, Scale kScaleKind, Grouping kGroups>
struct Weights {
  using D = SkinnyDecoder<E, kScaleKind>;
  static constexpr Grouping kGrouping = kGroups;
  static constexpr bool kGrouped = kGroups != Grouping::kBlocks;
  static constexpr Scale kScale = kScaleKind;
  static constexpr int kVectors = D::kBits == 6 ? 3 : D::kBits / 4;  // of 16 bytes, a lane's
  static constexpr int kLane = kVectors * 128 / D::kBits;            // elements of them
  static constexpr int kStep = 4 * kLane;
  static constexpr int kUnits = kLane / D::kElements;
  static constexpr int kFragments = kLane / 8;  // of 8 elements of x a lane, two matrix steps
  static constexpr int kUnitFragments = D::kElements / 8;
  static constexpr int kFactors = D::kBits == 4 && kScale != Scale::kE4M3 ? 1 : 2;  // of a lane

  // Where unit u of lane t of four starts inside a step. A lane's vectors lie 64 bytes apart where
  // each holds whole codes.
  PYFMT_DEVICE static int unit_start(int t, int u) {
    if constexpr (kVectors == 2) {
      return 64 * (u / 2) + (kGroups == Grouping::k32 ? 16 * (2 * (u & 1) + (t & 1)) + 8 * (t >> 1)
                                                      : 16 * t + 8 * (u & 1));
    }
    return kGroups == Grouping::k32 ? 32 * u + 8 * t : t * kLane + u * D::kElements;
  }
};

// Tiles of 16 rows that share a decoding pass (a strip), strips whose sums a warp keeps at once,
// steps in its ring, warps of a block, neighbouring parts of k that each of them takes in turn, and
// most blocks of a multiprocessor, for kTiles tiles of 8 columns. kWarps * kTurns, the number of
// parts, is the same for any kTiles, so that it does not matter how many tokens there are.
template <class W, int kTiles>
struct SkinnyShape {
  static constexpr bool kMany = kTiles > 1, kSix = W::D::kBits == 6;
  static constexpr int kRowTiles = W::D::kBits == 4 ? 2 : 1;
  static constexpr int kStrips = kMany && W::D::kBits == 8 ? 4 : 2;
  static constexpr int kDepth = kMany && kSix ? 3 : 2;
  static constexpr int kTurns = kMany ? 2 : 1;
  static constexpr int kWarps = (kSix ? 8 : 16) / kTurns;
  static constexpr int kBlocks = kSix && !kMany ? 2 : 1;
};

// A unit's elements as they lie in memory, in the pairs that come out of decoding.
template <class D>
PYFMT_DEVICE void order_pairs(const uint32_t* raw, uint32_t* words) {
#pragma unroll
  for (int j = 0; j < D::kPairs; ++j) {
    const int low = D::element(j, 0), high = D::element(j, 1);
    words[j] = pick_bytes(raw[low / 2], raw[high / 2],
                          (low & 1 ? 0x32u : 0x10u) | (high & 1 ? 0x7600u : 0x5400u));
  }
}

// Activations of a step in shared memory: each token's as they lie in memory, but for the places
// of 32 bytes within 512, so that four lanes far apart read different banks.
template <class W, int kTiles, Inputs kInputs>
struct SkinnyX {
  using D = typename W::D;
  static constexpr bool kAny = kInputs != Inputs::kBF16;

  template <int kParts>
  struct Fragments {
    uint32_t words[kTiles][W::kFragments / kParts][4];
  };

  PYFMT_DEVICE static unsigned place(unsigned at) { return at ^ (at >> 2 & 0x60u); }

  const char* from;  // this lane's first 16 bytes, as far as they do not depend on the step
  unsigned to;       // where they go
  int left;          // bytes from there to the end of the row

  PYFMT_DEVICE SkinnyX(const SkinnyParams& p, int lane, int first_token) {
    constexpr unsigned kChunks = W::kStep / 8;
    const unsigned token = unsigned(lane) / kChunks, at = unsigned(lane) % kChunks * 16;
    from = static_cast<const char*>(p.x) + (int64_t(first_token) + token) * p.x_stride * 2 + at;
    to = 2 * W::kStep * token + place(at);
    left = 2 * p.k - int(at);
    keep(from);
    keep(to);
    keep(left);
  }

  // Start the copies of the tokens' elements of a step: neighbouring lanes take neighbouring 16
  // bytes, whoever uses them.
  PYFMT_DEVICE void load(const SkinnyParams& p, SharedAddress slot, int lane, int first_token,
                         int tokens, int step) const {
    if constexpr (kAny) {
      load_any(p, slot, lane, first_token, tokens, step);
    } else {
      constexpr int kChunks = W::kStep / 8, kTokens = 32 / kChunks;
      const int rest = left - step * (2 * W::kStep), real = rest < 0 ? 0 : rest > 16 ? 16 : rest;
      const char* source = from + (real ? step * (2 * W::kStep) : 0);
      slot += to;
#pragma unroll 1
      for (int token = lane / kChunks; token < tokens; token += kTokens) {
        start_copy<16>(slot, source, real);
        slot += 2 * W::kStep * kTokens;
        source += p.x_stride * (2 * kTokens);
      }
    }
  }
  PYFMT_DEVICE static void load_any(const SkinnyParams& p, SharedAddress slot, int lane,
                                    int first_token, int tokens, int step) {
    const int bytes = p.x_dtype == DType::kFP32 ? 4 : 2;
    const int row = W::kStep * bytes;  // of a token
    const char* const x = static_cast<const char*>(p.x);
#pragma unroll 1
    for (int c = 16 * lane; c < tokens * row; c += 512) {
      const int token = c / row, at = c - token * row;
      const int rest = (p.k - step * W::kStep) * bytes - at;
      const int real = rest < 0 ? 0 : rest > 16 ? 16 : rest;
      const char* const source = x + int64_t(first_token + token) * p.x_stride * bytes +
                                 (real ? int64_t(step) * row + at : 0);
      const SharedAddress one = slot + unsigned(token * row) + place(unsigned(at));
      if (p.x_wide) {
        start_copy<16>(one, source, real);
      } else {
        careful(one, source, real, bytes);
      }
    }
  }

  PYFMT_DEVICE static void careful(SharedAddress to, const char* from, int real, int bytes) {
#pragma unroll 1
    for (int i = 0; i < 16; i += bytes) {
      if (bytes == 4) {
        store_small<4>(to + unsigned(i),
                       i < real ? *reinterpret_cast<const uint32_t*>(from + i) : 0);
      } else {
        store_small<2>(to + unsigned(i),
                       i < real ? *reinterpret_cast<const uint16_t*>(from + i) : 0);
      }
    }
  }

  // A step's activations as bfloat16 terms, the largest first: a column of `terms` each, in which
  // elements lie as bfloat16 activations would.
  PYFMT_DEVICE static void convert(const SkinnyParams& p, SharedAddress slot, SharedAddress terms,
                                   int lane, int tokens) {
    if (p.x_dtype == DType::kBF16) {
      convert_from<DType::kBF16>(slot, terms, lane, tokens);
    } else if (p.x_dtype == DType::kFP16) {
      convert_from<DType::kFP16>(slot, terms, lane, tokens);
    } else {
      convert_from<DType::kFP32>(slot, terms, lane, tokens);
    }
  }
  template <DType kIn>
  PYFMT_DEVICE static void convert_from(SharedAddress slot, SharedAddress terms, int lane,
                                        int tokens) {
    constexpr int kBytes = dtype_bytes(kIn), kChunks = W::kStep / 8, kPieces = kBytes / 2;
    constexpr int kTerms = kIn == DType::kBF16 ? 1 : kIn == DType::kFP16 ? 2 : 3;
#pragma unroll 1
    for (int i = lane; i < tokens * kChunks; i += 32) {
      const int token = i / kChunks;
      const unsigned at = unsigned(i % kChunks) * 8;
      uint32_t raw[4 * kPieces], words[kTerms][4];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const uint4 q =
            load_shared16(slot + unsigned(token * W::kStep * kBytes) + place(at * kBytes + 16 * j));
        raw[4 * j] = q.x;
        raw[4 * j + 1] = q.y;
        raw[4 * j + 2] = q.z;
        raw[4 * j + 3] = q.w;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t low[kTerms], high[kTerms];
        split<kIn>(raw, 2 * j, low);
        split<kIn>(raw, 2 * j + 1, high);
#pragma unroll
        for (int n = 0; n < kTerms; ++n) words[n][j] = pick_bytes(low[n], high[n], 0x7632);
      }
#pragma unroll
      for (int n = 0; n < kTerms; ++n) {
        store_shared16(terms + unsigned((token * kTerms + n) * 2 * W::kStep) + place(2 * at),
                       make_uint4(words[n][0], words[n][1], words[n][2], words[n][3]));
      }
    }
  }

  // An element in its terms: float32 bits of which the low half is zero.
  template <DType kIn, int kTerms>
  PYFMT_DEVICE static void split(const uint32_t* raw, int i, uint32_t (&term)[kTerms]) {
    if constexpr (kIn == DType::kBF16) {
      term[0] = i & 1 ? raw[i / 2] & 0xffff0000u : raw[i / 2] << 16;
    } else {
      float rest = kIn == DType::kFP32 ? as_float(raw[i]) : half_at<kIn>(raw[i / 2], i & 1);
      const uint32_t bits = as_uint(rest), magnitude = bits & 0x7fffffffu;
#pragma unroll
      for (int j = 0; j < kTerms; ++j) {
        term[j] = as_uint(rest) & 0xffff0000u;
        rest = rest - as_float(term[j]);
        // A NaN must not lose the bits that make it one; an infinity has no other terms.
        if (magnitude >= kFloatInf) term[j] = j ? 0 : magnitude > kFloatInf ? kFloatNaN : bits;
      }
    }
  }

  // This lane's operands of a part of a step. Columns beyond the last are read as the last: what
  // they give is never stored.
  template <int kParts>
  PYFMT_DEVICE static void fetch(SharedAddress from, int lane, int columns, int part,
                                 Fragments<kParts>& x) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int column = min(8 * j + (lane >> 2), columns - 1);
      const SharedAddress row = from + unsigned(column * 2 * W::kStep);
#pragma unroll
      for (int u = 0; u < W::kUnits / kParts; ++u) {
        const unsigned at = unsigned(W::unit_start(lane & 3, part * (W::kUnits / kParts) + u));
        unpack(row, at, x.words[j][u * W::kUnitFragments]);
      }
    }
  }

  // A unit's elements, which start at `at` of a column's, in pairs.
  PYFMT_DEVICE static void unpack(SharedAddress row, unsigned at, uint32_t* words) {
    uint32_t raw[D::kPairs];
#pragma unroll
    for (int i = 0; i < D::kPairs / 4; ++i) {
      const uint4 q = load_shared16(row + place(2 * at + 16 * i));
      raw[4 * i] = q.x;
      raw[4 * i + 1] = q.y;
      raw[4 * i + 2] = q.z;
      raw[4 * i + 3] = q.w;
    }
    order_pairs<D>(raw, words);
  }
};

// One column's activations straight to registers: aligned bfloat16, a multiple of 8 of them.
template <class W>
struct SkinnyColumn {
  using D = typename W::D;
  const char* from;  // this lane's first
  int left;          // bytes from there to the end of the row
  uint4 raw[W::kFragments];

  // Columns beyond the last are read as the last: what they give is never stored.
  PYFMT_DEVICE SkinnyColumn(const SkinnyParams& p, int lane, int first_token, int tokens) {
    const int token = first_token + min(lane >> 2, tokens - 1), start = W::unit_start(lane & 3, 0);
    left = 2 * (p.k - start);
    from = static_cast<const char*>(p.x) + int64_t(token) * p.x_stride * 2 + 2 * start;
    keep(from);
    keep(left);
  }
  // Start reading a step's.
  PYFMT_DEVICE void read(int step) {
#pragma unroll
    for (int u = 0; u < W::kFragments; ++u) {
      const int at = 2 * step * W::kStep + 2 * (W::unit_start(0, u) - W::unit_start(0, 0));
      raw[u] = make_uint4(0, 0, 0, 0);
      if (at < left) raw[u] = load_once16(from + at);
    }
  }
  // What was read, in the order of the decoded weights.
  PYFMT_DEVICE void take(uint32_t (&words)[1][W::kFragments][4]) const {
#pragma unroll
    for (int u = 0; u < W::kFragments; ++u) {
      const uint32_t four[4] = {raw[u].x, raw[u].y, raw[u].z, raw[u].w};
      order_pairs<D>(four, words[0][u]);
    }
  }
};

}  // namespace cuda
}  // namespace pyfmt
