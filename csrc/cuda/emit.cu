// SPDX-License-Identifier: Apache-2.0
// Activations for the dense GEMMs: rotate, quantize, and write what the tensor cores take, without
// packing codes and unpacking them again.
#include "fold.cuh"
#include "quantize.cuh"
#include "rotate.cuh"

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

template <class E, bool kPow2>
PYFMT_DEVICE void encode16(const float* v, const BlockScale& b, const EmitParams& p,
                           uint32_t* codes) {
  using C = Coder<E>;
  if constexpr (C::kE2M1) {
    if (kPow2 && p.scale.covers && b.code - 79u <= 96u) {
      const float multiplier = as_float(C::kEven + ((127u - b.code) << 23));
      C::encode_covered([&](int i) { return v[i]; }, multiplier, codes);
      return;
    }
    const auto saturated = [&](int i) { return min_magnitude(v[i] * b.multiplier, 6.0f); };
    C::encode_covered(saturated, as_float(C::kEven), codes);
  } else {
    C::encode([&](int i) { return v[i]; }, b.multiplier, p.limits, codes);
  }
#pragma unroll
  for (int i = 0; i < C::kWords; ++i) codes[i] = b.poisoned ? 0u : codes[i];
}

// A unit of x to codes; returns its scale.
template <class E>
PYFMT_DEVICE uint32_t encode_unit(const EmitParams& p, int64_t row, int64_t unit, uint32_t* codes) {
  float v[kUnit];
  load_rotated(p, row * p.units + unit, unit < p.units && row < p.to.rows, v);
  const BlockScale b = block_scale<true>(p.scale, {}, L::max(amax16(v), amax16(v + 16)));
  encode16<E, true>(v, b, p, codes);
  encode16<E, true>(v + 16, b, p, codes + Coder<E>::kWords);
  return b.code;
}

// A row by a block of threads; kUnits: of a thread.
template <class E, bool kE5M2, int kUnits>
__global__ void __launch_bounds__(kThreads) fold_values_rows(const __grid_constant__ EmitParams p) {
  __shared__ uint4 shared[Stage<32>::kShared];
  __shared__ uint32_t of_warp[kWarps];
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
__global__ void __launch_bounds__(kThreads)
    round_values_flat(const __grid_constant__ EmitParams p) {
  __shared__ uint4 shared[Stage<64>::kShared];
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  float v[kUnit];
  load_rotated(p, unit, unit < p.units, v);
  codec::RecipeConstants r{};
  if constexpr (!kPow2) {
    r = start_recipe(p.scale);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      *p.tensor_scale_out = as_float(r.tensor_scale) * (p.factor ? *p.factor : 1.0f);
    }
  }
  uint32_t amax[2] = {amax16(v), amax16(v + 16)};
  if (p.halves == 1) amax[0] = amax[1] = L::max(amax[0], amax[1]);
  for (int far = 1; far < p.lanes; far *= 2) {
    amax[0] = amax[1] = L::max(amax[0], __shfl_xor_sync(kAll, amax[0], far));
  }
  uint32_t words[kUnit / 2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const BlockScale b = block_scale<kPow2>(p.scale, r, amax[h]);
    uint32_t codes[Coder<E>::kWords];
    encode16<E, kPow2>(v + 16 * h, b, p, codes);
    const float s = as_float(kPow2 ? codec::e8m0_decode<uint32_t>(b.code)
                                   : codec::decode_scale<uint32_t>(p.scale.kind, b.code));
    float d[16];
    Coder<E>::decode(codes, d);
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      words[8 * h + i / 2] = to_halves<DType::kBF16>(d[i] * s, d[i + 1] * s);
    }
  }
  Stage<64>::store(static_cast<uint8_t*>(p.out), unit, p.units, words, shared);
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

void fold_values(const QuantizeArgs& a, const Folded& to, Stream stream) {
  EmitParams p = common_params(a);
  p.units = a.view.columns / kUnit;
  p.to = to;
  const int place = p.units <= kThreads ? 0 : p.units <= 2 * kThreads ? 1 : 2;
  launch(find_fold(a.format, to.e5m2)->by_units[place], to.padded_rows, kThreads, stream, p);
}

bool round_values_serves(const QuantizeArgs& a) {
  const int64_t block = a.format.block_columns;
  const bool power = block >= 16 && block <= 1024 && (block & (block - 1)) == 0;
  return whole_units(a) && power && a.view.columns % block == 0 && find_round(a.format);
}

void round_values(const QuantizeArgs& a, const float* factor, Stream stream) {
  EmitParams p = common_params(a);
  p.units = a.view.count() / kUnit;
  p.out = a.out;
  p.factor = factor;
  p.tensor_scale_out = a.tensor_scale_out;
  p.halves = a.format.block_columns == 16 ? 2 : 1;
  while (kUnit * p.lanes < a.format.block_columns) p.lanes *= 2;
  if (a.format.scale == Scale::kE4M3 && a.recipe != Recipe::kSingleLevel && !a.tensor_scale) {
    AmaxArgs amax;
    amax.x = a.x;
    amax.dtype = a.dtype;
    amax.view = a.view;
    amax.partials = a.partials;
    amax.rotation = a.rotation;
    p.scale.partial_count = amax_partials(amax, stream);
    p.scale.partials = a.partials;
  }
  launch_after(p.scale.partials && launches_overlap(), find_round(a.format), blocks_for(p.units),
               kThreads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
