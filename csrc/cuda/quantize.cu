// SPDX-License-Identifier: Apache-2.0
// Which kernel serves a call to quantize or fake_quantize, and with what constants.
#include "../parse.h"
#include "generic.h"
#include "quantize.cuh"
#include "quantize_kernels.h"
#include "wide.h"

namespace pyfmt {
namespace cuda {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that later launches do not report it again
    throw Error(std::string("CUDA ") + what + ": " + cudaGetErrorString(error));
  }
}

void set_device(int index) {
  check(cudaSetDevice(index), "device");
}

ScaleParams scale_params(const QuantizeArgs& args) {
  const ElementSpec& e = args.format.element;
  ScaleParams p;
  p.kind = args.format.scale;
  p.recipe = args.recipe;
  p.addend = codec::e8m0_addend(args.rule, e);
  p.covers = args.rule == ScaleRule::kRceil || args.rule == ScaleRule::kCeil;
  p.emax = e.emax();
  p.qmax = L::as_float(e.max_bits());
  p.inverse_qmax = 1.0f / p.qmax;
  p.top = 448.0f * p.qmax;
  p.given = args.tensor_scale;
  p.tensor_scale_out = args.tensor_scale_out;
  return p;
}

namespace {

enum class Path { kFlat, kRows, kWide, kAny };

const QuantizeKernels* find_kernels(const FormatSpec& f) {
  static const struct {
    ElementSpec element;
    bool pow2;
    QuantizeKernels kernels;
  } kTable[] = {
      {elements::e4m3fn, true, e4m3fn_pow2()},    {elements::e5m2ieee, true, e5m2ieee_pow2()},
      {elements::e2m3, true, e2m3_pow2()},        {elements::e3m2, true, e3m2_pow2()},
      {elements::e2m1, true, e2m1_pow2()},        {elements::int8q6, true, int8q6_pow2()},
      {elements::int6q4, true, int6q4_pow2()},    {elements::int4q2, true, int4q2_pow2()},
      {elements::e2m1, false, e2m1_multiplier()}, {elements::int4, false, int4_multiplier()},
      {elements::int8, false, int8_multiplier()},
  };
  for (const auto& row : kTable) {
    if (row.element == f.element && row.pow2 == (f.scale == Scale::kE8M0)) return &row.kernels;
  }
  return nullptr;
}

bool power_of_two(int64_t n) {
  return n > 0 && (n & (n - 1)) == 0;
}

bool dynamic(const QuantizeArgs& a) {
  return a.format.scale == Scale::kE4M3 && a.recipe != Recipe::kSingleLevel && !a.tensor_scale;
}

Path choose(const QuantizeArgs& a) {
  const FormatSpec& f = a.format;
  const int64_t block = f.block_columns, rows = f.block_rows;
  if (wide_serves(a)) return Path::kWide;
  if (!find_kernels(f) || !power_of_two(block) || block < 16 || block > 1024) return Path::kAny;
  if (rows == 1) {
    const bool whole = a.view.count() % kUnit == 0 && a.view.columns % block == 0;
    if (whole && !a.stochastic && a.view.flat() && aligned16(a.x)) return Path::kFlat;
  } else if ((rows != 16 && rows != 32) || block > kUnit || a.rotation.size > kUnit) {
    return Path::kAny;
  }
  return a.view.even() ? Path::kRows : Path::kAny;
}

QuantizeParams common_params(const QuantizeArgs& a, int partial_count) {
  QuantizeParams p;
  p.x = a.x;
  p.codes = a.codes;
  p.scales = a.scales;
  p.out = a.out;
  p.scale = scale_params(a);
  if (partial_count) {
    p.scale.partials = a.partials;
    p.scale.partial_count = partial_count;
  }
  p.limits = limits(a.format.element, a.full);
  p.rotation = rotation_params(a.rotation);
  p.halves = a.format.block_columns == 16 ? 2 : 1;
  while (kUnit * p.lanes < a.format.block_columns) {
    p.lanes *= 2;
    ++p.lane_shift;
  }
  return p;
}

void launch_flat(const QuantizeArgs& a, int partial_count, Stream stream) {
  QuantizeParams p = common_params(a, partial_count);
  p.units = a.view.count() / kUnit;
  const Task task = a.out             ? Task::kFakeQuantize
                    : a.rotation.size ? Task::kRotateQuantize
                                      : Task::kQuantize;
  // An empty tensor has a tensor scale all the same.
  const int64_t blocks = p.units || !a.tensor_scale_out ? blocks_for(p.units) : 1;
  launch(find_kernels(a.format)->flat[int(a.dtype)][int(task)], blocks, kThreads, stream, p);
}

void launch_rows(const QuantizeArgs& a, int partial_count, Stream stream) {
  const FormatSpec& f = a.format;
  QuantizeParams p = common_params(a, partial_count);
  p.dtype = a.dtype;
  p.rows = a.view.rows();
  p.columns = a.view.columns;
  p.row_stride = a.view.row_stride();
  p.row_bytes = f.row_bytes(p.columns);
  p.blocks = f.blocks(p.columns);
  p.units_per_row = (f.padded(p.columns) + kUnit - 1) / kUnit;
  p.block_rows = int(f.block_rows);
  p.matrix_rows = a.matrix_rows > 0 ? a.matrix_rows : 1;
  p.matrix_strips = (p.matrix_rows + p.block_rows - 1) / p.block_rows;
  p.strips = p.rows / p.matrix_rows * p.matrix_strips;
  p.aligned = aligned16(a.x) && p.row_stride * dtype_bytes(a.dtype) % 16 == 0;
  p.seed = a.seed;
  const int64_t at_once = 32 / p.block_rows;
  const int64_t threads = p.block_rows == 1
                              ? p.rows * p.units_per_row
                              : (p.strips + at_once - 1) / at_once * p.units_per_row * 32;
  p.units_per_row = p.units_per_row ? p.units_per_row : 1;
  const int64_t blocks = threads || !a.tensor_scale_out ? blocks_for(threads) : 1;
  launch(find_kernels(f)->rows[a.stochastic], blocks, kThreads, stream, p);
}

}  // namespace

