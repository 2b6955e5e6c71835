// SPDX-License-Identifier: Apache-2.0
// How packed weights reach the warps of matmul_wide.cuh: each warp copies the codes and scales of
// its 16 rows, a chunk of 128 columns at a time, into a ring in shared memory of its own, several
// chunks ahead.
#pragma once

#include "decode.cuh"
#include "hopper.cuh"
#include "matmul_wide.h"

namespace pyfmt {
namespace cuda {
namespace wide {

constexpr int kRows = 128, kChunk = 128;

struct Params {
  const uint8_t* panel = nullptr;
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  const float* tensor_scale = nullptr;
  const float* bias = nullptr;
  void* y = nullptr;
  DType dtype = DType::kBF16;
  Scale scale = Scale::kE8M0;
  int64_t row_bytes = 0, blocks = 0;  // of a row of w
  int whole = 0;  // chunks that all rows hold in full, with codes and scales aligned
  int m = 0, n = 0, panel_rows = 0, chunks = 0, group_chunks = 1;
  int share = 1, split = 1, n_clusters = 1;
  float up = 1.0f;  // what the decoder leaves out
};

// Elements of w and their scales. Blocks of 32 (E8M0) or 16 (E4M3); float scales belong to groups
// of whole chunks, which are summed on their own.
template <class E, Scale kScale>
struct Weights {
  using D = Decoder<E, kScale>;
  static constexpr int kBits = D::kBits;
  static constexpr int kScaleBytes = kScale == Scale::kE8M0 ? 1 : kScale == Scale::kE4M3 ? 2 : 0;
};

// ---- where a column goes ----------------------------------------------------------------------

// Which of a lane's 32 codes pair `p` (0 to 15) holds in half `which`.
template <int kBits>
PYFMT_HD constexpr int code_of(int p, int which) {
  using D =
      Decoder<std::conditional_t<kBits == 4, e2m1_element,
                                 std::conditional_t<kBits == 6, e2m3_element, e4m3fn_element>>,
              Scale::kE8M0>;
  return p / D::kPairs * D::kElements + D::element(p % D::kPairs, which);
}

// ---- the ring of one warp ---------------------------------------------------------------------

template <class F, int kDepth>
struct Ring {
  static constexpr int kBits = F::kBits;
  static constexpr bool kGroups = F::kScaleBytes == 0;
  static constexpr int kCopies = kBits / 2;  // of 16 bytes a lane: 16 rows of kBits pieces
  static constexpr int kScaleRow = kGroups ? 4 : 4 * F::kScaleBytes;
  static constexpr uint32_t kScalesAt = 256 * kBits, kSlot = kScalesAt + 128;
  static constexpr uint32_t kBytes = kDepth * kSlot;

  const uint8_t* codes;       // of the next chunk to fetch, row 0 of the block
  uint32_t offset[kCopies];   // of this lane's pieces from there
  const uint8_t* scale_from;  // row `lane` of the warp (16 lanes)
  uint32_t slot = 0, ahead = (kDepth - 1) * kSlot;  // places in the ring
  uint32_t at, codes_at, scales_at;  // of the ring, and of what this lane reads there
  int lane, in_group;
  uint32_t half_of[2];  // groups: which half of a word holds the scale of each row

  PYFMT_DEVICE Ring(const Params& p, uint32_t at, int n0, int warp, int lane, int first)
      : at(at), lane(lane) {
    if (n0 >= p.n) n0 = p.n - 1;  // a tile that only completes a cluster
    codes = p.codes + n0 * p.row_bytes + int64_t(first) * (16 * kBits);
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int piece = lane + 32 * j, row = clamp(p, n0, 16 * warp + piece / kBits);
      offset[j] = uint32_t(row) * uint32_t(p.row_bytes) + uint32_t(piece % kBits * 16);
    }
    hopper::keep(this->at);
    codes_at = this->at + uint32_t(lane / 4 * 16 * kBits);
    if constexpr (kBits == 8) codes_at += uint32_t(((lane / 4 & 1) * 4 + lane % 4) * 16);
    if constexpr (kBits == 6) codes_at += uint32_t(lane % 4 * 24);
    if constexpr (kBits == 4) codes_at += uint32_t(lane % 4 * 16);
    scales_at = this->at + kScalesAt + uint32_t(lane / 4 * kScaleRow + lane % 4 * F::kScaleBytes);
    hopper::keep(codes_at);
    hopper::keep(scales_at);
    const int64_t row = n0 + clamp(p, n0, 16 * warp + (lane & 15));
    if constexpr (kGroups) {
      in_group = first % p.group_chunks;
      scale_from = p.scales + (row * p.blocks + first / p.group_chunks) * scale_bytes(p.scale);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t mine = n0 + clamp(p, n0, 16 * warp + lane / 4 + 8 * r);
        half_of[r] = uint32_t(reinterpret_cast<uintptr_t>(p.scales) / 2 + mine * p.blocks +
                              first / p.group_chunks);
      }
    } else {
      scale_from = p.scales + row * p.blocks + 4 * int64_t(first) * F::kScaleBytes;
    }
  }

  PYFMT_DEVICE static int clamp(const Params& p, int n0, int row) {
    return n0 + row < p.n ? row : p.n - 1 - n0;
  }

