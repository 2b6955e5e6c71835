// SPDX-License-Identifier: Apache-2.0
// CUDA on the CPU, for tests: enough of the language to run the kernels of csrc/cuda without a GPU.
//
// One block of the grid (or one cluster) runs at a time, each of its threads as a fiber that yields
// at barriers and warp exchanges. Slow, single-threaded and deterministic; memory errors show under
// a sanitizer.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
inline const char* cudaGetErrorString(int) {
  return "emulated";
}
inline int cudaGetLastError() {
  return 0;
}
inline int cudaSetDevice(int) {
  return 0;
}
inline int cudaGetDevice(int* d) {
  return *d = 0;
}
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return 0;
}

namespace emulation {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

// A barrier of some living threads.
struct Meeting {
  int alive = 0, arrived = 0, generation = 0;

  void step() {
    if (!arrived || arrived != alive) return;
    arrived = 0;
    ++generation;
  }
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint32_t> exchange;
  ucontext_t scheduler;
  int threads = 0, current = 0;  // of all blocks of the cluster
  Meeting block_meeting[8], partial_meeting[8], cluster_meeting;
  std::vector<Meeting> warp_meeting;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
};

inline Block& block() {
  static Block b;
  return b;
}
inline uint3& thread_index() {
  static uint3 i{0, 0, 0};
  return i;
}
inline uint3& block_index() {
  static uint3 i{0, 0, 0};
  return i;
}
inline dim3& grid_size() {
  static dim3 d;
  return d;
}

inline int& cluster_rank() {
  static int rank = 0;
  return rank;
}
inline dim3& block_size() {
  static dim3 d;
  return d;
}

// All living threads arrive before any goes on: the scheduler runs them round by round.
inline void yield() {
  Block& b = block();
  swapcontext(&b.fibers[size_t(b.current)].context, &b.scheduler);
}

inline void entry() {
  Block& b = block();
  b.body(b.arguments);
  b.fibers[size_t(b.current)].done = true;
  yield();
}

// Blocks `first` to `first + cluster - 1` of the grid.
inline void run_blocks(int first, int cluster, int threads, void (*body)(void*), void* arguments) {
  constexpr size_t kStack = 64 * 1024;
  Block& b = block();
  const int all = threads * cluster;
  b.threads = all;
  b.body = body;
  b.arguments = arguments;
  b.exchange.resize(size_t(all));
  for (int r = 0; r < cluster; ++r) b.block_meeting[r] = {threads};
  b.cluster_meeting = {all};
  b.warp_meeting.assign(size_t(all + 31) / 32, {32});
  if (b.fibers.size() < size_t(all)) b.fibers.resize(size_t(all));
  for (int t = 0; t < all; ++t) {
    Fiber& f = b.fibers[size_t(t)];
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &b.scheduler;
    makecontext(&f.context, entry, 0);
  }
  while (b.cluster_meeting.alive) {
    for (int t = 0; t < all; ++t) {
      Fiber& f = b.fibers[size_t(t)];
      if (f.done) continue;
      b.current = t;
      thread_index().x = unsigned(t % threads);
      cluster_rank() = t / threads;
      block_index().x = unsigned(first + t / threads);
      swapcontext(&b.scheduler, &f.context);
      if (f.done) {
        --b.block_meeting[t / threads].alive;
        --b.cluster_meeting.alive;
        --b.warp_meeting[size_t(t / 32)].alive;
      }
    }
    for (int r = 0; r < cluster; ++r) {
      b.block_meeting[r].step();
      b.partial_meeting[r].step();
    }
    for (Meeting& m : b.warp_meeting) m.step();
    b.cluster_meeting.step();
  }
}

// Waits for the others of the block or the cluster, whatever they did in the meantime.
inline void meet(Meeting& m) {
  const int mine = m.generation;
  ++m.arrived;
  while (m.generation == mine) yield();
}
inline void sync_block() {
  meet(block().block_meeting[cluster_rank()]);
}
// `threads` of a block, the same ones all the time.
inline void sync_some(int threads) {
  Meeting& m = block().partial_meeting[cluster_rank()];
  m.alive = threads;
  meet(m);
}
inline void sync_cluster() {
  meet(block().cluster_meeting);
}
// The lanes of a warp, of blocks of whole warps.
inline void sync_warp() {
  meet(block().warp_meeting[size_t(block().current / 32)]);
}
inline bool any_of_warp(bool mine) {
  Block& b = block();
  const int first = b.current & ~31;
  b.exchange[size_t(b.current)] = mine;
  sync_warp();
  bool found = false;
  for (int i = first; i < first + 32; ++i) found = found || b.exchange[size_t(i)];
  sync_warp();
  return found;
}

template <class... P, class... A>
void launch_clusters(void (*kernel)(P...), int64_t blocks, int threads, int cluster,
                     const A&... args) {
  auto bound = std::make_tuple(kernel, args...);
  const auto body = [](void* p) {
    std::apply([](auto k, const auto&... a) { k(a...); }, *static_cast<decltype(bound)*>(p));
  };
  grid_size() = dim3(unsigned(blocks));
  block_size() = dim3(unsigned(threads));
  for (int64_t i = 0; i < blocks; i += cluster) {
    run_blocks(int(i), cluster, threads, body, &bound);
  }
}
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, const A&... args) {
  launch_clusters(kernel, blocks, threads, 1, args...);
}

template <class T>
T shuffle_xor(T value, int far) {
  static_assert(sizeof(T) == 4, "exchanges are of 4 bytes");
  Block& b = block();
  const int me = b.current;
  std::memcpy(&b.exchange[size_t(me)], &value, 4);
  yield();
  T other;
  std::memcpy(&other, &b.exchange[size_t(me ^ far)], 4);
  yield();
  return other;
}

// Whether any lane of the warp says so.
inline bool any(bool mine) {
  Block& b = block();
  const int me = b.current, first = me & ~31;
  b.exchange[size_t(me)] = mine;
  yield();
  bool found = false;
  for (int i = first; i < first + 32 && i < b.threads; ++i) found = found || b.exchange[size_t(i)];
  yield();
  return found;
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define gridDim (::emulation::grid_size())
#define blockDim (::emulation::block_size())

inline void __syncthreads() {
  ::emulation::sync_block();
}
inline void __syncwarp() {
  ::emulation::yield();
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int far) {
  return ::emulation::shuffle_xor(value, far);
}

template <class T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place = before + value;
  return before;
}
inline int cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t) {
  std::memset(place, value, bytes);
  return cudaSuccess;
}
template <class T>
T __shfl_up_sync(unsigned, T value, int far) {
  const int lane = ::emulation::block().current % 32;
  return ::emulation::shuffle_xor(value, lane >= far ? lane ^ (lane - far) : 0);
}
inline bool __any_sync(unsigned, bool mine) {
  return ::emulation::any(mine);
}

inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
inline uint32_t __vmaxs2(uint32_t a, uint32_t b) {
  const auto one = [](uint32_t x, uint32_t y) {
    return uint32_t(uint16_t(int16_t(x) > int16_t(y) ? int16_t(x) : int16_t(y)));
  };
  return one(a, b) | one(a >> 16, b >> 16) << 16;
}
