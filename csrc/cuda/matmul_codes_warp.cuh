// SPDX-License-Identifier: Apache-2.0
// What one warp of the kernel for few rows of codes does: it holds its columns of x, copies codes
// and scales ahead into a ring of its own, and multiplies.
#pragma once

#include <type_traits>

#include "matmul_codes_x.cuh"

namespace pyfmt {
namespace cuda {

struct CodesParams {
  const uint8_t* x = nullptr;
  const float* x_scales = nullptr;
  int tokens = 0;
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  int row_bytes = 0, row_scales = 0;
  float factor = 1.0f;
  const float *x_tensor_scale = nullptr, *tensor_scale = nullptr;  // of x, of the weight; or null
  void* slots = nullptr;  // of the launch that rounded x, to be cleared
  int slot_count = 0;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFP32;
  void* out = nullptr;
  DType out_dtype = DType::kBF16;
  int n = 0, k = 0;
  int even_tiles = 0, longer_blocks = 0;  // of a block's rows; how many have one more
  int early = 1;                          // slots that are filled ahead of x
};

// kTiles: of eight rows of x; kSlots: of 256 columns of a warp.
//
// Blocks of 16 (kScale: E4M3) are multiplied by 32 columns like those of 32: a tile then has four
// rows of x twice, once with the second half of every 32 columns left out and once with the first,
// so that the sums of either have rows of their own.
template <class E, Scale kScaleHere, int kTilesHere, int kSlotsHere>
struct CodesShape {
  static constexpr bool kInt = E::spec.is_int();
  static constexpr Scale kScale = kScaleHere;
  static constexpr bool kApart = kScale == Scale::kE4M3;
  static_assert(!kApart || kTilesHere == 1, "four rows");
  static constexpr int kTiles = kTilesHere, kSlots = kSlotsHere;
  static constexpr int kMostWarps = 16, kRows = 16, kSlotColumns = 256;
  static constexpr int kColumns = kSlotColumns * kSlots, kSlotBlocks = kSlotColumns / 32;
  static constexpr int kLine = kSlotColumns / 2, kSlot = kRows * kLine;  // bytes
  static constexpr int kSteps = kSlots * kSlotBlocks;                    // of 32 columns
  static constexpr int kRowScales = (kApart ? 2 : 1) * kSteps;
  static constexpr int kStage = kSlots * kSlot + kRows * kRowScales;  // a warp's part of a tile
  static constexpr int kStages = kSlots > 2 ? 1 : 2;
  static constexpr int kFloats = 4 * kRows * kRowScales;  // a tile's scales, as numbers
  static constexpr int kXScales = 4 * 8 * kTiles * kSteps;
  static constexpr int kPlaces = 3;                     // tiles whose sums are under way
  static constexpr int kSums = 4 * 8 * kTiles * kRows;  // of a warp and tile
  static constexpr int kWarp = kStages * kStage + kFloats + kXScales + kPlaces * kSums;
  static constexpr int kSignals = 16 * kPlaces;
  static_assert(kStage % 128 == 0, "lines at their places");
  // By how much float32 sums are less than what they stand for.
  static constexpr int kDown = 23;

  static int shared_bytes(int warps) { return 128 + warps * kWarp + kSignals; }
};

template <class S>
struct CodesWarp {
  static constexpr int kTiles = S::kTiles, kSlots = S::kSlots;

  const CodesParams& p;
  int lane, t;
  int first_column, slots;  // slots of this warp that k has
  uint32_t x[S::kSteps][kTiles][2];
  uint4 numbers_of_x[S::kXScales / 512];  // until they are placed
  float sums[kTiles][4];
  // Of the next tile, as this lane copies them.
  const uint8_t *codes, *scales;
  uint32_t four_rows;
  unsigned to, from;      // where it copies to in a slot, where it reads
  SharedAddress numbers;  // a tile's scales; those of x follow
  TwiceE2M1 twice;

  PYFMT_DEVICE CodesWarp(const CodesParams& p, int part, int first_tile, SharedAddress numbers)
      : p(p), lane(int(threadIdx.x & 31)), first_column(part * S::kColumns), numbers(numbers) {
    keep(lane);
    t = lane & 3;
    slots = max(0, min(kSlots, (p.k - first_column) / S::kSlotColumns));
    keep(slots);
    const int first = S::kRows * first_tile, row = lane >> 3, chunk = lane & 7;
    codes = p.codes + int64_t(first + row) * p.row_bytes + first_column / 2 + 16 * chunk;
    four_rows = 4 * uint32_t(p.row_bytes);
    // Sixteen bytes of a line change places with others by the row, against conflicts.
    to = unsigned(S::kLine * row + 16 * (chunk ^ row));
    const int matrix = lane >> 3, line = lane & 7;
    from = unsigned(S::kLine * (line + 8 * (matrix & 1)) + 16 * (matrix >> 1 ^ line));
    scales = p.scales + int64_t(first + (lane >> 1)) * p.row_scales +
             first_column / (S::kApart ? 16 : 32) + S::kRowScales / 2 * (lane & 1);
    keep(codes);
    keep(four_rows);
    keep(scales);
    keep(to);
    keep(from);
    if (!S::kInt) twice.hold(numbers);
  }

