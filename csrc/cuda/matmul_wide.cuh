// SPDX-License-Identifier: Apache-2.0
// The kernel of matmul_wide.h. A block owns 128 rows of w and kTokens rows of x; two warpgroups of
// 64 rows each decode codes into fragments and multiply, one more warp brings x.
//
// K goes by chunks of 128 columns. Of each row, lane t of a quad takes the 32 codes that lie
// together at 32 t, so that loads are wide and a lane needs few scales. A fragment however wants
// column 2t of step 0, and so on: x is stored with its columns permuted to match (panel_column).
#pragma once

#include "decode.cuh"
#include "hopper.cuh"
#include "matmul_wide.h"

namespace pyfmt {
namespace cuda {
namespace wide {

constexpr int kRows = 128, kChunk = 128, kConsumers = 8;
constexpr int kStages = 8;  // at most
constexpr int kHeader = 1024, kPitch = kRows + 4;

struct Params {
  const uint8_t* panel = nullptr;
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  const float* tensor_scale = nullptr;
  const float* bias = nullptr;
  void* y = nullptr;
  DType dtype = DType::kBF16;
  Scale scale = Scale::kE8M0;
  int64_t row_bytes = 0, blocks = 0;  // of a row of w
  int whole = 0;  // chunks that all rows hold in full, with codes and scales aligned
  int m = 0, n = 0, panel_rows = 0, chunks = 0, group_chunks = 1;
  int share = 1, split = 1, n_clusters = 1, stages = 2;
  float up = 1.0f;  // what the decoder leaves out
};

// ---- where a column goes ----------------------------------------------------------------------

// Elements of w and their scales. Blocks of 32 (E8M0) or 16 (E4M3); float scales belong to groups
// of whole chunks, which are summed on their own.
template <class E, Scale kScale>
struct Weights {
  using D = Decoder<E, kScale>;
  static constexpr int kBits = D::kBits;
  static constexpr int kScaleBytes = kScale == Scale::kE8M0 ? 1 : kScale == Scale::kE4M3 ? 2 : 0;
};

// Which of a lane's 32 codes pair `p` (0 to 15) holds in half `which`.
template <int kBits>
PYFMT_HD constexpr int code_of(int p, int which) {
  using D =
      Decoder<std::conditional_t<kBits == 4, e2m1_element,
                                 std::conditional_t<kBits == 6, e2m3_element, e4m3fn_element>>,
              Scale::kE8M0>;
  return p / D::kPairs * D::kElements + D::element(p % D::kPairs, which);
}

// The column of x, within a chunk, that belongs at place `i` (0 to 127) of the panel. Products take
// 16 places a step; lane t multiplies places 2t, 2t + 1 (its pair 2 s) and 2t + 8, 2t + 9 (2 s +
// 1).
template <int kBits>
PYFMT_HD constexpr int panel_column(int i) {
  const int step = i / 16, half = i / 8 % 2, t = i % 8 / 2;
  return 32 * t + code_of<kBits>(2 * step + half, i % 2);
}

// The byte of the panel where 16-byte piece `q` (0 to 7) of 64 places of a token lies: steps of 64
// places, each with all tokens, as the tile in shared memory (hopper::tile_descriptor) wants it.
PYFMT_HD constexpr int64_t panel_piece(int64_t step64, int64_t token, int q, int64_t panel_rows) {
  return (step64 * panel_rows + token) * 128 + ((q ^ int(token & 7)) * 16);
}

// ---- the weights of one warp ------------------------------------------------------------------

// A ring of chunks in shared memory, private to each lane: what it copies, it reads.
template <int kBits, int kDepth>
struct Codes {
  static constexpr int kPiece = kBits == 6 ? 8 : 16, kPieces = 4 * kBits / kPiece;
  static constexpr int kWarpBytes = 256 * kBits, kSlotBytes = kConsumers * kWarpBytes;
  static constexpr int kBytes = kDepth * kSlotBytes;

  const uint8_t* from[2];  // of this lane: where the next chunk starts
  uint32_t ring;
  int lane;

