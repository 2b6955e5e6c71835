// SPDX-License-Identifier: Apache-2.0
// A kernel of matmul_wide.h for integers in groups and more rows of x than matmul_wide_turns.cuh
// is for. A block owns 128 rows of w and kTokens of x; both operands of its products lie in shared
// memory: then additions of their results cost the tensor cores nothing. Two warpgroups of 64 rows
// take turns: while one has its products of a group there, the other scales and adds those that it
// had. A third decodes codes to tiles of w, several tiles ahead, and warps of a fourth bring tiles
// of x and codes. Or w was written out as bfloat16 integers before, and the third writes out the
// next part of w.
#pragma once

#include "matmul_wide.cuh"
#include "matmul_wide_groups_decode.cuh"
#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace groups {

template <class S>
struct Multiplier {
  static constexpr int kCount = S::kWide / 2, kAll = S::kTokens / 2;
  static constexpr int kSteps = 8 / S::kParts;  // of 16 columns, in a part
  using Product = hopper::Product<hopper::Bf16, S::kWide>;

  const Params& p;
  const uint32_t base;
  int lane, group;
  uint32_t factors, turn;
  Ring<S::kStages> stage;

  PYFMT_DEVICE Multiplier(const Params& p, uint32_t base)
      : p(p),
        base(base),
        lane(int(threadIdx.x) & 31),
        group(hopper::uniform(int(threadIdx.x) >> 7)) {
    factors = base + S::kFactorsAt + (16 * (threadIdx.x >> 5) + uint32_t(lane / 4)) * 4;
    turn = uint32_t(group) ^ 1;
  }

  PYFMT_DEVICE void wait_turn() {
    hopper::barrier_wait(base + kTurns + 8 * uint32_t(group), turn);
    turn ^= 1;
  }
  PYFMT_DEVICE void pass_turn() const {
    if (lane == 0) hopper::barrier_arrive_here(base + kTurns + 8 * uint32_t(group ^ 1));
  }
  // The warp has no more use for a stage. seen: what it read of it.
  PYFMT_DEVICE void release(const Ring<S::kStages>& used, uint32_t seen) const {
    hopper::warp_sync();
    const uint32_t empty = hopper::after_reading(base + kEmpty + 8 * used.place, seen, p.nothing);
    if (lane == 0) hopper::barrier_arrive_here(empty);
  }