  // ---- the left operand, once -------------------------------------------------------------------

  // All loads in one go, from one address each: what is worked out between them would wait for the
  // first ones.
  PYFMT_DEVICE void load_x(int tokens) {
    const int block = first_column / 32;
    const uint8_t* of_x =
        p.x + CodesLayout::run(kTiles, 0, block) + 16 * (S::kApart ? lane & 15 : lane);
    const int row = S::kApart ? lane >> 2 & 3 : lane >> 2;
    const bool mine = !S::kApart || lane >> 4 == t >> 1;
    const char* of_scales =
        reinterpret_cast<const char*>(p.x_scales) + int64_t(block) * (4 * 8 * kTiles) + 16 * lane;
    keep(of_x);
    keep(of_scales);
#pragma unroll
    for (int i = 0; i < S::kXScales / 512; ++i) {
      numbers_of_x[i] = load_later16_if(
          512 * i + 16 * lane < slots * S::kSlotBlocks * 4 * 8 * kTiles, of_scales + 512 * i);
    }
#pragma unroll
    for (int q = 0; q < S::kSteps / 2; ++q) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint4 v = load_later16_if(q < 4 * slots && mine && 8 * j + row < tokens,
                                        of_x + ((q / 8 * kTiles + j) * 8 + q % 8) * 512);
        x[2 * q][j][0] = v.x;
        x[2 * q][j][1] = v.y;
        x[2 * q + 1][j][0] = v.z;
        x[2 * q + 1][j][1] = v.w;
      }
    }
  }
  PYFMT_DEVICE void place_x_scales() const {
#pragma unroll
    for (int i = 0; i < S::kXScales / 512; ++i) {
      store_shared16(numbers + unsigned(S::kFloats + 512 * i + 16 * lane), numbers_of_x[i]);
    }
  }

  // ---- codes and scales, in the background ------------------------------------------------------

