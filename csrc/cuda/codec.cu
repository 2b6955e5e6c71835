// SPDX-License-Identifier: Apache-2.0
// Element codes one by one, for tests that walk through every number: what quantize does to a value
// once its scale is known.
#include "../parse.h"
#include "quantize_rotated.cuh"

namespace pyfmt {
namespace cuda {

namespace {

struct EncodeParams {
  const void* x = nullptr;
  uint8_t* codes = nullptr;
  int64_t count = 0;
  uint32_t scale = 127;
  uint32_t rotated = 0;  // first_multiplier of a rotation
  Limits limits;
};

template <class E, DType kIn>
__global__ void __launch_bounds__(kThreads)
    encode_elements(const __grid_constant__ EncodeParams p) {
  using C = Coder<E>;
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 16;
  if (first >= p.count) return;
  float v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = load_element(p.x, kIn, first + i < p.count ? first + i : 0);
  uint32_t words[C::kWords];
  const float m = as_float(codec::e8m0_encode_multiplier<uint32_t>(p.scale));
  const auto get = [&](int i) { return v[i]; };
  if constexpr (C::kE2M1) {
    if (p.rotated) {
      C::encode_covered(get, as_float(p.rotated - (p.scale << 23)), words);
    } else {
      C::encode(get, m, p.limits, words);
    }
  } else {
    C::encode(get, m, p.limits, words);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int bit = i * C::kBits;
    uint64_t word = words[bit / 32];
    if (bit / 32 + 1 < C::kWords) word |= uint64_t(words[bit / 32 + 1]) << 32;
    if (first + i < p.count) {
      p.codes[first + i] = uint8_t(word >> (bit % 32)) & uint8_t((1 << C::kBits) - 1);
    }
  }
}

template <class E>
bool launch_for(const EncodeArgs& a, Stream stream) {
  if (!(E::spec == a.element)) return false;
  EncodeParams p;
  p.x = a.x;
  p.codes = a.codes;
  p.count = a.count;
  p.scale = a.scale;
  if (a.rotation) p.rotated = first_multiplier(a.rotation);
  p.limits = limits(a.element, a.full);
  const int64_t blocks = blocks_for((a.count + 15) / 16);
  switch (a.dtype) {
    case DType::kBF16:
      launch(encode_elements<E, DType::kBF16>, blocks, kThreads, stream, p);
      break;
    case DType::kFP16:
      launch(encode_elements<E, DType::kFP16>, blocks, kThreads, stream, p);
      break;
    default:
      launch(encode_elements<E, DType::kFP32>, blocks, kThreads, stream, p);
  }
  return true;
}

}  // namespace

void encode(const EncodeArgs& a, Stream stream) {
#define PYFMT_ELEMENT(id, name, kind, exp, man, bias, frac, is_signed, special) \
  if (launch_for<id##_element>(a, stream)) return;
#include "../formats.inc"
  throw Error("element: expected one of a named format");
}

}  // namespace cuda
}  // namespace pyfmt
