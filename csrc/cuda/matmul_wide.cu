// SPDX-License-Identifier: Apache-2.0
// The host's side of matmul_wide.h: which formats and shapes, the plan, the panel of activations.
#include "matmul_wide.cuh"

namespace pyfmt {
namespace cuda {

namespace wide {
namespace {

// x with its columns in the order that the codes are decoded in, padded with zeros, as the tiles of
// shared memory want it. A warp writes 8 tokens by one chunk.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    write_panel(const uint16_t* x, uint8_t* panel, int m, int64_t k, int panel_rows, int chunks,
                bool wide) {
  __shared__ uint32_t shared[kWarps][512];
  hopper::start_dependents();
  const int lane = threadIdx.x & 31, token8 = panel_rows / 8;
  const int64_t unit = int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  const bool exists = unit < int64_t(token8) * chunks;
  const int tokens = int(unit % token8) * 8, chunk = int(unit / token8);
  const int row = lane / 4, t = lane % 4;
  uint32_t* mine = shared[threadIdx.x >> 5];
  if (exists) {
    uint32_t words[16];
    const int64_t column = int64_t(chunk) * kChunk + 32 * t, left = k - column;
    const uint16_t* from = x + int64_t(tokens + row) * k + column;
    if (tokens + row < m && wide && left >= 32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 v = reinterpret_cast<const uint4*>(from)[i];
        words[4 * i] = v.x;
        words[4 * i + 1] = v.y;
        words[4 * i + 2] = v.z;
        words[4 * i + 3] = v.w;
      }
    } else {
      const bool row_exists = tokens + row < m;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t low = row_exists && 2 * i < left ? from[2 * i] : 0u;
        const uint32_t high = row_exists && 2 * i + 1 < left ? from[2 * i + 1] : 0u;
        words[i] = low | high << 16;
      }
    }
#pragma unroll
    for (int p = 0; p < 16; ++p) {
      const int a = code_of<kBits>(p, 0), b = code_of<kBits>(p, 1);
      const uint32_t low = a & 1 ? words[a / 2] >> 16 : words[a / 2] & 0xffffu;
      const uint32_t high = b & 1 ? words[b / 2] >> 16 : words[b / 2] & 0xffffu;
      mine[p / 8 * 256 + row * 32 + ((p % 8) ^ row) * 4 + t] = low | high << 16;
    }
  }
  __syncwarp();
  if (exists) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int piece = (i & 1) * 32 + lane;  // of the 64 pieces of 8 tokens by 64 places
      const int64_t to = (int64_t(2 * chunk + i / 2) * panel_rows + tokens) * 128 + piece * 16;
      const uint32_t* v = mine + i / 2 * 256 + piece * 4;
      *reinterpret_cast<uint4*>(panel + to) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
}

template <int kBits>
void launch_panel(const MatmulWideArgs& a, const Params& p, Stream stream) {
  const int64_t units = int64_t(p.panel_rows / 8) * p.chunks;
  const bool wide = aligned16(a.x) && a.k % 8 == 0;
  launch(write_panel<kBits>, (units + kWarps - 1) / kWarps, kThreads, stream,
         static_cast<const uint16_t*>(a.x), static_cast<uint8_t*>(a.workspace), p.m, a.k,
         p.panel_rows, p.chunks, wide);
}

Launch find(const FormatSpec& f) {
  for (auto of : {fp4_launch, fp6_launch, fp8_launch, int_launch, mxint_launch}) {
    if (const Launch found = of(f)) return found;
  }
  return nullptr;
}

int chunks_of(const MatmulWideArgs& a) {
  return int((a.k + kChunk - 1) / kChunk);
}

int device_number(cudaDeviceAttr what) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&value, what, device), "device");
  return value;
}

