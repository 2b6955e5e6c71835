// SPDX-License-Identifier: Apache-2.0
// Rows that did not fold, computed from exact values.
#pragma once

#include "device.cuh"
#include "expand.h"

namespace pyfmt {
namespace cuda {

// Any element with an E8M0 scale, its constants known at run time.
struct AnyElement {
  bool is_int;
  codec::FloatCodec f;
  codec::IntCodec i;
  int bits;

  explicit AnyElement(const ElementSpec& e = elements::e2m1)
      : is_int(e.is_int()),
        f(e.is_int() ? elements::e2m1 : e),
        i(e.is_int() ? e : elements::int8, false),
        bits(e.bits()) {}
  PYFMT_DEVICE float decode(uint32_t code) const {
    return as_float(is_int ? codec::decode_int<uint32_t>(i, code)
                           : codec::decode_float<uint32_t>(f, code));
  }
};

struct RepairParams {
  RepairArgs args;
  AnyElement element;
  RepairParams() = default;
  explicit RepairParams(const RepairArgs& a) : args(a), element(a.w_format.element) {}
};

constexpr int kRepairTile = 8;  // rows of the other operand that a warp takes at once

// Four neighbouring values of a folded row.
PYFMT_DEVICE void folded4(const Folded& f, int64_t row, int64_t k, float (&v)[4]) {
  const int64_t piece = (k / 4 & 7) ^ (row & 7);  // of the panel
  const uint8_t* from =
      f.panel ? f.panel + (k / 128 * f.padded_rows + row) * 128 + piece * 16 + (k / 32 & 3) * 4
              : f.fp8 + row * f.columns + k;
  const uint32_t bytes = *reinterpret_cast<const uint32_t*>(from);
  if (f.e5m2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = from_half(((bytes >> (8 * i)) & 0xffu) << 8);
  } else {
    from_e4m3(bytes, v, v + 1);
    from_e4m3(bytes >> 16, v + 2, v + 3);
  }
  const float s = f.scale[row];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = v[i] * s;
}

PYFMT_DEVICE void spare4(const Folded& f, int64_t row, int64_t k, float (&v)[4]) {
  const uint2 w = *reinterpret_cast<const uint2*>(f.spare + row * f.columns + k);
  v[0] = half_at<DType::kBF16>(w.x, 0);
  v[1] = half_at<DType::kBF16>(w.x, 1);
  v[2] = half_at<DType::kBF16>(w.y, 0);
  v[3] = half_at<DType::kBF16>(w.y, 1);
}

PYFMT_DEVICE void coded4(const RepairParams& p, int64_t row, int64_t k, float (&v)[4]) {
  const int bits = p.element.bits;
  const int64_t row_bytes = p.args.k / 8 * bits, first = k * bits / 8;
  uint32_t word = 0;
  for (int i = 0; i < bits / 2; ++i) {
    word |= uint32_t(p.args.w_codes[row * row_bytes + first + i]) << (8 * i);
  }
  const uint32_t scale = p.args.w_scales[row * (p.args.k / 32) + k / 32];
  const float s = as_float(codec::e8m0_decode<uint32_t>(scale));
  for (int i = 0; i < 4; ++i) {
    v[i] = p.element.decode((word >> (bits * i)) & ((1u << bits) - 1)) * s;
  }
}

PYFMT_DEVICE void write_repaired(const RepairParams& p, int64_t row, int64_t column, float sum) {
  const RepairArgs& a = p.args;
  if (a.bias) sum = sum + load_element(a.bias, a.bias_dtype, column);
  store_element(a.y, a.dtype, row * a.stride + column, sum);
}

// Sums over K of one row against kCount rows of the other operand; lane 0 has them.
template <int kCount, class One, class Many>
PYFMT_DEVICE void dot(int64_t k, const One& one, const Many& many, float (&sum)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) sum[j] = 0.0f;
#pragma unroll 1
  for (int64_t at = (threadIdx.x & 31) * 4; at < k; at += 128) {
    float x[4];
    one(at, x);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float v[4];
      many(j, at, v);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[j] = fused(x[i], v[i], sum[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    for (int far = 16; far; far /= 2) sum[j] = sum[j] + __shfl_xor_sync(kAll, sum[j], far);
  }
}

// The marked ones of a stretch of rows, in order, for every block of threads alike.
struct Marked {
  static constexpr int kStretch = 16 * kThreads;
  int count;
  uint16_t rows[kStretch];
  int of_warp[kWarps];
};

// How many of `marks` from `first` on are set, and which; all threads of a block call.
template <class Meet>
PYFMT_DEVICE int find_marked(const Folded& f, int64_t first, Marked& found, const Meet& meet) {
  const int64_t at = first + 16 * threadIdx.x;
  uint32_t words[4] = {0, 0, 0, 0};
  // Padded rows are a multiple of 16 and never marked.
  if (at < f.padded_rows) {
    const uint4 w = *reinterpret_cast<const uint4*>(f.marks + at);
    words[0] = w.x;
    words[1] = w.y;
    words[2] = w.z;
    words[3] = w.w;
  }
  int mine = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) mine += (words[i / 4] >> (8 * (i % 4))) & 1;
  int before = mine;  // of this lane and those below
  for (int far = 1; far < 32; far *= 2) {
    const int other = __shfl_up_sync(kAll, before, far);
    if (int(threadIdx.x & 31) >= far) before += other;
  }
  if ((threadIdx.x & 31) == 31) found.of_warp[threadIdx.x >> 5] = before;
  meet();
  int all = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < int(threadIdx.x >> 5)) before += found.of_warp[i];
    all += found.of_warp[i];
  }
  if (mine) {
    int place = before - mine;
    for (int i = 0; i < 16; ++i) {
      if ((words[i / 4] >> (8 * (i % 4))) & 1) {
        found.rows[place++] = uint16_t(16 * threadIdx.x + i);
      }
    }
  }
  meet();
  return all;
}

