// SPDX-License-Identifier: Apache-2.0
// What compute capability 9.0 brought, one small function each: bulk copies and barriers in shared
// memory (hopper_clusters.cuh has clusters, wgmma.cuh the matrix products). Each has a host text of
// the same meaning, so that kernels built on them run in tests/emulation.
//
// Source: NVIDIA, PTX ISA 8.x, "mbarrier", "cp.async", "cp.async.bulk"; shared memory is addressed
// by 32-bit offsets throughout.
#pragma once

#include <type_traits>

#include "device.cuh"

// The instructions exist for sm_90a only; elsewhere kernels that need them compile to nothing and
// the host refuses to launch them.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYFMT_SM90A 1
#endif

namespace pyfmt {
namespace cuda {
namespace hopper {

constexpr int kMostShared = 232448;  // bytes of one block

#if !defined(__CUDA_ARCH__)
struct EmulatedBarrier {
  uint8_t phase, count, pending, unused;
  int32_t bytes;
};
#if defined(__CUDACC__)
// Named by the host texts below, which nvcc reads but never compiles.
__host__ __device__ char* emulated_at(uint32_t at);
__host__ __device__ void emulated_yield();
__host__ __device__ void emulated_sync(int threads);
__host__ __device__ void emulated_cluster_sync();
__host__ __device__ void emulated_warp_sync();
__host__ __device__ bool emulated_any(bool mine);
__host__ __device__ float emulated_from(float v, int lane);
__host__ __device__ uint32_t emulated_rank();
#else
// A place in the shared memory of this block, or, by its cluster_address, of another.
inline char* emulated_at(uint32_t at) {
  alignas(1024) static char bytes[8][kMostShared / 1024 * 1024 + 1024];
  const int rank = at >> 24 ? int(at >> 24) - 1 : ::emulation::cluster_rank();
  return bytes[rank] + (at & 0xffffffu);
}
inline void emulated_yield() {
  ::emulation::yield();
}
inline void emulated_sync(int threads) {
  ::emulation::sync_some(threads);
}
inline void emulated_cluster_sync() {
  ::emulation::sync_cluster();
}
inline void emulated_warp_sync() {
  ::emulation::sync_warp();
}
inline bool emulated_any(bool mine) {
  return ::emulation::any_of_warp(mine);
}
inline float emulated_from(float v, int lane) {
  static float all[8 * 1024];
  const int me = ::emulation::block().current;
  all[me] = v;
  emulated_warp_sync();
  const float found = all[(me & ~31) + lane];
  emulated_warp_sync();
  return found;
}
inline uint32_t emulated_rank() {
  return uint32_t(::emulation::cluster_rank());
}
#endif
PYFMT_HD EmulatedBarrier& emulated_barrier(uint32_t bar) {
  return *reinterpret_cast<EmulatedBarrier*>(emulated_at(bar));
}
PYFMT_HD void emulated_step(EmulatedBarrier& b) {
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.count;
}
#endif

// ---- shared memory ----------------------------------------------------------------------------

// Where a block's dynamic shared memory starts; aligned to 1024.
PYFMT_DEVICE uint32_t shared_start() {
#if defined(__CUDA_ARCH__)
  extern __shared__ __align__(1024) char dynamic_shared[];
  return uint32_t(__cvta_generic_to_shared(dynamic_shared));
#else
  return 0;
#endif
}

// A place there for ordinary reads and writes.
PYFMT_DEVICE void* shared_pointer(uint32_t at) {
#if defined(__CUDA_ARCH__)
  return __cvta_shared_to_generic(at);
#else
  return emulated_at(at);
#endif
}

PYFMT_DEVICE uint4 load_shared16(uint32_t at) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
#else
  return *reinterpret_cast<const uint4*>(emulated_at(at));
#endif
}

PYFMT_DEVICE uint2 load_shared8(uint32_t at) {
#if defined(__CUDA_ARCH__)
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
#else
  return *reinterpret_cast<const uint2*>(emulated_at(at));
#endif
}

// 1, 2 or 4 bytes.
template <int kBytes>
PYFMT_DEVICE uint32_t load_shared_small(uint32_t at) {
#if defined(__CUDA_ARCH__)
  uint32_t v;
  if constexpr (kBytes == 1) asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  if constexpr (kBytes == 2) asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  if constexpr (kBytes == 4) asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
#else
  uint32_t v = 0;
  memcpy(&v, emulated_at(at), kBytes);
  return v;
#endif
}

PYFMT_DEVICE void store_shared(uint32_t at, uint32_t v) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
#else
  memcpy(emulated_at(at), &v, 4);
#endif
}

PYFMT_DEVICE void store_shared8(uint32_t at, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b) : "memory");
#else
  const uint2 v = {a, b};
  memcpy(emulated_at(at), &v, 8);
#endif
}

PYFMT_DEVICE void store_shared16(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
#else
  const uint4 v = {a, b, c, d};
  memcpy(emulated_at(at), &v, 16);
#endif
}

