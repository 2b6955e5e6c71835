// SPDX-License-Identifier: Apache-2.0
// The host's side of matmul_wide.h: which formats and shapes, the plan, activations to read.
#include <cmath>

#include "matmul_wide.cuh"
#include "matmul_wide_panel.cuh"
#include "matmul_wide_parts.cuh"

namespace pyfmt {
namespace cuda {

namespace wide {
namespace {

bool rows_aligned(const MatmulWideArgs& a) {
  return aligned16(a.x) && a.k % 8 == 0;
}
int64_t padded_row(const MatmulWideArgs& a) {
  return (a.k + 7) / 8 * 8;
}

Kernel find(const FormatSpec& f, Form form) {
  for (auto of : {fp4_kernel, fp6_kernel, fp8_kernel, int_kernel, group_kernel, mxint_kernel}) {
    const Kernel found = of(f, form);
    if (found.launch) return found;
  }
  return {};
}
// One tile of 256 rows has the panel cost more than what the shared form loses; more share it.
Kernel find(const MatmulWideArgs& a) {
  if (a.plan.tokens <= 64) {
    if (const Kernel tall = find(a.format, Form::kTall); tall.launch) return tall;
  }
  const bool shared = has_groups(a.format, a.format.element)
                          ? a.plan.written || a.plan.tokens == 192
                          : a.plan.tokens == 256 && a.m <= 256;
  return find(a.format, shared ? Form::kShared : Form::kTurns);
}

// Of the workspace: x as the kernel reads it, where that is not as it lies.
int64_t bytes_of_x(const MatmulWideArgs& a) {
  if (find(a).panel) {
    return panel_rows(a.m, a.plan.tokens) * ((a.k + kChunk - 1) / kChunk) * kChunk * 2;
  }
  return rows_aligned(a) ? 0 : (a.m * padded_row(a) * 2 + 15) / 16 * 16;
}

// And sums of parts of K, behind x.
int64_t bytes_of_sums(const MatmulWideArgs& a) {
  if (a.plan.split <= 2) return 0;
  const int64_t rows = 64 * a.plan.share;
  return a.plan.split * ((a.n + rows - 1) / rows * rows) * panel_rows(a.m, a.plan.tokens) * 4;
}

// Likewise: for parts of w that are written out.
int64_t bytes_of_parts(const MatmulWideArgs& a) {
  if (!a.plan.written) return 0;
  const int64_t row_bytes = (a.format.row_bytes(a.k) + 15) / 16 * 16;
  const WrittenParts parts(a.m, a.n, row_bytes / a.format.bits() * 16, a.plan.tokens);
  return parts.room[0] + parts.room[1];
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

// Up to what power of two, at most 16 bytes, the scales of each row are aligned.
int alignment_of_scales(const MatmulWideArgs& a, const Params& p) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(a.scales) | uintptr_t(p.blocks) | 16u;
  return int(bits & (~bits + 1));
}

// Up to 64 rows of x: the warpgroups of a block have rows of w of their own, or take turns. By
// nanoseconds on an H200.
WidePlan tall_plan(const MatmulWideArgs& a) {
  const bool bytes = a.format.element.bits() == 8;
  // What a chunk of 64 rows of w takes, by 1, 2 or 4 of them in a block; of 64 rows of x a block
  // has too few stages for four warpgroups that take turns.
  const double few[] = {173, 140, 143}, more[] = {bytes ? 250.0 : 300.0, 192, 190},
               most[] = {0, 328, 240};
  WidePlan best;
  best.tokens = a.m <= 16 ? 16 : a.m <= 32 ? 32 : 64;
  const double* rows = best.tokens == 16 ? few : best.tokens == 32 ? more : most;
  const int64_t chunks = (a.k + kChunk - 1) / kChunk, sms = multiprocessors();
  double least = 0;
  for (int bits : {2, 1, 0}) {
    if (rows[bits] == 0) continue;
    const int share = 1 << bits;
    for (int split : {1, 2, 4, 8}) {
      if (split > chunks) break;
      const int64_t blocks = (a.n + 64 * share - 1) / (64 * share) * split;
      const int64_t waves = (blocks + sms - 1) / sms;
      // What it takes to add parts of K, in a cluster or by another launch.
      double sums = 0;
      if (split == 2) sums = 600 + 25 * best.tokens;
      if (split > 2) {
        sums = 2e-3 * double(a.n) * split * best.tokens;
        sums = std::max(sums, best.tokens == 16 ? 3000.0 : 2000.0) + (bytes ? 1500 : 0);
      }
      const double own = double(chunks) / split * share * rows[bits];
      const double cost = double(waves) * (own + 2000) + 3000 + sums;
      if (least != 0 && cost >= least) continue;
      least = cost;
      best.share = share;
      best.split = split;
    }
  }
  return best;
}

// The clocks that matmul_wide_groups.cuh takes. more: sums of a chunk beyond one.
double cost_of_groups(const MatmulWideArgs& a, const WidePlan& plan, double more) {
  const double sms = multiprocessors(), chunks = double((a.k + kChunk - 1) / kChunk);
  const double tiles = double((a.m + plan.tokens - 1) / plan.tokens);
  const double own = plan.tokens == 256     ? 2065 + 200 * more
                     : plan.written         ? 1570 + 150 * more
                     : a.format.bits() == 4 ? 2050 + 200 * more
                                            : 2220 + 200 * more;
  const auto waves = [&](double rows) { return std::ceil(std::ceil(rows / kRows) * tiles / sms); };
  const double wave = chunks * own + 1500 + 25 * plan.tokens;
  if (!plan.written) return waves(double(a.n)) * wave + 9000;
  const WrittenParts parts(a.m, a.n, a.k * 2, plan.tokens);
  // A launch for each part, and the first is written out before all else.
  double cost = 9000 + double(parts.rows[0]) * double(a.k) / 1000;
  for (const int64_t rows : parts.rows) cost += waves(double(rows)) * wave + 4000;
  return cost;
}

// What a chunk takes. Of groups by the sums that are kept apart for it.
WidePlan plan_of(const MatmulWideArgs& a) {
  if (!has_groups(a.format, a.format.element)) {
    if (a.m <= 64) return tall_plan(a);
    return cheapest_plan(a.m, a.n, a.k, {{128, 1600}, {192, 2100}, {256, 2600}});
  }
  const int columns = int(a.format.block_columns);
  const int parts = columns % 128 == 0 ? 1 : columns % 64 == 0 ? 2 : 4;
  const double more = parts - 1;
  double least = 0;
  WidePlan best = cheapest_plan(a.m, a.n, a.k,
                                {{64, 910 + 220 * more},
                                 {96, 1095 + 240 * more},
                                 {128, 1280 + 260 * more},
                                 // Registers hold no more than 128 tokens of groups of 32 columns.
                                 {parts == 4 ? 128 : 256, (parts == 4 ? 1280 : 2400) + 260 * more}},
                                &least);
  for (const WidePlan& plan :
       {WidePlan{192, 1, 1, false}, WidePlan{192, 1, 1, true}, WidePlan{256, 1, 1, true}}) {
    const double cost = cost_of_groups(a, plan, more);
    if (cost < least) {
      least = cost;
      best = plan;
    }
  }
  return best;
}

}  // namespace
}  // namespace wide

const char* matmul_wide_refuses(const FormatSpec& f, int64_t m, int64_t n, int64_t k) {
  using namespace wide;
  if (!find(f, Form::kTurns).launch || f.block_rows != 1)
    return "the format is none of those compiled in";
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

bool takes_ordered(const MatmulWideArgs& a) {
  return a.m <= 32 && a.plan.tokens <= 64 && a.k % wide::kChunk == 0 && aligned16(a.x) &&
         wide::find(a.format, wide::Form::kTall).launch;
}

WidePlan matmul_wide_plan(const MatmulWideArgs& a) {
  return a.plan.tokens ? a.plan : wide::plan_of(a);
}

int64_t matmul_wide_workspace(const MatmulWideArgs& a) {
  using namespace wide;
  return bytes_of_x(a) + bytes_of_sums(a) +
         aligned_codes_bytes(a.codes, a.format.row_bytes(a.k), a.n) + bytes_of_parts(a);
}

void matmul_wide(const MatmulWideArgs& a, Stream stream) {
  using namespace wide;
  const Kernel kernel = find(a);
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
  p.wide_scales = scales_aligned(a, p);
  p.scales_align = alignment_of_scales(a, p);
  p.group_runs = a.format.block_columns ? a.format.block_columns / 32 : 1 << 30;
  p.m = int(a.m);
  p.n = int(a.n);
  p.tiles = int((a.k + kernel.columns - 1) / kernel.columns);
  p.share = a.plan.share;
  p.ordered = a.ordered;
  // An x that the launch ahead writes comes later than one that lies ready.
  p.early = a.ordered && p.share == 1 ? 2 : 1;
  const bool apart = a.plan.split > 2;  // parts of K, by blocks that do not meet
  p.split = apart ? 1 : a.plan.split;
  p.parts = apart ? a.plan.split : 1;
  while (1 << p.parts_bits < p.parts) ++p.parts_bits;
  while (1 << p.share_bits < p.share) ++p.share_bits;
  p.middle = (p.tiles + kBatch - 1) / kBatch / 2 * kBatch;
  const int64_t rows = int64_t(kernel.rows) * p.share;  // of a cluster
  p.n_clusters = unsigned((a.n + rows - 1) / rows);

  WideCall call;
  call.tokens = a.plan.tokens;
  call.x = {a.x, a.k * 2, a.m, a.k * 2};
  call.codes =
      align_codes({a.codes, p.row_bytes, a.n, p.row_bytes},
                  static_cast<uint8_t*>(a.workspace) + bytes_of_x(a) + bytes_of_sums(a), stream);
  if (apart) {
    p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(a.workspace) + bytes_of_x(a));
  }
  p.copied_codes = call.codes.data == a.codes;
  if (a.plan.written) {
    call.room = static_cast<uint8_t*>(a.workspace) + bytes_of_x(a) +
                aligned_codes_bytes(a.codes, p.row_bytes, a.n);
  }
  if (kernel.panel) {
    p.panel = static_cast<const uint8_t*>(a.workspace);
    p.panel_rows = int(panel_rows(a.m, a.plan.tokens));
  } else if (!rows_aligned(a)) {
    const int64_t pitch = padded_row(a), count = a.m * pitch;
    launch(align_rows<uint16_t>, blocks_for(count), kThreads, stream,
           static_cast<const uint16_t*>(a.x), static_cast<uint16_t*>(a.workspace), count, a.k,
           pitch);
    call.x.data = a.workspace;
    call.x.pitch = pitch * 2;
  }
  kernel.launch(p, call, stream);
  if (apart) launch_sum(p, a.plan.tokens, stream);
}

}  // namespace cuda
}  // namespace pyfmt
