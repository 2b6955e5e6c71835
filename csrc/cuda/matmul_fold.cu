// SPDX-License-Identifier: Apache-2.0
// The host's side of matmul_fold.h: which formats and shapes, the plan, the launch.
#include "matmul_fold.cuh"

namespace pyfmt {
namespace cuda {

namespace wide {
namespace {

constexpr int kFoldColumns = 128;  // of a tile

Kernel find_fold(const FormatSpec& f, bool x_e5m2) {
  if (!folds(f, false)) return {};
  const Kernel found = fold4_kernel(f.element, x_e5m2);
  return found.launch ? found : fold6_kernel(f.element, x_e5m2);
}

WidePlan plan_of(const MatmulFoldArgs& a, int tiles) {
  WidePlan best = a.plan;
  if (best.tokens) return best;
  const int sms = multiprocessors();
  const int64_t n_tiles = (a.n + kRows - 1) / kRows;
  double least = 0;
  for (int tokens : {64, 128}) {
    for (int split : {1, 2}) {
      if (split > tiles) break;
      const int64_t blocks = n_tiles * ((a.a.rows + tokens - 1) / tokens) * split;
      const int64_t waves = (blocks + sms - 1) / sms;
      // Cycles of a tile on an H200, measured; decoding takes most of them.
      const double tile = tokens == 64 ? 940 : 1200;
      const double cost = double(waves) * (double(tiles) / split * tile + 6000 + 2000 * split);
      if (!best.tokens || cost < least) {
        least = cost;
        best.tokens = tokens;
        best.split = split;
      }
    }
  }
  return best;
}

}  // namespace
}  // namespace wide

const char* matmul_fold_refuses(const FormatSpec& f, int64_t m, int64_t n, int64_t k) {
  if (!wide::find_fold(f, true).launch) return "the format is none of those compiled in";
  return matmul_wide_refuses(f, m, n, k);
}

void matmul_fold(const MatmulFoldArgs& a, Stream stream) {
  using namespace wide;
  const int64_t k = a.a.columns;
  Params p;
  p.codes = a.codes;
  p.scales = a.scales;
  p.x_scale = a.a.scale;
  p.w_scale = a.w_scale;
  p.bias = a.bias;
  p.y = a.y;
  p.dtype = a.dtype;
  p.row_bytes = a.format.row_bytes(k);
  p.blocks = a.format.blocks(k);
  p.copied_codes = aligned16(a.codes) && p.row_bytes % 16 == 0;
  p.wide_scales = reinterpret_cast<uintptr_t>(a.scales) % 8 == 0 && p.blocks % 8 == 0;
  p.m = int(a.a.rows);
  p.n = int(a.n);
  p.tiles = int((k + kFoldColumns - 1) / kFoldColumns);
  const WidePlan plan = plan_of(a, p.tiles);
  p.share = plan.share;
  p.split = plan.split;
  while (1 << p.share_bits < p.share) ++p.share_bits;
  p.middle = (p.tiles + kBatch - 1) / kBatch / 2 * kBatch;
  p.n_clusters = unsigned((a.n + kRows * p.share - 1) / (kRows * p.share));
  WideCall call;
  call.tokens = plan.tokens;
  call.x = {a.a.fp8, k, p.m, k};
  call.codes = {a.codes, p.row_bytes, a.n, p.row_bytes};
  find_fold(a.format, a.a.e5m2).launch(p, call, stream);
}

}  // namespace cuda
}  // namespace pyfmt
