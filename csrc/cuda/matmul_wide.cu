// SPDX-License-Identifier: Apache-2.0
// The host's side of matmul_wide.h: which formats and shapes, the plan, activations to read.
#include "matmul_wide.cuh"

namespace pyfmt {
namespace cuda {

namespace wide {
namespace {

// Rows of x, so that each starts at a multiple of 16 bytes.
__global__ void __launch_bounds__(kThreads)
    align_rows(const uint16_t* x, uint16_t* to, int64_t count, int64_t k, int64_t pitch) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / pitch, column = i % pitch;
  to[i] = column < k ? x[row * k + column] : uint16_t(0);
}

bool rows_aligned(const MatmulWideArgs& a) {
  return aligned16(a.x) && a.k % 8 == 0;
}
int64_t padded_row(const MatmulWideArgs& a) {
  return (a.k + 7) / 8 * 8;
}

Kernel find(const FormatSpec& f) {
  for (auto of : {fp4_kernel, fp6_kernel, fp8_kernel, int_kernel, mxint_kernel}) {
    const Kernel found = of(f);
    if (found.launch) return found;
  }
  return {};
}

int device_number(cudaDeviceAttr what) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&value, what, device), "device");
  return value;
}

// Whether each lane's scales of a batch of tiles lie at a multiple of their size.
bool scales_aligned(const MatmulWideArgs& a, const Params& p) {
  const int64_t bytes = a.format.scale == Scale::kE4M3 ? 8 : 4;
  return reinterpret_cast<uintptr_t>(a.scales) % uintptr_t(bytes) == 0 && p.blocks % bytes == 0;
}

}  // namespace
}  // namespace wide

const char* matmul_wide_refuses(const FormatSpec& f, int64_t m, int64_t n, int64_t k) {
  using namespace wide;
  if (!find(f).launch || f.block_rows != 1) return "the format is none of those compiled in";
  if (has_groups(f, f.element) && f.block_columns % 32) {
    return "groups of integers must be multiples of 32 columns, or whole rows";
  }
  if (m < 1 || n < 1 || k < 1) return "a dimension is empty";
  if (m > 1 << 24 || n > 1 << 24 || k > 1 << 24) return "a dimension is beyond 2^24";
#if defined(__CUDACC__)
  if (device_number(cudaDevAttrComputeCapabilityMajor) != 9) {
    return "the device is not of compute capability 9.0";
  }
  static const bool has_code = compiled();
  if (!has_code) return "the library was compiled without architecture 90a";
#endif
  return nullptr;
}

WidePlan matmul_wide_plan(const MatmulWideArgs& a) {
  using namespace wide;
  WidePlan best = a.plan;
#if !defined(__CUDACC__)
  if (!best.tokens) best.tokens = a.m > 64 ? 128 : 64;
  return best;
#else
  if (best.tokens) return best;
  const int sms = multiprocessors();
  const int n_tiles = int((a.n + kRows - 1) / kRows);
  const int64_t tiles = (a.k + 63) / 64;
  const bool groups = has_groups(a.format, a.format.element);
  double least = 0;
  for (int tokens : {64, 128, 256}) {
    if (tokens > 128 && groups) break;
    for (int split : {1, 2}) {
      if (split > tiles) break;
      const int64_t blocks = n_tiles * ((a.m + tokens - 1) / tokens) * split;
      const int64_t waves = (blocks + sms - 1) / sms;
      // Cycles of a tile: products, or what shared memory moves for them.
      const double moved = 3.0 * tokens + 256 + 16.0 * a.format.bits();
      const double products = 4.0 * tokens, tile = moved > products ? moved : products;
      const double cost = double(waves) * (double(tiles) / split * tile + 8000 + 30.0 * tokens);
      if (!best.tokens || cost < least) {
        least = cost;
        best.tokens = tokens;
        best.split = split;
      }
    }
  }
  return best;
#endif
}

int64_t matmul_wide_workspace(const MatmulWideArgs& a) {
  return wide::rows_aligned(a) ? 0 : a.m * wide::padded_row(a) * 2;
}

void matmul_wide(const MatmulWideArgs& a, Stream stream) {
  using namespace wide;
  const Kernel kernel = find(a.format);
  Params p;
  p.codes = a.codes;
  p.scales = static_cast<const uint8_t*>(a.scales);
  p.tensor_scale = a.tensor_scale;
  p.bias = a.bias;
  p.y = a.y;
  p.dtype = a.dtype;
  p.scale = a.format.scale;
  p.row_bytes = a.format.row_bytes(a.k);
  p.blocks = a.format.blocks(a.k);
  p.copied_codes = aligned16(a.codes) && p.row_bytes % 16 == 0;
  p.wide_scales = scales_aligned(a, p);
  p.group_runs = a.format.block_columns ? a.format.block_columns / 32 : 1 << 30;
  p.half_tiles = p.group_runs % 2 != 0;
  p.two_tiles = p.group_runs % 4 == 0;
  p.m = int(a.m);
  p.n = int(a.n);
  p.tiles = int((a.k + kernel.columns - 1) / kernel.columns);
  p.share = a.plan.share;
  p.split = a.plan.split;
  while (1 << p.share_bits < p.share) ++p.share_bits;
  p.middle = (p.tiles + kBatch - 1) / kBatch / 2 * kBatch;
  p.n_clusters = unsigned((a.n + kRows * p.share - 1) / (kRows * p.share));

  WideCall call;
  call.tokens = a.plan.tokens;
  call.x = {a.x, a.k * 2, a.m, a.k * 2};
  if (!rows_aligned(a)) {
    const int64_t pitch = padded_row(a), count = a.m * pitch;
    launch(align_rows, blocks_for(count), kThreads, stream, static_cast<const uint16_t*>(a.x),
           static_cast<uint16_t*>(a.workspace), count, a.k, pitch);
    call.x.data = a.workspace;
    call.x.pitch = pitch * 2;
  }
  call.codes = {a.codes, p.row_bytes, a.n, p.row_bytes};
  kernel.launch(p, call, stream);
}

}  // namespace cuda
}  // namespace pyfmt
