// SPDX-License-Identifier: Apache-2.0
// Which kernel serves a call to quantize or fake_quantize, and with what constants.
#include <algorithm>

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

int multiprocessors() {
  static int counts[64];
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "device");
  if (device < 64 && counts[device]) return counts[device];
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  if (device < 64) counts[device] = count;
  return count;
}

bool launches_overlap() {
#if defined(__CUDACC__)
  static int8_t known[64];  // 1: no, 2: yes
  int device = 0;
  check(cudaGetDevice(&device), "device");
  if (device < 64 && known[device]) return known[device] == 2;
  cudaFuncAttributes facts;
  check(cudaFuncGetAttributes(&facts, e2m1_multiplier().flat[0][0]), "kernel");
  const bool yes = facts.ptxVersion >= 90;
  if (device < 64) known[device] = yes ? 2 : 1;
  return yes;
#else
  return false;
#endif
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

enum class Path { kFlat, kRows, kSquare, kWide, kAny };

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
    const bool alone = !a.rotation.size && !a.out;
    if (whole && (!a.stochastic || alone) && a.view.flat() && aligned16(a.x)) return Path::kFlat;
  } else if ((rows != 16 && rows != 32) || block > kUnit || a.rotation.size > kUnit) {
    return Path::kAny;
  } else if (a.view.columns % kUnit == 0 && a.view.count() && !a.stochastic && !a.out &&
             !a.rotation.size && a.view.flat() && aligned16(a.x)) {
    return Path::kSquare;
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
  p.keys = random_keys(a.seed);
  p.halves = a.format.block_columns == 16 ? 2 : 1;
  while (kUnit * p.lanes < a.format.block_columns) {
    p.lanes *= 2;
    ++p.lane_shift;
  }
  return p;
}

// What reads partial maxima is started while they are being found.
template <class... P, class... A>
void launch_scaled(const ScaleParams& scale, void (*kernel)(P...), int64_t blocks, int threads,
                   Stream stream, const A&... args) {
  launch_after(scale.partials && launches_overlap(), kernel, blocks, threads, stream, args...);
}

using RotatedKernel = void (*)(RotatedParams);

// For bf16 rows end to end, as Path::kFlat has them; null where quantize_flat is to serve.
RotatedKernel find_rotated(const QuantizeArgs& a) {
  const bool bytes = a.format.scale == Scale::kE8M0 || a.format.scale == Scale::kE4M3;
  const int index = rotated_index(a.rotation.size);
  const bool serves =
      a.dtype == DType::kBF16 && index >= 0 && bytes && a.format.block_columns <= kUnit && !a.out;
  return serves ? find_kernels(a.format)->rotated[index] : nullptr;
}

void launch_rotated(RotatedKernel kernel, const QuantizeArgs& a, const QuantizeParams& common,
                    Stream stream) {
  WholeParams p;
  p.x = static_cast<const uint8_t*>(common.x);
  p.units = common.units;
  p.codes = common.codes;
  p.scales = static_cast<uint8_t*>(common.scales);
  p.scale = common.scale;
  p.limits = common.limits;
  p.rotation = common.rotation;
  p.halves = common.halves;
  p.first = first_multiplier(a.rotation.size);
  p.next_waits = a.next_waits;
  const auto whole = find_kernels(a.format)->rotated_whole[a.rotation.signs != nullptr];
  const bool wholes = whole && a.rotation.size == 128 && a.format.block_columns == kUnit &&
                      reinterpret_cast<uintptr_t>(a.scales) % 4 == 0;
  RotatedShape shape = rotated_shape(a.rotation.size, a.format.scale == Scale::kE8M0);
  if (wholes) shape = {WholeTile::kUnits, kWholeWarps, kWholeBlocks, kWholeRounds};
  const int64_t of_block = 32 * shape.units * shape.warps;
  const int64_t blocks = (p.units + of_block - 1) / of_block;
  const int64_t at_once = int64_t(multiprocessors()) * shape.blocks;
  // Tensors of a few blocks spread over all multiprocessors instead.
  p.rounds = int(std::min<int64_t>(shape.rounds, std::max<int64_t>(1, blocks / at_once)));
  // Half of the device is left to the launch that starts beside this one.
  if (a.next_waits && !wholes) p.rounds = shape.rounds;
  const int64_t grid = (blocks + p.rounds - 1) / p.rounds;
  if (wholes) return launch(whole, grid, 32 * shape.warps, stream, p);
  launch_scaled(p.scale, kernel, std::max<int64_t>(grid, a.tensor_scale_out ? 1 : 0),
                32 * shape.warps, stream, RotatedParams(p));
}

