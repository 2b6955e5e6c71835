// SPDX-License-Identifier: Apache-2.0
// The left operand of products of codes: where its bytes and scales lie, and the small kernels that
// put them there.
#pragma once

#include "beside.cuh"
#include "coder.cuh"
#include "matmul_codes.h"
#include "together.cuh"
#include "warp.cuh"

namespace pyfmt {
namespace cuda {

// Elements as signed bytes: E2M1 times two, integers as they are. A run of 64 columns of eight rows
// (a tile) is 512 bytes: lane l of a warp takes 16 from 16 l on, of row l / 4, eight columns of
// either block of 32, as the tensor cores want them. Scales are float32: of 64 columns, lane t of
// four has those of either block for rows 2 t and 2 t + 1 of each tile.
struct CodesLayout {
  static constexpr int kColumns = 512;  // whose runs of a tile lie together

  PYFMT_HD static int tiles(int m) { return (m + 7) / 8; }
  PYFMT_HD static int64_t run(int tiles, int tile, int64_t block) {
    return ((block / 16 * tiles + tile) * 8 + block % 16 / 2) * 512;
  }
  // Of the eight bytes of columns 8 t and on, of the block.
  PYFMT_HD static int64_t byte(int tiles, int row, int64_t block, int t) {
    return run(tiles, row / 8, block) + row % 8 * 64 + t * 16 + block % 2 * 8;
  }
  PYFMT_HD static int64_t scale(int tiles, int row, int64_t block) {
    return ((block / 2 * 4 + row % 8 / 2) * 2 + block % 2) * (2 * tiles) + row / 8 * 2 + row % 2;
  }
  // Of blocks of 16, whose halves of 32 columns are multiplied as if they were rows of their own:
  // of up to four rows.
  static constexpr int kApartRows = 4;
  PYFMT_HD static int64_t scale_apart(int row, int64_t block) {
    return scale(1, row + int(block % 2) * kApartRows, block / 2);
  }
};

// E2M1 times two is the sum of two bytes of a code c: twice its magnitude unless it is negative,
// and less its magnitude. Both are looked up, four codes at once by the low 16 bits of a word: of
// a negative code the first gives eight copies of a sign that its table's bytes have not, 0.
struct TwiceE2M1 {
  uint32_t low = 0x06040200u, high = 0x18100c08u;
  uint32_t less_low = 0xfdfeff00u, less_high = 0xf4f8fafcu;