  PYFMT_DEVICE void fetch(const Params& p, int chunk, uint32_t slot) {
    const uint32_t to = ring + slot;
    if (chunk < p.whole) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          hopper::copy_async<kPiece>(to + uint32_t((r * kPieces + i) * 32 * kPiece),
                                     from[r] + i * kPiece);
        }
      }
    } else {
      fetch_bytes(p, chunk, to);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      from[r] += 16 * kBits;
      hopper::keep(from[r]);
    }
  }

  // Chunks that end inside, and rows that are not aligned.
  PYFMT_DEVICE void fetch_bytes(const Params& p, int chunk, uint32_t to) const {
    const int64_t at = int64_t(chunk) * (16 * kBits) + lane % 4 * (4 * kBits);
    const int left = int(p.row_bytes - at < 4 * kBits ? p.row_bytes - at : 4 * kBits);
#pragma unroll 1
    for (int i = 0; i < 4 * kBits; ++i) {
      const uint32_t there = to + uint32_t(i / kPiece * 32 * kPiece + i % kPiece);
      hopper::store_shared_byte(there, i < left ? from[0][i] : 0u);
      hopper::store_shared_byte(there + kPieces * 32 * kPiece, i < left ? from[1][i] : 0u);
    }
  }

  PYFMT_DEVICE void read(uint32_t slot, int r, uint32_t (&words)[kBits]) const {
    const uint32_t from = ring + slot;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t there = from + uint32_t((r * kPieces + i) * 32 * kPiece);
      if constexpr (kPiece == 16) {
        const uint4 v = hopper::load_shared16(there);
        words[4 * i] = v.x;
        words[4 * i + 1] = v.y;
        words[4 * i + 2] = v.z;
        words[4 * i + 3] = v.w;
      } else {
        const uint2 v = hopper::load_shared8(there);
        words[2 * i] = v.x;
        words[2 * i + 1] = v.y;
      }
    }
  }
};

// One or two bytes, with the whole 128 around them brought to L2.
template <int kBytes>
PYFMT_DEVICE uint32_t load_ahead(const uint8_t* p) {
#if defined(__CUDA_ARCH__)
  uint16_t v;
  if constexpr (kBytes == 1) {
    uint32_t byte;
    asm volatile("ld.global.nc.L2::128B.u8 %0, [%1];" : "=r"(byte) : "l"(p));
    return byte;
  }
  asm volatile("ld.global.nc.L2::128B.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
#else
  return kBytes == 1 ? uint32_t(p[0]) : uint32_t(p[0]) | uint32_t(p[1]) << 8;
#endif
}

// Scales of a lane's rows, chunk after chunk: the bytes of its 32 codes, one (blocks of 32) or two
// (16) a row.
template <int kScaleBytes>
struct BlockScales {
  const uint8_t* from[2];  // where the next chunk's lie
  uint32_t raw[2];

  PYFMT_DEVICE void next(const Params& p, int chunk, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (chunk < p.whole) {
        raw[r] = load_ahead<kScaleBytes>(from[r]);
      } else {
        // Past the end codes are zeros: any scale of the row serves.
        const int64_t i = int64_t(chunk) * (4 * kScaleBytes) + lane % 4 * kScaleBytes;
        const int64_t over = i - (p.blocks - 1);
        const uint8_t* last = from[r] - over;
        raw[r] = load_ahead<1>(over < 0 ? from[r] : last);
        if (kScaleBytes == 2) raw[r] |= load_ahead<1>(over < -1 ? from[r] + 1 : last) << 8;
      }
      from[r] += 4 * kScaleBytes;
      hopper::keep(from[r]);
    }
  }
};

// Those of whole groups, as numbers.
PYFMT_DEVICE float load_group_scale(const uint8_t* at, Scale kind) {
  return load_element(at,
                      kind == Scale::kBF16   ? DType::kBF16
                      : kind == Scale::kFP16 ? DType::kFP16
                                             : DType::kFP32,
                      0);
}

// ---- the kernel -------------------------------------------------------------------------------

