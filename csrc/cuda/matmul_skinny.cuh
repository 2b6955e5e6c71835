// SPDX-License-Identifier: Apache-2.0
// The kernel for few tokens: packed weights stream from memory through registers into tensor cores.
//
// The weight is the left operand, 16 rows of it a tensor-core tile, and up to 8 * kTiles columns
// (tokens, or the two or three bfloat16 terms of wider ones) the right one. The order of k inside a
// step is free as long as both sides agree, so a lane takes 16 or 48 contiguous bytes of a row and
// the activations lie in shared memory in the order in which those bytes are decoded.
//
// k is cut into parts: the blocks of a cluster take neighbouring ones, and so do the groups of
// warps in a block. Each part adds up in its own accumulators; the parts meet in shared memory and
// are summed in the order of k. How many parts there are depends on n and k alone, never on the
// number of tokens, so a token's result does not depend on what else is in the batch.
#pragma once

#include "matmul_skinny_x.cuh"

namespace pyfmt {
namespace cuda {

template <class W, int kTiles, Inputs kInputs>
__global__ void __launch_bounds__(32 * SkinnyShape<W, kTiles>::kWarps,
                                  SkinnyShape<W, kTiles>::kBlocks)
    skinny(const __grid_constant__ SkinnyParams p) {
  using Warp = SkinnyWarp<W, kTiles, kInputs>;
  constexpr int kDepth = SkinnyShape<W, kTiles>::kDepth, kRows = 16 * Warp::kRowTiles;
  char* const ring = dynamic_shared();
  char* const shared = ring + p.x_at;
  float* const partial = reinterpret_cast<float*>(ring + p.sums_at);
  const int rank = int(blockIdx.x % unsigned(p.cluster)),
            cluster = int(blockIdx.x / unsigned(p.cluster));
  const int clusters = int(gridDim.x / unsigned(p.cluster));
  const int of_k = int((threadIdx.x >> 5) / unsigned(p.row_warps));
  const int of_n = int(threadIdx.x >> 5) - of_k * p.row_warps;
  const int part = rank * p.k_warps + of_k;
  const int first_step = part_start(p, part), steps = part_start(p, part + 1) - first_step;
  const int first_token = int(blockIdx.y) * p.tile_tokens;
  const int tokens = min(p.tile_tokens, p.tokens - first_token);
  const int columns = tokens * p.terms, stride = 64 * p.columns;
  const int group_rows = kRows * p.row_warps, pitch = group_rows + 4;

  Warp warp(p, ring);
  typename Warp::Scales scales[kDepth];
  const int64_t first_row = int64_t(cluster) * group_rows + of_n * kRows;
  const int64_t row_step = int64_t(clusters) * group_rows;
  bool loading = first_row < p.n;
  if (loading) warp.set_rows(first_row);
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (loading && d < steps) warp.load(d, scales[d], first_step + d);
    close_copies();
  }
  wait_for_earlier_launch();
  allow_next_launch();

  // One column for all where fewer than eight are there: what the others give is never stored.
  const int column = kTiles > 1 ? warp.lane >> 2 : min(warp.lane >> 2, p.columns - 1);
  const char* const x =
      shared + of_k * p.slice_steps * W::kFragments * stride + 64 * column + 16 * warp.t;
  const bool once = p.slice_steps >= p.part_steps;
  bool staged = false;
  for (int64_t row = first_row; row - of_n * kRows < p.n; row += row_step) {
    const bool working = row < p.n;
    if (working) warp.clear();
    for (int slice = 0; slice < p.part_steps; slice += p.slice_steps) {
      if (!(once && staged)) {
        if (staged) block_barrier();
        if (kInputs == Inputs::kBF16 || p.x_dtype == DType::kBF16) {
          stage<W, DType::kBF16, kTiles <= 2 ? 8 : 4>(p, shared, first_token, tokens, rank, slice);
        } else if (p.x_dtype == DType::kFP16) {
          stage<W, DType::kFP16, kTiles <= 2 ? 8 : 4>(p, shared, first_token, tokens, rank, slice);
        } else {
          stage<W, DType::kFP32, kTiles <= 2 ? 8 : 4>(p, shared, first_token, tokens, rank, slice);
        }
        staged = true;
        block_barrier();
      }
      if (!working) continue;
      const int end = min(slice + p.slice_steps, p.part_steps);
      for (int base = slice; base < end; base += kDepth) {
        // The loads that follow are of the next steps, or of the next rows' first ones.
        int next = base + kDepth;
        if (next >= p.part_steps) {
          next = 0;
          loading = row + row_step < p.n;
          if (loading) warp.set_rows(row + row_step);
        }
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          copies_arrived<kDepth - 1>();
          if (base + d < steps) {
            warp.multiply_step(d, scales[d], x + (base + d - slice) * (W::kFragments * stride),
                               stride);
          }
          if (loading && next + d < steps) warp.load(d, scales[d], first_step + next + d);
          close_copies();
        }
      }
    }

