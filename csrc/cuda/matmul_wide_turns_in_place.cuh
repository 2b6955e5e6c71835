// SPDX-License-Identifier: Apache-2.0
// What multiplies in matmul_wide_turns.cuh where fp8 fragments of a chunk become those of the next
// in place, a step of 32 columns as soon as the second half of the tokens has been multiplied by
// it. Warpgroups take no turns: either has products under way nearly all the time.
//
// A chunk takes what its instructions take: addresses are carried from chunk to chunk, and nothing
// but additions stands between the end of products and the start of the next.
#pragma once

#include "matmul_wide_turns_halves.cuh"
#include "matmul_wide_turns_sums.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace turns {

template <class F, int kTokens>
struct InPlace {
  using R = Room<F, kTokens>;
  using Product = hopper::RegisterProduct<typename F::Type, R::kWide>;
  static constexpr int kCount = R::kWide / 2, kAll = kTokens / 2;
  static constexpr int kSteps = 4, kBy = F::kPartsOfBlock;  // steps of a chunk; decoded by parts
  static constexpr int kMost = 240;                         // registers
  static constexpr int kSpan = int(R::kSpan);
  // Whether a chunk's last part is decoded beside its own first products, not before them: worth
  // while where that is half of its codes.
  static constexpr bool kLastBeside = kBy == 2;
  using Fragments = uint32_t[kSteps][4];
  // What a lane has of a chunk before it is decoded.
  struct Packed {
    uint32_t words[2][F::kBits];
    typename F::Meaning of[2];
  };

  const Params& p;
  const Place& at;
  int lane, steps;
  uint32_t peer = 0;  // what turns an address of this block into that of another, for some lanes
  uint32_t codes, places;  // where this lane reads
  uint32_t tile;           // the stage's, as products have it
  Ring<R::kStages> stage;
  Ring<R::kDepth> slot;
  uint32_t seen = 0;  // a word of each that was read of a slot, for after_reading

  PYFMT_DEVICE InPlace(const Params& p, const Place& at)
      : p(p),
        at(at),
        lane(int(threadIdx.x) & 31),
        steps(at.last - at.first),
        tile(hopper::tile_code(at.base + kHeader)) {
    if (p.share > 1 && lane < p.share) {
      peer = hopper::cluster_address(at.base, uint32_t(at.part * p.share + lane)) - at.base;
    }
    const uint32_t row = uint32_t(16 * (threadIdx.x >> 5) + row_of<F>(lane));
    const uint32_t mine = uint32_t(lane % 4 * 4 * F::kBits);
    codes = at.base + R::kCodesAt + row * R::kRowBytes;
    codes += R::kRowBytes == 128 ? mine ^ (row & 7) << 4 : mine;
    places = at.base + R::kPlacesAt + row * 4 + uint32_t(lane % 4);
    hopper::keep(codes);
    hopper::keep(places);
  }

  // ---- codes ----------------------------------------------------------------------------------