// How many chunks of codes are under way or in use.
template <int kBits, int kTokens>
constexpr int depth() {
  return kTokens >= 192 ? 4 : kBits == 4 ? 8 : 6;
}

template <class F, int kTokens>
constexpr int shared_bytes(int stages) {
  const int loop =
      kHeader + stages * kTokens * 128 + Codes<F::kBits, depth<F::kBits, kTokens>()>::kBytes;
  const int epilogue = kHeader + kTokens * kPitch * 4;
  return loop > epilogue ? loop : epilogue;
}

template <class F, int kTokens>
constexpr int most_stages() {
  int stages = kStages;
  while (shared_bytes<F, kTokens>(stages) > hopper::kMostShared) --stages;
  return stages;
}

struct Place {
  uint32_t base, ring;
  int sub, part, n0, m0, first, last;

  template <int kTokens>
  PYFMT_DEVICE static Place of(const Params& p) {
    Place at;
    at.base = hopper::shared_start();
    at.ring = at.base + kHeader + uint32_t(p.stages * kTokens * 128);
    const int size = p.share * p.split, rank = int(hopper::cluster_rank());
    const int cluster = int(blockIdx.x) / size;
    at.sub = rank % p.share;
    at.part = rank / p.share;
    at.n0 = (cluster % p.n_clusters * p.share + at.sub) * kRows;
    at.m0 = cluster / p.n_clusters * kTokens;
    at.first = int(int64_t(p.chunks) * at.part / p.split);
    at.last = int(int64_t(p.chunks) * (at.part + 1) / p.split);
    return at;
  }
};

// Goes round the stages: where a tile lies, its barrier for "full" and 64 bytes on that for
// "empty".
template <int kTokens>
struct Turn {
  static constexpr uint32_t kTile = kTokens * 128;
  uint32_t first, last, full, tile, parity = 0;  // tile: by tile_code

  PYFMT_DEVICE Turn(const Params& p, const Place& at)
      : first(at.base),
        last(at.base + 8u * uint32_t(p.stages - 1)),
        full(at.base),
        tile(hopper::tile_code(at.base + kHeader)) {}
  PYFMT_DEVICE uint32_t empty() const { return full + 64; }
  PYFMT_DEVICE void next() {
    if (full == last) {
      full = first;
      tile = hopper::tile_code(first + kHeader);
      parity ^= 1;
    } else {
      full += 8;
      tile += kTile >> 4;
    }
  }
};

// One thread: brings the tiles of x, each block of a cluster its part for all that share it.
template <int kTokens>
PYFMT_DEVICE void produce(const Params& p, const Place& at) {
  const uint32_t bytes = uint32_t(kTokens * 128 / p.share), mine = uint32_t(at.sub) * bytes;
  const uint32_t mask = ((1u << p.share) - 1) << (at.part * p.share);
  const int64_t pitch = int64_t(p.panel_rows) * 128;
  const uint8_t* from = p.panel + int64_t(at.first) * 2 * pitch + int64_t(at.m0) * 128 + mine;
  hopper::wait_for_previous();
  Turn<kTokens> turn(p, at);
  uint32_t to = at.base + kHeader;
  for (int i = 2 * (at.last - at.first); i > 0; --i, from += pitch) {
    hopper::barrier_wait(turn.empty(), turn.parity ^ 1);
    hopper::barrier_expect(turn.full, uint32_t(kTokens * 128));
    hopper::bulk_copy(to + mine, from, bytes, turn.full, mask, p.share > 1);
    turn.next();
    to = turn.full == at.base ? at.base + kHeader : to + kTokens * 128;
  }
}

// sums[i] += step's product: half a chunk, four steps of 16.
template <int kTokens>
PYFMT_DEVICE void multiply_half(float (&sums)[kTokens / 2], const uint32_t (&a)[4][4],
                                uint32_t tile, int add) {
  hopper::products_fence();
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    hopper::Product<kTokens>::add_to(sums, a[s], hopper::tile_descriptor(tile, s), s ? 1 : add);
  }
  hopper::products_commit();
}

