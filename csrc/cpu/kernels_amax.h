// SPDX-License-Identifier: Apache-2.0
// The largest magnitude of blocks and of tensors, on the bits of |x|: NaN and infinity are those
// at or above infinity's.
#pragma once

#include "kernels_rotate.h"

namespace pyfmt {
namespace PYFMT_ISA {

// The largest lane of each of `count` vectors that `block(k)` gives, kLanes of them at a time.
template <class Block>
PYFMT_INLINE void max_of_blocks(const Block& block, int64_t count, uint32_t* out) {
  int64_t b = 0;
  U largest[kLanes];
  for (; b + kLanes <= count; b += kLanes) {
    for (int k = 0; k < kLanes; ++k) largest[k] = block(b + k);
    store<U>(out + b, max_of_each(largest));
  }
  if (b == count) return;
  for (int k = 0; k < kLanes; ++k) largest[k] = b + k < count ? block(b + k) : U{};
  const U each = max_of_each(largest);
  memcpy(out + b, &each, size_t(count - b) * 4);
}

// The largest |x| in each lane of a block of `size` elements, a multiple of 16.
template <DType kDType>
struct GroupBlock {
  const void* x;
  int64_t size;

  PYFMT_HD U operator()(int64_t b) const {
    U m{};
    for (int64_t i = b * size; i < (b + 1) * size; i += kGroup) {
      const Group g = load_as<kDType>(x, i);
      for (int j = 0; j < kVectors; ++j) m = max_u(m, g.v[j] & 0x7fffffffu);
    }
    return m;
  }
};

// The same for bfloat16, two elements a lane; kSteps vectors a block, or `steps` where it is 0.
// The low half of the result is noise.
template <int kSteps>
struct PairBlock {
  const uint16_t* x;
  int64_t steps;

  PYFMT_HD U operator()(int64_t b) const {
    const int64_t n = kSteps ? kSteps : steps;
    const uint16_t* p = x + b * n * 2 * kLanes;
    U m = load<U>(p) & 0x7fff7fffu;
    for (int64_t i = 1; i < n; ++i) m = max_i16(m, load<U>(p + i * 2 * kLanes) & 0x7fff7fffu);
    return max_i16(m, m << 16);
  }
};

static void amax_pairs(const uint16_t* x, int64_t blocks, int64_t size, uint32_t* out) {
  const int64_t steps = size / (2 * kLanes);
  switch (steps) {
    case 1:
      max_of_blocks(PairBlock<1>{x, 1}, blocks, out);
      break;
    case 2:
      max_of_blocks(PairBlock<2>{x, 2}, blocks, out);
      break;
    case 4:
      max_of_blocks(PairBlock<4>{x, 4}, blocks, out);
      break;
    default:
      max_of_blocks(PairBlock<0>{x, steps}, blocks, out);
  }
  for (int64_t b = 0; b < blocks; ++b) out[b] &= 0xffff0000u;
}

template <DType kDType>
static void amax_groups(const void* x, int64_t blocks, int64_t size, uint32_t* out) {
  if (size == kGroup) return max_of_blocks(GroupBlock<kDType>{x, kGroup}, blocks, out);
  if (size == 2 * kGroup) return max_of_blocks(GroupBlock<kDType>{x, 2 * kGroup}, blocks, out);
  max_of_blocks(GroupBlock<kDType>{x, size}, blocks, out);
}

#if PYFMT_AVX512
// The largest of the lower and of the upper eight lanes of each of eight vectors, in order.
PYFMT_INLINE U max_of_halves(__m512i a[8]) {
  for (int k = 0; k < 4; ++k) {
    const __m512i u = a[2 * k], v = a[2 * k + 1];
    a[k] = _mm512_max_epu32(_mm512_unpacklo_epi32(u, v), _mm512_unpackhi_epi32(u, v));
  }
  for (int k = 0; k < 2; ++k) {
    const __m512i u = a[2 * k], v = a[2 * k + 1];
    a[k] = _mm512_max_epu32(_mm512_unpacklo_epi64(u, v), _mm512_unpackhi_epi64(u, v));
  }
  const __m512i m = _mm512_max_epu32(_mm512_shuffle_i32x4(a[0], a[1], 0x88),
                                     _mm512_shuffle_i32x4(a[0], a[1], 0xdd));
  const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  return (U)_mm512_permutexvar_epi32(order, m);
}

// Blocks of sixteen, two to a vector that `pairs(i)` gives for elements 32 i to 32 i + 31.
template <class Block>
PYFMT_INLINE void max_of_half_blocks(const Block& pairs, int64_t blocks, uint32_t* out) {
  for (int64_t b = 0; b < blocks; b += 16) {
    __m512i a[8];
    for (int k = 0; k < 8; ++k) {
      a[k] = b + 2 * k < blocks ? (__m512i)pairs(b / 2 + k) : _mm512_setzero_si512();
    }
    const U each = max_of_halves(a);
    if (blocks - b >= 16) {
      store<U>(out + b, each);
    } else {
      memcpy(out + b, &each, size_t(blocks - b) * 4);
    }
  }
}
#endif

// Blocks of sixteen (an even number of them) of float32 in paired order.
struct PairedBlock {
  const uint32_t* x;

