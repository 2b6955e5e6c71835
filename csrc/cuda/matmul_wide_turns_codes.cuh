// SPDX-License-Identifier: Apache-2.0
// Packed codes to fragments of matmul_wide_turns.cuh: its policies. A policy says
//
//   kBits, kRun     of a code; codes of a row that lie together for a lane (matmul_wide_panel.cuh)
//   Type, kOut      what products multiply (wgmma.cuh); words that a lane's 32 codes become
//   kGroups         whether sums of 4 kRun columns are multiplied by factors of their rows
//   kFolded         whether decoding asks for a place of each block of 32 in a table
//   kDown           tensor cores see weights times 2^-kDown
//   kPiece          codes that are decoded at a time
//   decode          words of packed codes to words of fragments
#pragma once

#include "fold_weights.cuh"
#include "matmul_wide_panel.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace turns {

// Integers of kBits, in groups of a multiple of 4 kRun columns, to bfloat16.
template <int kBitsOfCode, int kRunOfLane>
struct Integers {
  using Type = hopper::Bf16;
  static constexpr int kBits = kBitsOfCode, kRun = kRunOfLane, kOut = 16, kDown = 6;
  static constexpr int kPiece = kRun < 32 ? kRun : kBits == 4 ? 32 : 16;
  static constexpr bool kGroups = true, kFolded = false;
  static_assert(kBits == 4 || kBits == 8, "integers have 4 or 8 bits");

  // Below 2^-125 bfloat16 is evenly spaced: the lower byte of each half, with its sign turned into
  // an offset, is a number of steps of 2^-133 as it stands.
  template <int kWords>
  PYFMT_DEVICE static void decode(const uint32_t (&words)[kWords], uint32_t /*place*/,
                                  uint32_t /*table*/, uint32_t* out) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t word = words[i], up = word >> 8;
      if constexpr (kBits == 4) {
        constexpr uint32_t kLow = both(0x7f00u), kHigh = both(0x7d00u), kOff = both(0xbe00u);
        out[4 * i] = fused_pairs(mask_xor(word, both(0x0fu), both(0x08u)), kLow, kOff);
        out[4 * i + 1] = fused_pairs(mask_xor(word, both(0xf0u), both(0x80u)), kHigh, kOff);
        out[4 * i + 2] = fused_pairs(mask_xor(up, both(0x0fu), both(0x08u)), kLow, kOff);
        out[4 * i + 3] = fused_pairs(mask_xor(up, both(0xf0u), both(0x80u)), kHigh, kOff);
      } else {
        constexpr uint32_t kBy = both(0x7f00u), kOff = both(0xc000u);
        out[2 * i] = fused_pairs(mask_xor(word, both(0xffu), both(0x80u)), kBy, kOff);
        out[2 * i + 1] = fused_pairs(mask_xor(up, both(0xffu), both(0x80u)), kBy, kOff);
      }
    }
  }
};

// Weights as fp8: a lane's codes of a chunk are one block.
template <class W>
struct Folding {
  using Type = typename W::Type;
  static constexpr int kBits = W::kBits, kRun = 32, kOut = 8, kDown = W::kDown, kPiece = 32;
  static constexpr bool kGroups = false, kFolded = true;

  PYFMT_DEVICE static void decode(const uint32_t (&words)[kBits], uint32_t place, uint32_t table,
                                  uint32_t* out) {
    W::decode_block(words, place, table, out);
  }
  // The same by parts: W's words are those of kParts whole steps of 32 columns.
  using Meaning = typename W::Meaning;
  static constexpr int kPartsOfBlock = W::kParts;
  PYFMT_DEVICE static Meaning meaning(uint32_t place, uint32_t table) {
    return W::meaning(place, table);
  }
  template <int kPart>
  PYFMT_DEVICE static void decode_part(const uint32_t (&words)[kBits], const Meaning& of,
                                       uint32_t* out) {
    W::template decode_part<kPart>(words, of, out);
  }
  PYFMT_DEVICE static void fill_table(uint32_t at, int thread) { W::fill_table(at, thread); }
  // The places of four blocks in the table, from their scale bytes; offset: of the row.
  PYFMT_DEVICE static uint32_t places(uint32_t scales, int offset) {
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int scale = int(scales >> (8 * i) & 0xffu);
      all |= uint32_t(max(0, min(scale + offset, W::kExponents - 1))) << (8 * i);
    }
    return all;
  }
  PYFMT_DEVICE static int offset_of(float row_scale) { return W::offset_of(row_scale); }
};

}  // namespace turns
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
