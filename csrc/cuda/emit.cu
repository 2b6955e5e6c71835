// SPDX-License-Identifier: Apache-2.0
// Activations for the dense GEMMs: rotate, quantize, and write what the tensor cores take, without
// packing codes and unpacking them again.
#include "emit.cuh"
#include "fold_scan.cuh"
#include "quantize.cuh"
#include "rotate.cuh"
#include "warp.cuh"

namespace pyfmt {
namespace cuda {

namespace {

struct EmitParams {
  const void* x = nullptr;
  int64_t units = 0;
  ScaleParams scale;
  Limits limits;
  RotationParams rotation;
  Folded to;            // fold_values
  FoldScanArgs scan;    // by the blocks after them
  void* out = nullptr;  // round_values
  const float* factor = nullptr;
  float* tensor_scale_out = nullptr;
  int halves = 1, lanes = 1;
};

PYFMT_DEVICE void load_rotated(const EmitParams& p, int64_t unit, bool live, float (&v)[kUnit]) {
  Raw<DType::kBF16> raw;
  if (live) {
    raw.load(static_cast<const char*>(p.x) + unit * (2 * kUnit));
  } else {
    raw.clear();
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) v[i] = raw.get(i);
  if (p.rotation.size) rotate(v, p.rotation, unit * kUnit);
}

PYFMT_DEVICE uint32_t amax16(const float* v) {
  float m = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) m = max_abs_nan(m, v[i]);
  return as_uint(m);
}

// A unit of x to codes; returns its scale.
template <class E>
PYFMT_DEVICE uint32_t encode_unit(const EmitParams& p, int64_t row, int64_t unit, uint32_t* codes) {
  float v[kUnit];
  load_rotated(p, row * p.units + unit, unit < p.units && row < p.to.rows, v);
  const BlockScale b = block_scale<true>(p.scale, {}, L::max(amax16(v), amax16(v + 16)));
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    encode16<E, true>([&](int i) { return v[16 * h + i]; }, b, p.scale, p.limits,
                      codes + h * Coder<E>::kWords);
  }
  return b.code;
}

// A row by a block of threads; kUnits: of a thread.
template <class E, bool kE5M2, int kUnits>
__global__ void __launch_bounds__(kThreads) fold_values_rows(const __grid_constant__ EmitParams p) {
  __shared__ uint4 shared[Stage<32>::kShared];
  __shared__ uint32_t of_warp[kWarps];
  allow_next_launch();
  if (blockIdx.x >= p.to.padded_rows) {
    scan_block(p.scan, blockIdx.x - p.to.padded_rows);
    return;
  }
  const int64_t row = blockIdx.x;
  uint32_t codes[kUnits][E::spec.bits()], scale[kUnits], range = 0;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (u * kThreads < p.units) {
      scale[u] = encode_unit<E>(p, row, u * kThreads + threadIdx.x, codes[u]);
      range = max_halves(range, Fold<E, kE5M2>::range(codes[u], scale[u]));
    }
  }
  const Base<Fold<E, kE5M2>> base(range_of_row<true>(range, of_warp));
  if (threadIdx.x == 0) store_base(p.to, row, base);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (u * kThreads < p.units) {
      store_unit<E, kE5M2>(p.to, row, u * kThreads + threadIdx.x, base, codes[u], scale[u], shared);
    }
  }
}

template <class E, bool kPow2>
PYFMT_DEVICE void round_unit(const EmitParams& p, const codec::RecipeConstants& r,
                             const float (&v)[kUnit], uint32_t* words,
                             Multipliers known = {nullptr}) {
  uint32_t amax[2] = {amax16(v), amax16(v + 16)};
  if (p.halves == 1) amax[0] = amax[1] = L::max(amax[0], amax[1]);
  for (int far = 1; far < p.lanes; far *= 2) {
    amax[0] = amax[1] = L::max(amax[0], __shfl_xor_sync(kAll, amax[0], far));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const BlockScale b = block_scale<kPow2>(p.scale, r, amax[h], known);
    round_values<E, kPow2>(v + 16 * h, b, scale_value<kPow2>(b.code), p.scale, p.limits,
                           words + 8 * h);
  }
}

PYFMT_DEVICE void store_tensor_scale(const EmitParams& p, const codec::RecipeConstants& r) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *p.tensor_scale_out = as_float(r.tensor_scale) * (p.factor ? *p.factor : 1.0f);
  }
}

