// SPDX-License-Identifier: Apache-2.0
// What every kernel of a level uses: loads and stores by dtype, scratch memory, the float
// environment. Included after simd.h.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace pyfmt {
namespace PYFMT_ISA {

using cpu::Rotation;
using cpu::Tiling;

constexpr int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

using cpu::GradualUnderflow;

// Scratch for one range of work items: carved from the stack, or from the heap where it is large.
class Scratch {
 public:
  PYFMT_HD explicit Scratch(int64_t bytes)
      : heap_(bytes > kStack ? (char*)malloc(size_t(bytes) + 64) : nullptr),
        next_(heap_ ? heap_ : stack_) {
    if (bytes > kStack && !heap_) throw std::bad_alloc();
    next_ += (64 - (uintptr_t(next_) & 63)) & 63;
  }
  PYFMT_HD ~Scratch() { free(heap_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  PYFMT_HD T* take(int64_t count) {
    T* p = (T*)next_;
    next_ += round_up(count * int64_t(sizeof(T)), 64);
    return p;
  }
  // What `take` of each of these counts of bytes needs.
  static constexpr int64_t kStack = 48 * 1024;

 private:
  alignas(64) char stack_[kStack + 64];
  char* heap_;
  char* next_;
};

// How far ahead of its reading a loop asks for its input: the encoding of a tile hides the wait for
// the next ones. Addresses past the end do no harm.
constexpr int64_t kAheadBytes = 16384;
PYFMT_INLINE void fetch_ahead(const void* p) {
  __builtin_prefetch((const char*)p + kAheadBytes);
}

// Ask for output that is written some hundred cycles later: a store that waits for its line holds
// up all stores behind it.
PYFMT_INLINE void fetch_output(void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((char*)p + at, 1);
}

// Sixteen elements of a dtype as float32 bits.
template <DType kDType>
PYFMT_INLINE Group load_as(const void* p, int64_t i) {
  if constexpr (kDType == DType::kFP32) return load_u32((const uint32_t*)p + i);
  Group g = load_u16((const uint16_t*)p + i);
  for (int k = 0; k < kVectors; ++k) {
    g.v[k] = kDType == DType::kBF16 ? codec::float_from_bf16<U>(g.v[k])
                                    : codec::float_from_half<U>(g.v[k]);
  }
  return g;
}

// Sixteen float32 (bits) rounded to a dtype, NaN made canonical.
template <DType kDType>
PYFMT_INLINE void store_as(void* p, int64_t i, Group g) {
  for (int k = 0; k < kVectors; ++k) {
    g.v[k] = kDType == DType::kFP32   ? codec::canonical_nan<U>(g.v[k], kFloatNaN)
             : kDType == DType::kBF16 ? codec::bf16_from_float<U>(g.v[k])
                                      : codec::half_from_float<U>(g.v[k]);
  }
  if constexpr (kDType == DType::kFP32) {
    store_u32((uint32_t*)p + i, g);
  } else {
    store_u16((uint16_t*)p + i, g);
  }
}

PYFMT_INLINE const void* at(const void* p, DType dtype, int64_t i) {
  return (const char*)p + i * dtype_bytes(dtype);
}
PYFMT_INLINE void* at(void* p, DType dtype, int64_t i) {
  return (char*)p + i * dtype_bytes(dtype);
}

// n elements to float32, and zeros up to `padded` (a multiple of 16).
template <DType kDType>
static void load_row_as(const void* x, int64_t n, int64_t padded, uint32_t* out) {
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) store_u32(out + i, load_as<kDType>(x, i));
  if (i < n) {
    alignas(64) char last[kGroup * 4] = {};
    memcpy(last, at(x, kDType, i), size_t(n - i) * dtype_bytes(kDType));
    store_u32(out + i, load_as<kDType>(last, 0));
    i += kGroup;
  }
  for (; i < padded; i += kGroup) store_u32(out + i, Group{});
}

static void load_row(const void* x, DType dtype, int64_t n, int64_t padded, uint32_t* out) {
  switch (dtype) {
    case DType::kBF16:
      return load_row_as<DType::kBF16>(x, n, padded, out);
    case DType::kFP16:
      return load_row_as<DType::kFP16>(x, n, padded, out);
    default:
      return load_row_as<DType::kFP32>(x, n, padded, out);
  }
}

template <DType kDType>
static void store_row_as(const uint32_t* in, int64_t n, void* x) {
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) store_as<kDType>(x, i, load_u32(in + i));
  if (i < n) {
    alignas(64) char last[kGroup * 4];
    store_as<kDType>(last, 0, load_u32(in + i));
    memcpy(at(x, kDType, i), last, size_t(n - i) * dtype_bytes(kDType));
  }
}

// The reverse; `in` is readable up to a multiple of 16.
static void store_row(const uint32_t* in, int64_t n, DType dtype, void* x) {
  switch (dtype) {
    case DType::kBF16:
      return store_row_as<DType::kBF16>(in, n, x);
    case DType::kFP16:
      return store_row_as<DType::kFP16>(in, n, x);
    default:
      return store_row_as<DType::kFP32>(in, n, x);
  }
}

// Where a work item lies.
struct Tile {
  int64_t strip, row, rows, column, width, padded;
};

PYFMT_INLINE Tile tile_at(const Tiling& t, int64_t item) {
  const int64_t across = t.tiles_per_strip(), strips = t.strips();
  Tile tile;
  tile.strip = item / across;
  const int64_t first = tile.strip % strips * t.block_rows;
  tile.row = tile.strip / strips * t.rows + first;
  tile.rows = t.rows - first < t.block_rows ? t.rows - first : t.block_rows;
  tile.column = item % across * t.tile_columns;
  const int64_t left = t.columns - tile.column, room = t.padded() - tile.column;
  tile.width = left < 0 ? 0 : left < t.tile_columns ? left : t.tile_columns;
  tile.padded = room < t.tile_columns ? room : t.tile_columns;
  return tile;
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
