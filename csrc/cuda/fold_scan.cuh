// SPDX-License-Identifier: Apache-2.0
// The base exponents of a weight that stays packed: its scales tell them, but for blocks of zeros,
// whose scales mean nothing. Codes are read where a scale is that of zeros, and in rows that do not
// fold by their scales alone.
#pragma once

#include "fold.cuh"

namespace pyfmt {
namespace cuda {

inline int64_t scan_blocks(const FoldScanArgs& s) {
  return (s.to.padded_rows + kWarps - 1) / kWarps;
}

PYFMT_DEVICE uint32_t range_of_scale(uint32_t scale) {
  return (scale + 1) | (256u - scale) << 16;
}

// A warp's rows of a block of threads.
PYFMT_DEVICE void scan_rows(const FoldScanArgs& s, int64_t block) {
  const int lane = threadIdx.x & 31;
  const int64_t row = block * kWarps + (threadIdx.x >> 5), units = s.to.columns / kUnit;
  if (row >= s.to.padded_rows) return;
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

}  // namespace cuda
}  // namespace pyfmt