// Four fragments from half a chunk: codes 16 kHalf to 16 kHalf + 15 of both rows' 32.
template <class F, int kHalf, bool kAll>
PYFMT_DEVICE void decode_half(const uint32_t (&words)[2][F::kBits], const Factor (&factor)[2],
                              uint32_t (&a)[4][4]) {
  using D = typename F::D;
  uint32_t pairs[2][8];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int u = 0; u < 8 / D::kPairs; ++u) {
      D::template scaled<kAll>(words[r] + kHalf * (F::kBits / 2) + u * D::kWords, factor[r],
                               pairs[r] + u * D::kPairs);
    }
  }
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    a[s][0] = pairs[0][2 * s];
    a[s][1] = pairs[1][2 * s];
    a[s][2] = pairs[0][2 * s + 1];
    a[s][3] = pairs[1][2 * s + 1];
  }
}

// The factors of half a chunk's codes from a row's scale bytes.
template <class F, int kHalf, bool kAll>
PYFMT_DEVICE Factor factor_of(uint32_t raw) {
  using D = typename F::D;
  if constexpr (F::kScaleBytes == 1) {
    return D::template factor<kAll>(raw);
  } else if constexpr (F::kScaleBytes == 2) {
    Factor two[2];
    D::factors(raw, two);
    return two[kHalf];
  } else {
    return D::unit_factor();
  }
}

// special: some scale or code of the warp's needs more than the usual steps.
template <class F, int kHalf>
PYFMT_DEVICE void decode_half(const uint32_t (&words)[2][F::kBits], const uint32_t (&raw)[2],
                              bool special, uint32_t (&a)[4][4]) {
  constexpr bool kCanBe = F::kScaleBytes == 1 || F::D::kHasSpecials;
  if (kCanBe && special) {
    const Factor factor[2] = {factor_of<F, kHalf, true>(raw[0]), factor_of<F, kHalf, true>(raw[1])};
    decode_half<F, kHalf, true>(words, factor, a);
  } else {
    const Factor factor[2] = {factor_of<F, kHalf, false>(raw[0]),
                              factor_of<F, kHalf, false>(raw[1])};
    decode_half<F, kHalf, false>(words, factor, a);
  }
}

template <class F>
PYFMT_DEVICE bool any_special(const uint32_t (&words)[2][F::kBits], const uint32_t (&raw)[2]) {
  using D = typename F::D;
  bool special = false;
  if constexpr (F::kScaleBytes == 1) {
    special = D::special_scale(raw[0]) || D::special_scale(raw[1]);
  }
  if constexpr (D::kHasSpecials) {
    special = special || D::template special_codes<F::kBits>(words[0]) ||
              D::template special_codes<F::kBits>(words[1]);
  }
  if constexpr (F::kScaleBytes == 1 || D::kHasSpecials) return __any_sync(kAll, special);
  return false;
}

// Two warpgroups: sums of this block's part of K, as product fragments.
template <class F, int kTokens>
struct Consumer {
  static constexpr int kBits = F::kBits, kDepth = depth<kBits, kTokens>();
  static constexpr bool kGroups = F::kScaleBytes == 0;
  static constexpr int kCount = kTokens / 2;

  const Params& p;
  const Place& at;
  using Ring = Codes<kBits, kDepth>;
  Ring codes;
  BlockScales<kGroups ? 1 : F::kScaleBytes> scales;
  const uint8_t* group[2];  // where a group's scale lies
  int lane;
  Turn<kTokens> turn;
  uint32_t held = 0;  // the barrier for "empty" of the stage that products under way read
  uint32_t peer = 0;  // what turns it into a peer's

