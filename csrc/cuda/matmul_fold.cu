// SPDX-License-Identifier: Apache-2.0
// The host's side of matmul_fold.h: which formats and shapes, the plan, the launch.
#include "matmul_fold.cuh"

namespace pyfmt {
namespace cuda {

namespace folding {
namespace {

Launch find(const FormatSpec& f) {
  if (!folds(f, false)) return nullptr;
  const Launch found = fold4_launch(f.element);
  return found ? found : fold6_launch(f.element);
}

int chunks_of(int64_t k) {
  return int((k + kChunk - 1) / kChunk);
}

// Chunks that the wide copies of codes and scales serve.
int whole_chunks(const MatmulFoldArgs& a, const Params& p) {
  if (reinterpret_cast<uintptr_t>(a.codes) % 16 || p.row_bytes % 16) return 0;
  if (reinterpret_cast<uintptr_t>(a.scales) % 4 || p.blocks % 4) return 0;
  return int(p.blocks / 4);
}

}  // namespace
}  // namespace folding

const char* matmul_fold_refuses(const FormatSpec& f, int64_t m, int64_t n, int64_t k) {
  using namespace folding;
  if (!find(f)) return "the format is none of those compiled in";
  if (m < 1 || n < 1 || k < 1) return "a dimension is empty";
  if (m > 1 << 24 || n > 1 << 24 || k > 1 << 24) return "a dimension is beyond 2^24";
#if defined(__CUDACC__)
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  if (major != 9) return "the device is not of compute capability 9.0";
  static const bool has_code = compiled();
  if (!has_code) return "the library was compiled without architecture 90a";
#endif
  return nullptr;
}

MatmulFoldPlan matmul_fold_plan(const FormatSpec& f, int64_t m, int64_t n, int64_t k,
                                MatmulFoldPlan plan) {
  using namespace folding;
  if (plan.tokens) return plan;
  const int chunks = chunks_of(k), sms = multiprocessors();
  const int64_t n_tiles = (n + kRows - 1) / kRows;
  double least = 0;
  for (int tokens : {64, 128}) {
    for (int split : {1, 2}) {
      if (split > chunks) break;
      const int64_t blocks = n_tiles * ((m + tokens - 1) / tokens) * split;
      const int64_t waves = (blocks + sms - 1) / sms;
      // Microseconds on an H200: a chunk of columns, and what a block needs besides.
      const double chunk = tokens == 64 ? 0.28 : 0.4;
      const double cost = double(waves) * (double(chunks) / split * chunk + 3 + 2 * (split - 1));
      if (!plan.tokens || cost < least) {
        least = cost;
        plan.tokens = tokens;
        plan.split = split;
      }
    }
  }
  (void)f;
  return plan;
}

int64_t matmul_fold_panel_rows(int64_t m, const MatmulFoldPlan& plan) {
  return (m + plan.tokens - 1) / plan.tokens * plan.tokens;
}

int64_t matmul_fold_panel_bytes(int64_t m, int64_t k, const MatmulFoldPlan& plan) {
  return matmul_fold_panel_rows(m, plan) * folding::chunks_of(k) * folding::kChunk;
}

void matmul_fold(const MatmulFoldArgs& a, Stream stream) {
  using namespace folding;
  Params p;
  p.panel = a.a.fp8;
  p.panel_rows = int(a.a.panel_rows);
  p.a_scale = a.a.scale;
  p.w_scale = a.w_scale;
  p.codes = a.codes;
  p.scales = a.scales;
  p.added = a.bias;
  p.added_dtype = a.bias_dtype;
  p.y = a.y;
  p.dtype = a.dtype;
  p.row_bytes = a.format.row_bytes(a.k);
  p.blocks = a.format.blocks(a.k);
  p.whole = whole_chunks(a, p);
  p.m = int(a.m);
  p.n = int(a.n);
  p.chunks = chunks_of(a.k);
  p.share = a.plan.share;
  p.split = a.plan.split;
  p.n_clusters = int((a.n + kRows * p.share - 1) / (kRows * p.share));
  find(a.format)(p, a.plan, a.a.e5m2, stream);
}

}  // namespace cuda
}  // namespace pyfmt