void launch_flat(const QuantizeArgs& a, int partial_count, Stream stream) {
  QuantizeParams p = common_params(a, partial_count);
  p.units = a.view.count() / kUnit;
  if (const RotatedKernel kernel = find_rotated(a)) return launch_rotated(kernel, a, p, stream);
  const Task task = a.out             ? Task::kFakeQuantize
                    : a.rotation.size ? Task::kRotateQuantize
                                      : Task::kQuantize;
  // An empty tensor has a tensor scale all the same.
  const int64_t blocks = p.units || !a.tensor_scale_out ? blocks_for(p.units) : 1;
  const QuantizeKernels* k = find_kernels(a.format);
  launch_scaled(p.scale,
                a.stochastic ? k->stochastic[int(a.dtype)] : k->flat[int(a.dtype)][int(task)],
                blocks, kThreads, stream, p);
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
  const int64_t at_once = 32 / p.block_rows;
  const int64_t threads = p.block_rows == 1
                              ? p.rows * p.units_per_row
                              : (p.strips + at_once - 1) / at_once * p.units_per_row * 32;
  p.units_per_row = p.units_per_row ? p.units_per_row : 1;
  const int64_t blocks = threads || !a.tensor_scale_out ? blocks_for(threads) : 1;
  launch_scaled(p.scale, find_kernels(f)->rows[a.stochastic], blocks, kThreads, stream, p);
}

void launch_square(const QuantizeArgs& a, int partial_count, Stream stream) {
  const QuantizeParams common = common_params(a, partial_count);
  SquareParams p;
  p.x = a.x;
  p.rows = a.matrix_rows;
  p.columns = a.view.columns;
  p.row_tiles = uint32_t((p.rows + kSquareRows - 1) / kSquareRows);
  p.column_tiles = uint32_t((p.columns / kUnit + kSquareUnits - 1) / kSquareUnits);
  p.codes = a.codes;
  p.scales = a.scales;
  p.scale = common.scale;
  p.limits = common.limits;
  p.halves = common.halves;
  p.block_rows = int(a.format.block_rows);
  p.strips = (p.rows + p.block_rows - 1) / p.block_rows;
  p.tiles = a.view.rows() / p.rows * p.row_tiles * p.column_tiles;
  // Blocks that stay work out the recipe's constants once.
  const int64_t stay = int64_t(kSquareBlocks) * multiprocessors();
  const bool once = a.format.scale == Scale::kE4M3 && p.tiles > stay;
  launch_scaled(p.scale, find_kernels(a.format)->square[int(a.dtype)], once ? stay : p.tiles,
                kThreads, stream, p);
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
    case Path::kSquare:
      return launch_square(a, partial_count, stream);
    case Path::kWide:
      return quantize_wide(a, stream);
    default:
      return quantize_any(a, partial_count, stream);
  }
}

namespace {

// Scales that `product_scale` finds.
bool by_products(const QuantizeArgs& a) {
  return a.format.scale == Scale::kE4M3 && a.recipe != Recipe::kTorchao &&
         a.format.block_columns == 16;
}

Way dual_way(const QuantizeArgs& a, DualRows rows) {
  if (!a.rotation.size) {
    if (a.stochastic) return Way::kStochastic;
    return by_products(a) && find_kernels(a.format)->dual[int(a.dtype)][int(Way::kTwoLevel)]
               ? Way::kTwoLevel
               : Way::kPlain;
  }
  if (a.stochastic) return Way::kTurnedStochastic;
  return rows == DualRows::kPlain ? Way::kTurned : Way::kRotated;
}

}  // namespace