bool needs_rotated_rows(const QuantizeArgs& a) {
  const Path path = choose(a);
  return a.rotation.size && (path == Path::kAny || (path == Path::kRows && dynamic(a)));
}

bool needs_scales(const QuantizeArgs& a) {
  return choose(a) == Path::kAny;
}

namespace {

// The first launch of a dynamic tensor scale; 0 where there is none.
int start_amax(const QuantizeArgs& a, Stream stream) {
  if (!dynamic(a)) return 0;
  AmaxArgs amax;
  amax.x = a.x;
  amax.dtype = a.dtype;
  amax.view = a.view;
  amax.partials = a.partials;
  amax.rotation = a.rotation;
  return amax_partials(amax, stream);
}

}  // namespace

void quantize(const QuantizeArgs& a, Stream stream) {
  const int partial_count = start_amax(a, stream);
  switch (choose(a)) {
    case Path::kFlat:
      return launch_flat(a, partial_count, stream);
    case Path::kRows:
      return launch_rows(a, partial_count, stream);
    case Path::kWide:
      return quantize_wide(a, stream);
    default:
      return quantize_any(a, partial_count, stream);
  }
}

bool dual_serves(const QuantizeArgs& a) {
  const FormatSpec& f = a.format;
  const bool block = f.block_rows == 1 && (f.block_columns == 16 || f.block_columns == 32);
  const bool whole = a.view.columns % kUnit == 0 && a.matrix_rows % kUnit == 0;
  // A rotation along the other axis has another tensor scale.
  const bool rotation = !a.rotation.size || (a.rotation.size <= kUnit && !dynamic(a));
  return block && whole && rotation && find_kernels(f) && !a.stochastic && a.view.count() &&
         a.view.flat() && aligned16(a.x);
}

void quantize_dual(const QuantizeArgs& a, const Across& across, Stream stream) {
  const QuantizeParams common = common_params(a, start_amax(a, stream));
  DualParams p;
  p.x = a.x;
  p.rows = a.matrix_rows;
  p.columns = a.view.columns;
  p.row_tiles = (p.rows + kTileRows - 1) / kTileRows;
  p.column_tiles = (p.columns + kTileColumns - 1) / kTileColumns;
  p.codes = a.codes;
  p.scales = a.scales;
  p.codes_t = across.codes;
  p.scales_t = across.scales;
  p.scale = common.scale;
  p.limits = common.limits;
  p.rotation = common.rotation;
  p.halves = common.halves;
  const int64_t tiles = a.view.rows() / p.rows * p.row_tiles * p.column_tiles;
  launch(find_kernels(a.format)->dual[int(a.dtype)], tiles, kThreads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
