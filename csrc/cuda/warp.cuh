// SPDX-License-Identifier: Apache-2.0
// What a warp, a block and a cluster of blocks do together: tensor-core steps, votes, barriers,
// reads from a neighbour's shared memory. The host texts run in the emulation of tests/emulation.
#pragma once

#include "device.cuh"
#if !defined(__CUDACC__)
#include "clusters.h"
#endif

namespace pyfmt {
namespace cuda {

// d += A (16 x 16, row by row) B (16 x 8, column by column), bfloat16 with float32 sums. Lane l
// holds of A rows l / 4 and l / 4 + 8, of B column l / 4, of d columns 2 (l % 4) and the next.
PYFMT_DEVICE void mma16816(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif !defined(__CUDACC__)
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  emulation::mma16816(d, a, b);
#endif
}

// d = A (16 x 32) B (32 x 8) + c, signed bytes with int32 sums. Lane l holds of A rows l / 4 and
// l / 4 + 8 by columns 4 (l % 4) and three more, then the same 16 columns on; of B the same of
// column l / 4; of d columns 2 (l % 4) and the next.
PYFMT_DEVICE void mma16832(uint32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1, const uint32_t (&c)[4]) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]),
        "r"(c[3]));
#elif !defined(__CUDACC__)
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  emulation::mma16832(d, a, b, c);
#endif
}

PYFMT_DEVICE bool any_lane(bool mine) {
#if defined(__CUDA_ARCH__)
  return __any_sync(kAll, mine);
#elif !defined(__CUDACC__)
  return emulation::any_lane(mine);
#else
  return mine;
#endif
}

PYFMT_DEVICE uint32_t lane_xor(uint32_t value, int far) {
#if defined(__CUDA_ARCH__)
  return __shfl_xor_sync(kAll, value, far);
#elif !defined(__CUDACC__)
  return emulation::from_lane(value, int(threadIdx.x & 31) ^ far);
#else
  return value;
#endif
}

PYFMT_DEVICE uint32_t from_lane(uint32_t value, int lane) {
#if defined(__CUDA_ARCH__)
  return __shfl_sync(kAll, value, lane);
#elif !defined(__CUDACC__)
  return emulation::from_lane(value, lane);
#else
  return value;
#endif
}

// The lanes of a warp, what they wrote to shared memory included.
PYFMT_DEVICE void warp_barrier() {
#if defined(__CUDA_ARCH__)
  __syncwarp();
#elif !defined(__CUDACC__)
  emulation::warp_barrier();
#endif
}

PYFMT_DEVICE void block_barrier() {
#if defined(__CUDA_ARCH__)
  __syncthreads();
#elif !defined(__CUDACC__)
  emulation::block_barrier();
#endif
}

// All threads of all blocks of the cluster, what they wrote to shared memory included.
PYFMT_DEVICE void cluster_barrier() {
#if defined(__CUDA_ARCH__)
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::cluster_barrier();
#endif
}

// What block `rank` of the cluster holds where this block holds *mine.
PYFMT_DEVICE float from_block(const float* mine, int rank) {
#if defined(__CUDA_ARCH__)
  const uint32_t here = uint32_t(__cvta_generic_to_shared(mine));
  uint32_t there;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  return value;
#elif !defined(__CUDACC__)
  return *emulation::in_block(mine, rank);
#else
  return *mine;
#endif
}

// The launch's dynamic shared memory.
PYFMT_DEVICE char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ uint4 dynamic[];
  return reinterpret_cast<char*>(dynamic);
#else
  return emulation::dynamic_shared();
#endif
}

// ---- shared memory by its addresses -------------------------------------------------------------

// kBytes: 1, 2 or 4.
template <int kBytes>
PYFMT_DEVICE uint32_t load_small(SharedAddress from) {
#if defined(__CUDA_ARCH__)
  uint32_t v;
  if constexpr (kBytes == 1)
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  if constexpr (kBytes == 2)
    asm volatile("{.reg .b16 h;\n ld.shared.b16 h, [%1];\n cvt.u32.u16 %0, h;}"
                 : "=r"(v)
                 : "r"(from)
                 : "memory");
  if constexpr (kBytes == 4)
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
#else
  uint32_t v = 0;
  memcpy(&v, reinterpret_cast<const void*>(from), kBytes);
  return v;
#endif
}

