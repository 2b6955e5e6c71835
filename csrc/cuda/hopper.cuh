// SPDX-License-Identifier: Apache-2.0
// What only compute capability 9.0 has, one small function each: warpgroup matrix products, bulk
// copies, barriers in shared memory, clusters. Each has a host text of the same meaning (one block
// of the grid, no clusters), so that kernels built on them run in tests/emulation.
//
// Source: NVIDIA, PTX ISA 8.x, "Asynchronous Warpgroup Level Matrix Instructions", "mbarrier",
// "cp.async.bulk"; shared memory is addressed by 32-bit offsets throughout.
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
__host__ __device__ char* emulated_shared();
__host__ __device__ void emulated_yield();
#else
inline char* emulated_shared() {
  alignas(1024) static char bytes[kMostShared];
  return bytes;
}
inline void emulated_yield() {
  ::emulation::yield();
}
#endif
PYFMT_HD EmulatedBarrier& emulated_barrier(uint32_t bar) {
  return *reinterpret_cast<EmulatedBarrier*>(emulated_shared() + bar);
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

PYFMT_DEVICE uint4 load_shared16(uint32_t at) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
#else
  return *reinterpret_cast<const uint4*>(emulated_shared() + at);
#endif
}

PYFMT_DEVICE uint2 load_shared8(uint32_t at) {
#if defined(__CUDA_ARCH__)
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
#else
  return *reinterpret_cast<const uint2*>(emulated_shared() + at);
#endif
}

PYFMT_DEVICE void store_shared(uint32_t at, uint32_t v) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
#else
  memcpy(emulated_shared() + at, &v, 4);
#endif
}

PYFMT_DEVICE void store_shared_byte(uint32_t at, uint32_t v) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(at), "r"(v) : "memory");
#else
  emulated_shared()[at] = char(v);
#endif
}

// Four floats at a cluster_address.
PYFMT_DEVICE float4 load_cluster16(uint32_t there) {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
#elif defined(__CUDA_ARCH__)
  return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#else
  return *reinterpret_cast<const float4*>(emulated_shared() + there);
#endif
}

// ---- copies -----------------------------------------------------------------------------------

// kBytes (4, 8 or 16) from global to shared memory by this thread.
template <int kBytes>
PYFMT_DEVICE void copy_async(uint32_t to, const void* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" ::"r"(to), "l"(from),
                 "n"(kBytes)
                 : "memory");
  }
#else
  memcpy(emulated_shared() + to, from, kBytes);
#endif
}

PYFMT_DEVICE void commit_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending groups of this thread's copies are under way.
template <int kPending>
PYFMT_DEVICE void wait_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
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
  return at;
#endif
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
  (void)mask, (void)multicast;
  memcpy(emulated_shared() + to, from, bytes);
  EmulatedBarrier& b = emulated_barrier(bar);
  b.bytes -= int32_t(bytes);
  emulated_step(b);
#endif
}

// ---- clusters, dependent launches -------------------------------------------------------------

PYFMT_DEVICE uint32_t cluster_rank() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
#else
  return 0;
#endif
}

PYFMT_DEVICE void cluster_sync() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The first kThreads threads of the block only; the others do not take part.
template <int kThreads>
PYFMT_DEVICE void partial_sync() {
#if defined(__CUDA_ARCH__)
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
#else
  __syncthreads();
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

// ---- warpgroup products -----------------------------------------------------------------------

// A tile of bf16 rows of 64 (128 bytes) in shared memory, 16-byte pieces q of row r at q ^ (r & 7).
// `tile`: where it lies, aligned to 1024, through tile_code; step: 16 columns each.
PYFMT_DEVICE uint32_t tile_code(uint32_t at) {
  return at >> 4 | 1u << 16;
}
PYFMT_DEVICE uint64_t tile_descriptor(uint32_t tile, int step) {
  constexpr uint32_t kRowsOf8 = 1024 >> 4, kSwizzle128 = 1u << 30;
  return uint64_t(kRowsOf8 | kSwizzle128) << 32 | (tile + 2u * uint32_t(step));
}

// Makes the compiler keep a pointer instead of working it out anew.
PYFMT_DEVICE void keep(const uint8_t*& p) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(p));
#endif
}

// Registers written before are seen by the products that follow.
PYFMT_DEVICE void products_fence() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
PYFMT_DEVICE void products_commit() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kPending>
PYFMT_DEVICE void products_wait() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving a use of these registers across.
template <int kCount>
PYFMT_DEVICE void pin(float (&v)[kCount]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(v[i])::"memory");
#endif
}
template <int kCount>
PYFMT_DEVICE void pin(uint32_t (&v)[kCount]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(v[i])::"memory");
#endif
}

// d (64 x kN, float32) += a (64 x 16, bf16, in registers) * b^T (kN x 16, bf16, a tile); or = where
// `add` is 0. Fragments: lane 4 g + t of warp w holds rows 16 w + g and + 8; of a, columns 2t, 2t +
// 1 of both rows and then 2t + 8, 2t + 9; of d, columns 8 j + 2t, + 1 of both rows, for each j.
template <int kN>
struct Product;

#if !defined(__CUDACC__)
inline float emulated_tile_at(uint64_t b, int row, int column) {
  const uint32_t start = uint32_t(b & 0x3fff) << 4, eight = uint32_t(b >> 32 & 0x3fff) << 4;
  uint32_t at = start + uint32_t(row / 8) * eight + uint32_t(row % 8) * 128 + uint32_t(column) * 2;
  at ^= (at >> 7 & 7) << 4;
  uint16_t half;
  memcpy(&half, emulated_shared() + at, 2);
  return as_float(uint32_t(half) << 16);
}

