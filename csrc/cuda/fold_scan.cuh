// SPDX-License-Identifier: Apache-2.0
// The base exponents of a weight that stays packed: its scales tell them, but for blocks of zeros,
// whose scales mean nothing. Codes are read where a scale is that of zeros, and in rows that do not
// fold by their scales alone.
#pragma once

#include "fold.cuh"

namespace pyfmt {
namespace cuda {

constexpr int kScanLoads = 4;  // that a lane has under way

// How many lanes share a row, 16 bytes each; 0: a warp takes one row, in pieces.
inline int scan_lanes(const FoldScanArgs& s) {
  const int64_t pieces = s.to.columns / kUnit / 16;
  if (s.to.columns % (16 * kUnit) || pieces < 1 || pieces > 32 || !aligned16(s.scales)) return 0;
  int lanes = 1;
  while (lanes < pieces) lanes *= 2;
  return lanes;
}
inline int64_t scan_blocks(const FoldScanArgs& s) {
  const int64_t rows = kWarps * (s.lanes ? 32 / s.lanes * kScanLoads : 1);
  return (s.to.padded_rows + rows - 1) / rows;
}

PYFMT_DEVICE uint32_t range_of_scale(uint32_t scale) {
  return (scale + 1) | (256u - scale) << 16;
}

// A row by a warp.
PYFMT_DEVICE void scan_row(const FoldScanArgs& s, int64_t row) {
  const int lane = threadIdx.x & 31;
  const int64_t units = s.to.columns / kUnit;
  const uint8_t* scales = s.scales + row * units;
  const int64_t count = row < s.to.rows ? units : 0;
  uint32_t range = 0;
  bool zeros = false, poisoned = false;
  const auto take = [&](uint32_t scale) {
    zeros = zeros || scale == 0;
    poisoned = poisoned || scale == 255;
    if (scale - 1 < 254u) range = max_halves(range, range_of_scale(scale));
  };
  if (units % 8 == 0 && reinterpret_cast<uintptr_t>(s.scales) % 8 == 0) {
    for (int64_t i = lane; i < count / 8; i += 32) {
      const uint2 v = reinterpret_cast<const uint2*>(scales)[i];
#pragma unroll
      for (int b = 0; b < 32; b += 8) {
        take(v.x >> b & 0xffu);
        take(v.y >> b & 0xffu);
      }
    }
  } else {
    for (int64_t i = lane; i < count; i += 32) take(scales[i]);
  }
  range = range_of_row<false>(range, nullptr);
  zeros = __any_sync(kAll, zeros);
  poisoned = __any_sync(kAll, poisoned);
  AnyBase base(range, s.low, s.high);
  if (zeros || !base.fits) {
    range = 0;
    const uint32_t* codes = reinterpret_cast<const uint32_t*>(s.codes) + row * units * s.bits;
    for (int64_t i = lane; i < count; i += 32) {
      const uint32_t scale = scales[i];
      uint32_t any = scale != 0 && base.fits;
      for (int w = 0; w < s.bits && !any; ++w) any = codes[i * s.bits + w] & s.masks[w];
      if (any && scale != 255) range = max_halves(range, range_of_scale(scale));
    }
    base = AnyBase(range_of_row<false>(range, nullptr), s.low, s.high);
  }
  base.fits = base.fits && !poisoned;
  if (lane == 0) store_base(s.to, row, base);
}

// Largest and smallest of 16 scale bytes, as range_of_scale has them.
PYFMT_DEVICE uint32_t range_of_scales(const uint4& v) {
  constexpr uint32_t kBytes = 0x00ff00ffu;
  uint32_t top = 0, bottom = 0;  // two at a time; the smallest as the largest of 255 less
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t even = words[i] & kBytes, odd = words[i] >> 8 & kBytes;
    top = max_halves(top, max_halves(even, odd));
    bottom = max_halves(bottom, max_halves(even ^ kBytes, odd ^ kBytes));
  }
  top = max_halves(top, top >> 16);
  bottom = max_halves(bottom, bottom >> 16);
  return ((top & 0xffffu) | bottom << 16) + 0x00010001u;
}

// The rows of a block of threads. All that a lane reads of several rows is under way at once; rows
// with zeros or NaN among their scales, and those that do not fold by them, are looked at again.
PYFMT_DEVICE void scan_block(const FoldScanArgs& s, int64_t block) {
  const int lane = threadIdx.x & 31, lanes = s.lanes;
  const int64_t warp = block * kWarps + (threadIdx.x >> 5);
  if (!lanes) {
    if (warp < s.to.padded_rows) scan_row(s, warp);
    return;
  }
  const int rows = 32 / lanes, mine = lane / lanes;
  const int64_t units = s.to.columns / kUnit, first = warp * rows * kScanLoads;
  const int64_t piece = min(lane & (lanes - 1), int(units / 16) - 1);
  uint4 v[kScanLoads];
#pragma unroll
  for (int j = 0; j < kScanLoads; ++j) {
    const int64_t row = first + j * rows + mine;
    v[j] = make_uint4(0, 0, 0, 0);
    if (row < s.to.rows) v[j] = reinterpret_cast<const uint4*>(s.scales + row * units)[piece];
  }
#pragma unroll
  for (int j = 0; j < kScanLoads; ++j) {
    const int64_t row = first + j * rows + mine;
    uint32_t range = range_of_scales(v[j]);
    for (int far = lanes / 2; far; far /= 2) {
      range = max_halves(range, __shfl_xor_sync(kAll, range, far));
    }
    const bool plain = (range & 0xffffu) < 256u && range >> 16 < 256u;
    const AnyBase base(row < s.to.rows ? range : 0, s.low, s.high);
    const bool done = row >= s.to.rows || (plain && base.fits);
    if (done && row < s.to.padded_rows && lane % lanes == 0) store_base(s.to, row, base);
    if (!__any_sync(kAll, !done)) continue;
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      if (__any_sync(kAll, !done && mine == r)) scan_row(s, first + j * rows + r);
    }
  }
}

}  // namespace cuda
}  // namespace pyfmt
