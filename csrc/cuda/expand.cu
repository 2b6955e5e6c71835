// SPDX-License-Identifier: Apache-2.0
// Packed codes to folded rows.
#include "fold_rows.cuh"
#include "fold_scan.cuh"

namespace pyfmt {
namespace cuda {

namespace {

// Where a block of threads keeps its table.
PYFMT_DEVICE uint32_t fold_table() {
#if defined(__CUDA_ARCH__)
  __shared__ __align__(16) uint8_t table[kFoldTable];
  return uint32_t(__cvta_generic_to_shared(table));
#else
  return hopper::shared_start();
#endif
}

template <class E, bool kE5M2, int kUnits, bool kBlock, bool kAgain>
PYFMT_DEVICE void fold_or_scan(const FoldCodesArgs& p, int64_t blocks, const FoldScanArgs& scan) {
  __shared__ uint4 shared[Stage<32>::kShared];
  __shared__ uint32_t of_warp[kWarps];
  allow_next_launch();
  if (blockIdx.x >= blocks) {
    scan_block(scan, blockIdx.x - blocks);
    return;
  }
  fold_codes_row<E, kE5M2, kUnits, kBlock, kAgain, true>(p, blockIdx.x, shared, of_warp,
                                                         fold_table());
}

template <class E, bool kE5M2, int kUnits, bool kBlock>
__global__ void __launch_bounds__(kThreads)
    fold_codes_rows(const __grid_constant__ FoldCodesArgs p, int64_t blocks,
                    const __grid_constant__ FoldScanArgs scan) {
  fold_or_scan<E, kE5M2, kUnits, kBlock, false>(p, blocks, scan);
}

// Rows that are read twice. Left alone, the compiler settles for 48 registers, and spills.
template <class E, bool kE5M2>
__global__ void __launch_bounds__(kThreads, 4)
    fold_long_rows(const __grid_constant__ FoldCodesArgs p, int64_t blocks,
                   const __grid_constant__ FoldScanArgs scan) {
  fold_or_scan<E, kE5M2, 4, true, true>(p, blocks, scan);
}

// Activations and weights at once: the activations are E5M2 where that holds the element.
template <class E, bool kE5M2, int kUnits, bool kBlock, bool kAgain>
__global__ void __launch_bounds__(kThreads, kUnits == 2 ? 4 : 3)
    fold_two_rows(const __grid_constant__ FoldCodesArgs a, const __grid_constant__ FoldCodesArgs w,
                  int64_t a_blocks, bool beside) {
  __shared__ uint4 shared[Stage<32>::kShared];
  __shared__ uint32_t of_warp[kWarps];
  const Mixed b = beside ? Mixed::last(blockIdx.x, a_blocks, gridDim.x)
                         : Mixed(blockIdx.x, a_blocks, gridDim.x);
  if (b.is_first) {
    if (beside) wait_for_earlier_launch();
    fold_codes_row<E, kE5M2, kUnits, kBlock, kAgain, false>(a, b.index, shared, of_warp,
                                                            fold_table());
  } else {
    fold_codes_row<E, false, kUnits, kBlock, kAgain, false>(w, b.index, shared, of_warp,
                                                            fold_table());
  }
}

struct FoldKernels {
  ElementSpec element;
  bool e5m2;
  int low, high;
  uint32_t (*mask)(int word);
  void (*one[4])(FoldCodesArgs, int64_t, FoldScanArgs);  // by units_kind
  void (*two[4])(FoldCodesArgs, FoldCodesArgs, int64_t, bool);
};

template <class E, bool kE5M2>
FoldKernels fold_kernels() {
  using F = Fold<E, kE5M2>;
  return {E::spec,
          kE5M2,
          F::kLow,
          F::kHigh,
          [](int word) { return F::magnitude_mask(word); },
          {fold_codes_rows<E, kE5M2, 2, false>, fold_codes_rows<E, kE5M2, 8, false>,
           fold_codes_rows<E, kE5M2, 2, true>, fold_long_rows<E, kE5M2>},
          {fold_two_rows<E, kE5M2, 2, false, false>, fold_two_rows<E, kE5M2, 8, false, false>,
           fold_two_rows<E, kE5M2, 2, true, false>, fold_two_rows<E, kE5M2, 4, true, true>}};
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

FoldScanArgs fold_scan_args(const FoldCodesArgs& a) {
  const FoldKernels& k = *find_fold(a.format, false);
  FoldScanArgs s;
  s.codes = a.codes;
  s.scales = a.scales;
  s.to = a.to;
  s.bits = a.format.bits();
  s.low = k.low;
  s.high = k.high;
  s.lanes = scan_lanes(s);
  for (int i = 0; i < s.bits; ++i) s.masks[i] = k.mask(i);
  return s;
}

void fold_codes(const FoldCodesArgs& a, Stream stream, const FoldScanArgs& scan) {
  const FoldKernels& k = *find_fold(a.format, a.to.e5m2);
  const int kind = units_kind(a.to);
  const int64_t blocks = blocks_of(a.to, kind);
  launch(k.one[kind], blocks + scan_blocks(scan), kThreads, stream, a, blocks, scan);
}

void fold_two(const FoldCodesArgs& a, const FoldCodesArgs& w, Stream stream, bool beside) {
  const FoldKernels& k = *find_fold(a.format, a.to.e5m2);
  const int kind = units_kind(w.to);
  const int64_t a_blocks = blocks_of(a.to, kind);
  launch_after(beside && launches_overlap(), k.two[kind], a_blocks + blocks_of(w.to, kind),
               kThreads, stream, a, w, a_blocks, beside);
}

}  // namespace cuda
}  // namespace pyfmt
