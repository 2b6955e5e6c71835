// SPDX-License-Identifier: Apache-2.0
// The kernel of matmul_wide.h for up to 64 rows of x, elements with scales of their blocks (of
// integers in groups it is in matmul_wide_tall_groups.cuh). Four
// warpgroups of a block decode 64 rows of w each into fragments, in registers, and multiply, each
// at its own pace, so that some decode while others' products are under way; those that share rows
// take columns in turn. One thread asks for x, a warp for codes and scales, and two warps put x in
// the order of the codes, in shared memory. K may be divided between two blocks of a cluster, or
// between more blocks whose sums another launch adds (matmul_wide_parts.cuh): with 256 rows of w a
// block, x is read least.
#pragma once

#include "matmul_wide.cuh"
#include "matmul_wide_finish.cuh"
#include "matmul_wide_tall_room.cuh"
#include "matmul_wide_weights.cuh"
#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace tall {

// ---- what multiplies --------------------------------------------------------------------------

template <class F, int kTokens>
struct Multiplier {
  using R = Room<F, kTokens>;
  using Product = hopper::RegisterProduct<hopper::Bf16, kTokens>;
  static constexpr int kCount = kTokens / 2;
  static constexpr int kRunWords = F::kBits * F::kRun / 32;
  static constexpr int kTogether = kRunWords % 4 == 0 ? 4 : kRunWords % 2 == 0 ? 2 : 1;
  static constexpr int kLoads = F::kBits / kTogether;  // of kTogether words, of a row
  using Fragments = uint32_t[8][4];                    // of the steps of a chunk

  const Params& p;
  const Place& at;
  int lane;
  uint32_t codes[kLoads], scales;  // where this lane reads, but for turns
  uint32_t bars, tiles;            // its warpgroup's barriers; stages of x
  Ring<R::kStages> stage;
  Ring<R::kDepth> slot;
  uint32_t x, skip;  // the stage's tile; others' chunks
  int mine;          // slots

  // Rows change places within eight, so that lanes which read together never share a bank.
  PYFMT_DEVICE static int row_of(int lane) {
    const int g = lane / 4;
    return kRunWords > 4 ? g : kRunWords == 4 ? g >> 1 | (g & 1) << 2 : g >> 2 | (g & 3) << 1;
  }