    // The parts' sums, column by column: [part of this block][column][row].
    if (working) {
#pragma unroll
      for (int i = 0; i < Warp::kRowTiles * kTiles * 4; ++i) {
        const int tile = i / 4 % kTiles, row_tile = i / 4 / kTiles, c = i % 4;
        const int at = 8 * tile + 2 * warp.t + (c & 1);
        const int line = of_n * kRows + 16 * row_tile + (warp.lane >> 2) + 8 * (c >> 1);
        if (at < columns)
          partial[(of_k * columns + at) * pitch + line] = warp.sums[row_tile][tile][c];
      }
    }
    p.cluster > 1 ? cluster_barrier() : block_barrier();
    const float factor = (p.tensor_scale ? *p.tensor_scale : 1.0f) * float(1 << W::D::kDown);
    for (int i = rank * int(blockDim.x) + int(threadIdx.x); i < group_rows * tokens;
         i += p.cluster * int(blockDim.x)) {
      const int line = i % group_rows, token = i / group_rows;
      const int64_t n = row - of_n * kRows + line;
      if (n >= p.n) continue;
      float sum = 0.0f;
      for (int term = p.terms - 1; term >= 0; --term) {
        const float* one = partial + (token * p.terms + term) * pitch + line;
        // Four at a time: a neighbour's memory is far away.
        for (int first = 0; first < p.cluster * p.k_warps; first += 4) {
          float some[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int part = first + j, from = part / p.k_warps;
            const float* at = one + (part - from * p.k_warps) * columns * pitch;
            if (from < p.cluster) some[j] = p.cluster > 1 ? from_block(at, from) : *at;
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (first + j < p.cluster * p.k_warps) sum = sum + some[j];
          }
        }
      }
      float y = sum * factor;
      if (p.bias) y = y + load_element(p.bias, p.bias_dtype, n);
      store_element(p.out, p.out_dtype, int64_t(first_token + token) * p.n + n, y);
    }
    // Nobody overwrites, or leaves, what another still reads.
    p.cluster > 1 ? cluster_barrier() : block_barrier();
  }
}

// ---- launch -----------------------------------------------------------------------------------

// One of the compiled kernels and what a plan must know of it.
struct SkinnyKernel {
  void (*run)(SkinnyParams) = nullptr;
  int step = 0, depth = 0, slot = 0, fragments = 0, row_tile = 0, warps = 0, blocks = 0, tiles = 0;
};

template <class W, int kTiles, Inputs kInputs>
SkinnyKernel describe_skinny() {
  using Shape = SkinnyShape<W, kTiles>;
  return {skinny<W, kTiles, kInputs>,
          W::kStep,
          Shape::kDepth,
          SkinnyWarp<W, kTiles, kInputs>::kSlotBytes,
          W::kFragments,
          16 * Shape::kRowTiles,
          Shape::kWarps,
          Shape::kBlocks,
          kTiles};
}

template <class W>
SkinnyKernel skinny_kernel(int columns, Inputs inputs) {
  if (inputs == Inputs::kGuarded) return describe_skinny<W, 8, Inputs::kGuarded>();
  if (inputs == Inputs::kAny) {
    return columns <= 8 ? describe_skinny<W, 1, Inputs::kAny>()
                        : describe_skinny<W, 8, Inputs::kAny>();
  }
  return columns <= 8    ? describe_skinny<W, 1, Inputs::kBF16>()
         : columns <= 16 ? describe_skinny<W, 2, Inputs::kBF16>()
         : columns <= 32 ? describe_skinny<W, 4, Inputs::kBF16>()
                         : describe_skinny<W, 8, Inputs::kBF16>();
}

SkinnyKernel skinny_fp4(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_fp6(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_fp8(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_mxint(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_int4(const FormatSpec&, int columns, Inputs);
SkinnyKernel skinny_int8(const FormatSpec&, int columns, Inputs);

}  // namespace cuda
}  // namespace pyfmt
