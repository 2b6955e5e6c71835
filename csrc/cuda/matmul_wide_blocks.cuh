// SPDX-License-Identifier: Apache-2.0
// The kernel of matmul_wide.h for elements with scales of their blocks, whose products are bfloat16
// numbers: all sums in one accumulator. A block owns 128 rows of w and kTokens rows of x;
// two warpgroups of 64 rows each decode codes into fragments, in registers, and multiply. They take
// turns at the tensor cores, so that products of one are under way while the other decodes. A
// third warpgroup brings x, codes and scales.
#pragma once

#include "matmul_wide.cuh"
#include "matmul_wide_finish.cuh"
#include "matmul_wide_panel.cuh"
#include "matmul_wide_turns_room.cuh"
#include "matmul_wide_weights.cuh"
#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace blocks {

using turns::Ring;

// ---- shared memory ----------------------------------------------------------------------------

template <class F, int kTokens>
struct Room {
  // Where registers suffice, two pairs of warpgroups take every other chunk each: with more of them
  // decoding, nobody waits for instructions.
  static constexpr int kPhases = kTokens == 64 ? 2 : 1;
  static constexpr int kMultipliers = kConsumers * kPhases, kThreads = kMultipliers + 128;
  // A stage has 64 columns of x, half a chunk.
  static constexpr uint32_t kStages = kTokens == 64 ? 12 : kTokens == 128 ? 8 : 5;
  static constexpr uint32_t kStage = kTokens * 128;
  // Codes of one chunk, or of two where that makes rows of 128 bytes, with their scales.
  static constexpr uint32_t kSpan = F::kBits == 4 ? 2 : 1;
  static constexpr uint32_t kHalf = kChunk * F::kBits / 8, kRowBytes = kHalf * kSpan;
  static constexpr uint32_t kSlot = kRows * kRowBytes;
  static constexpr uint32_t kReaders = 8 * (kSpan < kPhases ? kSpan : kPhases);  // of a slot, warps
  static constexpr uint32_t kRowScales = 4 * F::kEntry * kSpan, kScales = kRows * kRowScales;
  static constexpr uint32_t kDepth = kTokens == 256 ? 3 : 4;
  static constexpr uint32_t kCodesAt = kHeader + kStages * kStage;
  static constexpr uint32_t kScalesAt = kCodesAt + kDepth * kSlot;
  static constexpr uint32_t kLoop = kScalesAt + kDepth * kScales;
  static constexpr uint32_t kEnd = kHeader + kTokens * kPitch * 4;
  static constexpr uint32_t kBytes = kLoop > kEnd ? kLoop : kEnd;
  static_assert(kBytes <= hopper::kMostShared, "the block's shared memory");
};

// Barriers of the header: of stages (full, empty), of slots of codes (full, empty), of turns;
// sums_barrier is among them.
constexpr uint32_t kFull = 0, kEmpty = 96, kCodesFull = 200, kCodesEmpty = 256, kTurns = 320;

template <class F, int kTokens>
PYFMT_DEVICE void init_barriers(const Params& p, uint32_t base) {
  using R = Room<F, kTokens>;
  const uint32_t i = threadIdx.x;
  if (i >= 48) return;
  const uint32_t at = 8 * i;
  const uint32_t arrivals = at < kEmpty        ? 1
                            : at < kEmpty + 96 ? 8 * uint32_t(p.share)
                            : at < kCodesFull  ? 1
                            : at < kCodesEmpty ? 3
                            : at < kTurns      ? R::kReaders
                                               : 4;
  hopper::barrier_init(base + at, arrivals);
  hopper::barrier_init_fence();
}

// ---- what brings things -----------------------------------------------------------------------

template <class F, int kTokens>
struct Bringer {
  using R = Room<F, kTokens>;
  const Params& p;
  const Place& at;
  int steps;