// A warp's next tile arrives in shared memory while it rounds the one before.
// As many blocks of threads fit as with a few registers more.
template <class E, bool kPow2>
__global__ void __launch_bounds__(kThreads) __maxnreg__(kPow2 ? 64 : 72)
    round_values_flat(const __grid_constant__ EmitParams p) {
  using T = Tile<1, false>;
  __shared__ uint4 shared[Stage<64>::kShared];
  __shared__ __align__(256) uint8_t tiles[kWarps * T::kBytes];
  allow_next_launch();
  wait_for_earlier_launch();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const SharedAddress buffer = shared_address(tiles) + warp * T::kBytes;
  const SharedAddress to = buffer + T::copy_place(lane), from = buffer + T::read_place(lane);
  const auto fetch = [&](int64_t first) {
    T::fetch(to, static_cast<const uint8_t*>(p.x) + first * 64 + lane * 16, p.units - first, lane);
  };
  const int64_t step = int64_t(gridDim.x) * kThreads;
  int64_t first = int64_t(blockIdx.x) * kThreads + warp * 32;
  if (first < p.units) fetch(first);
  codec::RecipeConstants r{};
  Multipliers known{nullptr};
  if constexpr (!kPow2) {
    __shared__ float multipliers[128];
    known.of = multipliers;
    r = start_recipe(p.scale);
    store_tensor_scale(p, r);
    known.fill(p.scale, r);
    __syncthreads();
  }
#pragma unroll 1
  for (; first < p.units; first += step) {
    float v[kUnit];
    uint32_t words[kUnit / 2];
    wait_copies();
    __syncwarp();
    T::read(from, words);
    __syncwarp();
    if (first + step < p.units) fetch(first + step);
    // Lanes beyond the end hold whatever there was, and store nothing.
#pragma unroll
    for (int j = 0; j < kUnit; ++j) v[j] = half_at<DType::kBF16>(words[j / 2], j & 1);
    if (p.rotation.size) rotate(v, p.rotation, (first + lane) * kUnit);
    round_unit<E, kPow2>(p, r, v, words, known);
    Stage<64>::store(static_cast<uint8_t*>(p.out), first + lane, p.units, words, shared);
  }
}

// For few rows: one cluster of blocks holds all units, one a thread, and finds the tensor's largest
// number itself.
constexpr int kOnceThreads = 512, kOnceBlocks = 8;

PYFMT_DEVICE uint32_t largest_of_warp(uint32_t largest) {
  for (int far = 16; far; far /= 2) largest = L::max(largest, lane_xor(largest, far));
  return largest;
}

template <class E>
__global__ void __launch_bounds__(kOnceThreads)
    round_values_once(const __grid_constant__ EmitParams p) {
  float* const of_block = reinterpret_cast<float*>(dynamic_shared());
  uint32_t* const of_warp = reinterpret_cast<uint32_t*>(of_block + 1);
  allow_next_launch();
  wait_for_earlier_launch();
  const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  float v[kUnit];
  load_rotated(p, unit, unit < p.units, v);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const uint32_t size = as_uint(v[i]) & 0x7fffffffu;
    largest = L::max(largest, size < kFloatInf ? size : 0u);
  }
  const int lane = threadIdx.x & 31;
  largest = largest_of_warp(largest);
  if (lane == 0) of_warp[threadIdx.x >> 5] = largest;
  block_barrier();
  largest = largest_of_warp(lane < int(blockDim.x) / 32 ? of_warp[lane] : 0u);
  if (threadIdx.x == 0) *of_block = as_float(largest);
  cluster_barrier();
  largest = largest_of_warp(lane < int(gridDim.x) ? as_uint(from_block(of_block, lane)) : 0u);
  const codec::RecipeConstants r = recipe_constants(p.scale, as_float(largest));
  store_tensor_scale(p, r);
  uint32_t words[kUnit / 2];
  round_unit<E, false>(p, r, v, words);
  if (unit < p.units) {
    uint4* const out = static_cast<uint4*>(p.out) + unit * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  }
  // Nobody leaves while another reads what it holds.
  cluster_barrier();
}

struct FoldKernels {
  ElementSpec element;
  bool e5m2;
  void (*by_units[3])(EmitParams);  // 1, 2, 4 of a thread
};

template <class E, bool kE5M2>
FoldKernels fold_kernels() {
  return {E::spec,
          kE5M2,
          {fold_values_rows<E, kE5M2, 1>, fold_values_rows<E, kE5M2, 2>,
           fold_values_rows<E, kE5M2, 4>}};
}

const FoldKernels* find_fold(const FormatSpec& f, bool e5m2) {
  static const FoldKernels kTable[] = {
      fold_kernels<e2m1_element, false>(),   fold_kernels<e2m1_element, true>(),
      fold_kernels<int4q2_element, false>(), fold_kernels<int4q2_element, true>(),
      fold_kernels<e3m2_element, false>(),   fold_kernels<e3m2_element, true>(),
      fold_kernels<e2m3_element, false>(),
  };
  for (const FoldKernels& k : kTable) {
    if (k.element == f.element && k.e5m2 == e5m2) return &k;
  }
  return nullptr;
}

