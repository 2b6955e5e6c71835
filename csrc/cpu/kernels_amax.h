// SPDX-License-Identifier: Apache-2.0
// The largest magnitude of blocks and of tensors, on the bits of |x|: NaN and infinity are those
// at or above infinity's.
#pragma once

#include "kernels_rotate.h"

namespace pyfmt {
namespace PYFMT_ISA {

// The bits of the largest |x| in each of `blocks` blocks of `size` elements, a multiple of 16.
template <DType kDType>
static void amax_groups(const void* x, int64_t blocks, int64_t size, uint32_t* out) {
  U largest[kLanes];
  for (int64_t b = 0; b < blocks; b += kLanes) {
    const int64_t count = blocks - b < kLanes ? blocks - b : kLanes;
    for (int64_t k = 0; k < count; ++k) {
      U m{};
      for (int64_t i = (b + k) * size; i < (b + k + 1) * size; i += kGroup) {
        const Group g = load_as<kDType>(x, i);
        for (int j = 0; j < kVectors; ++j) m = max_u(m, g.v[j] & 0x7fffffffu);
      }
      largest[k] = m;
    }
    for (int64_t k = count; k < kLanes; ++k) largest[k] = U{};
    const U each = max_of_each(largest);
    memcpy(out + b, &each, size_t(count) * 4);
  }
}

static void block_amax_row(const void* x, DType dtype, int64_t blocks, int64_t size,
                           uint32_t* out) {
  if (size % kGroup == 0) {
    switch (dtype) {
      case DType::kBF16: return amax_groups<DType::kBF16>(x, blocks, size, out);
      case DType::kFP16: return amax_groups<DType::kFP16>(x, blocks, size, out);
      default: return amax_groups<DType::kFP32>(x, blocks, size, out);
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
    if (tile.padded == tile.width && t.block_columns % kGroup == 0 && !a.rotation.size) {
      block_amax_row(source, a.dtype, blocks, t.block_columns, out);
      continue;
    }
    load_row(source, a.dtype, tile.width, round_up(tile.padded, kGroup), x);
    if (a.rotation.size) rotate((float*)x, tile.width, a.rotation, tile.column);
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

template <DType kDType>
static uint32_t amax_row(const void* x, int64_t n, bool finite_only) {
  const int64_t whole = n / kGroup * kGroup;
  uint32_t m = amax_of_groups<kDType>(x, whole, false);
  if (finite_only && m >= kFloatInf) m = amax_of_groups<kDType>(x, whole, true);
  if (whole < n) {
    alignas(64) char last[kGroup * 4] = {};
    memcpy(last, at(x, kDType, whole), size_t(n - whole) * dtype_bytes(kDType));
    const uint32_t rest = amax_of_groups<kDType>(last, kGroup, finite_only);
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
      load_row(source, a.dtype, tile.width, round_up(tile.width, kGroup), x);
      rotate((float*)x, tile.width, a.rotation, tile.column);
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
