// SPDX-License-Identifier: Apache-2.0
// Both directions of a matrix from one read: a block of threads takes a tile of 128 rows into
// shared memory, quantizes it along its rows and along its columns, and turns the columns' codes
// there, so that all stores are of 64 bytes or more at a stretch.
#pragma once

#include "quantize_rotated.cuh"
#include "stochastic.cuh"
#include "units.cuh"

namespace pyfmt {
namespace cuda {

struct DualParams {
  const void* x = nullptr;
  int64_t rows = 0, columns = 0;  // of one matrix, whole units
  uint32_t row_tiles = 0, column_tiles = 0;
  uint8_t *codes = nullptr, *codes_t = nullptr;  // null: not asked for
  void *scales = nullptr, *scales_t = nullptr;
  ScaleParams scale, scale_t;
  Limits limits;
  RotationParams rotation;  // of at most a unit
  uint32_t first = 0;       // first_multiplier
  int halves = 1;           // blocks in a unit: 2 where they are of 16
  int lanes = 1;            // units in a block: up to 4
  int lane_shift = 0;       // log2 of that
  RandomKeys keys;          // of stochastic rounding
};

// kTwoLevel: as kPlain, for blocks of 16 whose E4M3 scales come by `product_scale`. kTurned: rows
// as they are, columns rotated; kTurnedStochastic: the same, both rounded stochastically; where
// scales are no powers of two, they are those of kTwoLevel.
enum class Way { kPlain, kRotated, kStochastic, kTwoLevel, kTurned, kTurnedStochastic };
constexpr int kWays = 6;

// A tile has 256 bytes a row.
constexpr int kTileRows = 128, kTileBytes = 256, kStrips = kTileRows / kUnit;
constexpr int tile_columns(DType t) {
  return kTileBytes / dtype_bytes(t);
}

// Where a 16-byte chunk of a row lies in the tile: neighbouring units of two rows, and a row's
// neighbouring chunks, meet different groups of banks.
PYFMT_DEVICE int tile_place(int row, int chunk) {
  return row * kTileBytes + (chunk ^ ((chunk >> 3) << 1) ^ (row & 1)) * 16;
}

PYFMT_DEVICE void copy_async(void* shared, const void* global) {
#if defined(__CUDA_ARCH__)
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  memcpy(shared, global, 16);
#endif
}
PYFMT_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Sixteen codes behind those that were there: the first words move out.
template <class E, bool kWithin, int kTotal = 2 * Coder<E>::kWords, class Get>
PYFMT_DEVICE void append_stochastic(const DualParams& p, const Get& get, float multiplier,
                                    int64_t index, uint32_t* codes) {
  constexpr int kWords = Coder<E>::kWords;
#pragma unroll
  for (int i = 0; i < kTotal - kWords; ++i) codes[i] = codes[i + kWords];
  encode_stochastic<E, kWithin, true>(p.keys, uint64_t(index), get, multiplier, p.limits,
                                      codes + kTotal - kWords);
}

template <bool kTwoLevel>
PYFMT_DEVICE void store_unit_scales(const DualParams& p, void* scales, int64_t unit, uint32_t first,
                                    uint32_t second) {
  if constexpr (kTwoLevel) {
    static_cast<uint16_t*>(scales)[unit] = uint16_t(first | second << 8);
    return;
  }
  const Scale kind = p.scale.kind;
  if (p.halves == 1) {
    if ((unit & (p.lanes - 1)) == 0) store_scale(scales, kind, unit >> p.lane_shift, first);
  } else {
    store_scale(scales, kind, 2 * unit, first);
    store_scale(scales, kind, 2 * unit + 1, second);
  }
}

// Blocks an SM: what the registers allow without spills.
template <class E, bool kPow2, DType kIn, Way kWay>
constexpr int dual_blocks =
    kWay == Way::kRotated                                    ? 2
    : kWay == Way::kTurned || kWay == Way::kTurnedStochastic ? 3
    : kWay == Way::kStochastic && kIn == DType::kFP32        ? 3
    : kWay == Way::kStochastic  ? (E::spec.bits() == 4 && kIn == DType::kBF16 ? 3 : 2)
    : kTwoAtOnce<E, kPow2, kIn> ? 5
    : kWay == Way::kTwoLevel || kPow2 || kIn == DType::kFP32 ? 4
                                                             : 3;

template <class E, bool kPow2, DType kIn, Way kWay>
__global__ void __launch_bounds__(kThreads, dual_blocks<E, kPow2, kIn, kWay>)
    quantize_dual(const __grid_constant__ DualParams p) {
  using C = Coder<E>;
  constexpr int kSize = dtype_bytes(kIn), kWords = 2 * C::kWords, kBytes = 4 * kWords;
  constexpr int kColumns = tile_columns(kIn), kUnits = kColumns / kUnit;
  // A column's results in the tile's place, once that is read, with a spare chunk to spread them
  // over the banks; scales behind.
  constexpr int kChunk = kBytes % 16 == 0 ? 16 : 8, kPitch = kStrips * kBytes + kChunk;
  constexpr int kScalesAt = kColumns * kPitch;
  constexpr bool kRotateRows = kWay == Way::kRotated;
  constexpr bool kRotate = kRotateRows || kWay == Way::kTurned || kWay == Way::kTurnedStochastic;
  constexpr bool kStochastic = kWay == Way::kStochastic || kWay == Way::kTurnedStochastic;
  constexpr bool kTwoLevel = kWay == Way::kTwoLevel || (!kPow2 && kRotate && !kRotateRows);
  // Scales that cover their blocks by a rule stay as they are.
  constexpr bool kNeverCut = kWay == Way::kTurnedStochastic && kPow2 && !E::spec.is_int();
  constexpr bool kPairs = kSize == 2 && !kRotate;
  constexpr int kSides = kSize == 2 ? 2 : 1;
  static_assert(kScalesAt + kColumns * kStrips * 8 <= kTileRows * kTileBytes, "results fit");
  __shared__ uint4 tile[kTileRows * kTileBytes / 16];
  __shared__ uint4 staged[kBytes == 16 ? 1 : kThreads * kBytes / 16];
  __shared__ uint32_t of_strip[kStrips * kColumns];
  __shared__ float multipliers[kPow2 ? 1 : 128], multipliers_t[!kPow2 && kRotate ? 128 : 1];
  const Multipliers known{kPow2 ? nullptr : multipliers};
  const Multipliers known_t{kPow2 ? nullptr : kRotate ? multipliers_t : multipliers};
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(tile);
  const auto find_scales = [&](const codec::RecipeConstants& r, const uint32_t (&amax)[2],
                               BlockScale(&b)[2], Multipliers of) {
    if constexpr (kTwoLevel) {
      b[0] = product_scale(r, amax[0], of);
      b[1] = product_scale(r, amax[1], of);
    } else {
      scales_of<kPow2>(p, r, amax, b, of);
    }
  };

  const uint32_t above = blockIdx.x / p.column_tiles;
  const int64_t matrix = above / p.row_tiles;
  const int64_t first_row = int64_t(above % p.row_tiles) * kTileRows;
  const int64_t first_column = int64_t(blockIdx.x % p.column_tiles) * kColumns;
  const int rows = int(p.rows - first_row < kTileRows ? p.rows - first_row : kTileRows);
  const int columns =
      int(p.columns - first_column < kColumns ? p.columns - first_column : kColumns);
  const int64_t start = (matrix * p.rows + first_row) * p.columns + first_column;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

  {
    const int chunk = threadIdx.x % 16;
    const char* from =
        static_cast<const char*>(p.x) + (start + threadIdx.x / 16 * p.columns) * kSize + chunk * 16;
    const int64_t step = kThreads / 16 * p.columns * kSize;
    const bool live = chunk * 16 / kSize < columns;
#pragma unroll
    for (int row = threadIdx.x / 16; row < kTileRows; row += kThreads / 16, from += step) {
      if (live && row < rows) copy_async(bytes + tile_place(row, chunk), from);
    }
  }
  codec::RecipeConstants r{}, r_t{};
  if constexpr (!kPow2) {
    r = r_t = start_recipe(p.scale);
    if (kRotate && p.codes) {
      __syncthreads();
      r_t = start_recipe(p.scale_t);
    } else if (p.scale_t.tensor_scale_out && blockIdx.x == 0 && threadIdx.x == 0) {
      *p.scale_t.tensor_scale_out = as_float(r.tensor_scale);
    }
    known.fill(p.scale, r);
    if (kRotate) known_t.fill(p.scale_t, r_t);
  }
  wait_for_copies();
  __syncthreads();

  if (p.codes) {
#pragma unroll 1
    for (int done = 0; done < kTileRows * kUnits; done += kThreads) {
      const int row = (done + threadIdx.x) / kUnits, unit = threadIdx.x % kUnits;
      Raw<kIn> raw;
#pragma unroll
      for (int i = 0; i < Raw<kIn>::kWords / 4; ++i) {
        const uint4 four = *reinterpret_cast<const uint4*>(
            bytes + tile_place(row, unit * (Raw<kIn>::kWords / 4) + i));
        raw.w[4 * i] = four.x;
        raw.w[4 * i + 1] = four.y;
        raw.w[4 * i + 2] = four.z;
        raw.w[4 * i + 3] = four.w;
      }
      uint32_t amax[2], codes[kWords] = {};
      BlockScale b[2];
      if constexpr (kRotateRows) {
        float v[kUnit];
        uint32_t scales[2];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) v[i] = raw.get(i);
        butterflies(v, p.rotation, first_column + unit * kUnit);
        quantize_rotated_unit<E, kPow2>(p, r, v, codes, scales, known);
        b[0].code = scales[0];
        b[1].code = scales[1];
      } else {
        amax[0] = raw.amax16(0);
        amax[1] = raw.amax16(1);
        for (int far = 1; !kTwoLevel && far < p.lanes; far *= 2) {
          amax[0] = L::max(amax[0], amax[1]);
          amax[0] = L::max(amax[0], __shfl_xor_sync(kAll, amax[0], far));
        }
        find_scales(r, amax, b, known);
        if constexpr (kStochastic) {
          const int64_t index = start + row * p.columns + unit * kUnit;
          const auto halves = [&](auto within) {
            float multiplier = b[0].multiplier;
#pragma unroll 1
            for (int h = 0; h < 2; ++h) {
              append_stochastic<E, decltype(within)::value>(
                  p, [&](int i) { return raw.get(i); }, multiplier, index + 16 * h, codes);
              raw.skip16();
              multiplier = b[1].multiplier;
            }
          };
          if (kNeverCut && p.scale.covers) {
            halves(std::true_type{});
          } else {
            halves(std::false_type{});
          }
        } else if (kPow2 && covered<E>(p.scale, b)) {
          encode_row<E, kPow2, true>(raw, b, p.limits, codes);
        } else {
          encode_row<E, kPow2, false>(raw, b, p.limits, codes);
        }
        clear_poisoned<E>(b, codes);
      }
      const bool live = row < rows && unit * kUnit < columns;
      const int64_t index = (start + row * p.columns) / kUnit + unit;
      if constexpr (kBytes == 16) {
        if (live) {
          reinterpret_cast<uint4*>(p.codes)[index] =
              make_uint4(codes[0], codes[1], codes[2], codes[3]);
        }
      } else {
        const int top = (done + warp * 32) / kUnits;
        store_rows<kBytes, kUnits>(p.codes + (start + top * p.columns) / kUnit * kBytes,
                                   p.columns / kUnit, rows - top, columns / kUnit, codes, staged);
      }
      if (live) store_unit_scales<kTwoLevel>(p, p.scales, index, b[0].code, b[1].code);
    }
  }
  if (!p.codes_t) return;