  // One thread. Parts of K take the halves of the tokens in different order (finish).
  PYFMT_DEVICE void bring_x() const {
    const uint32_t bytes = R::kStage >> (p.share_bits + p.split - 1),
                   mine = uint32_t(at.sub) * bytes;
    const uint32_t mask = ((1u << p.share) - 1) << (at.part << p.share_bits);
    const int64_t pitch = int64_t(p.panel_rows) * 128;
    const uint8_t* first = p.panel + int64_t(at.first) * 2 * pitch + int64_t(at.m0) * 128 + mine;
    const uint8_t* second = first + (at.part ^ 1) * (R::kStage / 2);
    first += at.part * (R::kStage / 2);
    Ring<R::kStages> ring;
    hopper::wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < 2 * steps; ++i, ring.next()) {
      const uint32_t full = at.base + kFull + 8 * ring.place;
      const uint32_t to = at.base + kHeader + ring.place * R::kStage + mine;
      hopper::barrier_wait(at.base + kEmpty + 8 * ring.place, ring.parity ^ 1);
      hopper::barrier_expect(full, R::kStage);
      hopper::bulk_copy(to, first, bytes, full, mask, p.share > 1);
      if (p.split > 1) {
        hopper::bulk_copy(to + R::kStage / 2, second, bytes, full, mask, p.share > 1);
      }
      first += pitch;
      second += pitch;
    }
  }

  // One thread.
  PYFMT_DEVICE void bring_codes() const {
    Ring<R::kDepth> ring;
    if (!p.copied_codes) hopper::wait_for_previous();  // a copy was made of them
#pragma unroll 1
    for (int i = 0; i < steps; i += int(R::kSpan), ring.next()) {
      const uint32_t full = at.base + kCodesFull + 8 * ring.place;
      hopper::barrier_wait(at.base + kCodesEmpty + 8 * ring.place, ring.parity ^ 1);
      hopper::barrier_expect(full, R::kSlot);
      hopper::copy_box(at.base + R::kCodesAt + ring.place * R::kSlot, p.codes_map,
                       (at.first + i) * int(R::kHalf), at.n0, full, 0, false);
    }
  }

  // Of a row and the chunks of a slot. Past the end codes are zeros: any scale but NaN serves.
  PYFMT_DEVICE void load_scales(const uint8_t* row, int i, uint32_t* words) const {
    constexpr int kBytes = 4 * F::kEntry;
#pragma unroll
    for (int h = 0; h < int(R::kSpan); ++h) {
      const int64_t from = int64_t(at.first + i + h) * kBytes;
      uint32_t* to = words + h * F::kEntry;
#pragma unroll
      for (int j = 0; j < F::kEntry; ++j) to[j] = 0;
      if (p.wide_scales) {
        if (from + kBytes <= p.blocks) hopper::load_words<F::kEntry>(row + from, to);
      } else {
#pragma unroll
        for (int j = 0; j < kBytes; ++j) {
          if (from + j < p.blocks) to[j / 4] |= uint32_t(row[from + j]) << (j % 4 * 8);
        }
      }
    }
  }
  PYFMT_DEVICE static void store_scales(uint32_t to, const uint32_t* words) {
    if constexpr (R::kRowScales == 4) {
      hopper::store_shared(to, words[0]);
    } else if constexpr (R::kRowScales == 8) {
      hopper::store_shared8(to, words[0], words[1]);
    } else {
      hopper::store_shared16(to, words[0], words[1], words[2], words[3]);
    }
  }

  // Two warps, a lane two rows. The next slot's scales are under way while one's are laid down.
  PYFMT_DEVICE void bring_scales(int thread) const {
    const uint8_t* row[2];
    uint32_t held[2][R::kRowScales / 4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = p.scales + int64_t(min(at.n0 + thread + 64 * r, p.n - 1)) * p.blocks;
      load_scales(row[r], 0, held[r]);
    }
    const uint32_t to = at.base + R::kScalesAt + uint32_t(thread) * R::kRowScales;
    Ring<R::kDepth> ring;
#pragma unroll 1
    for (int i = 0; i < steps; i += int(R::kSpan), ring.next()) {
      hopper::barrier_wait(at.base + kCodesEmpty + 8 * ring.place, ring.parity ^ 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        store_scales(to + ring.place * R::kScales + uint32_t(64 * r) * R::kRowScales, held[r]);
        load_scales(row[r], i + int(R::kSpan), held[r]);
      }
      hopper::warp_sync();
      if (thread % 32 == 0) hopper::barrier_arrive_here(at.base + kCodesFull + 8 * ring.place);
    }
  }

  PYFMT_DEVICE void run() const {
    const int warp = hopper::uniform(int(threadIdx.x) >> 5 & 3), lane = int(threadIdx.x) & 31;
    if (warp >= 2) {
      bring_scales(int(threadIdx.x) & 63);
    } else if (lane == 0) {
      warp ? bring_codes() : bring_x();
    }
  }
};

