// SPDX-License-Identifier: Apache-2.0
// Operands of the kernel for few tokens: how codes divide into steps, and activations as
// bfloat16 terms in the order of the decoded weights.
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
  int row_bytes = 0;
  const void* scales = nullptr;
  int row_scales = 0;          // of a row
  Scale scale = Scale::kE8M0;  // of groups: bf16, fp16 or fp32
  int scale_shift = 0;         // log2 of the bytes of a row's scales that are copied at once
  bool scale_copies = false;   // in the background; else loaded, a step's at once
  uint64_t group_share = 0;    // 2^32 over the steps, or runs of 32, of a group
  const float* tensor_scale = nullptr;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFP32;
  void* out = nullptr;
  DType out_dtype = DType::kBF16;
  int n = 0, k = 0, padded = 0;
  int strips = 0;                        // of rows
  int even_steps = 0, longer_parts = 0;  // of a warp's part of k; how many have one more
  int slot = 0;                          // bytes of a step in shared memory
};

enum class Grouping { kBlocks, kSteps, k32 };

// kBF16: aligned bfloat16 activations; kAny: any; kGuarded: and rows or scales of any alignment.
enum class Inputs { kBF16, kAny, kGuarded };

// E, its scales, and how groups with float scales divide a step: kBlocks for none.
template <class E, Scale kScaleKind, Grouping kGroups>
struct Weights {
  using D = Decoder<E, kScaleKind>;
  static constexpr Grouping kGrouping = kGroups;
  static constexpr bool kGrouped = kGroups != Grouping::kBlocks;
  static constexpr Scale kScale = kScaleKind;
  static constexpr int kVectors = D::kBits == 6 ? 3 : D::kBits / 4;  // of 16 bytes, a lane's
  static constexpr int kLane = kVectors * 128 / D::kBits;  // elements of them
  static constexpr int kStep = 4 * kLane;
  static constexpr int kUnits = kLane / D::kElements;
  static constexpr int kFragments = kLane / 8;  // of 8 elements of x a lane, two matrix steps
  static constexpr int kUnitFragments = D::kElements / 8;
  static constexpr int kFactors = D::kBits == 4 && kScale != Scale::kE4M3 ? 1 : 2;  // of a lane

  // Where unit u of lane t of four starts inside a step. A lane's vectors lie 64 bytes apart where
  // each holds whole codes.
  PYFMT_DEVICE static int unit_start(int t, int u) {
    if constexpr (kVectors == 2) {
      return 64 * (u / 2) +
             (kGroups == Grouping::k32 ? 16 * (2 * (u & 1) + (t & 1)) + 8 * (t >> 1)
                                       : 16 * t + 8 * (u & 1));
    }
    return kGroups == Grouping::k32 ? 32 * u + 8 * t : t * kLane + u * D::kElements;
  }
};

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

  // This lane's operands of a part of a step. Columns beyond the last are read as the last: what
  // they give is never stored.
  template <int kParts>
  PYFMT_DEVICE static void fetch(const SkinnyParams& p, SharedAddress from, int lane, int tokens,
                                 int part, Fragments<kParts>& x) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int column = 8 * j + (lane >> 2);
      const int token = min(kAny ? column / p.terms : column, tokens - 1);
      const int term = kAny ? column - token * p.terms : 0;
      const int bytes = kAny && p.x_dtype == DType::kFP32 ? 4 : 2;
      const SharedAddress row = from + unsigned(token * W::kStep * bytes);
#pragma unroll
      for (int u = 0; u < W::kUnits / kParts; ++u) {
        uint32_t* const words = x.words[j][u * W::kUnitFragments];
        const unsigned at = unsigned(W::unit_start(lane & 3, part * (W::kUnits / kParts) + u));
        if (!kAny || p.x_dtype == DType::kBF16) {
          unpack<DType::kBF16>(row, at, term, words);
        } else if (p.x_dtype == DType::kFP16) {
          unpack<DType::kFP16>(row, at, term, words);
        } else {
          unpack<DType::kFP32>(row, at, term, words);
        }
      }
    }
  }

  // A unit's elements, which start at `at` of a token's, as pairs of one of their bfloat16 terms.
  template <DType kIn>
  PYFMT_DEVICE static void unpack(SharedAddress row, unsigned at, int term, uint32_t* words) {
    constexpr int kBytes = dtype_bytes(kIn), kPieces = D::kElements * kBytes / 16;
    uint32_t raw[4 * kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint4 q = load_shared16(row + place(at * kBytes + 16 * i));
      raw[4 * i] = q.x;
      raw[4 * i + 1] = q.y;
      raw[4 * i + 2] = q.z;
      raw[4 * i + 3] = q.w;
    }
#pragma unroll
    for (int j = 0; j < D::kPairs; ++j) {
      const int low = D::element(j, 0), high = D::element(j, 1);
      if constexpr (kIn == DType::kBF16) {
        words[j] = pick_bytes(raw[low / 2], raw[high / 2],
                              (low & 1 ? 0x32u : 0x10u) | (high & 1 ? 0x7600u : 0x5400u));
      } else {
        words[j] = pick_bytes(term_of<kIn>(raw, low, term), term_of<kIn>(raw, high, term), 0x7632);
      }
    }
  }

  // Term `term` of an element, the largest first: float32 bits of which the low half is zero.
  template <DType kIn>
  PYFMT_DEVICE static uint32_t term_of(const uint32_t* raw, int i, int term) {
    float rest = kIn == DType::kFP32 ? as_float(raw[i]) : half_at<kIn>(raw[i / 2], i & 1);
    const uint32_t magnitude = as_uint(rest) & 0x7fffffffu;
    // A NaN must not lose the bits that make it one; an infinity has no other terms.
    if (magnitude >= kFloatInf) {
      return term ? 0 : magnitude > kFloatInf ? kFloatNaN : as_uint(rest);
    }
    uint32_t found = as_uint(rest) & 0xffff0000u;
#pragma unroll
    for (int j = 1; j < (kIn == DType::kFP32 ? 3 : 2); ++j) {
      rest = rest - as_float(found);
      if (j > term) break;
      found = as_uint(rest) & 0xffff0000u;
    }
    return found;
  }
};

}  // namespace cuda
}  // namespace pyfmt