  PYFMT_DEVICE Multiplier(const Params& p, const Place& at)
      : p(p), at(at), lane(int(threadIdx.x) & 31) {
    const uint32_t group = uint32_t(hopper::uniform(int(threadIdx.x) >> 7));
    const int turn = int(group) >> p.share_bits;
    mine = (at.slots - turn + at.turns - 1) >> (2 - p.share_bits);
    skip = uint32_t(at.turns - 1) * R::kStep;
    stage.place = uint32_t(turn) * R::kStep % R::kStages;
    stage.parity = uint32_t(turn) * R::kStep / R::kStages & 1;
    const uint32_t row = uint32_t(16 * (threadIdx.x >> 5 & 3) + row_of(lane));
    const uint32_t turned = F::kBits == 6 ? 0 : (row & 7) << 4;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int word = kTogether * j, run = word / kRunWords, within = word % kRunWords;
      const uint32_t mine = uint32_t(4 * ((4 * run + lane % 4) * kRunWords + within));
      codes[j] = at.base + R::kCodesAt + group * R::kSlot + row * R::kRowBytes + (mine ^ turned);
      hopper::keep(codes[j]);
    }
    scales = at.base + R::kScalesAt + group * R::kScales + row * R::kRowScales +
             uint32_t(lane % 4) * R::kLaneScales;
    bars = at.base + 8 * group;
    tiles = hopper::tile_code(at.base + kHeader);
    hopper::keep(scales);
  }

  // What a lane has of a chunk: its 32 codes and their scales, of two rows.
  struct Packed {
    uint32_t words[2][F::kBits], raw[2];
  };
  // Of row r of its two, of half kHalf of the slot.
  template <uint32_t kHalf>
  PYFMT_DEVICE uint32_t scales_at(uint32_t r) const {
    return scales + slot.place * (kGroups * R::kScales) + r * 8 * R::kRowScales +
           kHalf * R::kHalfScales;
  }
  template <uint32_t kHalf>
  PYFMT_DEVICE void load(Packed& c) const {
#pragma unroll
    for (uint32_t r = 0; r < 2; ++r) {
      if constexpr (!F::kGroups) {
        c.raw[r] = hopper::load_shared_small<F::kEntry>(scales_at<kHalf>(r));
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const uint32_t first = codes[j] + slot.place * (kGroups * R::kSlot);
        const uint32_t from =
            (F::kBits == 6 ? first + kHalf * R::kHalf : first ^ kHalf * R::kHalf) +
            r * 8 * R::kRowBytes;
        uint32_t* to = c.words[r] + kTogether * j;
        if constexpr (kTogether == 4) {
          const uint4 v = hopper::load_shared16(from);
          to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else if constexpr (kTogether == 2) {
          const uint2 v = hopper::load_shared8(from);
          to[0] = v.x, to[1] = v.y;
        } else {
          to[0] = hopper::load_shared_small<4>(from);
        }
      }
    }
  }
  PYFMT_DEVICE void wait_codes() const {
    hopper::barrier_wait(bars + kCodesFull + 8 * kGroups * slot.place, slot.parity);
  }
  // The slot has been decoded: nothing of it is still being read. seen: what of it has no use yet.
  PYFMT_DEVICE void release_codes(uint32_t seen = 0) {
    hopper::warp_sync();
    uint32_t empty = bars + kCodesEmpty + 8 * kGroups * slot.place;
    if constexpr (F::kGroups) empty = hopper::after_reading(empty, seen, p.nothing);
    if (lane == 0) hopper::barrier_arrive_here(empty);
    slot.next();
  }

  template <bool kAll>
  PYFMT_DEVICE static void to_fragments(const Packed& c, Fragments& to) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t pairs[16];
      F::template decode<kAll>(c.words[r], c.raw[r], pairs);
#pragma unroll
      for (int j = 0; j < 16; ++j) to[j / 2][r + 2 * (j & 1)] = pairs[j];
    }
  }
  PYFMT_DEVICE void decode(Packed& c, Fragments& to, float sum) const {
    // Waits for products: what is asked of scales here would else hold them up, waiting for scales.
    c.raw[0] ^= as_uint(sum) & p.nothing;
    bool special = false;
    if constexpr (F::kHasSpecials) {
      special = F::special(c.words[0], c.raw[0]) || F::special(c.words[1], c.raw[1]);
      special = hopper::any_lane(special);
    }
    if (special) {
      to_fragments<F::kHasSpecials>(c, to);
    } else {
      to_fragments<false>(c, to);
    }
  }

  PYFMT_DEVICE void find_stage() {
    x = uint32_t(hopper::uniform(int(tiles + stage.place * (R::kStage / 16))));
  }
  // By chunk kPart of the stage. Tiles' addresses are added to in 64 bits: one instruction.
  template <uint32_t kPart>
  PYFMT_DEVICE void multiply(float (&sums)[kCount], const Fragments& w) const {
    if (kPart == 0) hopper::barrier_wait(at.base + kFull + 8 * stage.place, stage.parity);
    hopper::products_fence();
    const uint64_t first = hopper::tile_descriptor(x, 0);
#pragma unroll
    for (uint32_t s = 0; s < 8; ++s) {
      const uint32_t tile = (2 * kPart + s / 4) * (R::kTile / 16);
      Product::add_to(sums, w[s], first + (tile + s % 4 * 2), 1);
    }
    hopper::products_commit();
  }
  // kLast: of the stage; kSkip: of the slot.
  template <bool kLast, bool kSkip>
  PYFMT_DEVICE void finish_products() {
    if constexpr (!kLast) {
      hopper::products_wait<0>();
    } else {
      const uint32_t used = at.base + kEmpty + 8 * stage.place;
      stage.place += kSkip ? 1 + skip : 1;
      if (stage.place >= R::kStages) {
        stage.place -= R::kStages;
        stage.parity ^= 1;
      }
      hopper::products_wait<0>();
      if (lane == 0) hopper::barrier_arrive_here(used);
    }
  }

  PYFMT_DEVICE void run(float (&sums)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums[j] = 0.0f;
    hopper::pin(sums);
    if (mine > 0) {
      Packed c;
      wait_codes();
      load<0>(c);
#pragma unroll 1
      for (int left = mine;;) {
        Fragments w;
        find_stage();
        if constexpr (R::kSpan == 2) {
          decode(c, w, sums[0]);
          multiply<0>(sums, w);
          load<R::kSpan - 1>(c);
          finish_products<R::kJoined == 1, false>();
          if (R::kJoined == 1) find_stage();
        }
        decode(c, w, sums[0]);
        multiply<R::kJoined - 1>(sums, w);
        release_codes();
        if (--left == 0) break;
        wait_codes();
        load<0>(c);
        finish_products<true, true>();
      }
    }
    hopper::products_wait<0>();
    hopper::pin(sums);
  }
};

// ---- sums to y --------------------------------------------------------------------------------

