// SPDX-License-Identifier: Apache-2.0
// Which kernel for few tokens, how k is cut, and how many blocks share the work.
#include <algorithm>
#include <cmath>
#include <mutex>

#include "../parse.h"
#include "matmul_skinny.cuh"
#include "matmul_skinny.h"

namespace pyfmt {
namespace cuda {

namespace {

constexpr int kShared = 228 * 1024;  // of a multiprocessor, of which each block takes 1 KB more

// Clusters of 1, 2, 4 and 8 blocks that run at once.
struct Machine {
  int clusters[4];

  int at_once(int cluster) const {
    return clusters[cluster >= 8 ? 3 : cluster >= 4 ? 2 : cluster >= 2 ? 1 : 0];
  }
};

int shared_limit(const SkinnyKernel& kernel) {
  return kShared / kernel.blocks - 1024;
}

// What this process found out about its devices, once for each and for each number of blocks.
const Machine& machine(const SkinnyKernel& kernel) {
  constexpr int kDevices = 64;
  static std::once_flag flags[kDevices][5];
  static Machine machines[kDevices][5];
  int device = 0;
  check(cudaGetDevice(&device), "device");
  device %= kDevices;
  Machine& m = machines[device][kernel.blocks];
  std::call_once(flags[device][kernel.blocks], [&] {
    for (int i = 0; i < 4; ++i) {
      m.clusters[i] = std::max(
          1, clusters_at_once(kernel.run, 1 << i, 32 * kernel.warps, shared_limit(kernel)));
    }
  });
  return m;
}

// How the blocks of a cluster and the warps of a block share rows and k.
struct Plan {
  int cluster = 1, k_warps = 1, row_warps = 1, clusters = 1;
  double cost = 1e30;

