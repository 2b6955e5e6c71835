// SPDX-License-Identifier: Apache-2.0
// What the kernels of matmul_wide.h are given, and which part of it a block works on.
#pragma once

#include "matmul_wide.h"
#include "tensor_map.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

constexpr int kRows = 128;  // of w, in a block
constexpr int kBatch = 4;   // K is divided between multiples of so many tiles

constexpr int kConsumers = 256;  // threads that multiply

struct Params {
  hopper::TensorMap x, codes_map;
  const uint8_t* panel = nullptr;  // x again, as matmul_wide_panel.cuh writes it
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  const float* tensor_scale = nullptr;
  const float* x_scale = nullptr;  // of each row, or null
  const float* w_scale = nullptr;
  const float* bias = nullptr;
  void* y = nullptr;
  DType dtype = DType::kBF16;
  Scale scale = Scale::kE8M0;
  int64_t row_bytes = 0, blocks = 0;        // of a row of w
  bool copied_codes = false;                // aligned for codes_map
  bool wide_scales = false;                 // aligned for loads of a batch
  int scales_align = 1;                     // bytes (up to 16) to which scales of rows are aligned
  int group_runs = 1;                       // groups: of so many runs of 32 columns
  int m = 0, n = 0, tiles = 0, middle = 0;  // middle: where the second part of K begins
  int panel_rows = 0;
  unsigned n_clusters = 1;
  int share = 1, split = 1, share_bits = 0;
  int parts = 1, parts_bits = 0;  // of K, each again `split` blocks of a cluster
  float* partials = nullptr;      // sums of those parts
  int early = 1;                  // slots of a warpgroup that are asked for ahead of x
  bool ordered = false;           // columns of x lie in the order of codes
  float up = 1.0f;                // what the decoder leaves out
  uint32_t nothing = 0;           // of hopper::after_reading
  // Of matmul_wide_groups.cuh: numbers from row to row of y; and codes of other rows of w, eight in
  // each of `later` units, that are written out beside the products.
  int y_pitch = 0;
  const uint8_t* later_codes = nullptr;
  void* later_to = nullptr;
  int64_t later = 0;
};

// A place of a ring, in turn.
template <uint32_t kCount>
struct Ring {
  uint32_t place = 0, parity = 0;

  PYFMT_DEVICE void next() {
    if (++place == kCount) {
      place = 0;
      parity ^= 1;
    }
  }
};

// How the host asks for a launch: matrices without their boxes.
struct WideCall {
  hopper::MatrixBox x, codes;
  int tokens = 64;
  uint8_t* room = nullptr;  // for parts of w that are written out, or null
};

// The cluster of a block: `share` neighbours along w read each tile of x together, times `split`
// parts of K.
struct Place {
  uint32_t base;
  int sub, part, n0, m0, first, last;  // tiles first to last - 1

  template <int kTokens>
  PYFMT_DEVICE static Place of(const Params& p) {
    Place at;
    at.base = hopper::shared_start();
    hopper::keep(at.base);
    const int rank = p.share * p.split > 1 ? int(hopper::cluster_rank()) : 0;
    const unsigned cluster = blockIdx.x >> (p.share_bits + p.split - 1);
    const unsigned m_tile = cluster / p.n_clusters;
    at.sub = rank & (p.share - 1);
    at.part = rank >> p.share_bits;
    at.n0 = int((cluster - m_tile * p.n_clusters) << p.share_bits | unsigned(at.sub)) * kRows;
    at.m0 = int(m_tile) * kTokens;
    at.first = at.part ? p.middle : 0;
    at.last = at.part + 1 == p.split ? p.tiles : p.middle;
    return at;
  }
};

// ---- shared memory ----------------------------------------------------------------------------

// Barriers, and from kTableAt on up to 256 bytes for decoding. Sums are staged behind it, in rows
// of kPitch.
constexpr int kHeader = 1024, kPitch = kRows + 4;
constexpr uint32_t kTableAt = 768;

// For the sums of the other part of K.
PYFMT_DEVICE uint32_t sums_barrier(uint32_t base) {
  return base + 192u;
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