// Sums of a warp in shared memory.
template <int kCount>
PYFMT_DEVICE void add_sums(uint32_t from, float (&sums)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    const float4 v = hopper::load_floats(from + uint32_t(j * 128));
    sums[j] += v.x, sums[j + 1] += v.y, sums[j + 2] += v.z, sums[j + 3] += v.w;
  }
}

// What warpgroups without rows of their own have is added to the others', in their order. Whether
// this one is of the others.
template <class R, int kCount>
PYFMT_DEVICE bool add_turns(const Params& p, const Place& at, float (&sums)[kCount]) {
  const int warp = int(threadIdx.x) >> 5, warps = 4 * p.share;
  const uint32_t lane16 = at.base + kHeader + (threadIdx.x & 31) * 16;
  hopper::partial_sync<kMultipliers>();
  if (warp >= warps) {
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      hopper::store_shared16(lane16 + uint32_t(warp) * R::kSums + uint32_t(j * 128),
                             as_uint(sums[j]), as_uint(sums[j + 1]), as_uint(sums[j + 2]),
                             as_uint(sums[j + 3]));
    }
  }
  hopper::partial_sync<kMultipliers>();
  if (warp >= warps) return false;
#pragma unroll 1
  for (int other = warp + warps; other < 4 * kGroups; other += warps) {
    add_sums<kCount>(lane16 + uint32_t(other) * R::kSums, sums);
  }
  return true;
}

// Two parts of K: each block finishes half of the warps' rows, and is given their sums by the
// other. Two summands: the order does not matter. Whether this warp's rows are finished here.
template <class R, int kCount>
PYFMT_DEVICE bool add_parts(const Params& p, const Place& at, float (&sums)[kCount]) {
  const int warp = hopper::uniform(int(threadIdx.x) >> 5), owner = warp / (2 * p.share);
  const uint32_t place = at.base + R::kInboxAt + uint32_t(warp - owner * 2 * p.share) * R::kSums +
                         (threadIdx.x & 31) * 16;
  if (owner == at.part) {
    hopper::barrier_wait(at.base + kSumsThere, 0);
    add_sums<kCount>(place, sums);
    return true;
  }
  const uint32_t there = hopper::cluster_address(place, uint32_t(owner));
  const uint32_t bar = hopper::cluster_address(at.base + kSumsThere, uint32_t(owner));
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    hopper::store_counted(there + uint32_t(j * 128), sums[j], sums[j + 1], sums[j + 2], sums[j + 3],
                          bar);
  }
  return false;
}

// By way of a kilobyte of shared memory that only this warp uses, 16 rows of x at a time.
template <int kTokens>
PYFMT_DEVICE void write(const Params& p, const Place& at, const float (&sums)[kTokens / 2], int row,
                        uint32_t staged, float scale) {
  const int lane = int(threadIdx.x) & 31, t = lane % 4, token = lane / 2;
  const int n0 = at.n0 + 16 * (int(threadIdx.x) >> 5) + lane % 2 * 8;
  float bias[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) bias[i] = p.bias && n0 + i < p.n ? p.bias[n0 + i] : 0.0f;
#pragma unroll
  for (int j = 0; j < kTokens / 2; j += 8) {
    if (at.m0 + 2 * j >= p.m) break;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int there = (8 * (i / 4) + 2 * t + (i & 1)) * 16 + ((row + (i & 2) * 4) ^ t << 2);
      hopper::store_shared(staged + uint32_t(4 * there), as_uint(sums[j + i]));
    }
    hopper::warp_sync();
    const int m = at.m0 + 2 * j + token;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int n = n0 + 4 * q, here = min(p.n - n, 4);
      const int from = token * 16 + ((lane % 2 * 8 + 4 * q) ^ (token / 2 % 4) << 2);
      const float4 s = hopper::load_floats(staged + uint32_t(4 * from));
      const float v[4] = {s.x * p.up * scale + bias[4 * q], s.y * p.up * scale + bias[4 * q + 1],
                          s.z * p.up * scale + bias[4 * q + 2],
                          s.w * p.up * scale + bias[4 * q + 3]};
      if (m < p.m && here > 0) store_four(p.y, p.dtype, p.n, int64_t(m) * p.n + n, v, here);
    }
    hopper::warp_sync();
  }
}