  // Where the 16 bytes go that this lane copies first; the others lie 512 bytes apart. Codes of 8
  // bits are turned so that the lanes that read together never share a bank.
  PYFMT_DEVICE uint32_t place() const {
    if constexpr (kBits == 8) {
      const int row = lane / 8, piece = lane % 8;
      return uint32_t(row * 128 + (((piece ^ row) & 1) * 4 + piece / 2) * 16);
    }
    return uint32_t(lane * 16);
  }

  // Starts the copies of `chunk`, the one after the last; `step` chunks further comes the next.
  PYFMT_DEVICE void fetch(const Params& p, int chunk, uint32_t to, int step) {
    to += at;
    if (chunk < p.whole) {
#pragma unroll
      for (int j = 0; j < kCopies; ++j) {
        hopper::copy_async<16>(to + place() + 512u * uint32_t(j), codes + offset[j]);
      }
      if (lane < 16) {
        const uint32_t there = to + kScalesAt + uint32_t(lane * kScaleRow);
        if constexpr (kGroups) {
          const uintptr_t word = reinterpret_cast<uintptr_t>(scale_from) & ~uintptr_t(3);
          const uintptr_t end =
              reinterpret_cast<uintptr_t>(p.scales + p.n * p.blocks * scale_bytes(p.scale));
          hopper::copy_some_async<4>(there, reinterpret_cast<const void*>(word),
                                     end - word < 4 ? int(end - word) : 4);
        } else {
          hopper::copy_async<kScaleRow>(there, scale_from);
        }
      }
    } else {
      fetch_bytes(p, chunk, to);
    }
    codes += 16 * kBits * step;
    hopper::keep(codes);
    if constexpr (kGroups) {
      if (++in_group == p.group_chunks) {
        in_group = 0;
        scale_from += scale_bytes(p.scale);
      }
    } else {
      scale_from += 4 * F::kScaleBytes * step;
    }
    hopper::keep(scale_from);
  }

  // Chunks that end inside, and rows that are not aligned.
  PYFMT_DEVICE void fetch_bytes(const Params& p, int chunk, uint32_t to) const {
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int piece = (lane + 32 * j) % kBits;
      const int64_t left = p.row_bytes - (int64_t(chunk) * (16 * kBits) + piece * 16);
#pragma unroll 1
      for (int i = 0; i < 16; ++i) {
        hopper::store_shared_byte(to + place() + uint32_t(512 * j + i),
                                  i < left ? codes[offset[j] + uint32_t(i)] : 0u);
      }
    }
    if (lane >= 16) return;
    const uint32_t there = to + kScalesAt + uint32_t(lane * kScaleRow);
    if constexpr (kGroups) {
      const int bytes = scale_bytes(p.scale);
      const int half = bytes == 2 ? int(reinterpret_cast<uintptr_t>(scale_from) & 2) : 0;
#pragma unroll 1
      for (int i = 0; i < bytes; ++i) {
        hopper::store_shared_byte(there + uint32_t(half + i), scale_from[i]);
      }
    } else {
      // Past the end codes are zeros: any scale of the row serves.
      const int64_t left = p.blocks - int64_t(chunk) * kScaleRow - 1;
#pragma unroll 1
      for (int i = 0; i < kScaleRow; ++i) {
        hopper::store_shared_byte(there + uint32_t(i), scale_from[i < left ? i : left]);
      }
    }
  }

  // This lane's 32 codes of row r.
  PYFMT_DEVICE void read_codes(int r, uint32_t (&words)[kBits]) const {
    const uint32_t from = codes_at + slot + uint32_t(r * 8 * 16 * kBits);
    if constexpr (kBits == 6) {
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const uint2 v = hopper::load_shared8(from + uint32_t(8 * i));
        words[2 * i] = v.x;
        words[2 * i + 1] = v.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBits / 4; ++i) {
        const uint4 v = hopper::load_shared16(i ? from ^ 64u : from);
        words[4 * i] = v.x;
        words[4 * i + 1] = v.y;
        words[4 * i + 2] = v.z;
        words[4 * i + 3] = v.w;
      }
    }
  }

  // The scale bytes of those codes: one (blocks of 32) or two (16).
  PYFMT_DEVICE uint32_t read_scales(int r) const {
    return hopper::load_shared_small<kGroups ? 1 : F::kScaleBytes>(scales_at + slot +
                                                                   uint32_t(r * 8 * kScaleRow));
  }

  // The scale of the group that begins `groups` groups after the first one.
  PYFMT_DEVICE float read_group_scale(int r, Scale kind, uint32_t groups) const {
    const uint32_t word = hopper::load_shared_small<4>(at + slot + kScalesAt +
                                                       uint32_t((lane / 4 + 8 * r) * kScaleRow));
    if (kind == Scale::kFP32) return as_float(word);
    const uint32_t half = (half_of[r] + groups) & 1 ? word >> 16 : word & 0xffffu;
    return kind == Scale::kBF16 ? as_float(half << 16) : from_half(half);
  }

  PYFMT_DEVICE void next() {
    ahead = slot;
    slot = slot == (kDepth - 1) * kSlot ? 0 : slot + kSlot;
  }
};

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