// ---- what multiplies --------------------------------------------------------------------------

template <class F, int kTokens>
struct Multiplier {
  using R = Room<F, kTokens>;
  using Product = hopper::RegisterProduct<hopper::Bf16, kTokens>;
  static constexpr int kCount = kTokens / 2, kPhases = R::kPhases;
  using Fragments = uint32_t[8][4];  // of the steps of a chunk

  const Params& p;
  const Place& at;
  int lane, group, phase, steps;
  uint32_t peer = 0;       // what turns an address of this block into that of another
  uint32_t codes, scales;  // where this lane reads, but for turns
  uint32_t turned = 0;     // which of the 16-byte pieces of its row
  Ring<R::kStages> stage, done;
  Ring<R::kDepth> slot;
  uint32_t turn;

  // Rows change places within eight, so that lanes which read together never share a bank.
  PYFMT_DEVICE static int row_of(int lane) {
    const int g = lane / 4;
    return F::kBits == 4 ? g >> 1 | (g & 1) << 2 : g;
  }

  PYFMT_DEVICE Multiplier(const Params& p, const Place& at)
      : p(p),
        at(at),
        lane(int(threadIdx.x) & 31),
        group(hopper::uniform(int(threadIdx.x) >> 7)),
        phase(group >> 1),
        steps(at.last - at.first) {
    if (p.share > 1 && lane < p.share) {
      peer = hopper::cluster_address(at.base, uint32_t(at.part * p.share + lane)) - at.base;
    }
    const uint32_t row = uint32_t(16 * (threadIdx.x >> 5 & 7) + row_of(lane));
    turned = F::kBits == 6 ? 0 : (row & 7) << 4;
    codes = at.base + R::kCodesAt + row * R::kRowBytes;
    scales = at.base + R::kScalesAt + row * R::kRowScales + uint32_t(lane % 4 * F::kEntry);
    turn = group ? 0 : 1;
    for (int i = 0; i < phase; ++i) {
      stage.next(), stage.next(), done.next(), done.next();
      if (R::kSpan == 1) slot.next();
    }
    hopper::keep(codes);
    hopper::keep(scales);
  }

  // This lane's 32 codes of row r of its two, of a chunk that starts at `half` in the slot's rows.
  PYFMT_DEVICE void read(uint32_t half, int r, uint32_t (&words)[F::kBits]) const {
    const uint32_t row = codes + slot.place * R::kSlot + uint32_t(r * 8) * R::kRowBytes;
    const uint32_t mine = half * R::kHalf + uint32_t(lane % 4 * 4 * F::kBits);
    constexpr int kWide = F::kBits == 6 ? 2 : 4;
#pragma unroll
    for (int i = 0; i < F::kBits; i += kWide) {
      const uint32_t there = row + ((mine + uint32_t(4 * i)) ^ turned);
      if constexpr (kWide == 4) {
        const uint4 v = hopper::load_shared16(there);
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
      } else {
        const uint2 v = hopper::load_shared8(there);
        words[i] = v.x, words[i + 1] = v.y;
      }
    }
  }

  template <bool kAll>
  PYFMT_DEVICE static void to_fragments(const uint32_t (&words)[F::kBits], uint32_t raw, int r,
                                        Fragments& to) {
    uint32_t pairs[16];
    F::template decode<kAll>(words, raw, pairs);
#pragma unroll
    for (int j = 0; j < 16; ++j) to[j / 2][r + 2 * (j & 1)] = pairs[j];
  }