  int parts() const { return cluster * k_warps; }
};

int sum_bytes(const SkinnyKernel& kernel, const Plan& plan, int columns) {
  return plan.k_warps * columns * (kernel.row_tile * plan.row_warps + 4) * 4;
}
int ring_bytes(const SkinnyKernel& kernel, const Plan& plan) {
  return plan.k_warps * plan.row_warps * kernel.depth * kernel.slot;
}
// Shared memory for x in one step of each part.
int step_bytes(const SkinnyKernel& kernel, const Plan& plan, int padded_columns) {
  return plan.k_warps * kernel.fragments * 64 * padded_columns;
}
int padded_columns(const SkinnyKernel& kernel, int columns) {
  return kernel.tiles > 1 ? 8 * kernel.tiles : columns;
}

// Time in microseconds, roughly: what the busiest multiprocessor reads at its share of the memory's
// rate, longer with few warps to hide latency, and what activations, rounds and exchanges add.
Plan cost_of(const SkinnyArgs& a, const SkinnyKernel& kernel, int cluster, int k_warps,
             int columns) {
  const double kBytesPerMicrosecond = 31e3 / kernel.blocks;  // of one block
  Plan plan;
  const int64_t tiles = (a.n + kernel.row_tile - 1) / kernel.row_tile;
  const int most = machine(kernel).at_once(cluster);
  const int64_t shares = (tiles + most - 1) / most;  // of a cluster
  const int64_t rounds = (shares * k_warps + kernel.warps - 1) / kernel.warps;
  plan.cluster = cluster;
  plan.k_warps = k_warps;
  plan.row_warps = int((shares + rounds - 1) / rounds);
  if (plan.row_warps * k_warps > kernel.warps) return plan;
  plan.clusters = int(std::min<int64_t>(most, (tiles + plan.row_warps - 1) / plan.row_warps));
  const int need = ring_bytes(kernel, plan) +
                   kernel.depth * step_bytes(kernel, plan, padded_columns(kernel, columns)) +
                   sum_bytes(kernel, plan, columns);
  if (need > shared_limit(kernel)) return plan;
  const double bits = a.format.bits() + 8.0 * scale_bytes(a.format.scale) / 32;
  const double steps = std::ceil(double(a.k) / kernel.step / cluster / k_warps) * k_warps;
  const double bytes = double(shares * kernel.row_tile) * steps * kernel.step * bits / 8;
  const double x_bytes = 2.0 * columns * double(a.k) / cluster;
  const double busy = std::min(1.0, double(plan.row_warps * k_warps) / (kernel.warps * 0.8));
  plan.cost = bytes / kBytesPerMicrosecond / busy + x_bytes / 60e3 + 0.6 * double(rounds) +
              (cluster > 1 ? 0.5 : 0.0) + 0.02 * (k_warps + cluster);
  return plan;
}

// parts 0: the best number of them.
Plan best_plan(const SkinnyArgs& a, const SkinnyKernel& kernel, int parts, int columns) {
  Plan best;
  for (int cluster = 1; cluster <= 8; cluster *= 2) {
    for (int k_warps = 1; k_warps <= 8; ++k_warps) {
      if (parts ? cluster * k_warps != parts : (cluster * k_warps > 16 || k_warps & 1)) continue;
      const Plan plan = cost_of(a, kernel, cluster, k_warps, columns);
      if (plan.cost < best.cost) best = plan;
    }
  }
  return best;
}

SkinnyKernel find_kernel(const FormatSpec& f, int columns, Inputs inputs) {
  for (auto* family :
       {skinny_fp4, skinny_fp6, skinny_fp8, skinny_mxint, skinny_int4, skinny_int8}) {
    const SkinnyKernel kernel = family(f, columns, inputs);
    if (kernel.run) return kernel;
  }
  return {};
}

}  // namespace

bool skinny_serves(const FormatSpec& f) {
  const bool integers = f.element == elements::int4 || f.element == elements::int8;
  if (integers && !f.tensor_scale && f.block_rows == 1 && f.block_columns % 32 == 0) {
    return f.scale == Scale::kBF16 || f.scale == Scale::kFP16 || f.scale == Scale::kFP32;
  }
#define PYFMT_FORMAT(id, name, element_id, rows, columns, scale_id, tensor)                      \
  if (f.element == elements::element_id && f.block_rows == rows && f.block_columns == columns && \
      f.scale == Scale::scale_id && f.tensor_scale == tensor) {                                  \
    return true;                                                                                 \
  }
#include "../formats.inc"
  return false;
}

void matmul_skinny(const SkinnyArgs& a, Stream stream) {
  if (a.m == 0 || a.n == 0) return;
  SkinnyParams p;
  p.x = a.x;
  p.x_stride = a.x_stride;
  p.x_dtype = a.x_dtype;
  const int64_t x_bytes = dtype_bytes(a.x_dtype);
  p.x_wide = aligned16(a.x) && a.x_stride * x_bytes % 16 == 0;
  p.terms = a.x_dtype == DType::kBF16 ? 1 : a.x_dtype == DType::kFP16 ? 2 : 3;
  p.tokens = int(a.m);
  p.codes = a.codes;
  p.row_bytes = a.format.row_bytes(a.k);
  p.scales = a.scales;
  p.row_scales = a.format.blocks(a.k);
  p.scale = a.format.scale;
  p.tensor_scale = a.tensor_scale;
  p.bias = a.bias;
  p.bias_dtype = a.bias_dtype;
  p.out = a.out;
  p.out_dtype = a.out_dtype;
  p.n = a.n;
  p.k = int(a.k);
  p.padded = int(a.format.padded(a.k));
  const bool two_scales = a.format.bits() == 6 || a.format.scale == Scale::kE4M3;
  const bool guard = !aligned16(a.codes) || p.row_bytes % 16 != 0 ||
                     (two_scales && (reinterpret_cast<uintptr_t>(a.scales) & 1) != 0);
  const int64_t wanted = a.m * p.terms;
  const Inputs inputs = guard ? Inputs::kGuarded : p.terms > 1 ? Inputs::kAny : Inputs::kBF16;
  const SkinnyKernel kernel = find_kernel(a.format, int(std::min<int64_t>(wanted, 64)), inputs);
  p.tile_tokens = int(std::min<int64_t>(a.m, 8 * kernel.tiles / p.terms));
  const int columns = p.tile_tokens * p.terms;
  p.columns = padded_columns(kernel, columns);
  const int steps = (p.padded + kernel.step - 1) / kernel.step;
  if (a.format.block_columns) {
    const bool whole = a.format.block_columns % kernel.step == 0;
    const int64_t runs = a.format.block_columns / (whole ? kernel.step : 32);
    p.group_share = runs ? ((uint64_t(1) << 32) + uint64_t(runs) - 1) / uint64_t(runs) : 0;
  }

  // The number of parts comes from the one-token kernel, for every number of tokens.
  Plan plan;
  if (a.cluster) {
    plan.cluster = a.cluster;
    plan.k_warps = a.k_warps;
    plan.row_warps = a.row_warps;
    const int64_t group = int64_t(kernel.row_tile) * plan.row_warps;
    plan.clusters =
        int(std::min<int64_t>((a.n + group - 1) / group, machine(kernel).at_once(plan.cluster)));
  } else {
    const SkinnyKernel one = find_kernel(a.format, 1, Inputs::kBF16);
    plan = best_plan(a, kernel, best_plan(a, one, 0, 1).parts(), columns);
  }
  p.cluster = plan.cluster;
  p.k_warps = plan.k_warps;
  p.row_warps = plan.row_warps;
  p.even_steps = steps / plan.parts();
  p.longer_parts = steps % plan.parts();
  const int longest = (steps + plan.parts() - 1) / plan.parts();
  p.part_steps = (longest + kernel.depth - 1) / kernel.depth * kernel.depth;
  const int sums = sum_bytes(kernel, plan, columns), step = step_bytes(kernel, plan, p.columns);
  p.x_at = ring_bytes(kernel, plan);
  const int fits = (shared_limit(kernel) - p.x_at - sums) / step / kernel.depth * kernel.depth;
  if (fits < kernel.depth) {
    throw Error(
        "matmul for few tokens: no way to share the work fits the shared memory of this "
        "device; choose another path");
  }
  p.slice_steps = std::min(p.part_steps, fits);
  p.sums_at = p.x_at + p.slice_steps * step;

  ClusterLaunch l;
  l.clusters = plan.clusters;
  l.cluster = plan.cluster;
  l.overlap = a.overlap;
  l.tiles = int((a.m + p.tile_tokens - 1) / p.tile_tokens);
  l.threads = 32 * p.row_warps * p.k_warps;
  l.shared = p.sums_at + sums;
  launch_clusters(kernel.run, l, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
