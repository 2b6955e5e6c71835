// SPDX-License-Identifier: Apache-2.0
// Block Hadamard rotation of rows laid end to end.
#include <algorithm>

#include "rotate.cuh"

namespace pyfmt {
namespace cuda {

namespace {

struct HadamardParams {
  const void* x = nullptr;
  void* out = nullptr;
  int64_t count = 0;
  bool aligned = false;
  int rounds = 1;  // hadamard_tiles: tiles of a warp
  RotationParams rotation;
};

template <DType kIn, DType kOut>
__global__ void __launch_bounds__(kThreads)
    hadamard_flat(const __grid_constant__ HadamardParams p) {
  constexpr int kInBytes = dtype_bytes(kIn) * kUnit, kOutBytes = dtype_bytes(kOut) * kUnit;
  __shared__ uint4 shared[Stage<kOutBytes>::kShared];
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t whole = p.count / kUnit;

  float v[kUnit];
  if (unit < whole && p.aligned) {
    Raw<kIn> raw;
    raw.load(static_cast<const char*>(p.x) + unit * kInBytes);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = raw.get(i);
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int64_t at = unit * kUnit + i;
      v[i] = at < p.count ? load_element(p.x, kIn, at) : 0.0f;
    }
  }
  rotate(v, p.rotation, unit * kUnit);

  uint32_t words[kOutBytes / 4];
#pragma unroll
  for (int i = 0; i < kUnit; i += 2) {
    if constexpr (kOut == DType::kFP32) {
      words[i] = canonical(v[i]);
      words[i + 1] = canonical(v[i + 1]);
    } else {
      words[i / 2] = to_halves<kOut>(v[i], v[i + 1]);
    }
  }
  Stage<kOutBytes>::store(static_cast<uint8_t*>(p.out), unit, whole, words, shared);
  if (unit == whole) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int64_t at = unit * kUnit + i;
      if (at < p.count) store_element(p.out, kOut, at, v[i]);
    }
  }
}

// bf16 to bf16 in whole units, rotations of 128 and more. Two buffers a warp: one is filled while
// the other gives its elements and takes the results, which leave it in wide pieces.
constexpr int kTileWarps = 4, kTileBlocks = 5, kTileRounds = 2;

__global__ void __launch_bounds__(32 * kTileWarps, kTileBlocks)
    hadamard_tiles(const __grid_constant__ HadamardParams p) {
  constexpr int kUnits = 2;
  using T = Tile<kUnits, true>;
  using S = Signs<kUnits, true>;
  __shared__ __align__(256) uint8_t shared[2 * kTileWarps * T::kBytes + S::kBytes];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  constexpr int kStep = kTileWarps * T::kUnitCount;
  int rounds = p.rounds;
  const int64_t units = p.count / kUnit;
  int64_t first = int64_t(blockIdx.x) * rounds * kStep + warp * T::kUnitCount;
  SharedAddress here = shared_address(shared) + 2 * warp * T::kBytes;
  const SharedAddress both = here + here + T::kBytes;
  const auto fetch = [&](SharedAddress buffer, int64_t unit) {
    T::fetch(buffer + T::copy_place(lane), static_cast<const uint8_t*>(p.x) + unit * 64 + lane * 16,
             units - unit, lane);
  };
  if (first < units) fetch(here, first);
  S signs(p.rotation, shared + 2 * kTileWarps * T::kBytes, first, kStep, lane);
  if (first >= units) return;
  for (;;) {
    uint32_t words[T::kChunks * 4];
    wait_copies();
    __syncwarp();
    const bool more = first + kStep < units && --rounds > 0;
    if (more) fetch(both - here, first + kStep);
    T::read(here + T::read_place(lane), words);
    float v[kUnits * kUnit];
    signs.unpack(p.rotation, lane, words, v);
    rotate_tile<128, kUnits>(v, p.rotation.size);
    multiply(v, p.rotation.factor);

    // Chunk i lies at i ^ (i / 16 % 8): neighbouring lanes meet different banks.
    __syncwarp();
#pragma unroll
    for (int h = 0; h < kUnits; ++h) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int i = T::unit_of(lane, h) * 4 + c;
        const float* const w = v + h * kUnit + 8 * c;
        store_shared16(
            here + 16 * (i ^ (i >> 4 & 7)),
            make_uint4(to_halves<DType::kBF16>(w[0], w[1]), to_halves<DType::kBF16>(w[2], w[3]),
                       to_halves<DType::kBF16>(w[4], w[5]), to_halves<DType::kBF16>(w[6], w[7])));
      }
    }
    __syncwarp();
    uint4* const out = static_cast<uint4*>(p.out) + first * 4;