// What block `block` of `blocks` does of the products of marked rows. The first kThreads threads of
// it call; meet: where they do. kColumnsAtOnce: of w, of a marked row of a.
template <int kColumnsAtOnce, class Meet>
PYFMT_DEVICE void repair_marked(const RepairParams& p, Marked& found, int64_t block, int64_t blocks,
                                const Meet& meet) {
  const RepairArgs& a = p.args;
  const int lane = threadIdx.x & 31;
  const int64_t warp = block * kWarps + (threadIdx.x >> 5);
  const int64_t warps = blocks * kWarps;

  const int64_t across = (a.columns + kColumnsAtOnce - 1) / kColumnsAtOnce;
  for (int64_t start = 0; start < a.rows; start += Marked::kStretch) {
    const int count = find_marked(a.a, start, found, meet);
    for (int64_t item = warp; item < count * across; item += warps) {
      const int64_t row = start + found.rows[item / across], first = item % across * kColumnsAtOnce;
      float sum[kColumnsAtOnce];
      dot(
          a.k, [&](int64_t k, float (&v)[4]) { spare4(a.a, row, k, v); },
          [&](int j, int64_t k, float (&v)[4]) {
            const int64_t column = first + j < a.columns ? first + j : first;
            if (!a.w.fp8 || a.w.marks[column]) {
              coded4(p, column, k, v);
            } else {
              folded4(a.w, column, k, v);
            }
          },
          sum);
      for (int j = 0; j < kColumnsAtOnce; ++j) {
        if (lane == 0 && first + j < a.columns) write_repaired(p, row, first + j, sum[j]);
      }
    }
    meet();
  }
  const int64_t down = (a.rows + kRepairTile - 1) / kRepairTile;
  for (int64_t start = 0; start < a.columns; start += Marked::kStretch) {
    const int count = find_marked(a.w, start, found, meet);
    for (int64_t item = warp; item < count * down; item += warps) {
      const int64_t column = start + found.rows[item / down], first = item % down * kRepairTile;
      float sum[kRepairTile];
      dot(
          a.k, [&](int64_t k, float (&v)[4]) { coded4(p, column, k, v); },
          [&](int j, int64_t k, float (&v)[4]) {
            folded4(a.a, first + j < a.rows ? first + j : first, k, v);
          },
          sum);
      for (int j = 0; j < kRepairTile; ++j) {
        // A row of a that does not fold either was done above.
        const bool mine = lane == 0 && first + j < a.rows && !a.a.marks[first + j];
        if (mine) write_repaired(p, first + j, column, sum[j]);
      }
    }
    meet();
  }
}

}  // namespace cuda
}  // namespace pyfmt
