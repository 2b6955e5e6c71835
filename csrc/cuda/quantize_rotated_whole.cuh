// SPDX-License-Identifier: Apache-2.0
// Rotation by 128 fused into quantize to E2M1 for bf16 rows end to end: a lane takes a whole
// rotation, so that lanes exchange nothing.
#pragma once

#include "quantize_rotated.cuh"
#include "units.cuh"

namespace pyfmt {
namespace cuda {

// A lane's rotation takes 256 bytes of shared memory and 16 more, its codes 64 and 16 more: eight
// lanes never share a bank, and all places are constants away from one address a lane.
struct WholeTile {
  static constexpr int kUnits = 4, kUnitCount = 32 * kUnits;
  static constexpr int kInPitch = 256 + 16, kOutPitch = 64 + 16;
  static constexpr int kIn = 32 * kInPitch, kOut = 32 * kOutPitch;
  static constexpr int kBytes = kIn + kOut;  // of a warp

  // to: the tile's memory plus copy_place; from: the tile's first byte and 16 * lane more.
  PYFMT_DEVICE static int copy_place(int lane) { return lane / 16 * kInPitch + lane % 16 * 16; }
  PYFMT_DEVICE static void fetch(SharedAddress to, const uint8_t* from, int64_t left, int lane) {
    if (left >= kUnitCount) {
#pragma unroll
      for (int j = 0; j < 16; ++j) copy16(to + 2 * kInPitch * j, from + 512 * j);
    } else {
#pragma unroll 1
      for (int j = 0; j < 16; ++j) {
        if (32 * j + lane < left * 4) copy16(to + 2 * kInPitch * j, from + 512 * j);
      }
    }
  }
  // from: the tile's memory and kInPitch * lane more.
  PYFMT_DEVICE static void read(SharedAddress from, uint32_t* words) {
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      const uint4 v = load_shared16(from + 16 * c);
      words[4 * c] = v.x;
      words[4 * c + 1] = v.y;
      words[4 * c + 2] = v.z;
      words[4 * c + 3] = v.w;
    }
  }

  // from: the codes' memory plus out_place; out: the tile's first byte and 16 * lane more.
  PYFMT_DEVICE static int out_place(int lane) { return lane / 4 * kOutPitch + lane % 4 * 16; }
  PYFMT_DEVICE static void store(SharedAddress from, uint8_t* out, int64_t left, int lane) {
    if (left >= kUnitCount) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        reinterpret_cast<uint4*>(out)[32 * j] = load_shared16(from + 8 * kOutPitch * j);
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        if (32 * j + lane < left) {
          reinterpret_cast<uint4*>(out)[32 * j] = load_shared16(from + 8 * kOutPitch * j);
        }
      }
    }
  }
};

struct NoSigns {
  PYFMT_DEVICE NoSigns(const RotationParams&, uint8_t*, int64_t, int, int) {}
};

constexpr int kWholeWarps = 4, kWholeBlocks = 3, kWholeRounds = 3;

struct WholeParams : RotatedParams {
  // Known to the host alone: see Moves. 2^16 brings the first of two bfloat16 to its place.
  uint32_t up = 1u << 16;
  Coder<e2m1_element>::Moves moves;
};

// Blocks of 32; p.scales at a multiple of four bytes. kSigned: p.rotation has signs; a kernel that
// asks as it goes unpacks only when the last word is there.
template <class E, bool kSigned>
__global__ void __launch_bounds__(32 * kWholeWarps, kWholeBlocks)
    quantize_rotated_whole(const __grid_constant__ WholeParams p) {
  using C = Coder<E>;
  using T = WholeTile;
  using S = Signs<T::kUnits, false>;
  constexpr int kStep = kWholeWarps * T::kUnitCount;
  constexpr int kTiles = kWholeWarps * T::kBytes;
  __shared__ __align__(16) uint8_t shared[kTiles + (kSigned ? S::kBytes : 0)];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int rounds = p.rounds;
  int64_t first = int64_t(blockIdx.x) * rounds * kStep + warp * T::kUnitCount;
  const SharedAddress mine = shared_address(shared) + warp * T::kBytes;
  const auto fetch = [&](int64_t unit) {
    T::fetch(mine + T::copy_place(lane), p.x + unit * 64 + lane * 16, p.units - unit, lane);
  };
  if (first < p.units) fetch(first);
  std::conditional_t<kSigned, S, NoSigns> signs(p.rotation, shared + kTiles, first, kStep, lane);
  if (first >= p.units) return;
  for (;;) {
    uint32_t words[64];
    wait_copies();
    __syncwarp();
    T::read(mine + T::kInPitch * lane, words);
    __syncwarp();
    const bool more = first + kStep < p.units && --rounds > 0;
    if (more) fetch(first + kStep);
    float v[T::kUnits * kUnit];
    if constexpr (kSigned) {
      signs.unpack(p.rotation, lane, words, v);
    } else {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        v[2 * i] = as_float(words[i] * p.up);
        v[2 * i + 1] = half_at<DType::kBF16>(words[i], 1);
      }
    }
    rotate_tile<128, T::kUnits>(v, 128);

    uint32_t amax[T::kUnits], scales[T::kUnits];
    bool plain = p.scale.covers;
#pragma unroll
    for (int h = 0; h < T::kUnits; ++h) {
      uint32_t halves[2];
      maxima(v + h * kUnit, halves);
      amax[h] = as_uint(as_float(L::max(halves[0], halves[1])) * p.rotation.factor);
      scales[h] = uint32_t(int32_t(amax[h] + p.scale.addend) >> 23) - uint32_t(p.scale.emax);
      plain = plain && plain_scale(scales[h]);
    }
    const SharedAddress here = mine + T::kIn;
    const auto put = [&](int h, const uint32_t* codes) {
      store_shared16(here + T::kOutPitch * lane + 16 * h,
                     make_uint4(codes[0], codes[1], codes[2], codes[3]));
    };
    if (!__any_sync(kAll, !plain)) {
#pragma unroll
      for (int h = 0; h < T::kUnits; ++h) {
        uint32_t codes[2 * C::kWords];
        const float multiplier = as_float(p.first - (scales[h] << 23));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          C::encode_covered([&](int j) { return v[h * kUnit + 16 * i + j]; }, multiplier,
                            codes + i * C::kWords, p.moves);
        }
        put(h, codes);
      }
    } else {
#pragma unroll
      for (int h = 0; h < T::kUnits; ++h) {
        uint32_t codes[2 * C::kWords];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scales[h] = encode_any<E>(p, amax[h], v + h * kUnit + 16 * i, codes + i * C::kWords);
        }
        put(h, codes);
      }
    }
    __syncwarp();
    const int64_t left = p.units - first;
    T::store(here + T::out_place(lane), p.codes + (first + lane) * 16, left, lane);
    // Rotations are whole: a lane has four units or none.
    if (lane * T::kUnits < left) {
      reinterpret_cast<uint32_t*>(p.scales + first)[lane] =
          scales[0] | scales[1] << 8 | scales[2] << 16 | scales[3] << 24;
    }
    if (!more) break;
    first += kStep;
  }
}

}  // namespace cuda
}  // namespace pyfmt
