// SPDX-License-Identifier: Apache-2.0
// The quantize kernels of the named elements: a thread takes a unit of 32 neighbouring elements,
// finds the block scale (with the lanes that share its block) and writes the packed codes.
//
// quantize_flat: rows end to end in whole units; 16-byte accesses, no index arithmetic. The hot
// one, and quantize_flat_stochastic beside it. quantize_rows: ragged, strided, unaligned rows.
#pragma once

#include "across.cuh"
#include "quantize_rotated_whole.cuh"
#include "square.cuh"

namespace pyfmt {
namespace cuda {

struct QuantizeParams {
  const void* x = nullptr;
  int64_t units = 0;
  uint8_t* codes = nullptr;
  void* scales = nullptr;
  void* out = nullptr;
  ScaleParams scale;
  Limits limits;
  RotationParams rotation;
  int halves = 1;      // blocks in a unit: 2 where they are of 16
  int lanes = 1;       // units in a block
  int lane_shift = 0;  // log2 of that
  RandomKeys keys;     // of stochastic rounding

  // quantize_rows alone.
  DType dtype = DType::kFP32;
  int64_t rows = 0, columns = 0, row_stride = 0, row_bytes = 0;
  int64_t blocks = 0, units_per_row = 0;
  int block_rows = 1;  // 1, 16 or 32
  int64_t matrix_rows = 1, matrix_strips = 1, strips = 0;
  bool aligned = false;
};

enum class Task { kQuantize, kRotateQuantize, kFakeQuantize };

// Decoded values of a unit to words of the output dtype.
template <class E, DType kOut>
PYFMT_DEVICE void decode_unit(const uint32_t* codes, const float (&scale)[2], bool two_level,
                              float tensor_scale, uint32_t* out) {
  using C = Coder<E>;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float v[16];
    C::decode(codes + h * C::kWords, v);
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = v[i] * scale[h];
    if (two_level) {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = v[i] * tensor_scale;
    }
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      if constexpr (kOut == DType::kFP32) {
        out[16 * h + i] = canonical(v[i]);
        out[16 * h + i + 1] = canonical(v[i + 1]);
      } else {
        out[8 * h + i / 2] = to_halves<kOut>(v[i], v[i + 1]);
      }
    }
  }
}

// The scales of a unit from its halves' maxima; lanes that share a block pass `far` as the first
// lane distance and `end` as the one to stop at.
template <bool kPow2>
PYFMT_DEVICE void unit_scales(const QuantizeParams& p, const codec::RecipeConstants& r,
                              uint32_t (&amax)[2], int far, int end, BlockScale (&b)[2]) {
  if (p.halves == 1) amax[0] = L::max(amax[0], amax[1]);
  for (; far < end; far *= 2) {
    amax[0] = L::max(amax[0], __shfl_xor_sync(kAll, amax[0], far));
    if (p.halves == 2) amax[1] = L::max(amax[1], __shfl_xor_sync(kAll, amax[1], far));
  }
  b[0] = block_scale<kPow2>(p.scale, r, amax[0]);
  b[1] = b[0];
  if (p.halves == 2) b[1] = block_scale<kPow2>(p.scale, r, amax[1]);
}

template <bool kPow2>
PYFMT_DEVICE void store_flat_scales(const QuantizeParams& p, int64_t unit,
                                    const BlockScale (&b)[2]) {
  const Scale kind = kPow2 ? Scale::kE8M0 : p.scale.kind;
  if (p.halves == 2) {
    if (kPow2 || kind == Scale::kE4M3) {
      static_cast<uint16_t*>(p.scales)[unit] = uint16_t(b[0].code | b[1].code << 8);
    } else {
      store_scale(p.scales, kind, 2 * unit, b[0].code);
      store_scale(p.scales, kind, 2 * unit + 1, b[1].code);
    }
  } else if ((threadIdx.x & (p.lanes - 1)) == 0) {
    store_scale(p.scales, kind, unit >> p.lane_shift, b[0].code);
  }
}