template <int kBytes>
PYFMT_DEVICE void store_small(SharedAddress to, uint32_t v) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 2)
    asm volatile("{.reg .b16 h;\n cvt.u16.u32 h, %1;\n st.shared.b16 [%0], h;}" ::"r"(to), "r"(v)
                 : "memory");
  if constexpr (kBytes == 4) asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
#else
  memcpy(reinterpret_cast<void*>(to), &v, kBytes);
#endif
}

// Sixteen bytes that no launch under way writes, by way of the first-level cache.
PYFMT_DEVICE uint4 load_once16(const void* from) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
#else
  uint4 v;
  memcpy(&v, from, 16);
  return v;
#endif
}

// Sixteen bytes that an earlier launch wrote, and four. Not by ld.nc: the assembler moves that
// above the wait for the earlier launch.
PYFMT_DEVICE uint4 load_later16(const void* from) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
#else
  uint4 v;
  memcpy(&v, from, 16);
  return v;
#endif
}
PYFMT_DEVICE uint32_t load_later4(const void* from) {
  uint32_t v;
#if defined(__CUDA_ARCH__)
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
#else
  memcpy(&v, from, 4);
#endif
  return v;
}
// Sixteen bytes that an earlier launch wrote, or zeros; without a branch, so that many of them
// start at once. Not by ld.nc: the assembler moves that above the wait for the earlier launch.
PYFMT_DEVICE uint4 load_later16_if(bool wanted, const void* from) {
#if defined(__CUDA_ARCH__)
  uint4 v = make_uint4(0, 0, 0, 0);
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
      "@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(uint32_t(wanted))
      : "memory");
  return v;
#else
  uint4 v = make_uint4(0, 0, 0, 0);
  if (wanted) memcpy(&v, from, 16);
  return v;
#endif
}

// Four matrices of eight rows of 16 bytes, whose addresses eight lanes each hold: lane l gets of
// each matrix the word l % 4 of row l / 4.
PYFMT_DEVICE void load_matrices(SharedAddress row, uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
#elif !defined(__CUDACC__)
  const uintptr_t base = reinterpret_cast<uintptr_t>(dynamic_shared());
  const int lane = int(threadIdx.x & 31);
  for (int i = 0; i < 4; ++i) {
    const uintptr_t from = base + emulation::from_lane(uint32_t(row - base), 8 * i + lane / 4);
    memcpy(words + i, reinterpret_cast<const void*>(from + uintptr_t(4 * (lane % 4))), 4);
  }
#endif
}

// Keep the compiler from working a value out anew where it is used.
template <class T>
PYFMT_DEVICE void keep(T& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
#endif
}

// ---- memory to shared memory, in the background -----------------------------------------------

// kBytes, 4, 8 or 16, of which the first `real` are read and the others zeros; visible to this
// thread after `copies_arrived`.
template <int kBytes>
PYFMT_DEVICE void start_copy(SharedAddress to, const void* from, int real) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(real)
                 : "memory");
  }
#else
  memset(reinterpret_cast<void*>(to), 0, kBytes);
  memcpy(reinterpret_cast<void*>(to), from, size_t(real));
#endif
}
// The same of 16 bytes; memory is read by whole lines of 128, whose rest is to be copied soon.
PYFMT_DEVICE void start_copy_line(SharedAddress to, const void* from, int real) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(real)
               : "memory");
#else
  start_copy<16>(to, from, real);
#endif
}
// The copies started since the last call make one group.
PYFMT_DEVICE void close_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Wait until at most kLater of this thread's groups are under way.
template <int kLater>
PYFMT_DEVICE void copies_arrived() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
#endif
}

// ---- signals between warps ---------------------------------------------------------------------

