// SPDX-License-Identifier: Apache-2.0
// Where folded activations lie for the products of matmul_fold.cuh: a panel of tiles, chunk by
// chunk of 128 columns, each with all rows, as shared memory takes them.
//
// A lane multiplies 32 codes of a weight that lie together, so four neighbouring columns of the
// products are not neighbours in a row: the panel has its columns in the products' order.
#pragma once

#include "device.cuh"
#include "expand.h"

namespace pyfmt {
namespace cuda {

// Which of a unit's 32 columns stands in byte `b` of its word `i` (0 to 7), for weights of so many
// bits: FoldWeights::decode says so.
PYFMT_HD constexpr int panel_column(int bits, int i, int b) {
  return bits == 4 ? 4 * i + b : i / 4 * 16 + i % 4 * 2 + b / 2 + b % 2 * 8;
}

// The byte where word `i` of a unit lies: step i / 2 of the chunk's products, 16-byte piece i of
// the row, turned by the row as hopper::tile_descriptor wants it.
PYFMT_HD constexpr int64_t panel_word(int64_t row, int64_t unit, int i, int64_t panel_rows) {
  return (unit / 4 * panel_rows + row) * 128 + (i ^ int(row & 7)) * 16 + unit % 4 * 4;
}

// One element, wherever it lies: for the few that are read again.
PYFMT_DEVICE uint32_t panel_byte(const Folded& f, int64_t row, int64_t column) {
  const int at = int(column % 32);
  const int word = f.order == 4 ? at / 4 : at / 16 * 4 + at % 8 / 2;
  const int byte = f.order == 4 ? at % 4 : at % 2 * 2 + at / 8 % 2;
  return f.fp8[panel_word(row, column / 32, word, f.panel_rows) + byte];
}

// A warp's 32 neighbouring units of a row, eight words of four bytes each in natural order. Chunks
// are written whole: units beyond the end hold zeros. shared: as for Stage<32>.
PYFMT_DEVICE void store_panel(const Folded& to, int64_t row, int64_t unit, int64_t units,
                              const uint32_t* words, uint4* shared) {
  const int lane = threadIdx.x & 31;
  // Piece i of a chunk takes a word of each of four lanes; a lane stores pieces t and t + 4. They
  // are turned by chunk, so that no two lanes share a bank.
  uint32_t* mine = reinterpret_cast<uint32_t*>(shared + (threadIdx.x >> 5) * 64);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t word = words[i];
    if (to.order != 4) {
      const int h = i / 4 * 4, r = i % 4;
      word = pick_bytes(words[h + r / 2], words[h + r / 2 + 2], r % 2 ? 0x7362 : 0x5140);
    }
    mine[lane / 4 * 32 + (i ^ lane / 4) * 4 + lane % 4] = word;
  }
  __syncwarp();
  if (unit / 4 * 4 < units) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = lane % 4 + 4 * half;
      const uint4 piece = reinterpret_cast<const uint4*>(mine)[lane / 4 * 8 + (i ^ lane / 4)];
      uint8_t* at = to.fp8 + panel_word(row, unit / 4 * 4, i, to.panel_rows);
      *reinterpret_cast<uint4*>(at) = piece;
    }
  }
}

}  // namespace cuda
}  // namespace pyfmt
