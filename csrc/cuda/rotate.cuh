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

// Sums and differences of kCount numbers at strides below kSize.
template <int kSize, int kCount = kUnit>
PYFMT_DEVICE void near_butterflies(float* v) {
#pragma unroll
  for (int stride = 1; stride < kCount && stride < kSize; stride *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
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
// laid end to end, or in its row. Without the factor.
PYFMT_DEVICE void butterflies(float (&v)[kUnit], const RotationParams& r, int64_t index) {
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
}
PYFMT_DEVICE void rotate(float (&v)[kUnit], const RotationParams& r, int64_t index) {
  butterflies(v, r, index);
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
  static_assert(kUnits == 1 || kUnits == 2, "a lane holds one or two units");

  // Chunk c of lane l lies at l * kChunks + (c ^ turn(l)).
  PYFMT_DEVICE static int turn(int lane) { return kUnits == 1 ? lane / 2 % 4 : lane % 8; }

  // Where this lane copies its chunk of the first 32 to; those that follow are 32 further, with the
  // same turn but for its third bit.
  PYFMT_DEVICE static int copy_place(int lane) {
    const int owner = lane / kChunks;
    return 16 * (owner * kChunks + (lane % kChunks ^ turn(owner)));
  }
  // kSwap: odd lanes take the second half of their chunks first.
  PYFMT_DEVICE static int read_place(int lane) {
    return 16 * (lane * kChunks + (turn(lane) ^ (kSwap ? lane % 2 * kChunks / 2 : 0)));
  }

  PYFMT_DEVICE static SharedAddress copy_to(SharedAddress to, int j) {
    return 512 * j + (kUnits == 2 && j % 2 ? to ^ 64 : to);
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

// A tile's elements with their signs. Up to 128 signs, the same for each tile, lie as masks of
// float32's sign bit in shared memory, one for each element, and cost a load for four as the
// elements are unpacked; more of them are read as words and cost an instruction an element.
template <int kUnits, bool kSwap>
class Signs {
 public:
  static constexpr int kMost = 4;                          // words that are kept as masks
  static constexpr int kBytes = kMost * 128 + kMost * 16;  // of shared memory

  // All threads of a block; first: the first unit of this lane's warp, step: units from tile to
  // tile. A word for each kUnits begins 16 bytes further than it would, so that eight lanes meet
  // different banks.
  PYFMT_DEVICE Signs(const RotationParams& r, uint8_t* shared, int64_t first, int step, int lane) {
    if (!r.signs) return;
    if (masked(r)) {
      for (int i = threadIdx.x; i < int(r.signs_words) * 32; i += int(blockDim.x)) {
        const int unit = i / 32, element = i % 32;
        reinterpret_cast<uint32_t*>(shared)[unit * 32 + unit / kUnits * 4 + element] =
            as_uint(flip(0.0f, r.signs[unit], element));
      }
#pragma unroll
      for (int h = 0; h < kUnits; ++h) place_[h] = place(r, shared_address(shared), lane, h);
      __syncthreads();
    } else {
      place_[0] = signs_word(r, first + lane * kUnits);
      step_ = signs_word(r, step);
    }
  }

  // words: as read from a tile, changed. Once for each tile.
  PYFMT_DEVICE void unpack(const RotationParams& r, int lane, uint32_t* words, float* v) {
    if (r.signs && masked(r)) {
#pragma unroll
      for (int h = 0; h < kUnits; ++h) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const uint4 m = load_shared16(place_[h] + 16 * c);
          const uint32_t a = words[16 * h + 2 * c], b = words[16 * h + 2 * c + 1];
          float* const four = v + kUnit * h + 4 * c;
          four[0] = as_float(a * 65536u + m.x);
          four[1] = as_float((a ^ m.y) & 0xffff0000u);
          four[2] = as_float(b * 65536u + m.z);
          four[3] = as_float((b ^ m.w) & 0xffff0000u);
        }
      }
      return;
    }
    if (r.signs) {
      uint32_t at = uint32_t(place_[0]), signs[kUnits];
#pragma unroll
      for (int h = 0; h < kUnits; ++h) signs[h] = r.signs[advance(r, at, h)];
      place_[0] = advance(r, at, step_);
      if (kSwap && (lane & 1)) {
        const uint32_t first = signs[0];
        signs[0] = signs[kUnits - 1];
        signs[kUnits - 1] = first;
      }
#pragma unroll
      for (int j = 0; j < kUnits * 16; ++j) words[j] = flip_pair(words[j], signs[j / 16], j % 16);
    }
#pragma unroll
    for (int i = 0; i < kUnits * kUnit; ++i) v[i] = half_at<DType::kBF16>(words[i / 2], i & 1);
  }

 private:
  PYFMT_DEVICE static bool masked(const RotationParams& r) {
    return r.signs_words <= kMost && (r.signs_words & (r.signs_words - 1)) == 0;
  }
  PYFMT_DEVICE static SharedAddress place(const RotationParams& r, SharedAddress shared, int lane,
                                          int h) {
    const int unit = (lane * kUnits + (kSwap ? h ^ (lane & 1) : h)) & (r.signs_words - 1);
    return shared + unit * 128 + unit / kUnits * 16;
  }
  PYFMT_DEVICE static uint32_t advance(const RotationParams& r, uint32_t at, uint32_t step) {
    return at + step < r.signs_words ? at + step : at + step - r.signs_words;
  }

  SharedAddress place_[kUnits] = {};  // of the units' masks, or first a word's index
  uint32_t step_ = 0;                 // of that index
};

// A stage of a lane's own: units `far` apart.
template <int kUnits>
PYFMT_DEVICE void unit_butterfly(float (&v)[kUnits * kUnit], int far) {
#pragma unroll
  for (int i = 0; i < kUnits * kUnit; ++i) {
    if (i / kUnit & far) continue;
    const float a = v[i], b = v[i + far * kUnit];
    v[i] = a + b;
    v[i + far * kUnit] = a - b;
  }
}

// Rotates what a lane holds, without the factor: whole rotations up to 32 * kUnits. Larger ones in
// lanes that read with kSwap, so that even lanes begin with units 0 and 1 of their pair, odd lanes
// with 3 and 2. They end with 0 and 2, and 1 and 3: each gives one unit for one of its partner's,
// half the exchanges of a stage in which all stay. size: the true one.
template <int kSize, int kUnits>
PYFMT_DEVICE void rotate_tile(float (&v)[kUnits * kUnit], int size) {
#pragma unroll
  for (int h = 0; h < kUnits; ++h) near_butterflies<kSize>(v + h * kUnit);
  if constexpr (kSize <= kUnits * kUnit) {
#pragma unroll
    for (int far = 1; far < kSize / kUnit; far *= 2) unit_butterfly<kUnits>(v, far);
  } else {
    static_assert(kUnits == 2, "lanes exchange one of two units");
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
