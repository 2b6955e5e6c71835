// SPDX-License-Identifier: Apache-2.0
// x for matmul_wide_turns.cuh: its columns in the order in which a warp's lanes have the codes of
// w.
//
// K goes by chunks of 128 columns, a chunk by blocks of 4 kRun. Of a row of w, lane t of a quad
// takes the kRun codes that lie together at kRun t of each block, so that loads are wide. A
// fragment however wants columns 2t, 2t + 1, 2t + 8, 2t + 9 of each 16: the panel has x permuted to
// match.
#pragma once

#include <initializer_list>

#include "launch.cuh"
#include "matmul_wide_tiles.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

constexpr int kChunk = 128;

// Elements leave decoding in pairs, by units of eight codes, or sixteen of 6 bits: which of a
// lane's 32 codes half h of its pair p holds. That pair belongs at places 8 p + 2t and the next
// one.
template <int kBits>
PYFMT_HD constexpr int element_of(int p, int h) {
  return kBits == 6   ? p / 8 * 16 + p % 8 + 8 * h
         : kBits == 8 ? p / 2 * 4 + p % 2 + 2 * h
                      : p / 4 * 8 + p % 4 + 4 * h;
}

// The byte of the panel where 16-byte piece q (0 to 7) of 64 places of a token lies: steps of 64
// places, each with all tokens, as the tile in shared memory (hopper::tile_descriptor) wants it.
PYFMT_HD constexpr int64_t panel_piece(int64_t step64, int64_t token, int q, int64_t panel_rows) {
  return (step64 * panel_rows + token) * 128 + ((q ^ int(token & 7)) * 16);
}

// Padded with zeros. A warp writes 8 tokens by one chunk.
template <int kBits, int kRun>
__global__ void __launch_bounds__(kThreads)
    write_panel(const uint16_t* x, uint8_t* panel, int m, int64_t k, int panel_rows, int chunks,
                bool aligned) {
  __shared__ uint32_t shared[kWarps][512];
  hopper::start_dependents();
  const int lane = threadIdx.x & 31, token8 = panel_rows / 8;
  const int64_t unit = int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (unit >= int64_t(token8) * chunks) return;
  const int tokens = int(unit % token8) * 8, chunk = int(unit / token8);
  const int row = lane / 4, t = lane % 4;
  uint32_t* mine = shared[threadIdx.x >> 5];
  hopper::wait_for_previous();

  // This lane's 32 columns: lane t's of each block.
  uint32_t words[16];
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const int block = i / (kRun / 2), within = i % (kRun / 2);
    const int64_t column = int64_t(chunk) * kChunk + block * 4 * kRun + kRun * t + 2 * within;
    const int64_t left = k - column;
    const uint16_t* from = x + int64_t(tokens + row) * k + column;
    if (tokens + row < m && aligned && left >= 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      words[i] = v.x;
      words[i + 1] = v.y;
      words[i + 2] = v.z;
      words[i + 3] = v.w;
    } else {
      const bool exists = tokens + row < m;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = exists && 2 * j < left ? from[2 * j] : 0u;
        const uint32_t high = exists && 2 * j + 1 < left ? from[2 * j + 1] : 0u;
        words[i + j] = low | high << 16;
      }
    }
  }
#pragma unroll
  for (int p = 0; p < 16; ++p) {
    const int a = element_of<kBits>(p, 0), b = element_of<kBits>(p, 1);
    const uint32_t low = a & 1 ? words[a / 2] >> 16 : words[a / 2] & 0xffffu;
    const uint32_t high = b & 1 ? words[b / 2] >> 16 : words[b / 2] & 0xffffu;
    mine[p / 8 * 256 + row * 32 + ((p % 8) ^ row) * 4 + t] = low | high << 16;
  }
  hopper::warp_sync();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int piece = (i & 1) * 32 + lane;  // of the 64 pieces of 8 tokens by 64 places
    const int64_t to = (int64_t(2 * chunk + i / 2) * panel_rows + tokens) * 128 + piece * 16;
    const uint32_t* v = mine + i / 2 * 256 + piece * 4;
    *reinterpret_cast<uint4*>(panel + to) = make_uint4(v[0], v[1], v[2], v[3]);
  }
}

// ---- the host's side --------------------------------------------------------------------------

template <int kBits, int kRun>
void launch_panel(const Params& p, const WideCall& call, Stream stream) {
  const int64_t units = int64_t(p.panel_rows / 8) * p.tiles, k = call.x.row_bytes / 2;
  const bool aligned = aligned16(call.x.data) && k % 8 == 0;
  launch(write_panel<kBits, kRun>, (units + kWarps - 1) / kWarps, kThreads, stream,
         static_cast<const uint16_t*>(call.x.data), const_cast<uint8_t*>(p.panel), p.m, k,
         p.panel_rows, p.tiles, aligned);
}

// Rows of k numbers to rows of pitch, so that each starts at a multiple of 16 bytes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    align_rows(const T* x, T* to, int64_t count, int64_t k, int64_t pitch) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / pitch, column = i % pitch;
  to[i] = column < k ? x[row * k + column] : T(0);
}

// The clocks that a chunk takes on an H200 by a kernel for so many tokens.
struct TileCost {
  int tokens;
  double chunk;
};

// The plan that takes the least time, and how many clocks that is.
inline WidePlan cheapest_plan(int64_t m, int64_t n, int64_t k,
                              std::initializer_list<TileCost> tiles, double* clocks = nullptr) {
  const int sms = multiprocessors();
  const int64_t n_tiles = (n + kRows - 1) / kRows, chunks = (k + kChunk - 1) / kChunk;
  WidePlan best;
  double least = 0;
  for (const TileCost& tile : tiles) {
    for (int split : {1, 2}) {
      if (split > chunks) break;
      const int64_t blocks = n_tiles * ((m + tile.tokens - 1) / tile.tokens) * split;
      const int64_t waves = (blocks + sms - 1) / sms;
      const double own = double(chunks) / split * tile.chunk + 9000 + 30 * tile.tokens;
      const double cost = double(waves) * own;
      if (!best.tokens || cost < least) {
        least = cost;
        if (clocks) *clocks = cost;
        best.tokens = tile.tokens;
        best.split = split;
      }
    }
  }
  return best;
}

inline int64_t panel_rows(int64_t m, int tokens) {
  return (m + tokens - 1) / tokens * tokens;
}
inline bool rows_of_16(const void* codes, int64_t row_bytes) {
  return aligned16(codes) && row_bytes % 16 == 0;
}
// What a copy of codes takes, where tensor maps do not take them as they lie.
inline int64_t aligned_codes_bytes(const void* codes, int64_t row_bytes, int64_t rows) {
  return rows_of_16(codes, row_bytes) ? 0 : rows * ((row_bytes + 15) / 16 * 16);
}
// Codes, or that copy of them.
inline hopper::MatrixBox align_codes(const hopper::MatrixBox& codes, uint8_t* to, Stream stream) {
  if (rows_of_16(codes.data, codes.row_bytes)) return codes;
  const int64_t pitch = (codes.row_bytes + 15) / 16 * 16, count = codes.rows * pitch;
  launch(align_rows<uint8_t>, blocks_for(count), kThreads, stream,
         static_cast<const uint8_t*>(codes.data), to, count, codes.row_bytes, pitch);
  return {to, pitch, codes.rows, pitch};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
