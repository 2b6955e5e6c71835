// SPDX-License-Identifier: Apache-2.0
// Boxes of a matrix in global memory, brought to shared memory by the bulk copy engine. What lies
// beyond the matrix arrives as zeros.
//
// Source: NVIDIA, PTX ISA 8.x, "cp.async.bulk.tensor"; CUDA driver API, cuTensorMapEncodeTiled.
#pragma once

#if defined(__CUDACC__)
#include <cuda.h>
#endif

#include "hopper_clusters.cuh"

namespace pyfmt {
namespace cuda {
namespace hopper {

// A matrix of bytes and the box that a copy brings. Rows of a box lie end to end in shared memory;
// where they have 32, 64 or 128 bytes, 16-byte pieces change places: address bits 4 to 6 are
// exclusive-ored with bits 7 to 9, as many of them as pieces need (`turned`).
struct MatrixBox {
  const void* data = nullptr;  // aligned to 16
  int64_t row_bytes = 0, rows = 0;
  int64_t pitch = 0;  // bytes from row to row, a multiple of 16
  int box_bytes = 0, box_rows = 0;
};

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
using TensorMap = MatrixBox;
#endif

constexpr uint32_t turn_mask(int row_bytes) {
  return row_bytes == 128 ? 7u : row_bytes == 64 ? 3u : row_bytes == 32 ? 1u : 0u;
}
// Where the byte that belongs at `at` lies, in boxes whose rows have kRowBytes.
template <int kRowBytes>
PYFMT_DEVICE uint32_t turned(uint32_t at) {
  constexpr uint32_t kMask = turn_mask(kRowBytes);
  return kMask ? at ^ (at >> 7 & kMask) << 4 : at;
}

#if defined(__CUDACC__)
inline TensorMap encode(const MatrixBox& m) {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  TensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(m.row_bytes), cuuint64_t(m.rows)};
  const cuuint64_t pitch = cuuint64_t(m.pitch);
  const cuuint32_t box[2] = {cuuint32_t(m.box_bytes), cuuint32_t(m.box_rows)}, steps[2] = {1, 1};
  const uint32_t mask = turn_mask(m.box_bytes);
  const CUresult result =
      function(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(m.data), sizes, &pitch,
               box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               mask == 7   ? CU_TENSOR_MAP_SWIZZLE_128B
               : mask == 3 ? CU_TENSOR_MAP_SWIZZLE_64B
               : mask == 1 ? CU_TENSOR_MAP_SWIZZLE_32B
                           : CU_TENSOR_MAP_SWIZZLE_NONE,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue, "tensor map");
  return map;
}
#else
inline TensorMap encode(const MatrixBox& m) {
  const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.pitch % 16 == 0;
  check(aligned && m.box_bytes % 16 == 0 && m.box_rows <= 256 ? cudaSuccess : 1, "tensor map");
  return m;
}
#endif

// Brings the descriptor itself nearer.
PYFMT_DEVICE void prefetch_map(const TensorMap& map) {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  (void)map;
#endif
}

// Copies the box that starts at byte `column` of row `row` to the same place in each block of the
// cluster in `mask`, whose barriers count its bytes. One thread; multicast: other blocks than this
// one are in the mask, which is of no meaning otherwise.
PYFMT_DEVICE void copy_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t bar,
                           uint32_t mask, bool multicast) {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  if (multicast) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(bar), "h"(uint16_t(mask))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(bar)
        : "memory");
  }
#elif !defined(__CUDACC__)
  for (uint32_t rank = 0; rank < 8; ++rank) {
    if (multicast ? !(mask >> rank & 1) : rank != emulated_rank()) continue;
    const uint32_t there = (rank + 1) << 24, turn = turn_mask(map.box_bytes);
    for (int r = 0; r < map.box_rows; ++r) {
      for (int b = 0; b < map.box_bytes; b += 16) {
        uint32_t at = to + uint32_t(r * map.box_bytes + b);
        at ^= (at >> 7 & turn) << 4;
        for (int i = 0; i < 16; ++i) {
          const bool inside = row + r < map.rows && column + b + i < map.row_bytes;
          const char* from = static_cast<const char*>(map.data) + (row + r) * map.pitch + column;
          emulated_at(at | there)[i] = inside ? from[b + i] : char(0);
        }
      }
    }
    EmulatedBarrier& barrier = emulated_barrier(bar | there);
    barrier.bytes -= int32_t(map.box_rows * map.box_bytes);
    emulated_step(barrier);
  }
#endif
}

// What is read once leaves the second-level cache first, so that what is read again stays.
PYFMT_DEVICE uint64_t read_once() {
  uint64_t policy = 0;
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
#endif
  return policy;
}
// The same copy to this block alone, by such a policy.
PYFMT_DEVICE void copy_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t bar,
                           uint64_t policy) {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(bar), "l"(policy)
      : "memory");
#else
  copy_box(to, map, column, row, bar, 0, false);
#endif
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pyfmt
