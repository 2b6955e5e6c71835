// SPDX-License-Identifier: Apache-2.0
// Block Hadamard rotation of whole tensors; the fused rotate+quantize is part of quantize.cpp.
#include "tiling.h"

namespace pyfmt {
namespace cpu {
namespace {

void rotate_rows(const ParallelFor& parallel, const Source& s, const Rotation& r, DType out_dtype,
                 void* out) {
  if (s.view.count() == 0) return;
  HadamardArgs a;
  a.x = s.x;
  a.out = out;
  a.dtype = s.dtype;
  a.out_dtype = out_dtype;
  a.rotation = r;
  a.rows = s.view.batches * s.view.rows;
  a.columns = s.view.columns;
  if (!r.signs || r.signs_length == r.size) {
    a.columns *= a.rows;
    a.rows = 1;
  }
  a.tile_columns = kTile;  // a multiple of every size
  const int64_t across = (a.columns + a.tile_columns - 1) / a.tile_columns;
  parallel(a.rows * across, kGrain / kTile,
           [&](int64_t begin, int64_t end) { kernels().hadamard(a, begin, end); });
}

}  // namespace

void hadamard(const ParallelFor& parallel, const Source& s, const Rotation& r, void* out) {
  rotate_rows(parallel, s, r, s.dtype, out);
}

void rotate_to_float(const ParallelFor& parallel, const Source& s, const Rotation& r, float* out) {
  rotate_rows(parallel, s, r, DType::kFP32, out);
}

}  // namespace cpu
}  // namespace pyfmt
