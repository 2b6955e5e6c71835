// SPDX-License-Identifier: Apache-2.0
// Codes and scales to values: a thread expands a unit of 32 elements.
#include <type_traits>

#include "generic.h"
#include "quantize.cuh"

namespace pyfmt {
namespace cuda {

namespace {

struct DequantizeParams {
  const void* codes = nullptr;
  const void* scales = nullptr;
  const float* tensor_scale = nullptr;
  void* out = nullptr;
  Scale kind = Scale::kE8M0;
  int64_t chunks = 0;  // of 16 bytes of the result
  int chunk_shift = 0, ahead = 0;
  // dequantize_units alone.
  int64_t units = 0;
  int halves = 1, lane_shift = 0;
};

template <class E, DType kOut>
__global__ void __launch_bounds__(kThreads)
    dequantize_units(const __grid_constant__ DequantizeParams p) {
  constexpr int kWords = E::spec.bits();  // of a unit
  constexpr int kOutBytes = dtype_bytes(kOut) * kUnit;
  __shared__ uint4 shared[Stage<kOutBytes>::kShared];
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  uint32_t codes[kWords];
  float scale[2] = {0.0f, 0.0f};
  if (unit < p.units) {
    if constexpr (kWords % 4 == 0) {
      const uint4* in = static_cast<const uint4*>(p.codes) + unit * (kWords / 4);
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 w = in[i];
        codes[4 * i] = w.x;
        codes[4 * i + 1] = w.y;
        codes[4 * i + 2] = w.z;
        codes[4 * i + 3] = w.w;
      }
    } else {
      const uint2* in = static_cast<const uint2*>(p.codes) + unit * (kWords / 2);
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

// The same in chunks of 16 bytes of the result, which neighbouring threads write side by side from
// registers: for elements whose chunks start at whole bytes of two or more.
template <class E, DType kOut>
struct Chunk {
  static constexpr int kElements = 16 / dtype_bytes(kOut);
  static constexpr int kBytes = kElements * E::spec.bits() / 8;
  static constexpr bool kServes = kBytes == 2 || kBytes == 4 || kBytes == 8;
  static constexpr int kCount = 2;  // of a thread
};
constexpr int kChunkThreads = 512, kChunkBlocks = 4;  // all that a multiprocessor holds

// Blocks of threads fetch the codes of the block that comes `ahead` blocks later to the L2 cache:
// whole stretches of reads take less of the memory's time for writing than scattered ones.
template <class E, DType kOut, Scale kScale>
__global__ void __launch_bounds__(kChunkThreads, kChunkBlocks)
    dequantize_chunks(const __grid_constant__ DequantizeParams p) {
  using C = Chunk<E, kOut>;
  using Codes = std::conditional_t<C::kBytes == 8, uint2,
                                   std::conditional_t<C::kBytes == 4, uint32_t, uint16_t>>;
  const int lane = threadIdx.x & 31;
  const int64_t warp = int64_t(blockIdx.x) * (kChunkThreads / 32) + (threadIdx.x >> 5);
  const int64_t first = warp * (32 * C::kCount) + lane;
  Codes codes[C::kCount];
  uint32_t scales[C::kCount];
#pragma unroll
  for (int i = 0; i < C::kCount; ++i) {
    codes[i] = Codes{};
    if (first + 32 * i < p.chunks) {
      codes[i] = load_once(static_cast<const Codes*>(p.codes) + first + 32 * i);
    }
  }
#pragma unroll
  for (int i = 0; i < C::kCount; ++i) {
    const bool live = first + 32 * i < p.chunks;
    scales[i] = live ? load_scale(p.scales, kScale, (first + 32 * i) >> p.chunk_shift) : 0;
  }
  constexpr int kOfBlock = kChunkThreads * C::kCount;
  const int64_t next = (int64_t(blockIdx.x) + p.ahead) * kOfBlock;
  if (threadIdx.x == 0 && next + kOfBlock <= p.chunks) {
    fetch_to_l2(static_cast<const char*>(p.codes) + next * C::kBytes, kOfBlock * C::kBytes);
  }
  const float tensor_scale = p.tensor_scale ? *p.tensor_scale : 1.0f;
#pragma unroll
  for (int i = 0; i < C::kCount; ++i) {
    uint32_t packed[4] = {};
    if constexpr (C::kBytes == 8) {
      packed[0] = codes[i].x;
      packed[1] = codes[i].y;
    } else {
      packed[0] = codes[i];
    }
    float v[16];  // the first are the chunk's
    Coder<E>::decode(packed, v);
    float scale;
    if constexpr (kScale == Scale::kE4M3) {
      float unused;
      from_e4m3(scales[i], &scale, &unused);
    } else {
      scale = as_float(codec::decode_scale<uint32_t>(kScale, scales[i]));
    }
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < C::kElements; ++j) {
      v[j] = v[j] * scale;
      // No other scales go with a tensor scale; 1 changes nothing.
      if constexpr (kScale == Scale::kE4M3) v[j] = v[j] * tensor_scale;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (kOut == DType::kFP32) {
        words[j] = canonical(v[j]);
      } else {
        words[j] = to_halves<kOut>(v[2 * j], v[2 * j + 1]);
      }
    }
    if (first + 32 * i < p.chunks) {
      store_once(static_cast<uint4*>(p.out) + first + 32 * i,
                 make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

struct Kernels {
  using Kernel = void (*)(DequantizeParams);
  ElementSpec element;
  struct {
    Kernel by_scale[5];
    int chunks;  // of a thread; 0: a unit
  } by_dtype[3];
};

template <class E, DType kOut>
void fill(Kernels* k) {
  auto& to = k->by_dtype[int(kOut)];
  if constexpr (Chunk<E, kOut>::kServes) {
#define PYFMT_SCALE(id, name, bits) \
  to.by_scale[int(Scale::id)] = dequantize_chunks<E, kOut, Scale::id>;
#include "../formats.inc"
    to.chunks = Chunk<E, kOut>::kCount;
  } else {
#define PYFMT_SCALE(id, name, bits) to.by_scale[int(Scale::id)] = dequantize_units<E, kOut>;
#include "../formats.inc"
    to.chunks = 0;
  }
}

template <class E>
Kernels kernels() {
  Kernels k{E::spec, {}};
  fill<E, DType::kBF16>(&k);
  fill<E, DType::kFP16>(&k);
  fill<E, DType::kFP32>(&k);
  return k;
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
  p.kind = f.scale;
  const auto& found = k->by_dtype[int(a.dtype)];
  const Kernels::Kernel kernel = found.by_scale[int(f.scale)];
  if (found.chunks) {
    const int elements = 16 / dtype_bytes(a.dtype);
    p.chunks = a.view.count() / elements;
    while (int64_t(elements) << p.chunk_shift < block) ++p.chunk_shift;
    p.ahead = multiprocessors() * kChunkBlocks;
    const int64_t of_block = int64_t(kChunkThreads) * found.chunks;
    return launch(kernel, (p.chunks + of_block - 1) / of_block, kChunkThreads, stream, p);
  }
  p.units = a.view.count() / kUnit;
  p.halves = block == 16 ? 2 : 1;
  while (int64_t(kUnit) << p.lane_shift < block) ++p.lane_shift;
  launch(kernel, blocks_for(p.units), kThreads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
