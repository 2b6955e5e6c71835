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
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif !defined(__CUDACC__)
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  emulation::mma16816(d, a, b);
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

// ---- memory to shared memory, in the background -----------------------------------------------

// Sixteen bytes, or zeros where not `real`; visible to this thread after `copies_arrived`.
PYFMT_DEVICE void start_copy(void* to, const void* from, bool real) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(real ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = real ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
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

struct ClusterLaunch {
  int64_t clusters = 0;
  int cluster = 1, tiles = 1, threads = 0, shared = 0;
  bool overlap = true;  // start before the launch ahead ends
};

#if defined(__CUDACC__)
// How many clusters of that many blocks run at once; 0 where the device has none.
template <class P>
int clusters_at_once(void (*kernel)(P), int cluster, int threads, int shared) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(cluster));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "shared memory");
  check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "clusters");
  return count;
}

// A grid of clusters * cluster by tiles blocks.
template <class P>
void launch_clusters(void (*kernel)(P), const ClusterLaunch& l, Stream stream, const P& params) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared),
        "shared memory");
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
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
int clusters_at_once(void (*)(P), int, int, int) {
  return 1;
}
template <class P>
void launch_clusters(void (*kernel)(P), const ClusterLaunch& l, Stream, const P& params) {
  emulation::launch_clusters(kernel, l.clusters, l.cluster, l.tiles, l.threads, l.shared, params);
}
#endif

}  // namespace cuda
}  // namespace pyfmt