template <class E, bool kPow2, DType kIn, Task kTask>
__global__ void __launch_bounds__(kThreads)
    quantize_flat(const __grid_constant__ QuantizeParams p) {
  using C = Coder<E>;
  constexpr bool kFake = kTask == Task::kFakeQuantize;
  constexpr int kInBytes = dtype_bytes(kIn) * kUnit;
  constexpr int kOutBytes = kFake ? kInBytes : 4 * E::spec.bits();
  __shared__ uint4 shared[Stage<kOutBytes>::kShared];

  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool live = unit < p.units;
  Raw<kIn> raw;
  if (live) {
    raw.load(static_cast<const char*>(p.x) + unit * kInBytes);
  } else {
    raw.clear();
  }
  codec::RecipeConstants r{};
  if constexpr (!kPow2) r = start_recipe(p.scale);

  float v[kUnit];
  uint32_t amax[2];
  if constexpr (kTask == Task::kRotateQuantize) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = raw.get(i);
    rotate(v, p.rotation, unit * kUnit);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) m = max_abs_nan(m, v[16 * h + i]);
      amax[h] = as_uint(m);
    }
  } else {
    amax[0] = raw.amax16(0);
    amax[1] = raw.amax16(1);
  }
  BlockScale b[2];
  unit_scales<kPow2>(p, r, amax, 1, p.lanes, b);

  uint32_t codes[2 * C::kWords];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if constexpr (kTask == Task::kRotateQuantize) {
      C::encode([&](int i) { return v[16 * h + i]; }, b[h].multiplier, p.limits,
                codes + h * C::kWords);
    } else {
      C::encode([&](int i) { return raw.get(16 * h + i); }, b[h].multiplier, p.limits,
                codes + h * C::kWords);
    }
#pragma unroll
    for (int i = 0; i < C::kWords; ++i) {
      codes[h * C::kWords + i] = b[h].poisoned ? 0u : codes[h * C::kWords + i];
    }
  }

  if constexpr (kFake) {
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scale[h] = as_float(kPow2 ? codec::e8m0_decode<uint32_t>(b[h].code)
                                : codec::decode_scale<uint32_t>(p.scale.kind, b[h].code));
    }
    uint32_t words[kInBytes / 4];
    decode_unit<E, kIn>(codes, scale, !kPow2 && p.scale.kind == Scale::kE4M3,
                        as_float(r.tensor_scale), words);
    Stage<kOutBytes>::store(static_cast<uint8_t*>(p.out), unit, p.units, words, shared);
  } else {
    Stage<kOutBytes>::store(p.codes, unit, p.units, codes, shared);
    if (live) store_flat_scales<kPow2>(p, unit, b);
  }
}

template <class E, bool kPow2, DType kIn>
__global__ void __launch_bounds__(kThreads, kIn == DType::kFP32 ? 3 : 4)
    quantize_flat_stochastic(const __grid_constant__ QuantizeParams p) {
  using C = Coder<E>;
  constexpr int kBytes = 4 * E::spec.bits();
  __shared__ uint4 shared[Stage<kBytes>::kShared];
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  Raw<kIn> raw;
  if (unit < p.units) {
    raw.load(static_cast<const char*>(p.x) + unit * (dtype_bytes(kIn) * kUnit));
  } else {
    raw.clear();
  }
  codec::RecipeConstants r{};
  if constexpr (!kPow2) r = start_recipe(p.scale);
  uint32_t amax[2] = {raw.amax16(0), raw.amax16(1)}, codes[2 * C::kWords] = {};
  BlockScale b[2];
  unit_scales<kPow2>(p, r, amax, 1, p.lanes, b);

  // Half by half in one place: the random words of both at once would take all registers.
  const auto halves = [&](auto within) {
    float multiplier = b[0].multiplier;
#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < C::kWords; ++i) codes[i] = codes[C::kWords + i];
      encode_stochastic<E, decltype(within)::value, true>(
          p.keys, uint64_t(unit * kUnit + 16 * h), [&](int i) { return raw.get(i); }, multiplier,
          p.limits, codes + C::kWords);
      raw.skip16();
      multiplier = b[1].multiplier;
    }
  };
  // Integers' scales may be cut at 2^127, and asking each block would take registers it has not.
  if (kPow2 && !C::kInt && p.scale.covers) {
    halves(std::true_type{});
  } else {
    halves(std::false_type{});
  }
#pragma unroll
  for (int i = 0; i < 2 * C::kWords; ++i) codes[i] = b[i / C::kWords].poisoned ? 0u : codes[i];
  Stage<kBytes>::store(p.codes, unit, p.units, codes, shared);
  if (unit < p.units) store_flat_scales<kPow2>(p, unit, b);
}

// ---- rows -------------------------------------------------------------------------------------