  // Vector b, of kVectors for each thirty-two elements, holds 2 * kLanes neighbours' maxima.
  PYFMT_HD U operator()(int64_t b) const {
    const uint32_t* p = x + b / kVectors * kPairs + b % kVectors * kLanes;
    return max_u(load<U>(p) & 0x7fffffffu, load<U>(p + kGroup) & 0x7fffffffu);
  }
};
// The same where two vectors make a block.
struct PairedHalves {
  PairedBlock half;

  PYFMT_HD U operator()(int64_t b) const { return max_u(half(2 * b), half(2 * b + 1)); }
};

static void amax_of_paired(const uint32_t* x, int64_t blocks, uint32_t* out) {
#if PYFMT_AVX512
  max_of_half_blocks(PairedBlock{x}, blocks, out);
#elif PYFMT_AVX2
  max_of_blocks(PairedBlock{x}, blocks, out);
#else
  max_of_blocks(PairedHalves{{x}}, blocks, out);
#endif
}

// The bits of the largest |x| in each of `blocks` blocks of `size` elements.
static void block_amax_row(const void* x, DType dtype, int64_t blocks, int64_t size,
                           uint32_t* out) {
  if (dtype == DType::kBF16 && size % (2 * kLanes) == 0) {
    return amax_pairs((const uint16_t*)x, blocks, size, out);
  }
#if PYFMT_AVX512
  if (dtype == DType::kBF16 && size == kGroup && blocks % 2 == 0) {
    max_of_half_blocks(PairBlock<1>{(const uint16_t*)x, 1}, blocks, out);
    for (int64_t b = 0; b < blocks; ++b) out[b] &= 0xffff0000u;
    return;
  }
#endif
  if (size % kGroup == 0) {
    switch (dtype) {
      case DType::kBF16:
        return amax_groups<DType::kBF16>(x, blocks, size, out);
      case DType::kFP16:
        return amax_groups<DType::kFP16>(x, blocks, size, out);
      default:
        return amax_groups<DType::kFP32>(x, blocks, size, out);
    }
  }
  // Other sizes come as float32.
  const uint32_t* bits = (const uint32_t*)x;
  for (int64_t b = 0; b < blocks; ++b) {
    uint32_t m = 0;
    for (int64_t i = b * size; i < (b + 1) * size; ++i) {
      const uint32_t v = bits[i] & 0x7fffffffu;
      m = v > m ? v : m;
    }
    out[b] = m;
  }
}

static void block_amax(const cpu::AmaxArgs& a, int64_t begin, int64_t end) {
  GradualUnderflow guard;
  const Tiling& t = a.tiling;
  const int64_t width = round_up(t.tile_columns, kGroup);
  Scratch scratch(width * 4);
  uint32_t* x = scratch.take<uint32_t>(width);
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tile_at(t, item);
    const void* source = at(a.x, a.dtype, tile.row * t.columns + tile.column);
    uint32_t* out = a.out + tile.row * t.blocks() + tile.column / t.block_columns;
    const int64_t blocks = tile.padded / t.block_columns;
    if (tile.padded == tile.width && t.block_columns % kGroup == 0) {
      block_amax_row(source, a.dtype, blocks, t.block_columns, out);
      continue;
    }
    load_row(source, a.dtype, tile.width, round_up(tile.padded, kGroup), x);
    block_amax_row(x, DType::kFP32, blocks, t.block_columns, out);
  }
}

template <DType kDType>
PYFMT_INLINE uint32_t amax_of_groups(const void* x, int64_t n, bool finite_only) {
  U m{};
  for (int64_t i = 0; i < n; i += kGroup) {
    const Group g = load_as<kDType>(x, i);
    for (int k = 0; k < kVectors; ++k) {
      const U v = g.v[k] & 0x7fffffffu;
      m = max_u(m, finite_only ? ((I)v < int32_t(kFloatInf) ? v : U{}) : v);
    }
  }
  uint32_t largest = 0;
  for (int k = 0; k < kLanes; ++k) largest = m[k] > largest ? m[k] : largest;
  return largest;
}

// All of bfloat16, finite or not, two elements a lane.
PYFMT_INLINE uint32_t amax_of_pairs(const uint16_t* x, int64_t n) {
  U m{};
  for (int64_t i = 0; i < n; i += 2 * kLanes) m = max_i16(m, load<U>(x + i) & 0x7fff7fffu);
  m = max_u(m << 16, m & 0xffff0000u);
  uint32_t largest = 0;
  for (int k = 0; k < kLanes; ++k) largest = m[k] > largest ? m[k] : largest;
  return largest;
}

template <DType kDType>
static uint32_t amax_row(const void* x, int64_t n, bool finite_only) {
  const int64_t whole = n / (2 * kGroup) * (2 * kGroup);
  uint32_t m = kDType == DType::kBF16 ? amax_of_pairs((const uint16_t*)x, whole)
                                      : amax_of_groups<kDType>(x, whole, false);
  if (finite_only && m >= kFloatInf) m = amax_of_groups<kDType>(x, whole, true);
  if (whole < n) {
    alignas(64) char last[2 * kGroup * 4] = {};
    memcpy(last, at(x, kDType, whole), size_t(n - whole) * dtype_bytes(kDType));
    const uint32_t rest = amax_of_groups<kDType>(last, 2 * kGroup, finite_only);
    m = rest > m ? rest : m;
  }
  return m;
}

// The bits of the largest |x| of n elements.
static uint32_t range_amax(const void* x, DType dtype, int64_t n, bool finite_only) {
  return dtype == DType::kBF16   ? amax_row<DType::kBF16>(x, n, finite_only)
         : dtype == DType::kFP16 ? amax_row<DType::kFP16>(x, n, finite_only)
                                 : amax_row<DType::kFP32>(x, n, finite_only);
}

static uint32_t finite_amax(const cpu::AmaxArgs& a, int64_t begin, int64_t end) {
  GradualUnderflow guard;
  const Tiling& t = a.tiling;
  const int64_t width = round_up(t.tile_columns, kGroup);
  Scratch scratch(a.rotation.size ? width * 4 : 0);
  uint32_t* x = scratch.take<uint32_t>(a.rotation.size ? width : 0);
  uint32_t m = 0;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tile_at(t, item);
    const void* source = at(a.x, a.dtype, tile.row * t.columns + tile.column);
    uint32_t one;
    if (a.rotation.size) {
      if (rotates_pairs(a.rotation, tile.width)) {
        rotate_pairs(source, a.dtype, tile.width, a.rotation, tile.column, x);
      } else {
        rotate_row(source, a.dtype, tile.width, round_up(tile.width, kGroup), a.rotation,
                   tile.column, x);
      }
      one = amax_row<DType::kFP32>(x, tile.width, true);
    } else {
      one = range_amax(source, a.dtype, tile.width, true);
    }
    m = one > m ? one : m;
  }
  return m;
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