// A barrier in shared memory on which some arrive and others wait: eight bytes.
PYFMT_DEVICE void signal_init(SharedAddress signal, int arrivals) {
#if defined(__CUDA_ARCH__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(signal), "r"(arrivals) : "memory");
#elif !defined(__CUDACC__)
  emulation::signal(signal) = {0, uint8_t(arrivals), uint8_t(arrivals), 0};
#endif
}
PYFMT_DEVICE void signal_arrive(SharedAddress signal) {
#if defined(__CUDA_ARCH__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(signal) : "memory");
#elif !defined(__CUDACC__)
  emulation::signal(signal).arrive();
#endif
}
// Until all have arrived for the phase-th time, counted from 0 and known by its last bit.
PYFMT_DEVICE void signal_wait(SharedAddress signal, unsigned phase) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "{\n.reg .pred done;\n"
      "again_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n}" ::"r"(signal),
      "r"(phase & 1)
      : "memory");
#elif !defined(__CUDACC__)
  while ((emulation::signal(signal).phase & 1) == (phase & 1)) emulation::yield();
#endif
}

// ---- between the blocks of a cluster ------------------------------------------------------------

// Signals that were initialized before this are seen by the cluster after its next barrier.
PYFMT_DEVICE void signal_init_fence() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// All threads of the cluster arrive, then wait. Orders no memory but signals that were initialized,
// and so does not wait for copies under way.
PYFMT_DEVICE void cluster_arrive() {
#if defined(__CUDA_ARCH__)
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
PYFMT_DEVICE void cluster_wait() {
#if defined(__CUDA_ARCH__)
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::cluster_barrier();
#endif
}
// The address of what lies in block `rank` where `mine` lies in this one.
PYFMT_DEVICE SharedAddress address_in_block(SharedAddress mine, int rank) {
#if defined(__CUDA_ARCH__)
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mine), "r"(rank));
  return there;
#elif !defined(__CUDACC__)
  return emulation::in_block(mine, rank);
#else
  return mine;
#endif
}
// Arrives, and has the phase wait for `bytes` that another block sends.
PYFMT_DEVICE void signal_expect(SharedAddress signal, int bytes) {
#if defined(__CUDA_ARCH__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(signal), "r"(bytes)
               : "memory");
#elif !defined(__CUDACC__)
  emulation::signal(signal).bytes += bytes;
  emulation::signal(signal).arrive();
#endif
}
// A number to an address_in_block, counted by a signal there when it has arrived.
PYFMT_DEVICE void send4(SharedAddress there, float v, SharedAddress signal) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(there),
      "f"(v), "r"(signal)
      : "memory");
#elif !defined(__CUDACC__)
  memcpy(reinterpret_cast<void*>(there), &v, 4);
  emulation::signal(signal).bytes -= 4;
  emulation::signal(signal).step();
#endif
}

// ---- launches -----------------------------------------------------------------------------------

// What blocks of an earlier launch left for each other (together.cuh).
PYFMT_DEVICE void clear_slots(void* slots, int count) {
  if (blockIdx.x) return;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    static_cast<uint4*>(slots)[i] = make_uint4(0, 0, 0, 0);
  }
}

struct ClusterLaunch {
  int64_t clusters = 0;
  int cluster = 1, tiles = 1, threads = 0, shared = 0;
  bool overlap = true;  // start before the launch ahead ends
  bool spread = false;  // the blocks of a cluster to different multiprocessors
};

#if defined(__CUDACC__)
// A grid of clusters * cluster by tiles blocks.
template <class P>
void launch_clusters(void (*kernel)(P), const ClusterLaunch& l, Stream stream, const P& params) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared),
        "shared memory");
  cudaLaunchAttribute attributes[3];
  unsigned count = 0;
  if (l.spread) {
    attributes[count].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    attributes[count++].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
  }
  if (l.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (l.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = unsigned(l.cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(l.clusters * l.cluster), unsigned(l.tiles));
  config.blockDim = dim3(unsigned(l.threads));
  config.dynamicSmemBytes = size_t(l.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, params), "launch");
}
#else
template <class P>
void launch_clusters(void (*kernel)(P), const ClusterLaunch& l, Stream, const P& params) {
  emulation::launch_clusters(kernel, l.clusters, l.cluster, l.tiles, l.threads, l.shared, params);
}
#endif

}  // namespace cuda
}  // namespace pyfmt
