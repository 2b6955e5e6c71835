// SPDX-License-Identifier: Apache-2.0
// What the streams of rows share: fetching the rows after these, and the end of a row.
#pragma once

#include "matmul_lanes.h"

namespace pyfmt {
namespace PYFMT_ISA {

using cpu::StreamArgs;

// Towards the next rows, perhaps beyond the last one: fetching never faults.
PYFMT_INLINE void prefetch(const uint8_t* p) {
  __builtin_prefetch(p, 0, 3);
}

// The scales of the `rows` rows after these.
PYFMT_INLINE void prefetch_scales(const StreamArgs& s, int64_t row, int rows) {
  const FormatSpec& f = s.right.format;
  const int64_t bytes = f.blocks(s.k) * scale_bytes(f.scale);
  if (f.block_rows != 1 || row + rows > s.n) return;
  const uint8_t* const first = (const uint8_t*)s.right.scales + row * bytes;
  for (int64_t i = 0; i < rows * bytes; i += 64) prefetch(first + i);
}

#if PYFMT_BF16
// sum += values times left, in pairs. By name, so that GCC keeps the sum where it is.
PYFMT_INLINE void pair_product(__m512i left, __m512i values, __m512& sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(values), "v"(left));
}
#endif

// y, bias and rounding for R rows of b from `row`.
template <int R, int M>
PYFMT_INLINE void finish_rows(const StreamArgs& s, int64_t row, const F (&sum)[R][M]) {
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      float y = sum_lanes(sum[r][m]);
      if (s.right.has_tensor_scale) y *= s.right.tensor_scale;
      if (s.bias) y += float_at(s.bias, s.bias_dtype, row + r);
      store_at(s.out, s.out_dtype, m * s.n + row + r, y);
    }
  }
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
