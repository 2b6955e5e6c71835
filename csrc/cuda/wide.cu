// SPDX-License-Identifier: Apache-2.0
// Blocks that are whole rows of up to 16384 elements: a block of threads keeps its row in registers
// between the largest magnitude and the codes.
#include "coder.cuh"
#include "scale.cuh"
#include "wide.h"

namespace pyfmt {
namespace cuda {

namespace {

struct WideParams {
  const void* x = nullptr;
  int64_t units = 0;  // of a row
  uint8_t* codes = nullptr;
  void* scales = nullptr;
  ScaleParams scale;
  Limits limits;
};

template <class E, DType kIn, int kUnits>
__global__ void __launch_bounds__(kThreads) quantize_wide(const __grid_constant__ WideParams p) {
  using C = Coder<E>;
  constexpr int kBytes = 4 * E::spec.bits();
  __shared__ uint4 shared[Stage<kBytes>::kShared];
  __shared__ uint32_t of_warp[kWarps];
  const int threads = blockDim.x, lane = threadIdx.x & 31;
  const int64_t row = blockIdx.x;

  Raw<kIn> raw[kUnits];
  uint32_t amax = 0;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int64_t unit = u * threads + threadIdx.x;
    if (unit < p.units) {
      raw[u].load(static_cast<const char*>(p.x) +
                  (row * p.units + unit) * (kUnit * dtype_bytes(kIn)));
    } else {
      raw[u].clear();
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    amax = L::max(amax, L::max(raw[u].amax16(0), raw[u].amax16(1)));
  }
  for (int far = 16; far; far /= 2) amax = L::max(amax, __shfl_xor_sync(kAll, amax, far));
  if (lane == 0) of_warp[threadIdx.x >> 5] = amax;
  __syncthreads();
  for (int i = 0; i < threads / 32; ++i) amax = L::max(amax, of_warp[i]);

  const BlockScale b = block_scale<false>(p.scale, {}, amax);
  if (threadIdx.x == 0) store_scale(p.scales, p.scale.kind, row, b.code);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    uint32_t codes[2 * C::kWords];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      C::encode([&](int i) { return raw[u].get(16 * h + i); }, b.multiplier, p.limits,
                codes + h * C::kWords);
    }
#pragma unroll
    for (int i = 0; i < 2 * C::kWords; ++i) codes[i] = b.poisoned ? 0u : codes[i];
    Stage<kBytes>::store(p.codes + row * p.units * kBytes, u * threads + threadIdx.x, p.units,
                         codes, shared);
  }
}

constexpr int64_t kLongest = 2 * kThreads * kUnit;

template <class E, DType kIn>
void launch_wide(const WideParams& p, int64_t rows, Stream stream) {
  const int64_t threads = p.units < kThreads ? (p.units + 31) / 32 * 32 : kThreads;
  launch(p.units > kThreads ? quantize_wide<E, kIn, 2> : quantize_wide<E, kIn, 1>, rows,
         int(threads), stream, p);
}

template <class E>
void launch_element(const QuantizeArgs& a, const WideParams& p, Stream stream) {
  const int64_t rows = a.view.rows();
  if (a.dtype == DType::kBF16) return launch_wide<E, DType::kBF16>(p, rows, stream);
  if (a.dtype == DType::kFP16) return launch_wide<E, DType::kFP16>(p, rows, stream);
  launch_wide<E, DType::kFP32>(p, rows, stream);
}

}  // namespace

bool wide_serves(const QuantizeArgs& a) {
  const FormatSpec& f = a.format;
  const bool element = f.element == elements::int8 || f.element == elements::int4;
  return element && f.has_float_scales() && f.block_rows == 1 && f.block_columns == 0 && !a.out &&
         !a.stochastic && !a.rotation.size && a.view.flat() && aligned16(a.x) &&
         a.view.count() > 0 && a.view.columns % kUnit == 0 && a.view.columns <= kLongest;
}

void quantize_wide(const QuantizeArgs& a, Stream stream) {
  WideParams p;
  p.x = a.x;
  p.units = a.view.columns / kUnit;
  p.codes = a.codes;
  p.scales = a.scales;
  p.scale = scale_params(a);
  p.limits = limits(a.format.element, a.full);
  if (a.format.element == elements::int8) return launch_element<int8_element>(a, p, stream);
  launch_element<int4_element>(a, p, stream);
}

}  // namespace cuda
}  // namespace pyfmt
