// SPDX-License-Identifier: Apache-2.0
// The host's side of matmul_fold.h: which formats and shapes, the plan, the launch.
#include "matmul_fold.cuh"

namespace pyfmt {
namespace cuda {

namespace wide {
namespace {

Kernel find_fold(const FormatSpec& f, bool x_e5m2) {
  if (!folds(f, false)) return {};
  const Kernel found = fold4_kernel(f.element, x_e5m2);
  return found.launch ? found : fold6_kernel(f.element, x_e5m2);
}

int chunks_of(const MatmulFoldArgs& a) {
  return int((a.a.columns + kChunk - 1) / kChunk);
}

}  // namespace
}  // namespace wide

const char* matmul_fold_refuses(const FormatSpec& f, int64_t m, int64_t n, int64_t k) {
  if (!wide::find_fold(f, true).launch) return "the format is none of those compiled in";
  return matmul_wide_refuses(f, m, n, k);
}

WidePlan matmul_fold_plan(const MatmulFoldArgs& a) {
  return a.plan.tokens ? a.plan
                       : wide::cheapest_plan(a.a.rows, a.n, a.a.columns,
                                             {{64, 740},
                                              {96, 870},
                                              {128, 1000},
                                              {144, 1060},
                                              {160, 1150},
                                              {192, 1250},
                                              {256, 1500}});
}

int64_t matmul_fold_panel(const MatmulFoldArgs& a) {
  return a.a.padded_rows * wide::chunks_of(a) * wide::kChunk;
}

int64_t matmul_fold_workspace(const MatmulFoldArgs& a) {
  return wide::aligned_codes_bytes(a.codes, a.format.row_bytes(a.a.columns), a.n);
}

void matmul_fold(const MatmulFoldArgs& a, Stream stream) {
  using namespace wide;
  const int64_t k = a.a.columns;
  Params p;
  p.panel = a.a.panel;
  p.panel_rows = int(a.a.padded_rows);
  p.codes = a.codes;
  p.scales = a.scales;
  p.x_scale = a.a.scale;
  p.w_scale = a.w_scale;
  p.bias = a.bias;
  p.y = a.y;
  p.dtype = a.dtype;
  p.row_bytes = a.format.row_bytes(k);
  p.blocks = a.format.blocks(k);
  p.wide_scales = reinterpret_cast<uintptr_t>(a.scales) % 8 == 0 && p.blocks % 8 == 0;
  p.m = int(a.a.rows);
  p.n = int(a.n);
  p.tiles = chunks_of(a);
  p.share = a.plan.share;
  p.split = a.plan.split;
  while (1 << p.share_bits < p.share) ++p.share_bits;
  p.middle = (p.tiles + kBatch - 1) / kBatch / 2 * kBatch;
  p.n_clusters = unsigned((a.n + kRows * p.share - 1) / (kRows * p.share));
  WideCall call;
  call.tokens = a.plan.tokens;
  call.codes = align_codes({a.codes, p.row_bytes, a.n, p.row_bytes},
                           static_cast<uint8_t*>(a.workspace), stream);
  p.repair = RepairParams(a.repair);
  p.copied_codes = call.codes.data == a.codes;
  find_fold(a.format, a.a.e5m2).launch(p, call, stream);
}

}  // namespace cuda
}  // namespace pyfmt
