// SPDX-License-Identifier: Apache-2.0
// Codes and scales to values: a thread expands a unit of 32 elements.
#include "generic.h"
#include "overlap.cuh"
#include "quantize.cuh"

namespace pyfmt {
namespace cuda {

namespace {

struct DequantizeParams {
  const uint8_t* codes = nullptr;
  const void* scales = nullptr;
  const float* tensor_scale = nullptr;
  void* out = nullptr;
  int64_t units = 0;
  Scale kind = Scale::kE8M0;
  int halves = 1, lane_shift = 0;
};

template <class E, DType kOut>
__global__ void __launch_bounds__(kThreads)
    dequantize_flat(const __grid_constant__ DequantizeParams p) {
  constexpr int kWords = E::spec.bits();  // of a unit
  constexpr int kOutBytes = dtype_bytes(kOut) * kUnit;
  __shared__ uint4 shared[Stage<kOutBytes>::kShared];
  take_turn();
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  uint32_t codes[kWords];
  float scale[2] = {0.0f, 0.0f};
  if (unit < p.units) {
    if constexpr (kWords % 4 == 0) {
      const uint4* in = reinterpret_cast<const uint4*>(p.codes) + unit * (kWords / 4);
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 w = in[i];
        codes[4 * i] = w.x;
        codes[4 * i + 1] = w.y;
        codes[4 * i + 2] = w.z;
        codes[4 * i + 3] = w.w;
      }
    } else {
      const uint2* in = reinterpret_cast<const uint2*>(p.codes) + unit * (kWords / 2);
#pragma unroll
      for (int i = 0; i < kWords / 2; ++i) {
        const uint2 w = in[i];
        codes[2 * i] = w.x;
        codes[2 * i + 1] = w.y;
      }
    }
    uint32_t s[2];
    if (p.halves == 2) {
      s[0] = load_scale(p.scales, p.kind, 2 * unit);
      s[1] = load_scale(p.scales, p.kind, 2 * unit + 1);
    } else {
      s[0] = s[1] = load_scale(p.scales, p.kind, unit >> p.lane_shift);
    }
    scale[0] = as_float(codec::decode_scale<uint32_t>(p.kind, s[0]));
    scale[1] = p.halves == 2 ? as_float(codec::decode_scale<uint32_t>(p.kind, s[1])) : scale[0];
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) codes[i] = 0;
  }
  const float tensor_scale = p.tensor_scale ? *p.tensor_scale : 1.0f;
  uint32_t words[kOutBytes / 4];
  decode_unit<E, kOut>(codes, scale, p.tensor_scale != nullptr, tensor_scale, words);
  Stage<kOutBytes>::store(static_cast<uint8_t*>(p.out), unit, p.units, words, shared);
}

struct Kernels {
  ElementSpec element;
  void (*by_dtype[3])(DequantizeParams);
};

template <class E>
Kernels kernels() {
  return {E::spec,
          {dequantize_flat<E, DType::kBF16>, dequantize_flat<E, DType::kFP16>,
           dequantize_flat<E, DType::kFP32>}};
}

const Kernels* find_kernels(const ElementSpec& e) {
#define PYFMT_ELEMENT(id, name, kind, exp, man, bias, frac, is_signed, special) \
  kernels<id##_element>(),
  static const Kernels kTable[] = {
#include "../formats.inc"
  };
  for (const Kernels& k : kTable) {
    if (k.element == e) return &k;
  }
  return nullptr;
}

}  // namespace

void dequantize(const DequantizeArgs& a, Stream stream) {
  const FormatSpec& f = a.format;
  const int64_t block = f.block_columns;
  const Kernels* k = find_kernels(f.element);
  const bool fast = k && f.block_rows == 1 && block >= 16 && (block & (block - 1)) == 0 &&
                    a.view.flat() && a.view.columns % block == 0 && a.view.count() % kUnit == 0 &&
                    aligned16(a.codes) && aligned16(a.out) &&
                    (reinterpret_cast<uintptr_t>(a.scales) & 3) == 0;
  if (!fast) return dequantize_any(a, stream);
  DequantizeParams p;
  p.codes = a.codes;
  p.scales = a.scales;
  p.tensor_scale = a.tensor_scale;
  p.out = a.out;
  p.units = a.view.count() / kUnit;
  p.kind = f.scale;
  p.halves = block == 16 ? 2 : 1;
  while (int64_t(kUnit) << p.lane_shift < block) ++p.lane_shift;
  launch_ahead(k->by_dtype[int(a.dtype)], blocks_for(p.units), kThreads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