using RoundKernel = void (*)(EmitParams);

RoundKernel find_round(const FormatSpec& f) {
  const bool pow2 = f.scale == Scale::kE8M0;
  if (!pow2 && f.scale != Scale::kE4M3) return nullptr;
  if (pow2) {
    if (f.element == elements::e2m1) return round_values_flat<e2m1_element, true>;
    if (f.element == elements::e2m3) return round_values_flat<e2m3_element, true>;
    if (f.element == elements::e3m2) return round_values_flat<e3m2_element, true>;
    if (f.element == elements::e4m3fn) return round_values_flat<e4m3fn_element, true>;
    if (f.element == elements::e5m2ieee) return round_values_flat<e5m2ieee_element, true>;
    if (f.element == elements::int8q6) return round_values_flat<int8q6_element, true>;
    if (f.element == elements::int6q4) return round_values_flat<int6q4_element, true>;
    if (f.element == elements::int4q2) return round_values_flat<int4q2_element, true>;
  } else {
    if (f.element == elements::e2m1) return round_values_flat<e2m1_element, false>;
    if (f.element == elements::int4) return round_values_flat<int4_element, false>;
  }
  return nullptr;
}

bool whole_units(const QuantizeArgs& a) {
  return a.dtype == DType::kBF16 && a.format.block_rows == 1 && !a.stochastic && a.view.flat() &&
         a.view.columns % kUnit == 0 && a.view.count() > 0 && aligned16(a.x);
}

RoundKernel find_round_once(const FormatSpec& f) {
  return f.element == elements::e2m1 ? round_values_once<e2m1_element>
                                     : round_values_once<int4_element>;
}

EmitParams common_params(const QuantizeArgs& a) {
  EmitParams p;
  p.x = a.x;
  p.scale = scale_params(a);
  p.scale.tensor_scale_out = nullptr;
  p.limits = limits(a.format.element, a.full);
  p.rotation = rotation_params(a.rotation);
  return p;
}

}  // namespace

bool fold_values_serves(const QuantizeArgs& a) {
  return whole_units(a) && a.view.columns <= kLongestFold;
}

void fold_values(const QuantizeArgs& a, const Folded& to, Stream stream, const FoldScanArgs& scan) {
  EmitParams p = common_params(a);
  p.units = a.view.columns / kUnit;
  p.to = to;
  p.scan = scan;
  const int place = p.units <= kThreads ? 0 : p.units <= 2 * kThreads ? 1 : 2;
  launch(find_fold(a.format, to.e5m2)->by_units[place], to.padded_rows + scan_blocks(scan),
         kThreads, stream, p);
}

bool round_values_serves(const QuantizeArgs& a) {
  const int64_t block = a.format.block_columns;
  const bool power = block >= 16 && block <= 1024 && (block & (block - 1)) == 0;
  return whole_units(a) && power && a.view.columns % block == 0 && find_round(a.format);
}

void round_values(const QuantizeArgs& a, const float* factor, Stream stream) {
  if (round_few_serves(a, 0)) return round_few(a, factor, 0, stream);
  EmitParams p = common_params(a);
  p.units = a.view.count() / kUnit;
  p.out = a.out;
  p.factor = factor;
  p.tensor_scale_out = a.tensor_scale_out;
  p.halves = a.format.block_columns == 16 ? 2 : 1;
  while (kUnit * p.lanes < a.format.block_columns) p.lanes *= 2;
  const bool dynamic = a.format.scale == Scale::kE4M3 && a.recipe != Recipe::kSingleLevel;
  if (dynamic && !a.tensor_scale) {
    if (p.units <= kOnceThreads * kOnceBlocks) {
      int blocks = 1;
      while (blocks * kOnceThreads < p.units) blocks *= 2;
      const int64_t warps = (p.units + 31) / 32;
      ClusterLaunch l;
      l.clusters = 1;
      l.cluster = blocks;
      l.threads = blocks > 1 ? kOnceThreads : int(32 * warps);
      l.shared = 4 * (1 + kOnceThreads / 32);
      launch_clusters(find_round_once(a.format), l, stream, p);
      return;
    }
    AmaxArgs amax;
    amax.x = a.x;
    amax.dtype = a.dtype;
    amax.view = a.view;
    amax.partials = a.partials;
    amax.rotation = a.rotation;
    p.scale.partial_count = amax_partials(amax, stream);
    p.scale.partials = a.partials;
  }
  // Blocks that stay work out the recipe's constants once; others come as places become free.
  const int64_t all = blocks_for(p.units), stay = 3 * int64_t(multiprocessors());
  const int64_t blocks = a.format.scale == Scale::kE4M3 && all > stay ? stay : all;
  launch_after(launches_overlap(), find_round(a.format), blocks, kThreads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