  // The scales of a tile come with its first slot, half of a row's a lane, by eight: those of 256
  // columns, as which rows are aligned.
  PYFMT_DEVICE void load_slot(SharedAddress stage, int which) const {
    if (which < slots) {
      const SharedAddress slot = stage + unsigned(which * S::kSlot);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        start_copy<16>(slot + ((to ^ unsigned(64 * (i & 1))) + unsigned(512 * i)),
                       codes + uint64_t(four_rows) * unsigned(i) + which * S::kLine, 16);
      }
    }
    if (which == 0) {
      constexpr int kUnit = S::kApart ? 16 : 8;
#pragma unroll
      for (int i = 0; i < kSlots / 2; ++i) {
        if (kSlots / 2 * (lane & 1) + i < slots) {
          start_copy<kUnit>(
              stage + unsigned(kSlots * S::kSlot + S::kRowScales / 2 * lane + kUnit * i),
              scales + kUnit * i, kUnit);
        }
      }
    }
  }
  PYFMT_DEVICE void next_tile() {
    codes += int64_t(S::kRows) * p.row_bytes;
    scales += int64_t(S::kRows) * p.row_scales;
  }

  // ---- products ---------------------------------------------------------------------------------

  // Of blocks of 16 a tile's scales lie apart by halves of 32 columns, and sixteen bytes of a row
  // change places with others, against conflicts.
  PYFMT_DEVICE static unsigned apart_place(int row, int half) {
    const int turn = (row & 3) | (kSlots > 2 ? 4 * half : 0);
    return unsigned(4 * (S::kRowScales * row + S::kSteps * half) + 16 * turn);
  }
  PYFMT_DEVICE void decode_apart(SharedAddress stage) const {
    constexpr int kHalf = S::kRowScales / 2;
    const SharedAddress from = stage + unsigned(kSlots * S::kSlot + kHalf * lane);
    const unsigned first = unsigned(2 * kHalf * (lane & 1));
    SharedAddress to[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) to[h] = numbers + (apart_place(lane >> 1, h) ^ first);
#pragma unroll
    for (int i = 0; i < kHalf; i += 8) {
      float w[2][4];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const uint32_t four = load_small<4>(from + unsigned(i + 2 * j));
        from_e4m3(four, &w[0][j], &w[1][j]);
        from_e4m3(four >> 16, &w[0][j + 1], &w[1][j + 1]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        store_shared16(to[h] ^ unsigned(2 * i), make_uint4(as_uint(w[h][0]), as_uint(w[h][1]),
                                                           as_uint(w[h][2]), as_uint(w[h][3])));
      }
    }
  }

  // A tile's scales, bytes to numbers: half of a row's a lane. 255 becomes an infinity, of which
  // multiply_slot makes NaN.
  PYFMT_DEVICE void decode_scales(SharedAddress stage) const {
    if constexpr (S::kApart) return decode_apart(stage);
    constexpr int kHalf = S::kRowScales / 2;
#pragma unroll
    for (int i = 0; i < kHalf; i += 8) {
      uint32_t w[8];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t four =
            load_small<4>(stage + unsigned(kSlots * S::kSlot + kHalf * lane + i + 4 * h));
        w[4 * h] = four << 23;
        w[4 * h + 1] = four << 15;
        w[4 * h + 2] = four << 7;
        w[4 * h + 3] = four >> 1;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        w[j] &= 0x7f800000u;
        keep(w[j]);
        w[j] = L::max(w[j], 1u << 22);  // of 0: 2^-127
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        store_shared16(numbers + unsigned(4 * (kHalf * lane + i + 4 * h)),
                       make_uint4(w[4 * h], w[4 * h + 1], w[4 * h + 2], w[4 * h + 3]));
      }
    }
  }

  PYFMT_DEVICE static float4 load_floats(SharedAddress from) {
    const uint4 v = load_shared16(from);
    return {as_float(v.x), as_float(v.y), as_float(v.z), as_float(v.w)};
  }

  // d: the sum of a block's products, as the float32 number 1.5 + sum * 2^-23.
  PYFMT_DEVICE void multiply_block(uint32_t top, uint32_t low, const uint32_t (&b)[kTiles][2],
                                   uint32_t (&d)[kTiles][4]) const {
    constexpr uint32_t kStart = 0x3fc00000u;
    const uint32_t c[4] = {kStart, kStart, kStart, kStart};
    if constexpr (S::kInt) {
      constexpr uint32_t kCodes = 0xf0f0f0f0u;
      const uint32_t a[4] = {top * 16u & kCodes, low * 16u & kCodes, top & kCodes, low & kCodes};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        mma16832(d[j], a[0], a[1], a[2], a[3], b[j][0], b[j][1], c);
      }
    } else {
      const uint32_t first[4] = {twice.positive(top), twice.positive(low),
                                 twice.positive(top >> 16), twice.positive(low >> 16)};
      const uint32_t top_size = top & 0x77777777u, low_size = low & 0x77777777u;
      const uint32_t second[4] = {twice.less(top_size), twice.less(low_size),
                                  twice.less(top_size >> 16), twice.less(low_size >> 16)};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        mma16832(d[j], first[0], first[1], first[2], first[3], b[j][0], b[j][1], c);
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        mma16832(d[j], second[0], second[1], second[2], second[3], b[j][0], b[j][1], d[j]);
      }
    }
  }

  template <int kWhich>
  PYFMT_DEVICE void multiply_slot(SharedAddress stage) {
    const SharedAddress mine = numbers + (S::kApart ? apart_place(lane >> 2, t >> 1)
                                                    : unsigned(4 * S::kRowScales * (lane >> 2)));
    const SharedAddress of_x = numbers + unsigned(S::kFloats + 16 * kTiles * t);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int four = kWhich * S::kSlotBlocks + 4 * h;  // the first of four blocks
      float4 rows[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows[r] = load_floats((S::kApart ? mine ^ unsigned(4 * four) : mine + unsigned(4 * four)) +
                              unsigned(4 * 8 * r * S::kRowScales));
      }
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        uint32_t words[4];
        load_matrices(stage + ((from ^ unsigned(32 * (2 * h + q))) + unsigned(kWhich * S::kSlot)),
                      words);
        float tokens[2][kTiles][2];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const float4 v = load_floats(of_x + unsigned((four / 2 + q) * 64 * kTiles + 16 * i));
          const float w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int at = 4 * i + c;
            tokens[at / (2 * kTiles)][at / 2 % kTiles][at % 2] = w[c];
          }
        }
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          uint32_t d[kTiles][4];
          multiply_block(words[2 * b], words[2 * b + 1], x[four + 2 * q + b], d);
          const float of_row[2] = {q   ? b ? rows[0].w : rows[0].z
                                   : b ? rows[0].y
                                       : rows[0].x,
                                   q   ? b ? rows[1].w : rows[1].z
                                   : b ? rows[1].y
                                       : rows[1].x};
          const float less[2] = {of_row[0] * -1.5f, of_row[1] * -1.5f};
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float scaled = fused(as_float(d[j][c]), of_row[c / 2], less[c / 2]);
              sums[j][c] = fused(scaled, tokens[b][j][c % 2], sums[j][c]);
            }
          }
        }
      }
    }
  }

  // ---- sums -------------------------------------------------------------------------------------

  PYFMT_DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[j][c] = 0;
    }
  }
  // Where the sum of a token and row lies: against conflicts of lanes that store.
  PYFMT_DEVICE static unsigned sum_place(int token, int row) {
    const int of_lane = token >> 1 & 3, column = (token & 8) + of_lane + ((token & 1) << 2);
    return unsigned(4 * (column * S::kRows + (row ^ (of_lane >> 1) << 3)));
  }
  PYFMT_DEVICE void store_sums(SharedAddress to) const {
    const unsigned first = sum_place(2 * t, lane >> 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const SharedAddress mine = to + (first ^ unsigned(4 * 8 * r));
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          store_small<4>(mine + unsigned(4 * (8 * j + 4 * c) * S::kRows),
                         as_uint(sums[j][2 * r + c]));
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace pyfmt
