// SPDX-License-Identifier: Apache-2.0
// Block Hadamard rotation in registers: fp32 butterflies in the order of strides 1, 2, 4, ...
//
// Signs come as bits, 32 elements a word, in the order that suits pairs of bf16: bit 31 - j is the
// sign of element 2 j + 1, bit 15 - j that of element 2 j.
#pragma once

#include "device.cuh"

namespace pyfmt {
namespace cuda {

// float32(2^(-k/2)) for size 2^k.
inline float rotation_factor(int size) {
  int k = 0;
  while (size >> (k + 1)) ++k;
  const uint32_t root = k & 1 ? 0x3f3504f3u : 0x3f800000u;  // float32(sqrt(1/2)) or 1
  return L::as_float(root - (uint32_t(k / 2) << 23));
}

struct RotationParams {
  int size = 0;
  float factor = 1.0f;
  const uint32_t* signs = nullptr;
  uint32_t signs_words = 0;
};

// Host: parameters from a verb's arguments.
inline RotationParams rotation_params(const Rotation& a) {
  return {a.size, a.size ? rotation_factor(a.size) : 1.0f, a.signs, uint32_t(a.signs_words)};
}

// Which word a unit has, counted along rows laid end to end (or along one row).
PYFMT_DEVICE uint32_t signs_word(const RotationParams& r, int64_t unit) {
  if (unit <= 0xffffffff) return uint32_t(unit) % r.signs_words;
  return uint32_t(unit % r.signs_words);
}

// word: two bf16, the elements 2 j and 2 j + 1 of a unit.
PYFMT_DEVICE uint32_t flip_pair(uint32_t word, uint32_t signs, int j) {
  return word ^ (signs << j & 0x80008000u);
}

// Element i of a unit.
PYFMT_DEVICE float flip(float v, uint32_t signs, int i) {
  return as_float(as_uint(v) ^ (signs << (i / 2 + (i & 1 ? 0 : 16)) & 0x80000000u));
}

// Sums and differences of one unit at strides below kSize.
template <int kSize>
PYFMT_DEVICE void near_butterflies(float* v) {
#pragma unroll
  for (int stride = 1; stride < kUnit && stride < kSize; stride *= 2) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i & stride) continue;
      const float a = v[i], b = v[i + stride];
      v[i] = a + b;
      v[i + stride] = a - b;
    }
  }
}

// A stage between lanes `far` apart, which hold the same places of neighbouring stretches.
template <int kCount>
PYFMT_DEVICE void far_butterfly(float (&v)[kCount], int far) {
  const float side = threadIdx.x & far ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = fused(side, v[i], __shfl_xor_sync(kAll, v[i], far));
}

template <int kCount>
PYFMT_DEVICE void multiply(float (&v)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = v[i] * factor;
}

// One unit a lane, neighbouring units in neighbouring lanes; index: of its first element in rows
// laid end to end, or in its row.
PYFMT_DEVICE void rotate(float (&v)[kUnit], const RotationParams& r, int64_t index) {
  if (r.signs) {
    const uint32_t signs = r.signs[signs_word(r, index / kUnit)];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = flip(v[i], signs, i);
  }
  // One copy of the code for each size: stages of a loop would cost a move for every other sum.
  switch (r.size) {
    case 2:
      near_butterflies<2>(v);
      break;
    case 4:
      near_butterflies<4>(v);
      break;
    case 8:
      near_butterflies<8>(v);
      break;
    case 16:
      near_butterflies<16>(v);
      break;
    default:
      near_butterflies<32>(v);
  }
  for (int far = 1; far < r.size / kUnit; far *= 2) far_butterfly(v, far);
  multiply(v, r.factor);
}

// ---- tiles: bf16 by way of shared memory ------------------------------------------------------

// What a warp takes at once: kUnits units a lane. The copies of the next tile run while the lanes
// compute; 16-byte chunks lie in an order in which neither side meets a bank twice.
template <int kUnits, bool kSwap>
struct Tile {
  static constexpr int kChunks = 4 * kUnits;    // of a lane
  static constexpr int kBytes = 512 * kChunks;  // of a warp
  static constexpr int kUnitCount = 32 * kUnits;
  static_assert(kUnits == 1 || kUnits == 2 || kUnits == 4, "a lane holds one, two or four units");

  // Chunk c of lane l lies at l * kChunks + (c ^ turn(l)).
  PYFMT_DEVICE static int turn(int lane) { return kUnits == 1 ? lane / 2 % 4 : lane % 8; }

