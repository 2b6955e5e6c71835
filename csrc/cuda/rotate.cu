// SPDX-License-Identifier: Apache-2.0
// Block Hadamard rotation of rows laid end to end.
#include "rotate.cuh"

namespace pyfmt {
namespace cuda {

namespace {

struct HadamardParams {
  const void* x = nullptr;
  void* out = nullptr;
  int64_t count = 0;
  bool aligned = false;
  RotationParams rotation;
};

template <DType kIn, DType kOut>
__global__ void __launch_bounds__(kThreads)
    hadamard_flat(const __grid_constant__ HadamardParams p) {
  constexpr int kInBytes = dtype_bytes(kIn) * kUnit, kOutBytes = dtype_bytes(kOut) * kUnit;
  __shared__ uint4 shared[Stage<kOutBytes>::kShared];
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t whole = p.count / kUnit;

  float v[kUnit];
  if (unit < whole && p.aligned) {
    Raw<kIn> raw;
    raw.load(static_cast<const char*>(p.x) + unit * kInBytes);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = raw.get(i);
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int64_t at = unit * kUnit + i;
      v[i] = at < p.count ? load_element(p.x, kIn, at) : 0.0f;
    }
  }
  rotate(v, p.rotation, unit * kUnit);

  uint32_t words[kOutBytes / 4];
#pragma unroll
  for (int i = 0; i < kUnit; i += 2) {
    if constexpr (kOut == DType::kFP32) {
      words[i] = canonical(v[i]);
      words[i + 1] = canonical(v[i + 1]);
    } else {
      words[i / 2] = to_halves<kOut>(v[i], v[i + 1]);
    }
  }
  Stage<kOutBytes>::store(static_cast<uint8_t*>(p.out), unit, whole, words, shared);
  if (unit == whole) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int64_t at = unit * kUnit + i;
      if (at < p.count) store_element(p.out, kOut, at, v[i]);
    }
  }
}

}  // namespace

void hadamard(const HadamardArgs& a, Stream stream) {
  HadamardParams p;
  p.x = a.x;
  p.out = a.out;
  p.count = a.count;
  p.aligned = aligned16(a.x);
  p.rotation = rotation_params(a.rotation);
  const int64_t blocks = blocks_for((a.count + kUnit - 1) / kUnit);
  constexpr DType b = DType::kBF16, h = DType::kFP16, f = DType::kFP32;
  if (a.dtype == f) return launch(hadamard_flat<f, f>, blocks, kThreads, stream, p);
  if (a.out_dtype == f) {
    return launch(a.dtype == b ? hadamard_flat<b, f> : hadamard_flat<h, f>, blocks, kThreads,
                  stream, p);
  }
  launch(a.dtype == b ? hadamard_flat<b, b> : hadamard_flat<h, h>, blocks, kThreads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