#pragma unroll
    for (int j = 0; j < T::kChunks; ++j) {
      const int i = 32 * j + lane;
      if (first + i / 4 < units) out[i] = load_shared16(here + 16 * (i ^ (i >> 4 & 7)));
    }
    if (!more) break;
    here = both - here;
    first += kStep;
  }
}

struct PackSignsParams {
  const uint8_t* last = nullptr;  // the last byte of the first sign, whose top bit it is
  int64_t pitch = 0, length = 0;
  uint32_t* words = nullptr;
  int64_t count = 0;
};

__global__ void __launch_bounds__(kThreads)
    pack_signs_of(const __grid_constant__ PackSignsParams p) {
  const int64_t word = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (word >= p.count) return;
  int64_t at = word * 32 % p.length;
  uint32_t bits = 0;
#pragma unroll 8
  for (int i = 0; i < 32; ++i) {
    bits |= uint32_t(p.last[at * p.pitch] >> 7) << (i & 1 ? 31 - i / 2 : 15 - i / 2);
    if (++at == p.length) at = 0;
  }
  p.words[word] = bits;
}

}  // namespace

int64_t signs_words(int64_t length) {
  int64_t words = length;
  for (int halved = 0; halved < 5 && words % 2 == 0; ++halved) words /= 2;
  return words;
}

void pack_signs(const SignsArgs& a, Stream stream) {
  PackSignsParams p;
  p.last = static_cast<const uint8_t*>(a.signs) + a.item_bytes - 1;
  p.pitch = a.stride * a.item_bytes;
  p.length = a.length;
  p.words = a.words;
  p.count = a.count;
  launch(pack_signs_of, blocks_for(p.count), kThreads, stream, p);
}

void hadamard(const HadamardArgs& a, Stream stream) {
  HadamardParams p;
  p.x = a.x;
  p.out = a.out;
  p.count = a.count;
  p.aligned = aligned16(a.x);
  p.rotation = rotation_params(a.rotation);
  const int64_t blocks = blocks_for((a.count + kUnit - 1) / kUnit);
  if (a.dtype == DType::kBF16 && a.out_dtype == DType::kBF16 && p.aligned &&
      a.rotation.size >= 256) {
    constexpr int kOfBlock = kTileWarps * Tile<2, true>::kUnitCount;
    const int64_t tiles = (a.count / kUnit + kOfBlock - 1) / kOfBlock;
    const int64_t at_once = int64_t(multiprocessors()) * kTileBlocks;
    p.rounds = int(std::min<int64_t>(kTileRounds, std::max<int64_t>(1, tiles / at_once)));
    return launch(hadamard_tiles, (tiles + p.rounds - 1) / p.rounds, 32 * kTileWarps, stream, p);
  }
  constexpr DType b = DType::kBF16, h = DType::kFP16, f = DType::kFP32;
  if (a.dtype == f) return launch(hadamard_flat<f, f>, blocks, kThreads, stream, p);
  if (a.out_dtype == f) {
    return launch(a.dtype == b ? hadamard_flat<b, f> : hadamard_flat<h, f>, blocks, kThreads,
                  stream, p);
  }
  launch(a.dtype == b ? hadamard_flat<b, b> : hadamard_flat<h, h>, blocks, kThreads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