  // Warps take strips of 32 rows; lanes two columns each: neighbours, or (of rotated columns) 32
  // apart. q: columns in the order of their places in the tile's memory.
  const int strip = warp / 2;
  const auto place_of = [&](int s) {
    return kPairs ? s * 64 + warp % 2 * 32 + lane : (warp % 2 * kSides + s) * 32 + lane;
  };
  const auto column_of = [&](int q) { return kPairs ? q % 64 / 32 * 64 + q % 32 * 2 + q / 64 : q; };
  // The largest of blocks that reach over strips.
  const auto share = [&](uint32_t (&amax)[kSides][2]) {
    if (kTwoLevel || p.lanes == 1) return;
#pragma unroll
    for (int s = 0; s < kSides; ++s) {
      of_strip[strip * kColumns + place_of(s)] = L::max(amax[s][0], amax[s][1]);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSides; ++s) {
      for (int i = 0; i < p.lanes; ++i) {
        const int other = strip - strip % p.lanes + i;
        amax[s][0] = L::max(amax[s][0], of_strip[other * kColumns + place_of(s)]);
      }
    }
  };
  const uint8_t* const top = bytes + strip * kUnit * kTileBytes;
  uint32_t codes[kSides][kWords] = {}, amax[kSides][2];
  BlockScale b[kSides][2];
  if constexpr (kPairs) {
    uint32_t x[kUnit], m[2] = {0, 0};
    const int even = tile_place(0, warp % 2 * 8 + lane / 4) + lane % 4 * 4, odd = even ^ 16;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      x[i] = *reinterpret_cast<const uint32_t*>(top + i * kTileBytes + (i % 2 ? odd : even));
      m[i / 16] = max_abs_halves<kIn>(m[i / 16], x[i]);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) amax[s][h] = as_uint(half_at<kIn>(m[h], s));
    }
    share(amax);
#pragma unroll
    for (int s = 0; s < 2; ++s) find_scales(r_t, amax[s], b[s], known_t);
    if constexpr (kStochastic) {
      const int64_t index = ((matrix * p.columns + first_column + column_of(place_of(0))) * p.rows +
                             first_row + strip * kUnit);
      // A column's half at a time, in one place: the first columns' upper rows, the second's, ...
      uint32_t all[2 * kWords] = {};
#pragma unroll 1
      for (int done = 0; done < 4; ++done) {
        const int s = done & 1, h = done >> 1;
        // From the tile again, rather than kept.
        const uint8_t* const from = top + h * 16 * kTileBytes + 2 * s;
        const auto get = [&](int i) {
          const uint8_t* const place = from + i * kTileBytes + (i % 2 ? odd : even);
          return half_at<kIn>(*reinterpret_cast<const uint16_t*>(place), 0);
        };
        const float m = s ? (h ? b[1][1].multiplier : b[1][0].multiplier)
                          : (h ? b[0][1].multiplier : b[0][0].multiplier);
        append_stochastic<E, false, 4 * C::kWords>(p, get, m, index + s * p.rows + 16 * h, all);
      }
#pragma unroll
      for (int i = 0; i < 4 * C::kWords; ++i) {
        codes[i / C::kWords % 2][i / C::kWords / 2 * C::kWords + i % C::kWords] = all[i];
      }
    } else if (kPow2 && covered<E>(p.scale, b[0]) && covered<E>(p.scale, b[1])) {
      encode_columns<E, kPow2, true, kIn>(x, b, p.limits, codes);
    } else {
      encode_columns<E, kPow2, false, kIn>(x, b, p.limits, codes);
    }
  } else {
#pragma unroll
    for (int s = 0; s < kSides; ++s) {
      const int at = ((warp % 2 * kSides + s) * 32 + lane) * kSize;
      float v[kUnit];
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const uint8_t* place = top + tile_place(i, at / 16) + at % 16;
        if constexpr (kSize == 4) {
          v[i] = *reinterpret_cast<const float*>(place);
        } else {
          v[i] = half_at<kIn>(*reinterpret_cast<const uint16_t*>(place), 0);
        }
      }
      if constexpr (kRotate) butterflies(v, p.rotation, first_row + strip * kUnit);
      if constexpr (kRotate && kStochastic) {
        multiply(v, p.rotation.factor);
        maxima(v, amax[s]);
        find_scales(r_t, amax[s], b[s], known_t);
        const int64_t index =
            (matrix * p.columns + first_column + column_of(place_of(s))) * p.rows + first_row +
            strip * kUnit;
        const auto halves = [&](auto within) {
          float multiplier = b[s][0].multiplier;
#pragma unroll 1
          for (int h = 0; h < 2; ++h) {
            append_stochastic<E, decltype(within)::value>(
                p, [&](int i) { return v[i]; }, multiplier, index + 16 * h, codes[s]);
#pragma unroll
            for (int i = 0; i < 16; ++i) v[i] = v[16 + i];
            multiplier = b[s][1].multiplier;
          }
        };
        if (kNeverCut && p.scale.covers) {
          halves(std::true_type{});
        } else {
          halves(std::false_type{});
        }
        clear_poisoned<E>(b[s], codes[s]);
        continue;
      } else if constexpr (kRotate) {
        uint32_t scales[2];
        quantize_rotated_unit<E, kPow2>(p, r_t, v, codes[s], scales, known_t);
        b[s][0] = {scales[0], 0.0f, false};
        b[s][1] = {scales[1], 0.0f, false};
        continue;
      }
      maxima(v, amax[s]);
      if constexpr (!kRotate) share(amax);  // then there is one side
      find_scales(r_t, amax[s], b[s], known_t);
      const auto get = [&](int i) { return v[i]; };
      if constexpr (kStochastic) {
        const int64_t index =
            (matrix * p.columns + first_column + column_of(place_of(s))) * p.rows + first_row +
            strip * kUnit;
        float multiplier = b[s][0].multiplier;
#pragma unroll 1
        for (int h = 0; h < 2; ++h) {
          const auto again = [&](int i) {
            return *reinterpret_cast<const float*>(top + tile_place(16 * h + i, at / 16) + at % 16);
          };
          append_stochastic<E, false>(p, again, multiplier, index + 16 * h, codes[s]);
          multiplier = b[s][1].multiplier;
        }
      } else if (kPow2 && covered<E>(p.scale, b[s])) {
        encode_unit<E, true>(get, b[s], p.limits, codes[s]);
      } else {
        encode_unit<E, false>(get, b[s], p.limits, codes[s]);
      }
    }
  }
  // All have read the tile.
  __syncthreads();
  uint32_t* const scales = reinterpret_cast<uint32_t*>(bytes + kScalesAt);
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
    if constexpr (!kRotate) clear_poisoned<E>(b[s], codes[s]);
    uint8_t* const to = bytes + place_of(s) * kPitch + strip * kBytes;
