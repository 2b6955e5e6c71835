// SPDX-License-Identifier: Apache-2.0
// Clusters and launches that depend on each other, on compute capability 9.0, and what keeps values
// in registers. See hopper.cuh.
//
// Source: NVIDIA, PTX ISA 8.x, "barrier.cluster", "mapa", "griddepcontrol".
#pragma once

#include "hopper.cuh"

namespace pyfmt {
namespace cuda {
namespace hopper {

// ---- clusters, dependent launches -------------------------------------------------------------

PYFMT_DEVICE uint32_t cluster_rank() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
#elif defined(__CUDA_ARCH__)
  return 0;
#else
  return emulated_rank();
#endif
}

// All threads of the cluster that are still running: each arrives, and those wait that need to know
// that all have. Orders no memory but initialized barriers (barrier_init_fence), and so waits for
// no stores or copies under way.
PYFMT_DEVICE void cluster_arrive() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
PYFMT_DEVICE void cluster_wait() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif !defined(__CUDA_ARCH__)
  emulated_cluster_sync();
#endif
}
PYFMT_DEVICE void cluster_meet() {
  cluster_arrive();
  cluster_wait();
}

// The first kThreads threads of the block only; the others do not take part.
template <int kThreads>
PYFMT_DEVICE void partial_sync() {
#if defined(__CUDA_ARCH__)
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
#else
  emulated_sync(kThreads);
#endif
}

// All lanes of the warp, wherever they came from.
PYFMT_DEVICE void warp_sync() {
#if defined(__CUDA_ARCH__)
  __syncwarp();
#else
  emulated_warp_sync();
#endif
}
PYFMT_DEVICE bool any_lane(bool mine) {
#if defined(__CUDA_ARCH__)
  return __any_sync(kAll, mine);
#else
  return emulated_any(mine);
#endif
}
// What another lane of the warp has.
PYFMT_DEVICE float from_lane(float v, int lane) {
#if defined(__CUDA_ARCH__)
  return __shfl_sync(kAll, v, lane);
#else
  return emulated_from(v, lane);
#endif
}

// Hands registers of this warpgroup over to others, or takes them.
template <int kRegisters>
PYFMT_DEVICE void fewer_registers() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
PYFMT_DEVICE void more_registers() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Lets the next kernel of the stream start; it waits for this one's results by itself.
PYFMT_DEVICE void start_dependents() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits for the results of the kernel before this one.
PYFMT_DEVICE void wait_for_previous() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A value that is the same in all lanes of a warp, said so to the compiler.
PYFMT_DEVICE int uniform(int x) {
#if defined(__CUDA_ARCH__)
  return __shfl_sync(kAll, x, 0);
#else
  return x;
#endif
}

// ---- registers --------------------------------------------------------------------------------

// Makes the compiler keep a value instead of working it out anew.
PYFMT_DEVICE void keep(const uint8_t*& p) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(p));
#endif
}

PYFMT_DEVICE void keep(uint32_t& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
}

// Has two words worked out here, not later: a store that never happens asks for them. nothing: a
// zero that the compiler does not know; at: any place in shared memory.
PYFMT_DEVICE void work_out(uint32_t a, uint32_t b, uint32_t nothing, uint32_t at) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 t;\nlop3.b32 t, %0, %1, %2, 0xa8;\nsetp.ne.b32 p, t, 0;\n"
      "@p st.shared.b32 [%3], t;\n}" ::"r"(a),
      "r"(b), "r"(nothing), "r"(at)
      : "memory");
#endif
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pyfmt
