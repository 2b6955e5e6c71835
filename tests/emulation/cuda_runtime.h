// SPDX-License-Identifier: Apache-2.0
// CUDA on the CPU, for tests: enough of the language to run the kernels of csrc/cuda without a GPU.
//
// One block of the grid runs at a time, each of its threads as a fiber that yields at barriers and
// warp exchanges. Slow, single-threaded and deterministic; memory errors show under a sanitizer.
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
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
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

struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint32_t> exchange;
  ucontext_t scheduler;
  int threads = 0, current = 0;
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

inline void run_block(int threads, void (*body)(void*), void* arguments) {
  constexpr size_t kStack = 64 * 1024;
  Block& b = block();
  b.threads = threads;
  b.body = body;
  b.arguments = arguments;
  b.exchange.resize(size_t(threads));
  if (b.fibers.size() < size_t(threads)) b.fibers.resize(size_t(threads));
  for (int t = 0; t < threads; ++t) {
    Fiber& f = b.fibers[size_t(t)];
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &b.scheduler;
    makecontext(&f.context, entry, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (int t = 0; t < threads; ++t) {
      if (b.fibers[size_t(t)].done) continue;
      b.current = t;
      thread_index().x = unsigned(t);
      swapcontext(&b.scheduler, &b.fibers[size_t(t)].context);
      alive = alive || !b.fibers[size_t(t)].done;
    }
  }
}

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, const A&... args) {
  auto bound = std::make_tuple(kernel, args...);
  const auto body = [](void* p) {
    std::apply([](auto k, const auto&... a) { k(a...); }, *static_cast<decltype(bound)*>(p));
  };
  grid_size() = dim3(unsigned(blocks));
  block_size() = dim3(unsigned(threads));
  for (int64_t i = 0; i < blocks; ++i) {
    block_index().x = unsigned(i);
    run_block(threads, body, &bound);
  }
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

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define gridDim (::emulation::grid_size())
#define blockDim (::emulation::block_size())

inline void __syncthreads() {
  ::emulation::yield();
}
inline void __syncwarp() {
  ::emulation::yield();
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int far) {
  return ::emulation::shuffle_xor(value, far);
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