// Up to 32 elements of a row, `have` of them there, zeros beyond.
PYFMT_DEVICE void load_unit(const void* x, DType dtype, int64_t at, int64_t have, bool aligned,
                            float (&v)[kUnit]) {
  if (aligned && have >= kUnit) {
    const char* p = static_cast<const char*>(x) + at * dtype_bytes(dtype);
    if (dtype == DType::kFP32) {
      Raw<DType::kFP32> raw;
      raw.load(p);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = raw.get(i);
    } else {
      Raw<DType::kBF16> raw;
      raw.load(p);
      const bool bf16 = dtype == DType::kBF16;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        v[i] = bf16 ? raw.get(i) : half_at<DType::kFP16>(raw.w[i / 2], i & 1);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = i < have ? load_element(x, dtype, at + i) : 0.0f;
  }
}

template <class E, bool kPow2, bool kStochastic>
__global__ void __launch_bounds__(kThreads, kStochastic ? 2 : 3)
    quantize_rows(const __grid_constant__ QuantizeParams p) {
  using C = Coder<E>;
  const int lane = threadIdx.x & 31;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  codec::RecipeConstants r{};
  if constexpr (!kPow2) r = start_recipe(p.scale);

  // Lanes are neighbouring units of a row, or for square blocks the same unit of 32 rows.
  int64_t row, column_unit, strip;
  bool live;
  if (p.block_rows == 1) {
    row = strip = thread / p.units_per_row;
    column_unit = thread % p.units_per_row;
    live = row < p.rows;
  } else {
    const int64_t warp = thread >> 5;
    strip = warp / p.units_per_row * (32 / p.block_rows) + lane / p.block_rows;
    column_unit = warp % p.units_per_row;
    const int64_t in_matrix = strip % p.matrix_strips * p.block_rows + lane % p.block_rows;
    row = strip / p.matrix_strips * p.matrix_rows + in_matrix;
    live = strip < p.strips && in_matrix < p.matrix_rows;
  }
  const int64_t column = column_unit * kUnit;
  const int64_t have = live && column < p.columns ? p.columns - column : 0;

  float v[kUnit];
  load_unit(p.x, p.dtype, row * p.row_stride + column, have, p.aligned, v);
  if (p.rotation.size) {
    rotate(v, p.rotation, column);
    // Whole rotations lie within a row; the zeros beyond it may have taken signs.
    if (have < kUnit) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = i < have ? v[i] : 0.0f;
    }
  }
  uint32_t amax[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) m = max_abs_nan(m, v[16 * h + i]);
    amax[h] = as_uint(m);
  }
  BlockScale b[2];
  unit_scales<kPow2>(p, r, amax, 1, p.block_rows == 1 ? p.lanes : p.block_rows, b);

  uint32_t codes[2 * C::kWords] = {};
  if constexpr (kStochastic) {
    const uint64_t index = uint64_t(row * p.columns + column);
    // Half by half in one place: the registers of both at once would not do.
    float multiplier = b[0].multiplier;
#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < C::kWords; ++i) codes[i] = codes[C::kWords + i];
      encode_stochastic<E, false, false>(
          p.keys, index + uint64_t(16 * h), [&](int i) { return v[i]; }, multiplier, p.limits,
          codes + C::kWords);
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = v[16 + i];
      multiplier = b[1].multiplier;
    }
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      C::encode([&](int i) { return v[16 * h + i]; }, b[h].multiplier, p.limits,
                codes + h * C::kWords);
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * C::kWords; ++i) codes[i] = b[i / C::kWords].poisoned ? 0u : codes[i];
  if (!live) return;

  if (p.out) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float values[16];
      C::decode(codes + h * C::kWords, values);
      const float scale = as_float(codec::decode_scale<uint32_t>(p.scale.kind, b[h].code));
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float value = values[i] * scale;
        if (p.scale.kind == Scale::kE4M3) value = value * as_float(r.tensor_scale);
        if (16 * h + i < have) {
          store_element(p.out, p.dtype, row * p.columns + column + 16 * h + i, value);
        }
      }
    }
    return;
  }
  uint8_t* const start = p.codes + row * p.row_bytes;
  const int64_t at = column_unit * (4 * E::spec.bits());
  if (p.row_bytes % 16 == 0 && at + 8 * C::kWords <= p.row_bytes && C::kWords % 2 == 0) {
#pragma unroll
    for (int i = 0; i < C::kWords / 2; ++i) {
      reinterpret_cast<uint4*>(start + at)[i] =
          make_uint4(codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3]);
    }
  } else {
    // Blocks are of 16 elements or more, so that rows are whole words.
#pragma unroll
    for (int i = 0; i < 2 * C::kWords; ++i) {
      if (at + 4 * i < p.row_bytes) reinterpret_cast<uint32_t*>(start + at)[i] = codes[i];
    }
  }
  const bool first = p.block_rows == 1 ? lane % p.lanes == 0 : lane % p.block_rows == 0;
  if (!first) return;
  if (p.halves == 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t block = 2 * column_unit + h;
      if (block < p.blocks)
        store_scale(p.scales, p.scale.kind, strip * p.blocks + block, b[h].code);
    }
  } else {
    const int64_t block = column_unit >> p.lane_shift;
    store_scale(p.scales, p.scale.kind, strip * p.blocks + block, b[0].code);
  }
}

