// SPDX-License-Identifier: Apache-2.0
// Pack and unpack rows of codes.
#include "tiling.h"

namespace pyfmt {
namespace cpu {
namespace {

template <class Kernel>
void run(const ParallelFor& parallel, PackArgs a, Kernel kernel) {
  if (a.rows == 0 || a.length == 0) return;
  a.tile = 8 * kTile;
  const int64_t each = a.length < a.tile ? a.length : a.tile;
  parallel(a.rows * a.tiles(), 4 * kGrain / each + 1,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

}  // namespace

void pack(const ParallelFor& parallel, const uint8_t* codes, int64_t rows, int64_t length, int bits,
          uint8_t* packed, int64_t stride) {
  PackArgs a;
  a.in = codes;
  a.out = packed;
  a.bits = bits;
  a.rows = rows;
  a.in_stride = a.length = length;
  a.out_stride = stride;
  run(parallel, a, kernels().pack);
}

void unpack(const ParallelFor& parallel, const uint8_t* packed, int64_t rows, int64_t stride,
            int64_t length, int bits, uint8_t* codes) {
  PackArgs a;
  a.in = packed;
  a.out = codes;
  a.bits = bits;
  a.rows = rows;
  a.in_stride = stride;
  a.out_stride = a.length = length;
  run(parallel, a, kernels().unpack);
}

}  // namespace cpu
}  // namespace pyfmt