  // Where this lane copies its chunk of the first 32 to; those that follow are 32 further, with the
  // same turn but for some bits.
  PYFMT_DEVICE static int copy_place(int lane) {
    const int owner = lane / kChunks;
    return 16 * (owner * kChunks + (lane % kChunks ^ turn(owner)));
  }
  // kSwap: odd lanes take the second half of their chunks first.
  PYFMT_DEVICE static int read_place(int lane) {
    return 16 * (lane * kChunks + (turn(lane) ^ (kSwap ? lane % 2 * kChunks / 2 : 0)));
  }

  PYFMT_DEVICE static SharedAddress copy_to(SharedAddress to, int j) {
    return 512 * j + (to ^ (kUnits == 1 ? 0 : kUnits == 2 ? j % 2 * 64 : j % 4 * 32));
  }

  // to: a buffer plus copy_place; from: the tile's first byte and 16 * lane more; left: units from
  // the tile's first to the end of the tensor. What lies beyond stays as it is.
  PYFMT_DEVICE static void fetch(SharedAddress to, const uint8_t* from, int64_t left, int lane) {
    if (left >= kUnitCount) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        copy16(copy_to(to, j), from + 512 * j);
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < kChunks; ++j) {
        if (32 * j + lane < left * 4) {
          copy16(copy_to(to, j), from + 512 * j);
        }
      }
    }
  }

  // from: a buffer plus read_place.
  PYFMT_DEVICE static void read(SharedAddress from, uint32_t* words) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint4 v = load_shared16(from ^ 16 * c);
      words[4 * c] = v.x;
      words[4 * c + 1] = v.y;
      words[4 * c + 2] = v.z;
      words[4 * c + 3] = v.w;
    }
  }

  // Where a lane's results belong, from the tile's first unit on.
  PYFMT_DEVICE static int unit_of(int lane, int h) {
    return kSwap ? (lane & ~1) * 2 + (lane & 1) + 2 * h : lane * kUnits + h;
  }
};

// The sign words of a lane's units, tile by tile.
template <int kUnits, bool kSwap>
struct SignWords {
  uint32_t at = 0, step = 0;

  PYFMT_DEVICE void start(const RotationParams& r, int64_t first, int64_t tiles_step, int lane) {
    if (!r.signs) return;
    at = signs_word(r, first + lane * kUnits);
    step = signs_word(r, tiles_step);
  }
  PYFMT_DEVICE void next(const RotationParams& r, uint32_t (&words)[kUnits], int lane) {
    uint32_t here = at;
#pragma unroll
    for (int h = 0; h < kUnits; ++h) {
      words[h] = r.signs[here];
      here = here + 1 == r.signs_words ? 0 : here + 1;
    }
    if constexpr (kSwap) {
      const uint32_t first = words[0];
      words[0] = lane & 1 ? words[1] : first;
      words[1] = lane & 1 ? first : words[1];
    }
    at += step;
    if (at >= r.signs_words) at -= r.signs_words;
  }
};

// Rotates what a lane holds, without the factor. kSize above 64: in lanes that read with kSwap, so
// that even lanes begin with units 0 and 1 of their pair, odd lanes with 3 and 2. They end with 0
// and 2, and 1 and 3: each gives one unit for one of its partner's, half the exchanges of a stage
// in which all stay. kSize 128 stands for all from there on; size is the true one.
template <int kSize, int kUnits>
PYFMT_DEVICE void rotate_tile(float (&v)[kUnits * kUnit], int size) {
#pragma unroll
  for (int h = 0; h < kUnits; ++h) near_butterflies<kSize>(v + h * kUnit);
  if constexpr (kUnits == 4) {
#pragma unroll
    for (int apart = kUnit; apart < kUnits * kUnit && apart < kSize; apart *= 2) {
#pragma unroll
      for (int i = 0; i < kUnits * kUnit; ++i) {
        if (i & apart) continue;
        const float a = v[i], b = v[i + apart];
        v[i] = a + b;
        v[i + apart] = a - b;
      }
    }
    for (int far = 1; far < size / (kUnits * kUnit); far *= 2) far_butterfly(v, far);
  } else if constexpr (kUnits == 1) {
    for (int far = 1; far < kSize / kUnit; far *= 2) far_butterfly(v, far);
  } else if constexpr (kSize == 64) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const float a = v[i], b = v[i + kUnit];
      v[i] = a + b;
      v[i + kUnit] = a - b;
    }
  } else if constexpr (kSize > 64) {
    const float side = threadIdx.x & 1 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const float a = v[i], b = v[i + kUnit];
      v[i] = fused(side, a, b);
      v[i + kUnit] = fused(-side, b, a);
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const float mine = v[i], other = __shfl_xor_sync(kAll, v[i + kUnit], 1);
      v[i] = mine + other;
      v[i + kUnit] = fused(side, mine, -side * other);
    }
    for (int far = 2; far < size / (2 * kUnit); far *= 2) far_butterfly(v, far);
  }
}

}  // namespace cuda
}  // namespace pyfmt
