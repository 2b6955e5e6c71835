// SPDX-License-Identifier: Apache-2.0
// Clusters of blocks on the CPU: every thread of every block of one cluster is a fiber; warps and
// blocks meet at gates of their own, so they may take different paths between barriers.
#pragma once

#include <cstddef>

namespace emulation {

struct Gate {
  int arrived = 0;
  unsigned phase = 0;

  void pass(int expected) {
    const unsigned mine = phase;
    if (++arrived == expected) {
      arrived = 0;
      ++phase;
    } else {
      while (phase == mine) yield();
    }
  }
};

struct Cluster {
  int blocks = 1, threads = 0, shared_bytes = 0;
  std::vector<uint4> shared;
  std::vector<Gate> warp_gates, block_gates;
  Gate gate;
  struct Lane {
    uint32_t word = 0, a[4] = {}, b[2] = {};
  };
  std::vector<Lane> lanes;
};

inline Cluster& cluster() {
  static Cluster c;
  return c;
}
inline int current_block() {
  return block().current / cluster().threads;
}
inline void warp_barrier() {
  cluster().warp_gates[size_t(block().current / 32)].pass(32);
}
inline void block_barrier() {
  cluster().block_gates[size_t(current_block())].pass(cluster().threads);
}
inline void cluster_barrier() {
  cluster().gate.pass(cluster().threads * cluster().blocks);
}
inline char* dynamic_shared() {
  return reinterpret_cast<char*>(cluster().shared.data()) +
         size_t(current_block()) * size_t(cluster().shared_bytes);
}
// A barrier in shared memory: phase counts how often all have arrived, and the bytes that they
// announced.
struct Signal {
  uint16_t phase;
  uint8_t count, pending;
  int32_t bytes;

  void arrive() {
    --pending;
    step();
  }
  void step() {
    if (pending || bytes) return;
    pending = count;
    ++phase;
  }
};
inline Signal& signal(uintptr_t at) {
  return *reinterpret_cast<Signal*>(at);
}

inline uintptr_t in_block(uintptr_t mine, int rank) {
  return mine + uintptr_t(ptrdiff_t(rank - current_block()) * cluster().shared_bytes);
}
template <class T>
const T* in_block(const T* mine, int rank) {
  return reinterpret_cast<const T*>(in_block(reinterpret_cast<uintptr_t>(mine), rank));
}

inline Cluster::Lane* warp_lanes() {
  return cluster().lanes.data() + block().current / 32 * 32;
}
inline bool any_lane(bool mine) {
  Cluster::Lane* lanes = warp_lanes();
  lanes[block().current % 32].word = mine;
  warp_barrier();
  bool any = false;
  for (int i = 0; i < 32; ++i) any = any || lanes[i].word;
  warp_barrier();
  return any;
}
inline uint32_t from_lane(uint32_t value, int lane) {
  Cluster::Lane* lanes = warp_lanes();
  lanes[block().current % 32].word = value;
  warp_barrier();
  const uint32_t found = lanes[lane & 31].word;
  warp_barrier();
  return found;
}
inline float half_of(uint32_t pair, int which) {
  const uint32_t bits = which ? pair & 0xffff0000u : pair << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// The operands of all lanes of a warp, until the next warp_barrier.
inline Cluster::Lane* lay_out(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Cluster::Lane* lanes = warp_lanes();
  const int lane = block().current % 32;
  std::memcpy(lanes[lane].a, a, sizeof a);
  std::memcpy(lanes[lane].b, b, sizeof b);
  warp_barrier();
  return lanes;
}
// The sum of 16 exact products rounded once: the device rounds more often.
inline void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Cluster::Lane* lanes = lay_out(a, b);
  const int lane = block().current % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
    double sum = double(d[i]);
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2;
      const uint32_t left = lanes[4 * row + owner].a[i / 2 + 2 * (k / 8)];
      const uint32_t right = lanes[4 * column + owner].b[k / 8];
      sum += double(half_of(left, k % 2)) * double(half_of(right, k % 2));
    }
    d[i] = float(sum);
  }
  warp_barrier();
}

// The same of signed bytes: exact.
inline void mma16832(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const uint32_t (&c)[4]) {
  const Cluster::Lane* lanes = lay_out(a, b);
  const int lane = block().current % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
    int64_t sum = int32_t(c[i]);
    for (int k = 0; k < 32; ++k) {
      const int owner = k % 16 / 4, shift = 8 * (k % 4);
      const uint32_t left = lanes[4 * row + owner].a[i / 2 + 2 * (k / 16)];
      const uint32_t right = lanes[4 * column + owner].b[k / 16];
      sum += int64_t(int8_t(left >> shift)) * int8_t(right >> shift);
    }
    d[i] = uint32_t(sum);
  }
  warp_barrier();
}

template <class P>
void launch_clusters(void (*kernel)(P), int64_t clusters, int blocks, int tiles, int threads,
                     int shared, const P& params) {
  constexpr size_t kStack = 64 * 1024;
  Cluster& c = cluster();
  Block& b = block();
  auto bound = std::make_tuple(kernel, &params);
  const int all = blocks * threads;
  b.threads = all;
  b.arguments = &bound;
  b.body = [](void* p) {
    auto& call = *static_cast<decltype(bound)*>(p);
    std::get<0>(call)(*std::get<1>(call));
  };
  if (b.fibers.size() < size_t(all)) b.fibers.resize(size_t(all));
  b.exchange.resize(size_t(all));
  grid_size() = dim3(unsigned(clusters * blocks), unsigned(tiles));
  block_size() = dim3(unsigned(threads));
  for (int64_t at = 0; at < clusters * tiles; ++at) {
    c = Cluster();
    c.blocks = blocks;
    c.threads = threads;
    c.shared_bytes = (shared + 15) / 16 * 16;
    // Bytes that read as NaN where a kernel uses what it never wrote.
    c.shared.assign(size_t(blocks) * size_t(c.shared_bytes) / 16, make_uint4(~0u, ~0u, ~0u, ~0u));
    c.warp_gates.resize(size_t(all / 32));
    c.block_gates.resize(size_t(blocks));
    c.lanes.resize(size_t(all));
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
    for (bool alive = true; alive;) {
      alive = false;
      for (int t = 0; t < all; ++t) {
        if (b.fibers[size_t(t)].done) continue;
        b.current = t;
        thread_index().x = unsigned(t % threads);
        block_index().x = unsigned(at % clusters * blocks + t / threads);
        block_index().y = unsigned(at / clusters);
        swapcontext(&b.scheduler, &b.fibers[size_t(t)].context);
        alive = alive || !b.fibers[size_t(t)].done;
      }
    }
  }
}

}  // namespace emulation