template <int kN>
void emulated_product(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int add) {
  static uint32_t all[1024][4];
  const int me = int(threadIdx.x), quad = me & ~3, t = me & 3;
  memcpy(all[me], a, 16);
  ::emulation::yield();
  for (int row = 0; row < 2; ++row) {
    float w[16];
    for (int k = 0; k < 16; ++k) {
      const uint32_t pair = all[quad + (k % 8) / 2][row + 2 * (k / 8)];
      w[k] = as_float(k & 1 ? pair & 0xffff0000u : pair << 16);
    }
    for (int j = 0; j < kN / 8; ++j) {
      for (int c = 0; c < 2; ++c) {
        float sum = add ? d[4 * j + 2 * row + c] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += w[k] * emulated_tile_at(b, 8 * j + 2 * t + c, k);
        d[4 * j + 2 * row + c] = sum;
      }
    }
  }
  ::emulation::yield();
}
#endif

#define PYFMT_S8(a, b, c, d, e, f, g, h) \
  "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define PYFMT_S32_0                                          \
  PYFMT_S8(0, 1, 2, 3, 4, 5, 6, 7)                           \
  ", " PYFMT_S8(8, 9, 10, 11, 12, 13, 14, 15) ", " PYFMT_S8( \
      16, 17, 18, 19, 20, 21, 22, 23) ", " PYFMT_S8(24, 25, 26, 27, 28, 29, 30, 31)
#define PYFMT_S32_1                                            \
  PYFMT_S8(32, 33, 34, 35, 36, 37, 38, 39)                     \
  ", " PYFMT_S8(40, 41, 42, 43, 44, 45, 46, 47) ", " PYFMT_S8( \
      48, 49, 50, 51, 52, 53, 54, 55) ", " PYFMT_S8(56, 57, 58, 59, 60, 61, 62, 63)
#define PYFMT_S32_2                                            \
  PYFMT_S8(64, 65, 66, 67, 68, 69, 70, 71)                     \
  ", " PYFMT_S8(72, 73, 74, 75, 76, 77, 78, 79) ", " PYFMT_S8( \
      80, 81, 82, 83, 84, 85, 86, 87) ", " PYFMT_S8(88, 89, 90, 91, 92, 93, 94, 95)
#define PYFMT_S32_3                                                                            \
  PYFMT_S8(96, 97, 98, 99, 100, 101, 102, 103)                                                 \
  ", " PYFMT_S8(104, 105, 106, 107, 108, 109, 110, 111) ", " PYFMT_S8(                         \
      112, 113, 114, 115, 116, 117, 118, 119) ", " PYFMT_S8(120, 121, 122, 123, 124, 125, 126, \
                                                            127)

#define PYFMT_R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PYFMT_R16(i) PYFMT_R4(i), PYFMT_R4(i + 4), PYFMT_R4(i + 8), PYFMT_R4(i + 12)
#define PYFMT_R32(i) PYFMT_R16(i), PYFMT_R16(i + 16)

#if defined(__CUDACC__)
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
#define PYFMT_PRODUCT_ASM(n, places, a0, a1, a2, a3, desc, flag, ...)                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #flag                                      \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" places "}, {%" #a0 \
               ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #desc ", p, 1, 1, 0;\n}"                   \
               : __VA_ARGS__                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
#else
#define PYFMT_PRODUCT_ASM(n, places, a0, a1, a2, a3, desc, flag, ...) (void)a, (void)b, (void)add
#endif
#define PYFMT_PRODUCT(n, places, a0, a1, a2, a3, desc, flag, ...)                          \
  template <>                                                                              \
  struct Product<n> {                                                                      \
    PYFMT_DEVICE static void add_to(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, \
                                    int add) {                                             \
      PYFMT_PRODUCT_ASM(n, places, a0, a1, a2, a3, desc, flag, __VA_ARGS__);               \
    }                                                                                      \
  };
#else
#define PYFMT_PRODUCT(n, ...)                                                            \
  template <>                                                                            \
  struct Product<n> {                                                                    \
    static void add_to(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, int add) { \
      emulated_product<n>(d, a, b, add);                                                 \
    }                                                                                    \
  };
#endif

PYFMT_PRODUCT(64, PYFMT_S32_0, 32, 33, 34, 35, 36, 37, PYFMT_R32(0))
PYFMT_PRODUCT(128, PYFMT_S32_0 ", " PYFMT_S32_1, 64, 65, 66, 67, 68, 69, PYFMT_R32(0),
              PYFMT_R32(32))
PYFMT_PRODUCT(192, PYFMT_S32_0 ", " PYFMT_S32_1 ", " PYFMT_S32_2, 96, 97, 98, 99, 100, 101,
              PYFMT_R32(0), PYFMT_R32(32), PYFMT_R32(64))
PYFMT_PRODUCT(256, PYFMT_S32_0 ", " PYFMT_S32_1 ", " PYFMT_S32_2 ", " PYFMT_S32_3, 128, 129, 130,
              131, 132, 133, PYFMT_R32(0), PYFMT_R32(32), PYFMT_R32(64), PYFMT_R32(96))

}  // namespace hopper
}  // namespace cuda
}  // namespace pyfmt
