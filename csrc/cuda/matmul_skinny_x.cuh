// SPDX-License-Identifier: Apache-2.0
// Activations for the kernel for few tokens: as bfloat16 terms, in the order of the decoded
// weights.
#pragma once

#include "matmul_skinny_warp.cuh"

namespace pyfmt {
namespace cuda {

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
// A task is what one lane of a step's fragments holds, so that neighbours store side by side; a
// thread loads several at once, kUnits units in all, to hide their latency.
template <class W, DType kIn, int kUnits>
PYFMT_DEVICE void stage(const SkinnyParams& p, char* shared, int first_token, int tokens, int rank,
                        int from) {
  constexpr bool kNarrow = kIn == DType::kBF16 && W::D::kBits != 6;
  constexpr int kTasks = kNarrow ? kUnits / W::kUnits : 1, kBatch = kNarrow ? W::kUnits : 1;
  const int stride = 64 * p.columns;
  const unsigned all = unsigned(p.k_warps * p.slice_steps) * 4u * unsigned(tokens);
  for (unsigned first = threadIdx.x; first < all; first += kTasks * blockDim.x) {
    char* to[kTasks];
    int token[kTasks], k[kTasks], lanes[kTasks];
#pragma unroll
    for (int i = 0; i < kTasks; ++i) {
      const unsigned index = first + unsigned(i) * blockDim.x;
      const unsigned local = (index >> 2) / unsigned(tokens);
      const unsigned of_k = local / unsigned(p.slice_steps);
      const int part = rank * p.k_warps + int(of_k);
      const int step = part_start(p, part) + from + int(local - of_k * unsigned(p.slice_steps));
      token[i] = int((index >> 2) - local * unsigned(tokens));
      lanes[i] = int(index & 3);
      k[i] = step * W::kStep;
      const bool real = index < all && step < part_start(p, part + 1);
      to[i] = real ? shared + int(local) * W::kFragments * stride + 64 * token[i] * p.terms +
                         16 * lanes[i]
                   : nullptr;
    }
#pragma unroll
    for (int u = 0; u < W::kUnits; u += kBatch) {
      SkinnyInput<W, kIn> units[kTasks][kBatch];
#pragma unroll
      for (int i = 0; i < kTasks * kBatch; ++i) {
        const int task = i / kBatch, at = u + i % kBatch;
        if (!to[task]) continue;
        units[task][i % kBatch].load(p, first_token + token[task],
                                     k[task] + W::unit_start(lanes[task], at));
      }
#pragma unroll
      for (int i = 0; i < kTasks * kBatch; ++i) {
        const int task = i / kBatch, at = u + i % kBatch;
        if (!to[task]) continue;
        units[task][i % kBatch].store(to[task] + at * W::kUnitFragments * stride, stride);
      }
    }
  }
}

}  // namespace cuda
}  // namespace pyfmt
