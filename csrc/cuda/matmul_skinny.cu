// SPDX-License-Identifier: Apache-2.0
// Which kernel for few tokens, how k is cut, and how many blocks share the work.
#include <algorithm>

#include "../parse.h"
#include "matmul_skinny.cuh"
#include "matmul_skinny.h"

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

// The kernel that holds all activations, where it can and pays; else none. longest: steps of a
// part.
SkinnyKernel find_held(const SkinnyArgs& a, int longest, int64_t blocks) {
  const bool fine = a.format.scale == Scale::kE4M3;
  if (a.k % 128 != 0 || reinterpret_cast<uintptr_t>(a.scales) % (fine ? 8 : 4) != 0) return {};
  const SkinnyKernel one = find_kernel(a.format, 8, Inputs::kHeld);
  if (!one.run || one.held(int(a.m), longest) > kMostShared) return {};
  const int64_t tiles = (a.n + one.strip - 1) / one.strip;
  // Short launches gain by blocks of the next one beside them.
  const SkinnyKernel two = find_kernel(a.format, 8, Inputs::kHeldTwice);
  const bool is_short = tiles * ((longest + 1) / 2) <= 4 * blocks;
  if (is_short && two.held(int(a.m), longest) <= kMostShared / 2 - 1024) return two;
  // Where a warp has few tiles, more than two tokens of E8M0 take longer to bring than they save.
  return a.m <= 2 || fine || tiles > 8 * blocks ? one : SkinnyKernel{};
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
  const bool guard = !aligned16(a.codes) || p.row_bytes % 16 != 0 || a.n < 128;
  const Inputs inputs = guard                      ? Inputs::kGuarded
                        : p.terms == 1 && p.x_wide ? Inputs::kBF16
                                                   : Inputs::kAny;
  const int columns = int(std::min<int64_t>(a.m * p.terms, 64));
  SkinnyKernel kernel = find_kernel(a.format, columns, inputs);
  p.strips = (p.n + kernel.strip - 1) / kernel.strip;
  const int steps = (int(a.format.padded(a.k)) + kernel.step - 1) / kernel.step;
  const int longest = (steps + kernel.parts - 1) / kernel.parts;
  if (inputs == Inputs::kBF16 && columns <= 8 && a.k % 8 == 0) {
    const int64_t blocks = a.blocks ? a.blocks : multiprocessors();
    const SkinnyKernel held = find_held(a, longest, blocks);
    if (held.run) {
      kernel = held;
      p.strips = (p.n + kernel.strip - 1) / kernel.strip;
    } else if (p.strips > 5 * std::min<int64_t>(blocks, p.strips)) {
      // With many strips a block it pays that warps do not wait for each other.
      const SkinnyKernel found = find_kernel(a.format, columns, Inputs::kLong);
      if (found.run) kernel = found;
    }
  }
  // As many tokens at once as there are columns and shared memory for.
  const auto shared = [&](int tokens) {
    if (kernel.held) return kernel.held(tokens, longest);
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
  p.even_tiles = int(p.strips / l.clusters);
  p.longer_blocks = int(p.strips % l.clusters);
  l.overlap = a.overlap;
  l.tiles = int((a.m + p.tile_tokens - 1) / p.tile_tokens);
  l.threads = 32 * kernel.warps;
  launch_clusters(kernel.run, l, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