  // Of the chunk of the slot that codes and places point to.
  PYFMT_DEVICE void read_chunk(Packed& c) {
    static_assert(F::kBits == 6 || R::kRowBytes == 128, "a lane has 16 bytes, which are turned");
    const uint32_t from = codes + slot.place * R::kSlot;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t (&words)[F::kBits] = c.words[r];
      const uint32_t row = from + uint32_t(r * 8) * R::kRowBytes;
      if constexpr (F::kBits == 4) {
        const uint4 v = hopper::load_shared16(row);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        seen |= v.x;
      } else {
#pragma unroll
        for (int i = 0; i < F::kBits; i += 2) {
          const uint2 v = hopper::load_shared8(row + uint32_t(4 * i));
          words[i] = v.x, words[i + 1] = v.y;
          seen |= v.x;
        }
      }
      const uint32_t place =
          hopper::load_shared_small<1>(places + slot.place * R::kPlaces + uint32_t(r * 32));
      seen |= place;
      c.of[r] = F::meaning(place, at.base + kTableAt);
    }
  }
  // Part kPart of it becomes fragments, which products that are under way have no use for.
  template <int kPart>
  PYFMT_DEVICE void decode_some(Packed& c, Fragments& to) const {
    constexpr int kWords = F::kOut / kBy;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      hopper::pin(c.words[r]);
      uint32_t out[F::kOut];
      F::template decode_part<kPart>(c.words[r], c.of[r], out);
#pragma unroll
      for (int j = kPart * kWords; j < (kPart + 1) * kWords; ++j)
        to[j / 2][r + 2 * (j & 1)] = out[j];
    }
    if constexpr (kPart + 1 < kBy) {
      uint32_t all = 0;
#pragma unroll
      for (int s = kPart * kWords / 2; s < (kPart + 1) * kWords / 2; ++s) {
        all |= to[s][0] | to[s][1] | to[s][2];
        if (s + 1 < (kPart + 1) * kWords / 2) all |= to[s][3];
      }
      hopper::work_out(all, to[(kPart + 1) * kWords / 2 - 1][3], p.nothing, at.base);
    }
  }
  // To the other chunk of two in a slot.
  PYFMT_DEVICE void turn_over() {
    codes ^= 64;
    places ^= kRows * 4;
  }
  PYFMT_DEVICE void read_next(Packed& c) {
    wait_codes();
    read_chunk(c);
    if constexpr (kSpan == 2) turn_over();
  }
  PYFMT_DEVICE void decode_first(Packed& c, Fragments& to) {
    read_next(c);
    decode_some<0>(c, to);
    if constexpr (kBy == 4) {
      decode_some<1>(c, to);
      decode_some<2>(c, to);
    }
    if constexpr (!kLastBeside) decode_some<kBy - 1>(c, to);
    if constexpr (kSpan == 1) release_codes();
  }

  PYFMT_DEVICE void wait_codes() const {
    hopper::barrier_wait(at.base + kCodesFull + 8 * slot.place, slot.parity);
  }
  // All of a slot has been read. The last of all, nobody waits for.
  PYFMT_DEVICE void release_codes() {
    hopper::warp_sync();
    const uint32_t empty =
        hopper::after_reading(at.base + kCodesEmpty + 8 * slot.place, seen, p.nothing);
    if (lane == 0) hopper::barrier_arrive_here(empty);
    seen = 0;
    slot.next();
  }

  // ---- products -------------------------------------------------------------------------------

  PYFMT_DEVICE void wait_x(const Ring<R::kStages>& of) const {
    hopper::barrier_wait(at.base + kFull + 8 * of.place, of.parity);
  }
  // The warp has no more use for its stage; on to the next.
  PYFMT_DEVICE void release_stage() {
    if (lane < p.share) hopper::barrier_arrive(at.base + kEmpty + 8 * stage.place + peer);
    tile += R::kStage >> 4;
    if (++stage.place == R::kStages) {
      stage.place = 0;
      stage.parity ^= 1;
      tile -= R::kStages * (R::kStage >> 4);
    }
  }

  // Starts products of half kHalf of the tokens, of steps kFrom to kTo. kEach: steps can be waited
  // for one by one.
  template <int kHalf, int kFrom, int kTo, bool kEach = false>
  PYFMT_DEVICE void multiply_steps(float (&fresh)[kCount], const Fragments& of) const {
    const uint32_t half = tile + (kHalf * (R::kWide * 128) >> 4);
    hopper::products_fence();
#pragma unroll
    for (int s = kFrom; s < kTo; ++s) {
      Product::add_to(fresh, of[s], hopper::tile_descriptor(half, s), s > 0 ? 1 : 0);
      if (kEach || s == kSteps - 1) hopper::products_commit();
    }
  }
  // Those of the first half.
  PYFMT_DEVICE void multiply_first(float (&fresh)[kCount], Fragments& of, Packed& c) const {
    if constexpr (kLastBeside) {
      constexpr int kReady = kSteps - kSteps / kBy;
      multiply_steps<0, 0, kReady>(fresh, of);
      decode_some<kBy - 1>(c, of);
      multiply_steps<0, kReady, kSteps>(fresh, of);
    } else {
      multiply_steps<0, 0, kSteps>(fresh, of);
    }
  }
  // kLast: the stage has no more use.
  template <int kHalf, bool kLast>
  PYFMT_DEVICE void add(float (&sums)[kAll], float (&fresh)[kCount]) {
    hopper::products_wait<0>();
    hopper::pin(fresh);
    if constexpr (kLast) release_stage();
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      sums[kHalf * kCount + j] = sums[kHalf * kCount + j] + fresh[j];
    }
  }

  // ---- chunks ---------------------------------------------------------------------------------

  // Chunk i, not the last.
  PYFMT_DEVICE void chunk(int i, float (&sums)[kAll], float (&fresh)[kCount], Fragments& of,
                          Packed& c) {
    multiply_first(fresh, of, c);
    if constexpr (!kLastBeside) read_next(c);
    add<0, false>(sums, fresh);
    multiply_steps<1, 0, kSteps, true>(fresh, of);
    // What is read here the assembler cannot decode between products.
    if constexpr (kLastBeside) read_next(c);
    if (kSpan == 1 || i % 2 == 0) release_codes();
    hopper::products_wait<4 - 4 / kBy>();
    decode_some<0>(c, of);
    if constexpr (kBy == 4) {
      hopper::products_wait<2>();
      decode_some<1>(c, of);
      hopper::products_wait<1>();
      decode_some<2>(c, of);
    }
    Ring<R::kStages> coming = stage;
    coming.next();
    wait_x(coming);
    add<1, true>(sums, fresh);
    if constexpr (!kLastBeside) decode_some<kBy - 1>(c, of);
  }
  // The last one, and the sums of its first half on their way to the other part of K.
  PYFMT_DEVICE void last_chunk(float (&sums)[kAll], float (&fresh)[kCount], Fragments& of,
                               Packed& c) {
    if (steps > 0) {
      multiply_first(fresh, of, c);
      add<0, false>(sums, fresh);
      multiply_steps<1, 0, kSteps>(fresh, of);
    }
    if (p.split > 1) send_sums<R>(p, at, sums);
    if (steps > 0) add<1, true>(sums, fresh);
  }

  PYFMT_DEVICE void run(float (&sums)[kAll]) {
    float fresh[kCount];
    Fragments a;
#pragma unroll
    for (int j = 0; j < kAll; ++j) sums[j] = 0.0f;
    Packed c = {};
    if (steps > 0) {
      decode_first(c, a);
      wait_x(stage);
    }
#pragma unroll 1
    for (int i = 0; i + 1 < steps; ++i) chunk(i, sums, fresh, a, c);
    last_chunk(sums, fresh, a, c);
  }

  // What is left once all of run is over.
  PYFMT_DEVICE void end(float (&sums)[kAll]) const {
    if (p.n % 8 || p.dtype == DType::kFP32) {
      const Ending<kTokens> ending(p, at, at.part ^ 1);
      stage_all(sums);
      ending.write(p, at.base + kHeader);
    } else if (p.dtype == DType::kBF16) {
      end_halves<DType::kBF16>(sums);
    } else {
      end_halves<DType::kFP16>(sums);
    }
  }
  template <DType kType>
  PYFMT_DEVICE void end_halves(float (&sums)[kAll]) const {
    const EndingOfHalves<kType, kTokens> ending(p, at, at.part ^ 1);
    stage_all(sums);
    ending.write(p, at.base + kHeader);
  }
  PYFMT_DEVICE void stage_all(float (&sums)[kAll]) const {
    meet_at_end(sums);
    const bool parts = p.split > 1;
    const int row = row_of<F>(lane);
    const uint32_t staged = at.base + kHeader;
    if (!parts) stage_sums<0, kCount>(staged, sums, row);
    stage_sums<kCount, kCount>(staged - (parts ? kTokens / 2 * kPitch * 4 : 0), sums, row);
    hopper::partial_sync<kConsumers>();
  }
  // Sums that the other part of K has sent are added. Nothing is written to before all products are
  // over, and sums that came have been read.
  PYFMT_DEVICE void meet_at_end(float (&sums)[kAll]) const {
    if (p.split > 1) take_sums<R>(at, steps, sums);
    if (p.share > 1) {
      hopper::cluster_meet();
    } else {
      hopper::partial_sync<kConsumers>();
    }
  }
};

}  // namespace turns
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