  // Four products of a stage, or two: steps kFrom to kTo - 1 of its four.
  template <int kHalf, int kFrom, int kTo, bool kFirst, bool kLast>
  PYFMT_DEVICE void multiply(float (&fresh)[kCount], const Ring<S::kStages>& from) {
    const uint32_t here = base + S::kStageAt + from.place * S::kTiles;
    const uint32_t x = hopper::tile_code(here + kHalf * (S::kWide * 128));
    const uint32_t w = hopper::tile_code(here + S::kTileOfX + uint32_t(group) * (64 * 128));
    if constexpr (kHalf == 0 && kFrom == 0) {
      hopper::barrier_wait(base + kFull + 8 * from.place, from.parity);
    }
    hopper::products_fence();
#pragma unroll
    for (int s = kFrom; s < kTo; ++s) {
      if (kLast && s == kTo - 1) pass_turn();
      Product::add_to(fresh, hopper::tile_descriptor(w, s), hopper::tile_descriptor(x, s),
                      kFirst && s == kFrom ? 0 : 1);
    }
    hopper::products_commit();
  }
  PYFMT_DEVICE void read_factors(float (&factor)[2], int part) const {
    const uint32_t from = factors + stage.place * S::kFactors + uint32_t(part * kRows * 4);
    factor[0] = as_float(hopper::load_shared_small<4>(from));
    factor[1] = as_float(hopper::load_shared_small<4>(from + 32));
  }
  template <int kHalf>
  PYFMT_DEVICE void add(float (&sums)[kAll], const float (&fresh)[kCount],
                        const float (&factor)[2]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float& sum = sums[kHalf * kCount + j];
      sum = fused(factor[j >> 1 & 1], fresh[j], sum);
    }
  }

  // Sums of 128 columns, two stages.
  template <int kHalf>
  PYFMT_DEVICE void chunk_half(float (&sums)[kAll], float (&factor)[2]) {
    constexpr bool kDone = kHalf == S::kHalves - 1;
    float fresh[kCount];
    Ring<S::kStages> second = stage;
    second.next();
    wait_turn();
    multiply<kHalf, 0, 4, true, false>(fresh, stage);
    multiply<kHalf, 0, 4, false, true>(fresh, second);
    if constexpr (kHalf == 0) read_factors(factor, 0);
    if constexpr (kDone) {
      const uint32_t seen = as_uint(factor[0]) | as_uint(factor[1]);
      hopper::products_wait<1>();
      release(stage, seen);
      hopper::products_wait<0>();
      hopper::pin(fresh);
      release(second, seen);
    } else {
      hopper::products_wait<0>();
      hopper::pin(fresh);
    }
    add<kHalf>(sums, fresh, factor);
  }

  // Sums of part kPart of a stage, of which it has kStageParts.
  template <int kPart, int kHalf>
  PYFMT_DEVICE void part_half(float (&sums)[kAll], float (&factor)[2]) {
    constexpr bool kDone = kHalf == S::kHalves - 1 && kPart == S::kStageParts - 1;
    float fresh[kCount];
    wait_turn();
    multiply<kHalf, kPart * kSteps, (kPart + 1) * kSteps, true, true>(fresh, stage);
    if constexpr (kHalf == 0) read_factors(factor, kPart);
    hopper::products_wait<0>();
    hopper::pin(fresh);
    if constexpr (kDone) release(stage, as_uint(factor[0]) | as_uint(factor[1]));
    add<kHalf>(sums, fresh, factor);
  }
  template <int kPart>
  PYFMT_DEVICE void part(float (&sums)[kAll]) {
    float factor[2];
    part_half<kPart, 0>(sums, factor);
    if constexpr (S::kHalves > 1) part_half<kPart, 1>(sums, factor);
  }

  PYFMT_DEVICE void run(float (&sums)[kAll], int steps) {
#pragma unroll
    for (int j = 0; j < kAll; ++j) sums[j] = 0.0f;
    if constexpr (S::kParts == 1) {
#pragma unroll 1
      for (int i = 0; i < steps; i += 2) {
        float factor[2];
        chunk_half<0>(sums, factor);
        if constexpr (S::kHalves > 1) chunk_half<1>(sums, factor);
        stage.next();
        stage.next();
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < steps; ++i) {
        part<0>(sums);
        if constexpr (S::kStageParts > 1) part<1>(sums);
        stage.next();
      }
    }
  }
};

// Sums of a warpgroup, 64 rows of w, become rows of y. Once a tile.
template <class S>
struct Output {
  static constexpr int kAll = S::kTokens / 2;
  const Params& p;
  uint32_t base;
  int lane, warp, group, n0, m0;  // n0: of the warpgroup

  PYFMT_DEVICE Output(const Params& p, uint32_t base, int n0, int m0)
      : p(p),
        base(base),
        lane(int(threadIdx.x) & 31),
        warp(int(threadIdx.x) >> 5 & 3),
        group(int(threadIdx.x) >> 7),
        n0(n0 + 64 * group),
        m0(m0) {}