  PYFMT_DEVICE Consumer(const Params& p, const Place& at)
      : p(p), at(at), lane(int(threadIdx.x) & 31), turn(p, at) {
    const int warp = int(threadIdx.x) >> 5;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int row = at.n0 + 16 * warp + lane / 4 + 8 * r;
      row = row < p.n ? row : p.n - 1;
      codes.from[r] =
          p.codes + row * p.row_bytes + int64_t(at.first) * (16 * kBits) + lane % 4 * (4 * kBits);
      if constexpr (kGroups) {
        group[r] = p.scales + (row * p.blocks + at.first / p.group_chunks) * scale_bytes(p.scale);
      } else {
        scales.from[r] =
            p.scales + row * p.blocks + (4 * int64_t(at.first) + lane % 4) * F::kScaleBytes;
        hopper::keep(scales.from[r]);
      }
    }
    codes.lane = lane;
    codes.ring = at.ring + uint32_t(warp) * Ring::kWarpBytes + uint32_t(lane) * Ring::kPiece;
    if (lane < p.share) {
      peer = hopper::cluster_address(at.base, uint32_t(at.part * p.share + lane)) - at.base;
    }
  }

  // Before x is there.
  PYFMT_DEVICE void prefetch() {
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; ++i) {
      if (at.first + i < at.last) codes.fetch(p, at.first + i, uint32_t(i) * Ring::kSlotBytes);
      hopper::commit_copies();
    }
  }

  // The products before the last ones are over: their stage may be filled anew.
  PYFMT_DEVICE void release() {
    if (held && lane < p.share) hopper::barrier_arrive(held + peer);
  }

  PYFMT_DEVICE void half(float (&sums)[kCount], const uint32_t (&a)[4][4], int add) {
    hopper::barrier_wait(turn.full, turn.parity);
    multiply_half<kTokens>(sums, a, turn.tile, add);
    hopper::products_wait<1>();
    release();
    held = turn.empty();
    turn.next();
  }

  PYFMT_DEVICE void run(float (&sums)[kCount]) {
    float fresh[kGroups ? kCount : 1];
    float group_scale[2] = {0.0f, 0.0f};
    if constexpr (!kGroups) scales.next(p, at.first, lane);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
    uint32_t slot = 0, ahead = (kDepth - 1) * Ring::kSlotBytes;  // bytes into the ring
    int in_group = kGroups ? at.first % p.group_chunks : 0;
    bool fresh_group = true;
#pragma unroll 1
    for (int c = at.first; c < at.last; ++c) {
      uint32_t words[2][kBits];
      hopper::wait_copies<kDepth - 2>();
#pragma unroll
      for (int r = 0; r < 2; ++r) codes.read(slot, r, words[r]);
      const uint32_t now[2] = {scales.raw[0], scales.raw[1]};
      const bool special = any_special<F>(words, now);
      if (c + kDepth - 1 < at.last) codes.fetch(p, c + kDepth - 1, ahead);
      hopper::commit_copies();
      ahead = slot;
      slot = slot == (kDepth - 1) * Ring::kSlotBytes ? 0 : slot + Ring::kSlotBytes;
      if constexpr (!kGroups) {
        scales.next(p, c + 1, lane);
      } else if (fresh_group) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          group_scale[r] = load_group_scale(group[r], p.scale);
          group[r] += scale_bytes(p.scale);
          hopper::keep(group[r]);
        }
      }

      uint32_t a[2][4][4];
      decode_half<F, 0>(words, now, special, a[0]);
      if constexpr (kGroups) {
        half(fresh, a[0], fresh_group ? 0 : 1);
      } else {
        half(sums, a[0], 1);
      }
      hopper::pin(words[0]);
      hopper::pin(words[1]);
      decode_half<F, 1>(words, now, special, a[1]);
      if constexpr (kGroups) {
        half(fresh, a[1], 1);
        fresh_group = ++in_group == p.group_chunks || c + 1 == at.last;
        if (fresh_group) {
          in_group = 0;
          hopper::products_wait<0>();
          hopper::pin(fresh);
          release();
          held = 0;
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            sums[i] = fused(group_scale[i >> 1 & 1], fresh[i], sums[i]);
          }
        }
      } else {
        half(sums, a[1], 1);
      }
    }
    hopper::products_wait<0>();
    if constexpr (!kGroups) hopper::pin(sums);
  }
};