// Sums of a part of K to where add_parts_of_k finds them.
template <int kTokens>
PYFMT_DEVICE void write_partial(const Params& p, const Place& at, const float (&sums)[kTokens / 2],
                                int row) {
  const int64_t strips = int64_t(p.n_clusters) * p.share * ((p.m + kTokens - 1) / kTokens);
  const int64_t strip = int64_t(at.tile) * p.share + (threadIdx.x >> 7);
  const int64_t warp = (at.whole * strips + strip) * 4 + (threadIdx.x >> 5 & 3);
  float4* to = reinterpret_cast<float4*>(p.partials) + warp * (kTokens / 8 * 32) +
               (row * 4 + int(threadIdx.x & 3));
#pragma unroll
  for (int j = 0; j < kTokens / 2; j += 4) {
    to[j / 4 * 32] = {sums[j], sums[j + 1], sums[j + 2], sums[j + 3]};
  }
}

// ---- the kernel -------------------------------------------------------------------------------

// Of matmul_wide_tall_groups.cuh.
template <class F, int kTokens>
struct GroupMultiplier;
template <class F, int kTokens>
struct GroupBringer;

template <class F, int kTokens>
PYFMT_DEVICE void work(const Params& p) {
  using R = Room<F, kTokens>;
  using Multiplies =
      std::conditional_t<F::kGroups, GroupMultiplier<F, kTokens>, Multiplier<F, kTokens>>;
  using Brings = std::conditional_t<F::kGroups, GroupBringer<F, kTokens>, Bringer<F, kTokens>>;
  if (threadIdx.x == kMultipliers) {
    hopper::prefetch_map(p.codes_map);
    hopper::prefetch_map(p.x);
  }
  tall::init_barriers<F, kTokens>(p);
  const Place at = Place::of<R, kTokens>(p);
  __syncthreads();
  if (R::kApart && p.split > 1) hopper::cluster_arrive();
  // Registers: 96 for each of 640 threads, shared out anew.
  constexpr bool kMany = kTokens == 64 || (F::kGroups && (kTokens == 32 || F::kRun < 32));
  if (threadIdx.x >= kMultipliers) {
    if (kMany) hopper::fewer_registers<64>();
    hopper::start_dependents();
    Brings{p, at}.run();
    return;
  }
  if (kMany) hopper::more_registers<104>();
  float sums[kTokens / 2];
  Multiplies(p, at).run(sums);
  hopper::wait_for_previous();
  const float scale = p.tensor_scale ? hopper::load_early(p.tensor_scale) : 1.0f;
  if (p.share < kGroups && !add_turns<R>(p, at, sums)) return;
  if (p.split > 1) {
    // No block is written to before it runs, nor while it may still need what lies there.
    if (!R::kApart) hopper::cluster_arrive();
    hopper::cluster_wait();
    if (!add_parts<R>(p, at, sums)) return;
  }
  const int row = Multiplier<F, kTokens>::row_of(int(threadIdx.x) & 31);
  if (p.parts > 1) return write_partial<kTokens>(p, at, sums, row);
  // Where others may still multiply, the rows of codes that this warp had.
  const uint32_t warp = threadIdx.x >> 5;
  const bool alone = p.share == kGroups && (p.split == 1 || R::kApart);
  const uint32_t codes = R::kCodesAt + warp / 4 * R::kSlot + warp % 4 * (16 * R::kRowBytes);
  write<kTokens>(p, at, sums, row, at.base + (alone ? codes : kHeader + warp * R::kSums), scale);
}

template <class F, int kTokens>
__global__ void __launch_bounds__(PYFMT_WIDE_THREADS(kBlockThreads), 1)
    matmul_tall_kernel(const __grid_constant__ Params p) {
#if defined(PYFMT_SM90A)
  work<F, kTokens>(p);
#endif
}

template <class F, int kTokens>
void launch_tokens(Params& p, const WideCall& call, Stream stream) {
  using R = Room<F, kTokens>;
  describe_codes<F>(p, call, int(R::kRowBytes), 64);
  hopper::MatrixBox x = call.x;
  x.box_bytes = kChunk;
  x.box_rows = kTokens;
  p.x = hopper::encode(x);
  // What another block sends has its room only where it comes: the launch that adds parts of K
  // wants to run beside this one.
  launch_clusters(matmul_tall_kernel<F, kTokens>, p, p.split, kTokens, kBlockThreads,
                  p.split > 1 ? R::kBytes : R::kLoop, stream);
}

template <class F>
void launch_elements(Params& p, const WideCall& call, Stream stream) {
  if (call.tokens == 16) return launch_tokens<F, 16>(p, call, stream);
  if (call.tokens == 64) return launch_tokens<F, 64>(p, call, stream);
  launch_tokens<F, 32>(p, call, stream);
}

}  // namespace tall

// The kernel of few rows of x for elements E with scales of their blocks.
template <class E, Scale kScale>
Kernel tall_kernel() {
  return {tall::launch_elements<Weights<E, kScale, false>>, kChunk, false, 64};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
