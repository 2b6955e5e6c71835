// SPDX-License-Identifier: Apache-2.0
// Which kernel for few tokens, how k is cut, and how many blocks share the work.
#include <algorithm>

#include "../parse.h"
#include "matmul_skinny.cuh"
#include "matmul_skinny.h"
#include "together.h"

namespace pyfmt {
namespace cuda {

namespace {

constexpr int kMostShared = 227 * 1024;  // of a block

SkinnyKernel find_kernel(const FormatSpec& f, int columns, Inputs inputs) {
  for (auto* family :
       {skinny_fp4, skinny_fp6, skinny_fp8, skinny_mxint, skinny_int4, skinny_int8}) {
    const SkinnyKernel kernel = family(f, columns, inputs);
    if (kernel.run) return kernel;
  }
  return {};
}

// Where the general kernels are faster, as measured: for 8 rows of 4096 x 4096 of 6 bits by 5%; for
// integers of 8 bits, which take memory's time in either, where blocks have few tiles to spread the
// activations' time over: by 5% at 8 rows of 8192 x 8192, by 2 to 6% of 4096 x 14336.
bool faster_without(const SkinnyArgs& a, int64_t tiles, int warps, int split) {
  const int64_t places = multiprocessors();
  const int bits = a.format.element.bits();
  if (bits == 6) return a.m >= 4 && split == 1 && warps <= 8 && tiles <= 2 * places;
  if (bits != 8 || !a.format.element.is_int() || tiles >= 6 * places) return false;
  if (split > 1) return true;
  if (a.format.has_float_scales()) return a.m > 2 && warps > 8;
  return a.m > 2 || tiles < 3 * places;
}

// The kernel whose activations stay in registers, where it can.
bool launch_still(const SkinnyArgs& a, SkinnyParams& p, Stream stream) {
  if (a.batch_invariant || a.split < 0 || a.m > 8 || a.k % 256 != 0 || a.n % 16 != 0) return false;
  const bool groups = a.format.has_float_scales();
  if (groups && (a.format.block_columns != 128 || scale_bytes(a.format.scale) != 2)) return false;
  const int unit = groups ? 4 : a.format.scale == Scale::kE4M3 ? 16 : 8;  // of a copy of scales
  if (reinterpret_cast<uintptr_t>(a.scales) % unit != 0) return false;
  SkinnyKernel kernel = find_kernel(a.format, int(a.m), Inputs::kStill);
  if (!kernel.run) return false;
  const int parts = int((a.k + kernel.columns - 1) / kernel.columns);
  p.split = a.split ? a.split : parts > 16 ? 2 : 1;
  p.parts = (parts + p.split - 1) / p.split;
  ClusterLaunch l;
  l.shared = kernel.still(int(a.m), p.parts, p.split);
  if (p.parts > 16 || (p.split > 1 && p.parts < a.m) || p.split > 2 || l.shared > kMostShared)
    return false;
  const int64_t tiles = a.n / 16, places = multiprocessors();
  if (!a.split && faster_without(a, tiles, p.parts, p.split)) return false;
  int warps = p.parts;
  // Two more where two of four schedulers would have a warp more than the others. Those whose tiles
  // are shared add up no sums.
  if (kernel.turns && warps % 4 == 2 && warps >= 6 && (p.split == 1 || warps - 2 >= a.m)) {
    const int shared = kernel.still(int(a.m), warps + 2, p.split);
    if (shared <= kMostShared) {
      l.shared = shared;
      warps += 2;
      kernel.run = kernel.turns;
    }
  }
  // Where two blocks fit a multiprocessor and each has work, one begins while the other ends.
  const bool two = warps <= 8 && 2 * (l.shared + 1024) <= 228 * 1024 && tiles >= 6 * places;
  // Beside the launch that rounds x two blocks might share a multiprocessor while another has none.
  if (a.slots && !two) l.shared = std::max(l.shared, 116 * 1024);
  l.cluster = p.split;
  l.clusters = std::min(tiles, (a.blocks ? a.blocks : two ? 2 * places : places) / p.split);
  // Short launches by no more blocks than it takes: what comes next finds the other multiprocessors
  // free. (Measured in a decoder's layer: 1% at two tokens, 2% at four, 3% at eight, but -0.5% at
  // one; slower by 1 to 2% where blocks of 16 warps or of many tiles follow one another.)
  const int64_t most = (tiles + l.clusters - 1) / l.clusters, enough = (tiles + most - 1) / most;
  const bool brief = a.m > 1 && most <= 4 && (p.split > 1 || warps <= 8);
  if (!a.blocks && brief && 16 * enough >= 15 * l.clusters) l.clusters = enough;
  p.even_tiles = int(tiles / l.clusters);
  p.longer_blocks = int(tiles % l.clusters);
  p.tile_tokens = int(a.m);
  // Many copies ahead of activations hold these up, unless copies are what takes the time.
  p.early = a.early ? a.early : kernel.early;
  l.overlap = a.overlap;
  l.threads = 32 * warps;
  launch_clusters(kernel.run, l, stream, p);
  return true;
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
  p.row_bytes = int(a.format.row_bytes(a.k));
  p.scales = a.scales;
  p.row_scales = int(a.format.blocks(a.k));
  p.scale = a.format.scale;
  p.tensor_scale = a.tensor_scale;
  p.bias = a.bias;
  p.bias_dtype = a.bias_dtype;
  p.out = a.out;
  p.out_dtype = a.out_dtype;
  p.n = int(a.n);
  p.k = int(a.k);
  p.slots = a.slots;
  p.slot_count = a.slot_count;
  const bool guard = !aligned16(a.codes) || p.row_bytes % 16 != 0 || a.n < 128;
  const Inputs inputs = guard                      ? Inputs::kGuarded
                        : p.terms == 1 && p.x_wide ? Inputs::kBF16
                                                   : Inputs::kAny;
  if (inputs == Inputs::kBF16 && launch_still(a, p, stream)) return;
  const int columns = int(std::min<int64_t>(a.m * p.terms, 64));
  SkinnyKernel kernel = find_kernel(a.format, columns, inputs);
  p.strips = (p.n + kernel.strip - 1) / kernel.strip;
  const int steps = (int(a.format.padded(a.k)) + kernel.step - 1) / kernel.step;
  if (inputs == Inputs::kBF16 && columns <= 8 && a.k % 8 == 0) {
    const int64_t blocks = a.blocks ? a.blocks : multiprocessors();
    // With many strips a block it pays that warps do not wait for each other.
    if (p.strips > 5 * std::min<int64_t>(blocks, p.strips)) {
      const SkinnyKernel found = find_kernel(a.format, columns, Inputs::kLong);
      if (found.run) kernel = found;
    }
  }
  // As many tokens at once as there are columns and shared memory for.
  const auto shared = [&](int tokens) {
    if (kernel.shared) return kernel.shared(tokens);
    const int sums = 4 * tokens * p.terms * (kernel.strips * kernel.strip + 4);
    p.slot = std::max(kernel.codes + kernel.step * tokens * int(x_bytes), (sums + 15) / 16 * 16);
    p.terms_bytes = inputs == Inputs::kBF16 ? 0 : 2 * kernel.step * tokens * p.terms;
    return kernel.warps * (kernel.depth * (p.slot + kernel.scales) + p.terms_bytes);
  };
  p.tile_tokens = int(std::min<int64_t>(a.m, 8 * kernel.tiles / p.terms));
  while (shared(p.tile_tokens) > kMostShared) --p.tile_tokens;
  if (a.format.block_columns) {
    const bool whole = a.format.block_columns % kernel.step == 0;
    const int64_t runs = a.format.block_columns / (whole ? kernel.step : 32);
    p.group_share = runs ? ((uint64_t(1) << 32) + uint64_t(runs) - 1) / uint64_t(runs) : 0;
  }
  // Scales are copied 16, 8 or 4 bytes of a row at once, as their alignment allows, but not less
  // than a step's.
  const bool blocks = a.format.scale == Scale::kE8M0 || a.format.scale == Scale::kE4M3;
  const int size = scale_bytes(a.format.scale);
  const int least = blocks ? kernel.step / (a.format.scale == Scale::kE4M3 ? 16 : 32) : size;
  const uint64_t places = reinterpret_cast<uintptr_t>(a.scales) | uint64_t(p.row_scales) * size;
  for (p.scale_shift = 4; p.scale_shift && places >> p.scale_shift << p.scale_shift != places;)
    --p.scale_shift;
  p.scale_copies = !guard && p.scale_shift >= 2 && 1 << p.scale_shift >= least;
  if (!p.scale_copies) {
    for (p.scale_shift = 0; 1 << p.scale_shift < least;) ++p.scale_shift;
  }
  p.even_steps = steps / kernel.parts;
  p.longer_parts = steps % kernel.parts;
  ClusterLaunch l;
  l.shared = shared(p.tile_tokens);
  const int at_once = kernel.blocks * (l.shared + 1024) <= 228 * 1024 ? kernel.blocks : 1;
  l.clusters = std::min(p.strips, a.blocks ? a.blocks : at_once * multiprocessors());
  l.overlap = a.overlap;
  l.tiles = int((a.m + p.tile_tokens - 1) / p.tile_tokens);
  l.threads = 32 * kernel.warps;
  launch_clusters(kernel.run, l, stream, p);
  if (a.slots) clear_together(a.slots, a.slot_count, stream);
}

}  // namespace cuda
}  // namespace pyfmt