// Writes four neighbours of a row of y; `here` of them exist.
PYFMT_DEVICE void store_four(const Params& p, int64_t at, const float (&v)[4], int here) {
  if (here == 4 && p.n % 4 == 0) {
    if (p.dtype == DType::kFP32) {
      reinterpret_cast<uint4*>(p.y)[at / 4] =
          make_uint4(canonical(v[0]), canonical(v[1]), canonical(v[2]), canonical(v[3]));
    } else if (p.dtype == DType::kBF16) {
      reinterpret_cast<uint2*>(p.y)[at / 4] =
          make_uint2(to_halves<DType::kBF16>(v[0], v[1]), to_halves<DType::kBF16>(v[2], v[3]));
    } else {
      reinterpret_cast<uint2*>(p.y)[at / 4] =
          make_uint2(to_halves<DType::kFP16>(v[0], v[1]), to_halves<DType::kFP16>(v[2], v[3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < here) store_element(p.y, p.dtype, at + i, v[i]);
    }
  }
}

// Sums lie as [token][row of w] in shared memory; each part of K's block finishes some tokens, the
// parts added in order.
template <int kTokens>
PYFMT_DEVICE void finish(const Params& p, const Place& at) {
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  const int n = at.n0 + 4 * lane, here = p.n - n < 4 ? p.n - n : 4;
  const float scale = p.tensor_scale ? *p.tensor_scale : 1.0f;
  float bias[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bias[i] = p.bias && i < here ? p.bias[n + i] : 0.0f;
  const int first = kTokens / p.split * at.part, last = first + kTokens / p.split;
#pragma unroll 2
  for (int token = first + warp; token < last; token += kConsumers) {
    const uint32_t from = at.base + kHeader + uint32_t((token * kPitch + 4 * lane) * 4);
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int part = 0; part < p.split; ++part) {
      const float4 s =
          hopper::load_cluster16(hopper::cluster_address(from, uint32_t(part * p.share + at.sub)));
      v[0] = part ? v[0] + s.x : s.x;
      v[1] = part ? v[1] + s.y : s.y;
      v[2] = part ? v[2] + s.z : s.z;
      v[3] = part ? v[3] + s.w : s.w;
    }
    if (at.m0 + token >= p.m || here <= 0) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = v[i] * p.up * scale + bias[i];
    store_four(p, int64_t(at.m0 + token) * p.n + n, v, here);
  }
}

// The fragments of one warpgroup to shared memory as [token][row of w].
template <int kTokens>
PYFMT_DEVICE void stage_sums(const Place& at, const float (&sums)[kTokens / 2]) {
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  const int row = 16 * warp + lane / 4, token = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int there = (8 * (i / 4) + token + (i & 1)) * kPitch + row + (i & 2) * 4;
    hopper::store_shared(at.base + kHeader + uint32_t(there * 4), as_uint(sums[i]));
  }
}

// Registers come by warpgroups: many sums take those of a whole one that only brings x.
template <class F, int kTokens>
constexpr bool moves_registers() {
  return kTokens * (F::kScaleBytes ? 1 : 2) >= 192;
}
template <class F, int kTokens>
constexpr int threads_of() {
  return 32 * (kConsumers + (moves_registers<F, kTokens>() ? 4 : 1));
}

template <class F, int kTokens>
PYFMT_DEVICE void run_block(const Params& p) {
  const Place at = Place::of<kTokens>(p);
  const bool clustered = p.share * p.split > 1;
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; ++s) {
      hopper::barrier_init(at.base + 8u * uint32_t(s), 1);
      hopper::barrier_init(at.base + 64u + 8u * uint32_t(s), uint32_t(kConsumers * p.share));
    }
    hopper::barrier_init_fence();
  }
  if (threadIdx.x >= kConsumers * 32) {
    if constexpr (moves_registers<F, kTokens>()) hopper::fewer_registers<40>();
    if (clustered) {
      hopper::cluster_sync();
    } else {
      __syncthreads();
    }
    if (threadIdx.x == kConsumers * 32) produce<kTokens>(p, at);
    __syncwarp();
    if (clustered) hopper::cluster_sync();
    if (p.split > 1) hopper::cluster_sync();
    return;
  }
  if constexpr (moves_registers<F, kTokens>()) hopper::more_registers<232>();
  {
    Consumer<F, kTokens> consumer(p, at);
    consumer.prefetch();
    if (clustered) {
      hopper::cluster_sync();
    } else {
      __syncthreads();
    }
    float sums[kTokens / 2];
    consumer.run(sums);
    hopper::partial_sync<32 * kConsumers>();
    stage_sums<kTokens>(at, sums);
  }
  // Also: no block leaves while another of its cluster may still arrive at its barriers.
  if (clustered) {
    hopper::cluster_sync();
  } else {
    hopper::partial_sync<32 * kConsumers>();
  }
  finish<kTokens>(p, at);
  if (p.split > 1) hopper::cluster_sync();
}