// ---- launching --------------------------------------------------------------------------------

// Sizes 16, 32, 64, and 128 with all above; -1 for those below.
inline int rotated_index(int size) {
  return size < 16 ? -1 : size == 16 ? 0 : size == 32 ? 1 : size == 64 ? 2 : 3;
}

// What the elements' source files offer; null where a pair is not compiled.
struct QuantizeKernels {
  using Kernel = void (*)(QuantizeParams);
  Kernel flat[3][3];                   // by dtype and task
  Kernel stochastic[3];                // by dtype
  Kernel rows[2];                      // nearest, stochastic
  void (*dual[3][kWays])(DualParams);  // by dtype and way; from kTwoLevel on of some alone
  void (*fake_across[3])(DualParams, void*);
  void (*square[3])(SquareParams);
  void (*rotated[4])(RotatedParams);      // of bf16, by rotated_index
  void (*rotated_whole[2])(WholeParams);  // without signs, with them
};

template <class E, bool kPow2, DType kIn>
void fill_flat(QuantizeKernels* k) {
  k->flat[int(kIn)][int(Task::kQuantize)] = quantize_flat<E, kPow2, kIn, Task::kQuantize>;
  k->flat[int(kIn)][int(Task::kRotateQuantize)] =
      quantize_flat<E, kPow2, kIn, Task::kRotateQuantize>;
  k->flat[int(kIn)][int(Task::kFakeQuantize)] = quantize_flat<E, kPow2, kIn, Task::kFakeQuantize>;
  k->stochastic[int(kIn)] = quantize_flat_stochastic<E, kPow2, kIn>;
  k->dual[int(kIn)][int(Way::kPlain)] = quantize_dual<E, kPow2, kIn, Way::kPlain>;
  k->dual[int(kIn)][int(Way::kRotated)] = quantize_dual<E, kPow2, kIn, Way::kRotated>;
  k->dual[int(kIn)][int(Way::kStochastic)] = quantize_dual<E, kPow2, kIn, Way::kStochastic>;
  if constexpr (!kPow2 && E::spec.bits() == 4) {
    k->dual[int(kIn)][int(Way::kTwoLevel)] = quantize_dual<E, kPow2, kIn, Way::kTwoLevel>;
  }
  // What gradients are trained with.
  if constexpr (E::spec.bits() == 4 && kIn == DType::kBF16) {
    k->dual[int(kIn)][int(Way::kTurned)] = quantize_dual<E, kPow2, kIn, Way::kTurned>;
    k->dual[int(kIn)][int(Way::kTurnedStochastic)] =
        quantize_dual<E, kPow2, kIn, Way::kTurnedStochastic>;
  }
  k->fake_across[int(kIn)] = fake_quantize_across<E, kPow2, kIn>;
  k->square[int(kIn)] = quantize_square<E, kPow2, kIn>;
}

template <class E, bool kPow2>
QuantizeKernels quantize_kernels() {
  QuantizeKernels k{};
  fill_flat<E, kPow2, DType::kBF16>(&k);
  fill_flat<E, kPow2, DType::kFP16>(&k);
  fill_flat<E, kPow2, DType::kFP32>(&k);
  // Of the elements with other scales, those of 4 bits have formats with scales of a byte.
  if constexpr (kPow2 || E::spec.bits() == 4) {
    k.rotated[0] = quantize_rotated<E, kPow2, 16>;
    k.rotated[1] = quantize_rotated<E, kPow2, 32>;
    k.rotated[2] = quantize_rotated<E, kPow2, 64>;
    k.rotated[3] = quantize_rotated<E, kPow2, 128>;
  }
  if constexpr (kPow2 && Coder<E>::kE2M1) {
    k.rotated_whole[0] = quantize_rotated_whole<E, false>;
    k.rotated_whole[1] = quantize_rotated_whole<E, true>;
  }
  k.rows[0] = quantize_rows<E, kPow2, false>;
  k.rows[1] = quantize_rows<E, kPow2, true>;
  return k;
}

}  // namespace cuda
}  // namespace pyfmt