// Chunks that the wide copies of codes and scales serve.
int whole_chunks(const MatmulWideArgs& a, const Params& p) {
  if (reinterpret_cast<uintptr_t>(a.codes) % 16 || p.row_bytes % 16) return 0;
  const int64_t whole = p.row_bytes / (16 * a.format.bits());
  const uintptr_t scales = reinterpret_cast<uintptr_t>(a.scales);
  if (has_groups(a.format, a.format.element)) return scales % 4 ? 0 : int(whole);
  const int bytes = a.format.scale == Scale::kE8M0 ? 4 : 8;  // of a row of a chunk
  if (scales % uintptr_t(bytes) || p.blocks % bytes) return 0;
  return int(whole < p.blocks / bytes ? whole : p.blocks / bytes);
}

}  // namespace
}  // namespace wide

const char* matmul_wide_refuses(const FormatSpec& f, int64_t m, int64_t n, int64_t k) {
  using namespace wide;
  if (!find(f) || f.block_rows != 1) return "the format is none of those compiled in";
  if (has_groups(f, f.element) && f.block_columns % kChunk) {
    return "groups of integers must be whole multiples of 128 columns, or whole rows";
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
  const int n_tiles = int((a.n + kRows - 1) / kRows), chunks = chunks_of(a);
#if !defined(__CUDACC__)
  if (!best.tokens) best.tokens = a.m > 64 ? 128 : 64;
  return best;
#else
  if (best.tokens) return best;
  const int sms = device_number(cudaDevAttrMultiProcessorCount);
  const bool groups = has_groups(a.format, a.format.element);
  double least = 0;
  for (int tokens : {64, 128, 192, 256}) {
    if (tokens > 128 && groups) break;
    for (int split : {1, 2}) {
      if (split > chunks) break;
      const int64_t blocks = n_tiles * ((a.m + tokens - 1) / tokens) * split;
      const int64_t waves = (blocks + sms - 1) / sms;
      // Microseconds on an H200, measured: a chunk is products, and decoding beside them.
      const double decoding = groups || a.format.bits() == 8 ? 0.75
                              : a.format.bits() == 6         ? 0.6
                                                             : 0.4;
      const double products = 0.0043 * tokens, both = products + decoding - 0.0016 * tokens;
      const double chunk = both > products ? both : products;
      const double cost = double(waves) * (double(chunks) / split * chunk + 8 + 0.02 * tokens);
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
  const int64_t tokens = a.plan.tokens, rows = (a.m + tokens - 1) / tokens * tokens;
  return rows * wide::chunks_of(a) * (2 * wide::kChunk);
}

void matmul_wide(const MatmulWideArgs& a, Stream stream) {
  using namespace wide;
  Params p;
  p.panel = static_cast<const uint8_t*>(a.workspace);
  p.codes = a.codes;
  p.scales = static_cast<const uint8_t*>(a.scales);
  p.tensor_scale = a.tensor_scale;
  p.bias = a.bias;
  p.y = a.y;
  p.dtype = a.dtype;
  p.scale = a.format.scale;
  p.row_bytes = a.format.row_bytes(a.k);
  p.blocks = a.format.blocks(a.k);
  p.whole = whole_chunks(a, p);
  p.m = int(a.m);
  p.n = int(a.n);
  p.chunks = chunks_of(a);
  const int64_t group = a.format.columns(a.k);
  p.group_chunks = a.format.block_columns ? int((group + kChunk - 1) / kChunk) : p.chunks;
  p.share = a.plan.share;
  p.split = a.plan.split;
  p.n_clusters = int((a.n + kRows * p.share - 1) / (kRows * p.share));
  p.panel_rows = int((a.m + a.plan.tokens - 1) / a.plan.tokens * a.plan.tokens);
  switch (a.format.bits()) {
    case 4:
      launch_panel<4>(a, p, stream);
      break;
    case 6:
      launch_panel<6>(a, p, stream);
      break;
    default:
      launch_panel<8>(a, p, stream);
  }
  find(a.format)(p, a.plan, stream);
}

}  // namespace cuda
}  // namespace pyfmt