// kWords (1 or 2) words of global memory; their neighbours are soon to be read.
template <int kWords>
PYFMT_DEVICE void load_words(const uint8_t* from, uint32_t* words) {
#if defined(__CUDA_ARCH__)
  if constexpr (kWords == 1) {
    asm volatile("ld.global.L2::128B.b32 %0, [%1];" : "=r"(words[0]) : "l"(from));
  } else {
    asm volatile("ld.global.L2::128B.v2.b32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(from));
  }
#else
  memcpy(words, from, 4 * kWords);
#endif
}

// A float of global memory, asked for here though it be needed later.
PYFMT_DEVICE float load_early(const float* from) {
#if defined(__CUDA_ARCH__)
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
  return v;
#else
  return *from;
#endif
}

PYFMT_DEVICE float4 load_floats(uint32_t at) {
  const uint4 v = load_shared16(at);
  return {as_float(v.x), as_float(v.y), as_float(v.z), as_float(v.w)};
}

// What this thread stored to shared memory is seen by matrix products and bulk copies that are
// ordered after this by a barrier.
PYFMT_DEVICE void stores_fence() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- barriers ---------------------------------------------------------------------------------

PYFMT_DEVICE void barrier_init(uint32_t bar, uint32_t arrivals) {
#if defined(__CUDA_ARCH__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
#else
  emulated_barrier(bar) = {0, uint8_t(arrivals), uint8_t(arrivals), 0, 0};
#endif
}

// Makes initialized barriers seen by bulk copies and by the rest of the cluster.
PYFMT_DEVICE void barrier_init_fence() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Arrives once and adds `bytes` to what copies are to bring in this phase.
PYFMT_DEVICE void barrier_expect(uint32_t bar, uint32_t bytes) {
#if defined(__CUDA_ARCH__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
#else
  EmulatedBarrier& b = emulated_barrier(bar);
  b.bytes += int32_t(bytes);
  --b.pending;
  emulated_step(b);
#endif
}

// The address by which the cluster knows a place in the shared memory of its block `rank`.
PYFMT_DEVICE uint32_t cluster_address(uint32_t at, uint32_t rank) {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
#else
  return at | (rank + 1) << 24;
#endif
}

// Arrives at a barrier of this block.
PYFMT_DEVICE void barrier_arrive_here(uint32_t bar) {
#if defined(__CUDA_ARCH__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
#else
  EmulatedBarrier& b = emulated_barrier(bar);
  --b.pending;
  emulated_step(b);
#endif
}

// The address of a barrier, once `words` that this warp has read from shared memory are there: an
// arrival does not wait for reads under way, and what they read may be written over after it.
// nothing: a zero that the compiler does not know.
PYFMT_DEVICE uint32_t after_reading(uint32_t bar, uint32_t words, uint32_t nothing) {
  return bar + (words & nothing);
}

// Arrives at a barrier of the cluster, by its cluster_address.
PYFMT_DEVICE void barrier_arrive(uint32_t there) {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
#elif !defined(__CUDA_ARCH__)
  EmulatedBarrier& b = emulated_barrier(there);
  --b.pending;
  emulated_step(b);
#endif
}

// Four floats to a cluster_address; the barrier of that block (by its cluster_address) counts them
// once they are there.
PYFMT_DEVICE void store_counted(uint32_t there, float a, float b, float c, float d, uint32_t bar) {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(there),
      "f"(a), "f"(b), "f"(c), "f"(d), "r"(bar)
      : "memory");
#elif !defined(__CUDA_ARCH__)
  const float4 v = {a, b, c, d};
  memcpy(emulated_at(there), &v, 16);
  EmulatedBarrier& counter = emulated_barrier(bar);
  counter.bytes -= 16;
  emulated_step(counter);
#endif
}

// Waits until the phase of this parity is over.
PYFMT_DEVICE void barrier_wait(uint32_t bar, uint32_t parity) {
#if defined(__CUDA_ARCH__)
  uint32_t done = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  } while (!done);
#else
  while (emulated_barrier(bar).phase == parity) emulated_yield();
#endif
}

// Copies `bytes` (a multiple of 16) to the same place in each block of the cluster in `mask`, whose
// barriers count them. One thread; multicast: more than one block in the mask.
PYFMT_DEVICE void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t bar,
                            uint32_t mask, bool multicast) {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  if (multicast) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(bar), "h"(uint16_t(mask))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(bar)
        : "memory");
  }
#elif !defined(__CUDA_ARCH__)
  for (uint32_t rank = 0; rank < 8; ++rank) {
    if (multicast ? !(mask >> rank & 1) : rank != emulated_rank()) continue;
    const uint32_t there = (rank + 1) << 24;
    memcpy(emulated_at(to | there), from, bytes);
    EmulatedBarrier& b = emulated_barrier(bar | there);
    b.bytes -= int32_t(bytes);
    emulated_step(b);
  }
#endif
}

// Copies kBytes (4, 8 or 16) of which the first `real` are read and the others zeros, in the
// background.
template <int kBytes>
PYFMT_DEVICE void copy_small(uint32_t to, const void* from, int real) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(to), "l"(from),
               "n"(kBytes), "r"(real)
               : "memory");
#else
  memset(emulated_at(to), 0, kBytes);
  memcpy(emulated_at(to), from, size_t(real));
#endif
}
// Arrives once this thread's small copies so far are there.
PYFMT_DEVICE void arrive_after_copies(uint32_t bar) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
#else
  barrier_arrive_here(bar);
#endif
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pyfmt
