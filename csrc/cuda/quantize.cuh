// SPDX-License-Identifier: Apache-2.0
// The quantize kernels of the named elements: a thread takes a unit of 32 neighbouring elements,
// finds the block scale (with the lanes that share its block) and writes the packed codes.
//
// quantize_flat: rows end to end in whole units; 16-byte accesses, no index arithmetic. The hot
// one. quantize_rows: ragged, strided, unaligned rows, square blocks, stochastic rounding.
#pragma once

#include "dual.cuh"

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

  // quantize_rows alone.
  DType dtype = DType::kFP32;
  int64_t rows = 0, columns = 0, row_stride = 0, row_bytes = 0;
  int64_t blocks = 0, units_per_row = 0;
  int block_rows = 1;  // 1, 16 or 32
  int64_t matrix_rows = 1, matrix_strips = 1, strips = 0;
  bool aligned = false;
  uint64_t seed = 0;
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
  // A factor that is a power of two can wait for the scale: it rounds nothing but what is next to
  // zero in the block.
  constexpr bool kByExponent = C::kE2M1 && kPow2 && kTask == Task::kRotateQuantize;
  float left = 1.0f;
  if constexpr (kTask == Task::kRotateQuantize) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = raw.get(i);
    butterflies(v, p.rotation, unit * kUnit);
    if (kByExponent && p.rotation.power_of_two) {
      left = p.rotation.factor;
    } else {
      multiply(v, p.rotation.factor);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) m = max_abs_nan(m, v[16 * h + i]);
      amax[h] = as_uint(m * left);
    }
  } else {
    amax[0] = raw.amax16(0);
    amax[1] = raw.amax16(1);
  }
  BlockScale b[2];
  unit_scales<kPow2>(p, r, amax, 1, p.lanes, b);

  uint32_t codes[2 * C::kWords];
  bool by_exponent = false;
  if constexpr (kByExponent) {
    // Both scales within 2^-48 to 2^48, so that all below is exact; poisoned blocks are not.
    by_exponent = p.scale.covers && b[0].code - 79u <= 96u && b[1].code - 79u <= 96u;
    if (by_exponent) {
      const int e = -int(as_uint(left) >> 23);  // 127 less: the byte's bias
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        C::encode_at([&](int i) { return v[16 * h + i]; }, int(b[h].code) + e,
                     codes + h * C::kWords);
      }
    } else {
      multiply(v, left);
    }
  }
  if (!by_exponent) {
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
    if (!live) return;
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

// codec's stochastic codes with the float to integer conversions, a sixteenth of the adder's rate,
// replaced by additions rounded down.
template <class E>
PYFMT_DEVICE uint32_t stochastic_code(float y, uint32_t random24, const Limits& limits) {
  constexpr ElementSpec spec = E::spec;
  const uint32_t bits = as_uint(y), sign = bits & 0x80000000u;
  float t;
  uint32_t below = 0;
  if constexpr (spec.is_int()) {
    const float limit = sign ? -limits.low : limits.high;
    t = as_float(L::min(bits & 0x7fffffffu, as_uint(limit))) *
        as_float(power_of_two_bits(spec.frac));
  } else {
    constexpr codec::FloatCodec c(spec);
    const uint32_t magnitude = L::min(bits & 0x7fffffffu, c.max_bits);
    const uint32_t exponent = L::max(magnitude & kFloatInf, c.emin_bits);
    t = as_float(magnitude) * as_float(((254u + uint32_t(c.man)) << 23) - exponent);
    below = (exponent - c.emin_bits) >> c.shift;
  }
  // Whatever is not zero stays above it: only random24 = 0 can tell such values apart.
  if (bits << 1) t = as_float(L::max(as_uint(t), power_of_two_bits(-60)));
  const float sum = add_down(t, 8388608.0f);
  const float rest = (t - (sum - 8388608.0f)) * 16777216.0f;
  const uint32_t up = L::to_float(random24) < rest ? 1u : 0u;
  const uint32_t n = as_uint(sum) - as_uint(8388608.0f) + up + below;
  if constexpr (spec.is_int()) {
    constexpr uint32_t mask = (1u << spec.bits()) - 1;
    return (sign ? 0u - n : n) & mask;
  } else {
    return n | sign >> (32 - spec.bits());
  }
}

// The four random words of a counter: element 4 * counter + i has word i.
PYFMT_DEVICE void random_words(uint64_t seed, uint64_t counter, uint32_t (&w)[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  w[0] = uint32_t(counter);
  w[1] = uint32_t(counter >> 32);
  w[2] = w[3] = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(w[0]) * 0xd2511f53u, b = uint64_t(w[2]) * 0xcd9e8d57u;
    w[0] = uint32_t(b >> 32) ^ w[1] ^ k0;
    w[1] = uint32_t(b);
    w[2] = uint32_t(a >> 32) ^ w[3] ^ k1;
    w[3] = uint32_t(a);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

// Numbers of sixteen consecutive elements, 24 bits each; `index` of the first.
PYFMT_DEVICE void random_sixteen(uint64_t seed, uint64_t index, uint32_t (&r)[16]) {
  if (index % 4 == 0) {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      uint32_t w[4];
      random_words(seed, index / 4 + uint64_t(g), w);
#pragma unroll
      for (int i = 0; i < 4; ++i) r[4 * g + i] = w[i] >> 8;
    }
  } else {
#pragma unroll 1
    for (int g = 0; g < 5; ++g) {
      uint32_t w[4];
      random_words(seed, index / 4 + uint64_t(g), w);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t lane = uint32_t(index + uint64_t(i)) & 3;
        const uint32_t word = lane & 2 ? (lane & 1 ? w[3] : w[2]) : (lane & 1 ? w[1] : w[0]);
        if ((index + uint64_t(i)) / 4 == index / 4 + uint64_t(g)) r[i] = word >> 8;
      }
    }
  }
}

// Random words of many elements in flight would take all registers: hence at least two blocks an
// SM.
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
  // Whole rotations lie within a row, and zeros beyond it stay zero.
  if (p.rotation.size) rotate(v, p.rotation, column);
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

  uint32_t codes[2 * C::kWords];
  if constexpr (kStochastic) {
    const uint64_t index = uint64_t(row * p.columns + column);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t random[16];
      random_sixteen(p.seed, index + uint64_t(16 * h), random);
      C::pack(
          [&](int i) {
            return stochastic_code<E>(v[16 * h + i] * b[h].multiplier, random[i], p.limits);
          },
          codes + h * C::kWords);
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

// What the elements' source files offer; null where a pair is not compiled.
struct QuantizeKernels {
  using Kernel = void (*)(QuantizeParams);
  Kernel flat[3][3];               // by dtype and task
  Kernel rows[2];                  // nearest, stochastic
  void (*dual[3][2])(DualParams);  // by dtype, without and with a rotation
};

template <class E, bool kPow2, DType kIn>
void fill_flat(QuantizeKernels* k) {
  k->flat[int(kIn)][int(Task::kQuantize)] = quantize_flat<E, kPow2, kIn, Task::kQuantize>;
  k->flat[int(kIn)][int(Task::kRotateQuantize)] =
      quantize_flat<E, kPow2, kIn, Task::kRotateQuantize>;
  k->flat[int(kIn)][int(Task::kFakeQuantize)] = quantize_flat<E, kPow2, kIn, Task::kFakeQuantize>;
  k->dual[int(kIn)][0] = quantize_dual<E, kPow2, kIn, false>;
  k->dual[int(kIn)][1] = quantize_dual<E, kPow2, kIn, true>;
}

template <class E, bool kPow2>
QuantizeKernels quantize_kernels() {
  QuantizeKernels k{};
  fill_flat<E, kPow2, DType::kBF16>(&k);
  fill_flat<E, kPow2, DType::kFP16>(&k);
  fill_flat<E, kPow2, DType::kFP32>(&k);
  k.rows[0] = quantize_rows<E, kPow2, false>;
  k.rows[1] = quantize_rows<E, kPow2, true>;
  return k;
}

}  // namespace cuda
}  // namespace pyfmt