  PYFMT_DEVICE void write(float (&sums)[kAll]) const {
    const int n = n0 + 16 * warp + lane / 4;
    const float scale = p.tensor_scale ? *p.tensor_scale : 1.0f;
    float bias[2] = {0.0f, 0.0f};
    if (p.bias) {
      if (n < p.n) bias[0] = p.bias[n];
      if (n + 8 < p.n) bias[1] = p.bias[n + 8];
    }
#pragma unroll
    for (int i = 0; i < kAll; ++i) sums[i] = sums[i] * p.up * scale + bias[i >> 1 & 1];
    if (p.dtype == DType::kFP32) return write_floats(sums);
    uint32_t halves[kAll / 2];
    if (p.dtype == DType::kBF16) {
#pragma unroll
      for (int i = 0; i < kAll / 2; ++i) {
        halves[i] = to_halves<DType::kBF16>(sums[2 * i], sums[2 * i + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kAll / 2; ++i) {
        halves[i] = to_halves<DType::kFP16>(sums[2 * i], sums[2 * i + 1]);
      }
    }
    write_halves(halves);
  }

  PYFMT_DEVICE void write_floats(const float (&sums)[kAll]) const {
    const int n = n0 + 16 * warp + lane / 4, token = m0 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      const int column = n + (i & 2) * 4, row = token + i / 4 * 8 + (i & 1);
      if (column < p.n && row < p.m) {
        static_cast<uint32_t*>(p.y)[int64_t(row) * p.y_pitch + column] = canonical(sums[i]);
      }
    }
  }

  // By 16 tokens: turned around in shared memory, in rows of 128 bytes.
  PYFMT_DEVICE void write_halves(const uint32_t (&halves)[kAll / 2]) const {
    const uint32_t staged = base + S::kStagedAt + uint32_t(group) * S::kStaged;
    const uint32_t full = base + kStagedFull + 8 * uint32_t(group);
    const auto place = [&](int token, int piece) {
      return staged + uint32_t(token * 128 + (piece ^ (token & 7)) * 16);
    };
    const uint32_t to = place(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
    const int thread = 32 * warp + lane, n = n0 + thread % 8 * 8;
    const uint32_t from = place(thread / 8, thread % 8);
    const bool whole = p.y_pitch % 8 == 0 && n + 8 <= p.n;
    int left = p.m - m0 - thread / 8;
    uint16_t* y = static_cast<uint16_t*>(p.y) + int64_t(m0 + thread / 8) * p.y_pitch + n;
#pragma unroll
    for (int slice = 0; slice < S::kTokens / 16; ++slice) {
      const uint32_t* v = halves + slice * 4;
      const uint32_t half = uint32_t(slice % 2) * (S::kStaged / 2);
      hopper::store_matrices_turned(to + half, v[0], v[1], v[2], v[3]);
      hopper::warp_sync();
      if (lane == 0) hopper::barrier_arrive_here(full);
      hopper::barrier_wait(full, uint32_t(slice % 2));
      const uint4 out = hopper::load_shared16(from + half);
      if (left > 0) {
        if (whole) {
          *reinterpret_cast<uint4*>(y) = out;
        } else {
          write_some(y, n, out);
        }
      }
      left -= 16;
      y += 16 * int64_t(p.y_pitch);
    }
  }
  PYFMT_DEVICE void write_some(uint16_t* y, int n, const uint4& v) const {
#pragma unroll 1
    for (int e = 0; e < 8 && n + e < p.n; ++e) {
      const uint32_t word = e < 2 ? v.x : e < 4 ? v.y : e < 6 ? v.z : v.w;
      y[e] = uint16_t(word >> (e % 2 * 16));
    }
  }
};

template <class S>
PYFMT_DEVICE void run_block(const Params& p) {
  Walk<S> walk(p);
  init_barriers<S>(walk.base);
  if (threadIdx.x == 0) {
    hopper::prefetch_map(p.x);
    hopper::prefetch_map(p.codes_map);
  }
  __syncthreads();
  // Registers: 128 for each of 512 threads, shared out anew. Scales and codes are read before the
  // launch ahead has ended; whatever writes weights lets no other launch start early.
  if (threadIdx.x >= kBringers) {
    hopper::fewer_registers<40>();
    if (threadIdx.x >= kBringers + 64) {
      Factors<S>(p, walk).bring();
    } else if (threadIdx.x == kBringers) {
      hopper::wait_for_previous();
      hopper::start_dependents();
      bring_tiles<S>(p, walk);
    } else if (threadIdx.x == kBringers + 32) {
      if constexpr (S::kPacked) bring_codes<S>(p, walk);
    }
  } else if (threadIdx.x >= kDecoders) {
    hopper::fewer_registers<56>();
    if constexpr (S::kPacked) {
      Decoder<S>(p, walk).run();
    } else {
      hopper::wait_for_previous();  // which may read what is written over
      write_out<S::kBits>(p.later_codes, p.later_to, p.later,
                          int64_t(blockIdx.x) * 128 + (threadIdx.x & 127),
                          int64_t(gridDim.x) * 128);
    }
  } else {
    hopper::more_registers<208>();
    hopper::wait_for_previous();
    Multiplier<S> multiplier(p, walk.base);
    for (; walk.more(); walk.next()) {
      int n0, m0;
      walk.place(n0, m0);
      float sums[S::kTokens / 2];
      multiplier.run(sums, walk.steps);
      Output<S>(p, walk.base, n0, m0).write(sums);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(PYFMT_WIDE_THREADS(kThreadsHere), 1)
    matmul_groups_kernel(const __grid_constant__ Params p) {
#if defined(PYFMT_SM90A)
  run_block<S>(p);
#endif
}

// ---- the host's side --------------------------------------------------------------------------

// w: codes, or what they were written out to; its rows alone.
template <class S>
void launch_tiles(Params& p, const WideCall& call, hopper::MatrixBox w, Stream stream) {
  hopper::MatrixBox x = call.x;
  x.box_bytes = 128;
  x.box_rows = S::kTokens;
  p.x = hopper::encode(x);
  w.box_bytes = int(S::kRowBytes);
  w.box_rows = kRows;
  p.codes_map = hopper::encode(w);
  p.n = int(w.rows);
  p.up = L::as_float(power_of_two_bits(kDown));
  p.tiles = (p.tiles + 1) / 2 * 2;  // whole chunks of 128 columns: beyond K all is zero
  const int64_t tiles = int64_t((p.n + kRows - 1) / kRows) * ((p.m + S::kTokens - 1) / S::kTokens);
  const int blocks = int(std::min<int64_t>(tiles, multiprocessors()));
  launch_blocks(matmul_groups_kernel<S>, p, blocks, 1, kThreadsHere, S::kBytes, stream);
}

template <int kBits>
__global__ void __launch_bounds__(kThreads)
    write_out_codes(const uint8_t* codes, void* to, int64_t units) {
  hopper::start_dependents();  // which wait for what is written here
  write_out<kBits>(codes, to, units, int64_t(blockIdx.x) * kThreads + threadIdx.x,
                   int64_t(gridDim.x) * kThreads);
}

// Parts of w are written out one after the other, each but the first beside the products of the
// one before.
template <int kBits, int kParts, int kTokens>
void launch_written(Params& p, const WideCall& call, Stream stream) {
  const int64_t row_bytes = call.codes.row_bytes, pitch = row_bytes / kBits * 16, n = p.n;
  const WrittenParts parts(p.m, n, pitch, kTokens);
  const uint8_t* codes = static_cast<const uint8_t*>(call.codes.data);
  uint8_t* room[2] = {call.room, call.room + parts.room[0]};
  const auto units = [&](size_t part) { return parts.rows[part] * (row_bytes / kBits); };
  launch(write_out_codes<kBits>, int64_t(multiprocessors()) * 8, kThreads, stream, codes,
         static_cast<void*>(room[0]), units(0));
  for (size_t i = 0; i < parts.rows.size(); ++i) {
    const int64_t rows = parts.rows[i];
    Params mine = p;
    codes += rows * row_bytes;
    if (i + 1 < parts.rows.size()) {
      mine.later_codes = codes;
      mine.later_to = room[(i + 1) % 2];
      mine.later = units(i + 1);
    }
    launch_tiles<Layout<kBits, false, kParts, kTokens>>(
        mine, call, {room[i % 2], call.x.row_bytes, rows, pitch}, stream);
    p.scales += rows * p.blocks * (p.scale == Scale::kFP32 ? 4 : 2);
    if (p.bias) p.bias += rows;
    p.y = static_cast<uint8_t*>(p.y) + rows * (p.dtype == DType::kFP32 ? 4 : 2);
  }
}

template <int kBits, int kParts>
void launch_parts(Params& p, const WideCall& call, Stream stream) {
  if (call.room && call.tokens == 256) return launch_written<kBits, kParts, 256>(p, call, stream);
  if (call.room) return launch_written<kBits, kParts, 192>(p, call, stream);
  launch_tiles<Layout<kBits, true, kParts, 192>>(p, call, call.codes, stream);
}

template <int kBits>
void launch(Params& p, const WideCall& call, Stream stream) {
  p.y_pitch = p.n;
  if (p.group_runs % 4 == 0) return launch_parts<kBits, 1>(p, call, stream);
  if (p.group_runs % 2 == 0) return launch_parts<kBits, 2>(p, call, stream);
  launch_parts<kBits, 4>(p, call, stream);
}

}  // namespace groups
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