  // In registers for good, by way of shared memory: a constant would be moved to one for every use.
  PYFMT_DEVICE void hold(SharedAddress room) {
    store_small<4>(room, low);
    store_small<4>(room + 4, less_low);
    warp_barrier();
    low = load_small<4>(room);
    less_low = load_small<4>(room + 4);
  }
  PYFMT_DEVICE uint32_t positive(uint32_t codes) const { return permute_bytes(low, high, codes); }
  // codes: without signs.
  PYFMT_DEVICE uint32_t less(uint32_t codes) const {
    return permute_bytes(less_low, less_high, codes);
  }
};

// Four bytes added without carries between them.
PYFMT_DEVICE uint32_t add_bytes(uint32_t a, uint32_t b) {
  return ((a & 0x7f7f7f7fu) + (b & 0x7f7f7f7fu)) ^ ((a ^ b) & 0x80808080u);
}

struct PlaceParams {
  const void* x = nullptr;  // bfloat16, or packed codes
  const uint8_t* x_scales = nullptr;
  int64_t eights = 0;  // of elements, in all
  int row_eights = 1, rows = 0;
  ScaleParams scale;
  Limits limits;
  RotationParams rotation;
  uint8_t* bytes = nullptr;
  float *scales = nullptr, *tensor_scale = nullptr;
  Together together;  // where the tensor scale is found on the way
  int tiles = 1;
  bool halves = false;
};

// A lane's eight codes as bytes to their place, and, from the first lane of a block, its scale.
// kScale: E8M0 of blocks of 32, E4M3 of 16.
template <class E, Scale kScale>
PYFMT_DEVICE void place_eight(const PlaceParams& p, uint32_t row, uint32_t inside, uint32_t codes,
                              uint32_t scale) {
  const int block = int(inside / 4), t = int(inside % 4);
  uint32_t bytes[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t four = codes >> (16 * h);
    if constexpr (Coder<E>::kE2M1) {
      const TwiceE2M1 twice;
      bytes[h] = add_bytes(twice.positive(four), twice.less(four & 0x7777u));
    } else {
      // Two's complement of four bits stretched over eight.
      const uint32_t spread =
          (four & 0xfu) | (four & 0xf0u) << 4 | (four & 0xf00u) << 8 | (four & 0xf000u) << 12;
      bytes[h] = spread | (spread & 0x08080808u) * 0x1eu;
    }
  }
  if (p.halves) {
    const uint32_t even = pick_bytes(bytes[0], bytes[1], 0x6420);
    bytes[1] = pick_bytes(bytes[0], bytes[1], 0x7531);
    bytes[0] = even;
  }
  *reinterpret_cast<uint2*>(p.bytes + CodesLayout::byte(p.tiles, int(row), block, t)) =
      make_uint2(bytes[0], bytes[1]);
  // Rows of the last tile that x has not: their scales are read too, for sums that nobody stores.
  if constexpr (kScale == Scale::kE4M3) {
    if (t % 2) return;
    float value, unused;
    from_e4m3(scale, &value, &unused);
    const int64_t half = inside / 2;
    p.scales[CodesLayout::scale_apart(int(row), half)] = value;
    if (int(row) + 1 < p.rows) return;
    for (int beyond = p.rows; beyond < CodesLayout::kApartRows; ++beyond) {
      p.scales[CodesLayout::scale_apart(beyond, half)] = 0.0f;
    }
    return;
  }
  if (t == 0) {
    p.scales[CodesLayout::scale(p.tiles, int(row), block)] =
        as_float(codec::e8m0_decode<uint32_t>(scale));
  }
  if (int(row) + 1 == p.rows) {
    for (int beyond = p.rows + t; beyond < 8 * p.tiles; beyond += 4) {
      p.scales[CodesLayout::scale(p.tiles, beyond, block)] = 0.0f;
    }
  }
}

// Few threads of few registers, which find room beside the blocks of a product: eight elements a
// lane, so that four lanes have a block and a warp has whole rotations of up to 256.
constexpr int kPlaceThreads = 64;

template <class E, Scale kScale>
__global__ void __launch_bounds__(kPlaceThreads, 32)
    round_to_bytes(const __grid_constant__ PlaceParams p) {
  using C = Coder<E>;
  constexpr bool kPow2 = kScale == Scale::kE8M0;
  allow_next_launch();
  const uint32_t eight = blockIdx.x * uint32_t(kPlaceThreads) + threadIdx.x;
  const bool live = eight < p.eights;
  // What needs no x is worked out while there is time. Parameters come from memory too.
  uint32_t row = eight / uint32_t(p.row_eights), inside = eight - row * uint32_t(p.row_eights);
  void* slots = p.together.slots;
  int size = p.rotation.size;
  keep(row);
  keep(inside);
  keep(slots);
  keep(size);
  wait_for_earlier_launch();
  float v[8];
  load_rotated_eight(p.x, p.rotation, eight, live, v);
  codec::RecipeConstants r{};
  if constexpr (!kPow2) {
    uint32_t largest = 0;
    if (slots) {
      largest = largest_of_x(p.together, p.x, p.rotation, uint32_t(p.eights), eight, v);
    }
    r = recipe_constants(p.scale, as_float(largest));
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.tensor_scale = as_float(r.tensor_scale);
  }
  float m = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) m = max_abs_nan(m, v[i]);
  m = max_abs_nan(m, __shfl_xor_sync(kAll, m, 1));
  if constexpr (kPow2) m = max_abs_nan(m, __shfl_xor_sync(kAll, m, 2));
  const BlockScale b = block_scale<kPow2>(p.scale, r, as_uint(m));
  uint32_t codes[C::kWords];  // of sixteen, of which there are eight
  C::encode([&](int i) { return i < 8 ? v[i & 7] : 0.0f; }, b.multiplier, p.limits, codes);
  if (live) place_eight<E, kScale>(p, row, inside, b.poisoned ? 0u : codes[0], b.code);
}

template <class E, Scale kScale>
__global__ void __launch_bounds__(kPlaceThreads, 32)
    place_as_bytes(const __grid_constant__ PlaceParams p) {
  allow_next_launch();
  wait_for_earlier_launch();
  const uint32_t eight = blockIdx.x * uint32_t(kPlaceThreads) + threadIdx.x;
  if (eight >= p.eights) return;
  constexpr int kLanes = kScale == Scale::kE4M3 ? 2 : 4;  // of a block
  const uint32_t row = eight / uint32_t(p.row_eights), inside = eight % uint32_t(p.row_eights);
  place_eight<E, kScale>(p, row, inside, static_cast<const uint32_t*>(p.x)[eight],
                         p.x_scales[eight / kLanes]);
}

}  // namespace cuda
}  // namespace pyfmt
