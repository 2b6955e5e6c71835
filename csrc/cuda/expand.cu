// SPDX-License-Identifier: Apache-2.0
// Packed codes to folded rows: a block of threads keeps a row's codes in registers between the
// range of its exponents and the fp8 numbers.
#include "fold.cuh"

namespace pyfmt {
namespace cuda {

namespace {

template <class E, bool kE5M2, int kUnits>
__global__ void __launch_bounds__(kThreads)
    fold_codes_rows(const __grid_constant__ FoldCodesArgs p) {
  constexpr int kBits = E::spec.bits();  // words of a unit
  __shared__ uint4 shared[Stage<32>::kShared];
  __shared__ uint32_t of_warp[kWarps];
  const int64_t row = blockIdx.x, units = p.to.columns / kUnit;
  uint32_t codes[kUnits][kBits], scale[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int64_t unit = int64_t(u) * blockDim.x + threadIdx.x;
    scale[u] = 0;
#pragma unroll
    for (int i = 0; i < kBits; ++i) codes[u][i] = 0;
    if (unit < units && row < p.to.rows) {
      const uint8_t* from = p.codes + (row * units + unit) * (4 * kBits);
      if constexpr (kBits % 4 == 0) {
        const uint4 w = *reinterpret_cast<const uint4*>(from);
        codes[u][0] = w.x;
        codes[u][1] = w.y;
        codes[u][2] = w.z;
        codes[u][3] = w.w;
      } else {
#pragma unroll
        for (int i = 0; i < kBits; i += 2) {
          const uint2 w = reinterpret_cast<const uint2*>(from)[i / 2];
          codes[u][i] = w.x;
          codes[u][i + 1] = w.y;
        }
      }
      scale[u] = p.scales[row * units + unit];
    }
  }
  store_folded<E, kE5M2, kUnits>(p.to, codes, scale, shared, of_warp);
}

struct FoldKernels {
  ElementSpec element;
  bool e5m2;
  void (*by_units[3])(FoldCodesArgs);  // 1, 2, 4
};

template <class E, bool kE5M2>
FoldKernels fold_kernels() {
  return {
      E::spec,
      kE5M2,
      {fold_codes_rows<E, kE5M2, 1>, fold_codes_rows<E, kE5M2, 2>, fold_codes_rows<E, kE5M2, 4>}};
}

const FoldKernels* find_fold(const FormatSpec& f, bool e5m2) {
  static const FoldKernels kTable[] = {
      fold_kernels<e2m1_element, false>(),   fold_kernels<e2m1_element, true>(),
      fold_kernels<int4q2_element, false>(), fold_kernels<int4q2_element, true>(),
      fold_kernels<e3m2_element, false>(),   fold_kernels<e3m2_element, true>(),
      fold_kernels<e2m3_element, false>(),
  };
  if (f.block_rows != 1 || f.block_columns != kUnit || f.scale != Scale::kE8M0) return nullptr;
  for (const FoldKernels& k : kTable) {
    if (k.element == f.element && k.e5m2 == e5m2) return &k;
  }
  return nullptr;
}

}  // namespace

bool folds(const FormatSpec& f, bool e5m2) {
  return find_fold(f, e5m2) != nullptr;
}

void fold_codes(const FoldCodesArgs& a, Stream stream) {
  const RowLaunch l(a.to.columns);
  check(cudaMemsetAsync(a.to.listed, 0, sizeof(int32_t), static_cast<cudaStream_t>(stream)),
        "memset");
  launch(find_fold(a.format, a.to.e5m2)->by_units[l.units / 2], a.to.padded_rows, l.threads, stream,
         a);
}

}  // namespace cuda
}  // namespace pyfmt
