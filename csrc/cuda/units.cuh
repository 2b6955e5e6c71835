// SPDX-License-Identifier: Apache-2.0
// Units of 32 elements, along a row or down two columns: their scales, their codes, their stores.
#pragma once

#include <type_traits>

#include "pairs.cuh"
#include "scale.cuh"

namespace pyfmt {
namespace cuda {

// The scales of a unit, once its halves' maxima are known.
template <bool kPow2, class Params>
PYFMT_DEVICE void scales_of(const Params& p, const codec::RecipeConstants& r,
                            const uint32_t (&amax)[2], BlockScale (&b)[2],
                            Multipliers known = {nullptr}) {
  b[0] = block_scale<kPow2>(p.scale, r, p.halves == 1 ? L::max(amax[0], amax[1]) : amax[0], known);
  b[1] = b[0];
  if (p.halves == 2) b[1] = block_scale<kPow2>(p.scale, r, amax[1], known);
}

template <class E>
PYFMT_DEVICE void clear_poisoned(const BlockScale (&b)[2], uint32_t* codes) {
  constexpr int kWords = Coder<E>::kWords;
#pragma unroll
  for (int i = 0; i < 2 * kWords; ++i) codes[i] = b[i / kWords].poisoned ? 0u : codes[i];
}

PYFMT_DEVICE void maxima(const float* v, uint32_t (&amax)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) m = max_abs_nan(m, v[16 * h + i]);
    amax[h] = as_uint(m);
  }
}

template <class E, bool kWithin, class Get>
PYFMT_DEVICE void encode_unit(const Get& get, const BlockScale (&b)[2], const Limits& limits,
                              uint32_t* codes) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    Coder<E>::template encode<kWithin>([&](int i) { return get(16 * h + i); }, b[h].multiplier,
                                       limits, codes + h * Coder<E>::kWords);
  }
}

template <class E, bool kPow2, DType kIn>
constexpr bool kTwoAtOnce = kPow2 && kIn == DType::kBF16 && pairs::serve<E>();

template <class E, bool kPow2, bool kWithin, DType kIn>
PYFMT_DEVICE void encode_row(const Raw<kIn>& raw, const BlockScale (&b)[2], const Limits& limits,
                             uint32_t* codes) {
  if constexpr (kTwoAtOnce<E, kPow2, kIn>) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float m = b[w / 2].multiplier;
      const uint32_t* q = raw.w + 4 * w;
      // Elements i and i + 4 of eight: their codes come out in order.
      const uint32_t x[4] = {pick_bytes(q[0], q[2], 0x5410), pick_bytes(q[0], q[2], 0x7632),
                             pick_bytes(q[1], q[3], 0x5410), pick_bytes(q[1], q[3], 0x7632)};
      codes[w] = pairs::nibbles<E, kWithin>(x, pairs::two(m, m), limits);
    }
  } else {
    encode_unit<E, kWithin>([&](int i) { return raw.get(i); }, b, limits, codes);
  }
}

// Two neighbouring columns of 32 rows, a row a word.
template <class E, bool kPow2, bool kWithin, DType kIn>
PYFMT_DEVICE void encode_columns(const uint32_t (&x)[kUnit], const BlockScale (&b)[2][2],
                                 const Limits& limits, uint32_t (*codes)[2 * Coder<E>::kWords]) {
  if constexpr (kTwoAtOnce<E, kPow2, kIn>) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t m = pairs::two(b[0][w / 2].multiplier, b[1][w / 2].multiplier);
      const uint32_t *q = x + 8 * w, four[4] = {q[0], q[1], q[2], q[3]},
                     more[4] = {q[4], q[5], q[6], q[7]};
      const uint32_t low = pairs::nibbles<E, kWithin>(four, m, limits);
      const uint32_t high = pairs::nibbles<E, kWithin>(more, m, limits);
      codes[0][w] = pick_bytes(low, high, 0x5410);
      codes[1][w] = pick_bytes(low, high, 0x7632);
    }
  } else {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      encode_unit<E, kWithin>([&](int i) { return half_at<kIn>(x[i], s); }, b[s], limits, codes[s]);
    }
  }
}

// A warp's units of a tile's rows, `units` a row, to memory where unit (0, 0) starts at `out`.
// Units wider than one access go through shared memory, so that the stores are of whole rows.
template <int kBytes, int kUnits>
PYFMT_DEVICE void store_rows(uint8_t* out, int64_t units_per_row, int rows, int units,
                             const uint32_t* words, uint4* shared) {
  constexpr int kChunk = kBytes % 16 == 0 ? 16 : 8, kCount = kBytes / kChunk;
  using Chunk = std::conditional_t<kChunk == 16, uint4, uint2>;
  const int lane = threadIdx.x & 31;
  Chunk* mine = reinterpret_cast<Chunk*>(shared) + (threadIdx.x >> 5) * 32 * kCount;
  // As in Stage: eight lanes never share a bank.
  const int turn = kChunk == 16 ? (lane * kCount >> 3) & (kCount - 1) : 0;
  __syncwarp();
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    Chunk& to = mine[lane * kCount + (kChunk == 16 ? c ^ turn : c)];
    if constexpr (kChunk == 16) {
      to = make_uint4(words[4 * c], words[4 * c + 1], words[4 * c + 2], words[4 * c + 3]);
    } else {
      to = make_uint2(words[2 * c], words[2 * c + 1]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    const int i = c * 32 + lane, owner = i / kCount, row = owner / kUnits, unit = owner % kUnits;
    const int place = kChunk == 16 ? i ^ ((i >> 3) & (kCount - 1)) : i;
    if (row < rows && unit < units) {
      reinterpret_cast<Chunk*>(out + (row * units_per_row + unit) * kBytes)[i % kCount] =
          mine[place];
    }
  }
}

}  // namespace cuda
}  // namespace pyfmt
