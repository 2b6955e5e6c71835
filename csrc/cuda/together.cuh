// SPDX-License-Identifier: Apache-2.0
// The largest magnitude of all blocks of a launch, found by all of them in the same launch: a
// second one would begin some two microseconds after the first.
//
// Each block leaves what it has in a slot of its own and reads the others'. A block that has waited
// long (where not all blocks run at once) goes through everything itself, so nobody waits for ever.
#pragma once

#include "beside.cuh"
#include "together.h"
#include "warp.cuh"

namespace pyfmt {
namespace cuda {

constexpr uint32_t kMissed = 0xffffffffu;

PYFMT_DEVICE uint4 slot_of(const Together& t, uint32_t largest) {
  return make_uint4(largest, uint32_t(t.call), ~largest, uint32_t(t.call >> 32));
}
PYFMT_DEVICE void store_slot(uint4* to, const uint4& v) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#else
  *to = v;
#endif
}
PYFMT_DEVICE uint4 load_slot(const uint4* from) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
#else
  return *from;
#endif
}

constexpr int kThreadsTogether = 64;

// All threads of the block; `room` is used once.
PYFMT_DEVICE uint32_t largest_of_block(uint32_t mine, uint32_t (&room)[2]) {
  mine = largest_of_lanes(mine);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = mine;
  __syncthreads();
  return L::max(room[0], room[1]);
}

// mine: of what this thread has; all threads of the block. kMissed: others did not come.
PYFMT_DEVICE uint32_t largest_together(const Together& t, uint32_t mine) {
#if defined(__CUDA_ARCH__)
  constexpr int kPatience = 1 << 14;  // reads, some milliseconds
#else
  constexpr int kPatience = 1;  // blocks run one after the other
#endif
  __shared__ uint32_t first[2], second[2];
  uint32_t largest = largest_of_block(mine, first);
  if (threadIdx.x == 0) store_slot(static_cast<uint4*>(t.slots) + blockIdx.x, slot_of(t, largest));
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < gridDim.x; i += kThreadsTogether) {
    uint32_t found = kMissed;
#pragma unroll 1
    for (int reads = 0; reads < kPatience; ++reads) {
      const uint4 v = load_slot(static_cast<const uint4*>(t.slots) + i), want = slot_of(t, v.x);
      if (v.y == want.y && v.z == want.z && v.w == want.w) {
        found = v.x;
        break;
      }
    }
    largest = L::max(largest, found);
  }
  return largest_of_block(largest, second);
}

PYFMT_DEVICE void load_rotated_eight(const void* x, const RotationParams& r, uint32_t eight,
                                     bool live, float (&v)[8]) {
  load_eight(x, r, eight, live, v);
  if (r.size) rotate_eight<false>(v, r);
}

// Of all rotated numbers of x, eight a thread, the finite ones; v: this thread's. All threads of
// the block.
PYFMT_DEVICE uint32_t largest_of_x(const Together& t, const void* x, const RotationParams& r,
                                   uint32_t eights, uint32_t eight, float (&v)[8]) {
  __shared__ uint32_t room[2];
  uint32_t largest = largest_together(t, largest_finite(v));
  if (largest != kMissed) return largest;
  largest = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < eights; first += kThreadsTogether) {
    const uint32_t i = first + threadIdx.x;
    load_rotated_eight(x, r, i, i < eights, v);
    largest = L::max(largest, largest_finite(v));
  }
  load_rotated_eight(x, r, eight, eight < eights, v);
  return largest_of_block(largest, room);
}

}  // namespace cuda
}  // namespace pyfmt