#pragma unroll
    for (int i = 0; i < kBytes / kChunk; ++i) {
      if constexpr (kChunk == 16) {
        reinterpret_cast<uint4*>(to)[i] = make_uint4(codes[s][4 * i], codes[s][4 * i + 1],
                                                     codes[s][4 * i + 2], codes[s][4 * i + 3]);
      } else {
        reinterpret_cast<uint2*>(to)[i] = make_uint2(codes[s][2 * i], codes[s][2 * i + 1]);
      }
    }
    uint32_t* const two = scales + (place_of(s) * kStrips + strip) * 2;
    two[0] = b[s][0].code;
    two[1] = b[s][1].code;
  }
  __syncthreads();

  const int64_t units = p.rows / kUnit, strips = rows / kUnit;
  const int64_t corner = (matrix * p.columns + first_column) * units + first_row / kUnit;
  constexpr int kChunks = kStrips * kBytes / kChunk;  // of a column
#pragma unroll
  for (int n = 0; n < kColumns * kChunks / kThreads; ++n) {
    const int i = n * kThreads + threadIdx.x, q = i / kChunks, chunk = i % kChunks;
    if (column_of(q) >= columns || chunk * kChunk / kBytes >= strips) continue;
    uint8_t* const out = p.codes_t + (corner + column_of(q) * units) * kBytes + chunk * kChunk;
    const uint8_t* const from = bytes + q * kPitch + chunk * kChunk;
    if constexpr (kChunk == 16) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from);
    } else {
      *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(from);
    }
  }
#pragma unroll
  for (int n = 0; n < kColumns * kStrips / kThreads; ++n) {
    const int i = n * kThreads + threadIdx.x, q = i / kStrips;
    if (column_of(q) >= columns || i % kStrips >= strips) continue;
    store_unit_scales<kTwoLevel>(p, p.scales_t, corner + column_of(q) * units + i % kStrips,
                                 scales[2 * i], scales[2 * i + 1]);
  }
}

}  // namespace cuda
}  // namespace pyfmt