bool dual_serves(const QuantizeArgs& a, DualRows rows) {
  const FormatSpec& f = a.format;
  const int64_t block = f.block_columns, unit = block > kUnit ? block : kUnit;
  const bool blocks = f.block_rows == 1 && power_of_two(block) && block >= 16 &&
                      block <= (a.dtype == DType::kFP32 ? 64 : 128);
  const bool rotation = !a.rotation.size || (a.rotation.size <= kUnit && block <= kUnit);
  const bool rounding = !a.stochastic || (!a.out && (!a.rotation.size || rows != DualRows::kAlike));
  const QuantizeKernels* k = find_kernels(f);
  if (!k || !blocks || !rotation || !rounding) return false;
  const Way way = dual_way(a, rows);
  const bool turned = way == Way::kTurned || way == Way::kTurnedStochastic;
  const bool scales = !turned || f.scale == Scale::kE8M0 || by_products(a);
  return scales && k->dual[int(a.dtype)][int(way)] && a.view.columns % unit == 0 &&
         a.matrix_rows % unit == 0 && a.view.count() && a.view.flat() && aligned16(a.x);
}

namespace {

DualParams dual_params(const QuantizeArgs& a, int partial_count) {
  const QuantizeParams common = common_params(a, partial_count);
  DualParams p;
  p.x = a.x;
  p.rows = a.matrix_rows;
  p.columns = a.view.columns;
  const int tile = tile_columns(a.dtype);
  p.row_tiles = uint32_t((p.rows + kTileRows - 1) / kTileRows);
  p.column_tiles = uint32_t((p.columns + tile - 1) / tile);
  p.codes = a.codes;
  p.scales = a.scales;
  p.scale = p.scale_t = common.scale;
  p.limits = common.limits;
  p.rotation = common.rotation;
  p.first = a.rotation.size ? first_multiplier(a.rotation.size) : 0;
  p.halves = common.halves;
  p.lanes = common.lanes;
  p.lane_shift = common.lane_shift;
  p.keys = common.keys;
  return p;
}

int64_t tiles_of(const QuantizeArgs& a, const DualParams& p) {
  return a.view.rows() / p.rows * p.row_tiles * p.column_tiles;
}

}  // namespace

void quantize_dual(const QuantizeArgs& a, const Across& across, DualRows rows, Stream stream) {
  // Rotated columns have a largest number of their own; rows as they are have theirs from the same
  // read.
  const bool turned = a.rotation.size && across.partials, plain = rows == DualRows::kPlain;
  DualParams p = dual_params(a, turned && (plain || !a.codes) ? 0 : start_amax(a, stream));
  p.codes_t = across.codes;
  p.scales_t = across.scales;
  p.scale_t.tensor_scale_out = across.tensor_scale_out;
  if (turned) {
    AmaxArgs amax;
    amax.x = a.x;
    amax.dtype = a.dtype;
    amax.view = a.view;
    amax.matrix_rows = a.matrix_rows;
    amax.partials = across.partials;
    amax.rotation = a.rotation;
    amax.rows_partials = plain ? a.partials : nullptr;
    p.scale_t.partials = across.partials;
    p.scale_t.partial_count = amax_partials_across(amax, stream);
    if (plain) {
      p.scale.partials = a.partials;
      p.scale.partial_count = p.scale_t.partial_count;
    }
    if (!a.codes) p.scale = p.scale_t;
  }
  const auto& kernels = find_kernels(a.format)->dual[int(a.dtype)];
  launch_scaled(p.scale, kernels[int(dual_way(a, rows))], tiles_of(a, p), kThreads, stream, p);
}

void fake_quantize_across(const QuantizeArgs& a, Stream stream) {
  const DualParams p = dual_params(a, start_amax(a, stream));
  launch_scaled(p.scale, find_kernels(a.format)->fake_across[int(a.dtype)], tiles_of(a, p),
                kThreads, stream, p, a.out);
}

}  // namespace cuda
}  // namespace pyfmt
