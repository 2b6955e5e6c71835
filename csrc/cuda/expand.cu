// SPDX-License-Identifier: Apache-2.0
// Packed codes to folded rows: a warp keeps a row's codes in registers between the range of its
// exponents and the fp8 numbers; only rows beyond 512 units are read twice.
#include "fold.cuh"

namespace pyfmt {
namespace cuda {

namespace {

// Codes of a unit and its scale; zeros beyond the row.
template <class E>
PYFMT_DEVICE uint32_t load_unit(const FoldCodesArgs& p, int64_t row, int64_t unit, int64_t units,
                                uint32_t* codes) {
  constexpr int kBits = E::spec.bits();  // words of a unit
#pragma unroll
  for (int i = 0; i < kBits; ++i) codes[i] = 0;
  if (unit >= units || row >= p.to.rows) return 0;
  const uint8_t* from = p.codes + (row * units + unit) * (4 * kBits);
  if constexpr (kBits % 4 == 0) {
    const uint4 w = load_once(reinterpret_cast<const uint4*>(from));
    codes[0] = w.x;
    codes[1] = w.y;
    codes[2] = w.z;
    codes[3] = w.w;
  } else {
#pragma unroll
    for (int i = 0; i < kBits; i += 2) {
      const uint2 w = reinterpret_cast<const uint2*>(from)[i / 2];
      codes[i] = w.x;
      codes[i + 1] = w.y;
    }
  }
  return p.scales[row * units + unit];
}

// kUnits: a lane's; with kAgain they are the first of more, and the row is read a second time.
template <class E, bool kE5M2, int kUnits, bool kAgain>
__global__ void __launch_bounds__(kThreads)
    fold_codes_rows(const __grid_constant__ FoldCodesArgs p) {
  using F = Fold<E, kE5M2>;
  __shared__ uint4 shared[Stage<32>::kShared];
  const int lane = threadIdx.x & 31;
  const int64_t row = int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  const int64_t units = p.to.columns / kUnit;
  if (row >= p.to.padded_rows) return;
  uint32_t codes[kUnits][E::spec.bits()], scale[kUnits], range = 0;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    scale[u] = load_unit<E>(p, row, 32 * u + lane, units, codes[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) range = max_halves(range, F::range(codes[u], scale[u]));
  if constexpr (kAgain) {
    for (int64_t first = 32 * kUnits; first < units; first += 32) {
      uint32_t more[E::spec.bits()];
      const uint32_t s = load_unit<E>(p, row, first + lane, units, more);
      range = max_halves(range, F::range(more, s));
    }
  }
  const Base<F> base(range_of_row<false>(range, nullptr));
  if (lane == 0) store_base(p.to, row, base);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (32 * u < units) {
      store_unit<E, kE5M2>(p.to, row, 32 * u + lane, base, codes[u], scale[u], shared);
    }
  }
  if constexpr (kAgain) {
    for (int64_t first = 32 * kUnits; first < units; first += 32) {
      uint32_t more[E::spec.bits()];
      const uint32_t s = load_unit<E>(p, row, first + lane, units, more);
      store_unit<E, kE5M2>(p.to, row, first + lane, base, more, s, shared);
    }
  }
}

using FoldKernel = void (*)(FoldCodesArgs);

struct FoldKernels {
  ElementSpec element;
  bool e5m2;
  FoldKernel two, eight, sixteen, more;  // by units of a lane
};

template <class E, bool kE5M2>
FoldKernels fold_kernels() {
  return {E::spec,
          kE5M2,
          fold_codes_rows<E, kE5M2, 2, false>,
          fold_codes_rows<E, kE5M2, 8, false>,
          fold_codes_rows<E, kE5M2, 16, false>,
          fold_codes_rows<E, kE5M2, 16, true>};
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
  check(cudaMemsetAsync(a.to.listed, 0, sizeof(int32_t), static_cast<cudaStream_t>(stream)),
        "memset");
  const FoldKernels& k = *find_fold(a.format, a.to.e5m2);
  const int64_t units = a.to.columns / kUnit, blocks = (a.to.padded_rows + kWarps - 1) / kWarps;
  const FoldKernel kernel = units <= 64    ? k.two
                            : units <= 256 ? k.eight
                            : units <= 512 ? k.sixteen
                                           : k.more;
  launch(kernel, blocks, kThreads, stream, a);
}

}  // namespace cuda
}  // namespace pyfmt