  // What a lane has of a chunk: its codes and their scales, of two rows.
  struct Packed {
    uint32_t words[2][F::kBits], raw[2];
  };
  // Chunk i, once it is there.
  PYFMT_DEVICE void load(int i, Packed& c) {
    const uint32_t half = R::kSpan == 2 ? uint32_t(i & 1) : 0;
    hopper::barrier_wait(at.base + kCodesFull + 8 * slot.place, slot.parity);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      c.raw[r] = hopper::load_shared_small<F::kEntry>(scales + slot.place * R::kScales +
                                                      uint32_t(r * 8) * R::kRowScales +
                                                      half * (4 * F::kEntry));
      read(half, r, c.words[r]);
    }
    if (R::kSpan == 2 && kPhases == 1 && !(i & 1)) return;
    hopper::warp_sync();
    if (lane == 0) hopper::barrier_arrive_here(at.base + kCodesEmpty + 8 * slot.place);
    slot.next();
    if (R::kSpan == 1 && kPhases == 2) slot.next();
  }
  PYFMT_DEVICE void decode(const Packed& c, Fragments& to) const {
    bool special = false;
    if constexpr (F::kHasSpecials) {
      special = F::special(c.words[0], c.raw[0]) || F::special(c.words[1], c.raw[1]);
      special = hopper::any_lane(special);
    }
    if (special) {
#pragma unroll
      for (int r = 0; r < 2; ++r) to_fragments<F::kHasSpecials>(c.words[r], c.raw[r], r, to);
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) to_fragments<false>(c.words[r], c.raw[r], r, to);
    }
  }

  PYFMT_DEVICE void wait_turn() {
    hopper::barrier_wait(at.base + kTurns + 8 * uint32_t(group), turn);
    turn ^= 1;
  }
  PYFMT_DEVICE void pass_turn() const {
    const uint32_t next = uint32_t(group + 1) % uint32_t(2 * kPhases);
    if (lane == 0) hopper::barrier_arrive_here(at.base + kTurns + 8 * next);
  }

  // The products of the chunk before are over: the warp has no more use for its stages.
  PYFMT_DEVICE void finish_products() {
    hopper::products_wait<0>();
#pragma unroll
    for (int h = 0; h < 2; ++h, done.next()) {
      const uint32_t empty = at.base + kEmpty + 8 * done.place;
      if (p.share > 1) {
        if (lane < p.share) hopper::barrier_arrive(empty + peer);
      } else if (lane == 0) {
        hopper::barrier_arrive_here(empty);
      }
    }
    if (kPhases == 2) done.next(), done.next();
  }

  PYFMT_DEVICE void multiply(float (&sums)[kCount], const Fragments& w) {
    wait_turn();
    uint32_t x[2];
#pragma unroll
    for (int h = 0; h < 2; ++h, stage.next()) {
      hopper::barrier_wait(at.base + kFull + 8 * stage.place, stage.parity);
      x[h] = hopper::tile_code(at.base + kHeader + stage.place * R::kStage);
    }
    if (kPhases == 2) stage.next(), stage.next();
    // Without a branch between them, which would make them two groups.
    hopper::products_fence();
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      if (s == 7) pass_turn();
      Product::add_to(sums, w[s], hopper::tile_descriptor(x[s / 4], s % 4), 1);
    }
    hopper::products_commit();
  }

  // Products of fragments `now` beside decoding of chunk i + 1 to `next`.
  PYFMT_DEVICE void chunk(int i, float (&sums)[kCount], const Fragments& now, Fragments& next) {
    if (i > 0) finish_products();
    multiply(sums, now);
    if (i + 1 < steps) {
      Packed c;
      load(i + 1, c);
      decode(c, next);
    }
  }

  PYFMT_DEVICE void run(float (&sums)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums[j] = 0.0f;
    hopper::pin(sums);
    Packed c;
    if (phase < steps) load(phase, c);
    if constexpr (kPhases == 2) {
      // Others' products are beside this warpgroup's decoding.
#pragma unroll 1
      for (int i = phase; i < steps; i += 2) {
        if (i > phase) finish_products();
        Fragments w;
        decode(c, w);
        multiply(sums, w);
        if (i + 2 < steps) load(i + 2, c);
      }
    } else {
      Fragments a, b;
      if (steps > 0) decode(c, a);
#pragma unroll 1
      for (int i = 0; i < steps; i += 2) {
        chunk(i, sums, a, b);
        if (i + 1 < steps) chunk(i + 1, sums, b, a);
      }
    }
    hopper::products_wait<0>();
    hopper::pin(sums);
  }
};

