// SPDX-License-Identifier: Apache-2.0
// Rows of packed codes to folded rows.
#pragma once

#include "fold_weights.cuh"

namespace pyfmt {
namespace cuda {

// Of shared memory: fp8 numbers by code and exponent (FoldWeights).
constexpr int kFoldTable = 512;

// Codes of a unit and its scale; zeros beyond the row.
template <class E>
PYFMT_DEVICE uint32_t load_codes(const FoldCodesArgs& p, int64_t row, int64_t unit, int64_t units,
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

// A warp or a block of threads keeps a row in registers; kUnits: a thread's. With kAgain they are
// the first of more, and the row is read a second time. table: shared memory, kFoldTable bytes.
// kPanel: there may be one to write to.
template <class E, bool kE5M2, int kUnits, bool kBlock, bool kAgain, bool kPanel>
PYFMT_DEVICE void fold_codes_row(const FoldCodesArgs& p, int64_t block, uint4* shared,
                                 uint32_t* of_warp, uint32_t table) {
  using F = Fold<E, kE5M2>;
  using Decoded = FoldWeights<E, false, kE5M2, kE5M2>;
  constexpr int kStep = kBlock ? kThreads : 32;
  const int first = threadIdx.x & (kStep - 1);
  const int64_t row = kBlock ? block : block * kWarps + (threadIdx.x >> 5);
  const int64_t units = p.to.columns / kUnit;
  uint32_t codes[kUnits][E::spec.bits()], scale[kUnits], range = 0;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    scale[u] = load_codes<E>(p, row, kStep * u + first, units, codes[u]);
  }
  if constexpr (Decoded::kLookup) {
    Decoded::fill_table(table, int(threadIdx.x));
    __syncthreads();
  }
  if (row >= p.to.padded_rows) return;
  bool poisoned = false;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    range = max_halves(range, F::range(codes[u], scale[u]));
    poisoned = poisoned || scale[u] == 255u;
  }
  if constexpr (kAgain) {
    for (int64_t next = kStep * kUnits; next < units; next += kStep) {
      uint32_t more[E::spec.bits()];
      const uint32_t s = load_codes<E>(p, row, next + first, units, more);
      range = max_halves(range, F::range(more, s));
      poisoned = poisoned || s == 255u;
    }
  }
  const Base<F> base(range_of_row<kBlock>(range, of_warp));
  if (first == 0) store_base(p.to, row, base);

  // Within the window, without NaN: few instructions. Blocks of zeros may have any scale.
  const bool usual = base.fits && !__any_sync(kAll, poisoned);
  const int offset = -(base.exponent + 127) - F::kLow;
  const auto store = [&](int64_t unit, const uint32_t* of_unit, uint32_t s) {
    uint32_t words[8];
    const int place = max(0, min(int(s) + offset, Decoded::kExponents - 1));
    Decoded::decode_block(of_unit, uint32_t(place), table, words);
    if constexpr (kPanel) {
      store_folded(p.to, row, unit, words, shared);
    } else {
      Stage<32>::store(p.to.fp8 + row * p.to.columns, unit, units, words, shared);
    }
  };
  int64_t next = 0;
  if (usual) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (kStep * u < units) store(kStep * u + first, codes[u], scale[u]);
    }
    if constexpr (!kAgain) return;
    next = kStep * kUnits;
  }
#pragma unroll 1
  for (; next < units; next += kStep) {
    uint32_t again[E::spec.bits()];
    const uint32_t s = load_codes<E>(p, row, next + first, units, again);
    if (usual) {
      store(next + first, again, s);
    } else {
      store_unit<E, kE5M2>(p.to, row, next + first, base, again, s, shared);
    }
  }
}

// Which of the kernels for few to many units, and its blocks of threads. Few rows are shared by
// more threads each.
inline int units_kind(const Folded& to) {
  const int64_t units = to.columns / kUnit;
  return units <= 64                              ? 0
         : units <= 256 && to.padded_rows >= 2048 ? 1
         : units <= 2 * kThreads                  ? 2
                                                  : 3;
}
inline int64_t blocks_of(const Folded& to, int kind) {
  return kind < 2 ? (to.padded_rows + kWarps - 1) / kWarps : to.padded_rows;
}

// Two kinds of blocks spread evenly among each other: `first` of `all` are of the first kind.
struct Mixed {
  bool is_first;
  int64_t index;  // among its kind

  PYFMT_DEVICE Mixed(int64_t block, int64_t first, int64_t all) {
    const int64_t before = block * first / all;
    is_first = (block + 1) * first / all != before;
    index = is_first ? before : block - before;
  }
  // Those of the first kind after all others.
  PYFMT_DEVICE static Mixed last(int64_t block, int64_t first, int64_t all) {
    Mixed m(block, 0, all);
    m.is_first = block >= all - first;
    if (m.is_first) m.index = block - (all - first);
    return m;
  }
};

}  // namespace cuda
}  // namespace pyfmt