#if defined(PYFMT_SM90A)
#define PYFMT_WIDE_THREADS threads_of<F, kTokens>()
#else
#define PYFMT_WIDE_THREADS 32  // tells the host that there is nothing to launch
#endif

template <class F, int kTokens>
__global__ void __launch_bounds__(PYFMT_WIDE_THREADS, 1)
    matmul_wide_kernel(const __grid_constant__ Params p) {
#if defined(PYFMT_SM90A)
  run_block<F, kTokens>(p);
#endif
}

template <class F, int kTokens>
void launch_tile(Params p, const WidePlan& plan, Stream stream) {
  p.stages = most_stages<F, kTokens>();
  p.up = L::as_float(power_of_two_bits(F::D::kDown));
  const int clusters = p.n_clusters * ((p.m + kTokens - 1) / kTokens);
  const int blocks = clusters * plan.share * plan.split;
  const auto kernel = matmul_wide_kernel<F, kTokens>;
#if defined(__CUDACC__)
  constexpr int kBytes = shared_bytes<F, kTokens>(most_stages<F, kTokens>());
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "shared memory");
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = unsigned(plan.share * plan.split);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  // Starts beside the kernel that writes the panel, and waits for it before reading x.
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads_of<F, kTokens>());
  config.dynamicSmemBytes = kBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, p), "launch");
#else
  launch(kernel, blocks, threads_of<F, kTokens>(), stream, p);
#endif
}

// Each group of integers needs a second set of sums: half the tokens.
template <class F>
constexpr bool serves_tokens(int tokens) {
  return tokens == 64 || tokens == 128 || (F::kScaleBytes && (tokens == 192 || tokens == 256));
}

template <class F>
void launch_format(const Params& p, const WidePlan& plan, Stream stream) {
  if constexpr (F::kScaleBytes != 0) {
    if (plan.tokens == 256) return launch_tile<F, 256>(p, plan, stream);
    if (plan.tokens == 192) return launch_tile<F, 192>(p, plan, stream);
  }
  if (plan.tokens == 128) return launch_tile<F, 128>(p, plan, stream);
  launch_tile<F, 64>(p, plan, stream);
}

inline bool is_mx(const FormatSpec& f, const ElementSpec& e) {
  return f.element == e && f.scale == Scale::kE8M0 && f.block_columns == 32;
}
inline bool is_nv(const FormatSpec& f, const ElementSpec& e) {
  return f.element == e && f.scale == Scale::kE4M3 && f.block_columns == 16;
}
inline bool has_groups(const FormatSpec& f, const ElementSpec& e) {
  return f.element == e && f.scale != Scale::kE8M0 && f.scale != Scale::kE4M3;
}

using Launch = void (*)(const Params&, const WidePlan&, Stream);

// By element and scale; null where there is none. One a file, so that they compile side by side.
Launch fp4_launch(const FormatSpec&);
Launch fp6_launch(const FormatSpec&);
Launch fp8_launch(const FormatSpec&);
Launch int_launch(const FormatSpec&);
Launch mxint_launch(const FormatSpec&);

// Whether kernels were compiled, or left empty for want of architecture 90a.
bool compiled();

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