// What the second pair of warpgroups has is added to the first's.
template <int kTokens>
PYFMT_DEVICE void add_phases(const Place& at, float (&sums)[kTokens / 2]) {
  const uint32_t mine = at.base + kHeader + (threadIdx.x & (kConsumers - 1)) * 16;
  hopper::partial_sync<2 * kConsumers>();
  if (threadIdx.x >= kConsumers) {
#pragma unroll
    for (int j = 0; j < kTokens / 2; j += 4) {
      hopper::store_shared16(mine + uint32_t(j * kConsumers * 4), as_uint(sums[j]),
                             as_uint(sums[j + 1]), as_uint(sums[j + 2]), as_uint(sums[j + 3]));
    }
  }
  hopper::partial_sync<2 * kConsumers>();
  if (threadIdx.x < kConsumers) {
#pragma unroll
    for (int j = 0; j < kTokens / 2; j += 4) {
      const float4 v = hopper::load_floats(mine + uint32_t(j * kConsumers * 4));
      sums[j] += v.x, sums[j + 1] += v.y, sums[j + 2] += v.z, sums[j + 3] += v.w;
    }
  }
}

template <class F, int kTokens>
PYFMT_DEVICE void take_turns(const Params& p) {
  using R = Room<F, kTokens>;
  const Place at = Place::of<kTokens>(p);
  blocks::init_barriers<F, kTokens>(p, at.base);
  if (threadIdx.x == 0) hopper::prefetch_map(p.codes_map);
  if (p.share > 1) hopper::cluster_meet();
  if (p.share == 1) __syncthreads();
  // Registers: 168 for each of 384 threads, or 96 for 640, shared out anew.
  constexpr bool kMany = R::kPhases == 2;
  if (threadIdx.x >= R::kMultipliers) {
    hopper::fewer_registers<kMany ? 32 : 40>();
    hopper::start_dependents();
    Bringer<F, kTokens>{p, at, at.last - at.first}.run();
  } else {
    hopper::more_registers<kMany ? 112 : 232>();
    float sums[kTokens / 2];
    Multiplier<F, kTokens>(p, at).run(sums);
    if constexpr (kMany) {
      add_phases<kTokens>(at, sums);
      if (threadIdx.x >= kConsumers) return;
    }
    hopper::wait_for_previous();
    if (threadIdx.x == 0 && p.split > 1) expect_sums<kTokens>(at);
    // No block leaves, or is written to, while another of its cluster may still need its tiles.
    if (p.share * p.split > 1) {
      hopper::cluster_meet();
    } else {
      hopper::partial_sync<kConsumers>();
    }
    finish<kTokens>(p, at, sums, Multiplier<F, kTokens>::row_of(int(threadIdx.x) & 31));
  }
}

template <class F, int kTokens>
__global__ void __launch_bounds__(PYFMT_WIDE_THREADS((Room<F, kTokens>::kThreads)), 1)
    matmul_blocks_kernel(const __grid_constant__ Params p) {
#if defined(PYFMT_SM90A)
  take_turns<F, kTokens>(p);
#endif
}

template <class F, int kTokens>
void launch_tokens(Params& p, const WideCall& call, Stream stream) {
  using R = Room<F, kTokens>;
  hopper::MatrixBox codes = call.codes;
  codes.box_bytes = int(R::kRowBytes);
  codes.box_rows = kRows;
  p.codes_map = hopper::encode(codes);
  p.up = L::as_float(power_of_two_bits(F::kDown));
  launch_wide(matmul_blocks_kernel<F, kTokens>, p, kTokens, R::kThreads, R::kBytes, stream);
}

template <class F>
void launch_elements(Params& p, const WideCall& call, Stream stream) {
  const int64_t units = int64_t(p.panel_rows / 8) * p.tiles, k = call.x.row_bytes / 2;
  const bool aligned = aligned16(call.x.data) && k % 8 == 0;
  launch(write_panel<F::kBits, 32>, (units + kWarps - 1) / kWarps, kThreads, stream,
         static_cast<const uint16_t*>(call.x.data), const_cast<uint8_t*>(p.panel), p.m, k,
         p.panel_rows, p.tiles, aligned);
  if (call.tokens == 256) return launch_tokens<F, 256>(p, call, stream);
  if (call.tokens == 128) return launch_tokens<F, 128>(p, call, stream);
  launch_tokens<F, 64>(p, call, stream);
}

}  // namespace blocks

// The kernel for elements E with scales of their blocks.
template <class E, Scale kScale>
Kernel blocks_kernel() {
  return {blocks::launch_elements<Weights<E, kScale, false>>, kChunk, true};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
