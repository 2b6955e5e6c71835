// SPDX-License-Identifier: Apache-2.0
// matmul_wide_tall.cuh for integers in groups of multiples of 128 columns: a code times its scale
// has more digits than bfloat16, so what is multiplied are integers. The products of a chunk are
// summed apart, and its group's factor adds them to the sums.
#pragma once

#include "matmul_wide_tall.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace tall {

// Integers of kBits, scales of 2 or 4 bytes.
template <int kBitsOfCode, Scale kScale>
struct Groups {
  using Codes = turns::Integers<kBitsOfCode, 32>;
  static constexpr int kBits = kBitsOfCode;
  static constexpr int kDown = Codes::kDown;  // tensor cores see weights times 2^-kDown
  static constexpr int kEntry = kScale == Scale::kFP32 ? 4 : 2;  // bytes of a scale
  static constexpr bool kGroups = true, kHasSpecials = false;

  PYFMT_DEVICE static float factor(uint32_t raw) {
    if constexpr (kScale == Scale::kBF16) return as_float(raw << 16);
    if constexpr (kScale == Scale::kFP16) return from_half(raw);
    return as_float(raw);
  }

  template <bool kAll>
  PYFMT_DEVICE static void decode(const uint32_t (&words)[kBits], uint32_t /*raw*/,
                                  uint32_t (&out)[16]) {
    Codes::decode(words, 0, 0, out);
  }
};

// Copies are of at least four bytes: of two chunks' scales each slot has both, and a warpgroup
// reads its own.
template <class F>
constexpr bool kTwoChunks = F::kBits == 8 && F::kEntry == 2;

// ---- what multiplies --------------------------------------------------------------------------

template <class F, int kTokens>
struct GroupMultiplier : Multiplier<F, kTokens> {
  using Base = Multiplier<F, kTokens>;
  using R = Room<F, kTokens>;
  using typename Base::Fragments;
  using typename Base::Packed;
  // Sums of all of 64 tokens twice, and fragments, find no registers: products go by halves.
  static constexpr int kHalves = kTokens == 64 ? 2 : 1, kWide = kTokens / kHalves;
  static constexpr int kAll = kTokens / 2, kCount = kWide / 2;
  // Then codes are read once the registers of fragments are free, else beside the products.
  static constexpr bool kEarly = kTokens == 16 || (kTokens == 32 && F::kBits == 4);
  using Product = hopper::RegisterProduct<hopper::Bf16, kWide>;
  using Base::at;
  using Base::find_stage;
  using Base::mine;
  using Base::stage;
  using Base::wait_codes;
  using Base::x;

  float fresh[kCount], factor[2];

  PYFMT_DEVICE GroupMultiplier(const Params& p, const Place& at) : Base(p, at) {
    if constexpr (kTwoChunks<F>) {
      Base::scales += uint32_t(at.first + hopper::uniform(int(threadIdx.x) >> 7 >> p.share_bits)) %
                      2 * F::kEntry;
    }
  }
  PYFMT_DEVICE void next_scales() {
    if (kTwoChunks<F>) Base::scales ^= uint32_t(at.turns & 1) * F::kEntry;
  }

  // By chunk kPart of the stage, kHalf of the tokens.
  template <uint32_t kPart, uint32_t kHalf>
  PYFMT_DEVICE void multiply(const Fragments& w) {
    if (kPart == 0 && kHalf == 0) {
      hopper::barrier_wait(at.base + kFull + 8 * stage.place, stage.parity);
    }
    hopper::products_fence();
    const uint64_t first = hopper::tile_descriptor(x, 0);
#pragma unroll
    for (uint32_t s = 0; s < 8; ++s) {
      const uint32_t tile = (2 * kPart + s / 4) * (R::kTile / 16) + kHalf * (kWide * 128 / 16);
      Product::add_to(fresh, w[s], first + (tile + s % 4 * 2), s > 0);
    }
    hopper::products_commit();
  }
  template <int kHalf>
  PYFMT_DEVICE void add(float (&sums)[kAll]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float& sum = sums[kHalf * kCount + j];
      sum = fused(factor[j >> 1 & 1], fresh[j], sum);
    }
  }

  // Products of what lies in c, all but their last half: that is under way.
  template <uint32_t kPart>
  PYFMT_DEVICE void start(const Packed& c, float (&sums)[kAll]) {
    Fragments w;
    Base::template to_fragments<false>(c, w);
    factor[0] = F::factor(c.raw[0]);
    factor[1] = F::factor(c.raw[1]);
    multiply<kPart, 0>(w);
    if constexpr (kHalves == 2) {
      hopper::products_wait<0>();
      hopper::pin(fresh);
      add<0>(sums);
      multiply<kPart, 1>(w);
    }
  }

  PYFMT_DEVICE void run(float (&sums)[kAll]) {
#pragma unroll
    for (int j = 0; j < kAll; ++j) sums[j] = 0.0f;
    if (mine == 0) return;
    Packed c;
    wait_codes();
    Base::template load<0>(c);
#pragma unroll 1
    for (int left = mine;;) {
      find_stage();
      if constexpr (R::kSpan == 2) {
        start<0>(c, sums);
        if (kEarly) Base::template load<R::kSpan - 1>(c);
        Base::template finish_products<R::kJoined == 1, false>();
        hopper::pin(fresh);
        if (!kEarly) Base::template load<R::kSpan - 1>(c);
        add<kHalves - 1>(sums);
        if (R::kJoined == 1) find_stage();
      }
      start<R::kJoined - 1>(c, sums);
      Base::release_codes(c.raw[0] | c.raw[1]);
      next_scales();
      if (--left == 0) break;
      if (kEarly) {
        wait_codes();
        Base::template load<0>(c);
      }
      Base::template finish_products<true, true>();
      hopper::pin(fresh);
      if (!kEarly) {
        wait_codes();
        Base::template load<0>(c);
      }
      add<kHalves - 1>(sums);
    }
    hopper::products_wait<0>();
    hopper::pin(fresh);
    add<kHalves - 1>(sums);
  }
};

// ---- what brings codes and scales --------------------------------------------------------------

template <class F, int kTokens>
struct GroupBringer : Bringer<F, kTokens> {
  using Base = Bringer<F, kTokens>;
  using R = Room<F, kTokens>;
  static constexpr int kSpan = int(R::kSpan), kBytes = int(R::kRowScales);
  using Base::at;
  using Base::kWaits;
  using Base::p;

  // Of warpgroup g, in the round that begins with slot i: its place in the ring, its first chunk.
  struct Slot {
    uint32_t place, full, scales;
    int chunk;
    bool there;
  };
  PYFMT_DEVICE Slot slot_of(int i, int g, const Ring<R::kDepth>& ring, int lane) const {
    Slot s;
    const int slot = i + (g >> p.share_bits);
    s.there = slot < at.slots;
    s.chunk = at.first + slot * kSpan;
    s.place = ring.place * kGroups + uint32_t(g);
    s.full = at.base + kCodesFull + 8 * s.place;
    s.scales = at.base + R::kScalesAt + s.place * R::kScales + uint32_t(lane) * R::kRowScales;
    return s;
  }
  // Codes of a slot, once it is empty.
  PYFMT_DEVICE void copy_codes(const Slot& s, int g, const Ring<R::kDepth>& ring, int lane) const {
    hopper::barrier_wait(at.base + kCodesEmpty + 8 * s.place, ring.parity ^ 1);
    if (lane == 0) {
      hopper::barrier_expect(s.full, R::kSlot);
      hopper::copy_box(at.base + R::kCodesAt + s.place * R::kSlot, p.codes_map,
                       s.chunk * int(R::kHalf), at.n0 + 64 * (g & (p.share - 1)), s.full, 0, false);
    }
  }
  PYFMT_DEVICE void copy_scales(const Slot& s, const uint8_t* const (&row)[2]) const {
    const int from = kTwoChunks<F> ? s.chunk / 2 * 4 : s.chunk * F::kEntry;
    hopper::copy_small<kBytes>(s.scales, row[0] + from, kBytes);
    hopper::copy_small<kBytes>(s.scales + 32 * R::kRowScales, row[1] + from, kBytes);
    hopper::arrive_after_copies(s.full);
  }

  // Where copies cannot serve, scales go through registers, a round ahead.
  using Raw = uint32_t[2][kSpan];
  PYFMT_DEVICE void read_scales(int chunk, float groups, const uint8_t* const (&row)[2],
                                Raw& raw) const {
#pragma unroll
    for (int h = 0; h < kSpan; ++h) {
      // Half a chunk is more than what the quotient is off by.
      const int group = int((float(min(chunk + h, p.tiles - 1)) + 0.5f) * groups);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint8_t* const from = row[r] + group * F::kEntry;
        raw[r][h] = F::kEntry == 4 ? *reinterpret_cast<const uint32_t*>(from)
                                   : *reinterpret_cast<const uint16_t*>(from);
      }
    }
  }
  // Beyond the last chunk scales are zeros.
  PYFMT_DEVICE void lay_down(const Slot& s, const Raw& raw) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t v[kSpan];
#pragma unroll
      for (int h = 0; h < kSpan; ++h) v[h] = s.chunk + h < p.tiles ? raw[r][h] : 0;
      const uint32_t to = s.scales + uint32_t(r) * 32 * R::kRowScales;
      if constexpr (F::kEntry == 2) {
        hopper::store_shared(to, v[0] | v[kSpan - 1] << 16);
      } else if constexpr (kSpan == 2) {
        hopper::store_shared8(to, v[0], v[1]);
      } else {
        hopper::store_shared(to, v[0]);
      }
    }
    hopper::barrier_arrive_here(s.full);
  }

  // One warp; a lane has two rows of each warpgroup.
  PYFMT_DEVICE void bring_weights(int lane) const {
    const uint8_t* row[kGroups][2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int n = at.n0 + 64 * (g & (p.share - 1)) + lane;
      row[g][0] = p.scales + int64_t(min(n, p.n - 1)) * p.blocks * F::kEntry;
      row[g][1] = p.scales + int64_t(min(n + 32, p.n - 1)) * p.blocks * F::kEntry;
    }
    if (!p.copied_codes) hopper::wait_for_previous();  // a copy was made of them
    if (p.group_runs == 4 && p.scales_align >= kBytes) {
      bring_slots<true>(lane, row);
    } else {
      bring_slots<false>(lane, row);
    }
  }
  template <bool kCopied>
  PYFMT_DEVICE void bring_slots(int lane, const uint8_t* const (&row)[kGroups][2]) const {
    const float groups = 4.0f / float(p.group_runs);  // a chunk
    Raw raw[kCopied ? 1 : kGroups];
    const auto ask = [&](int i) {
      if constexpr (!kCopied) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          read_scales(at.first + (i + (g >> p.share_bits)) * kSpan, groups, row[g], raw[g]);
        }
      }
    };
    ask(0);
    Ring<R::kDepth> ring;
#pragma unroll 1
    for (int i = 0; i < at.slots; i += at.turns, ring.next()) {
      // As in Bringer: x must not wait behind all that a ring holds.
      if (i == at.turns && (kWaits || p.parts > 1)) {
        hopper::wait_for_previous();
        hopper::barrier_wait(at.base + kRaw + 8 * uint32_t(at.turns) * R::kStep, 0);
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const Slot s = slot_of(i, g, ring, lane);
        if (!s.there) break;
        copy_codes(s, g, ring, lane);
        if (kCopied) copy_scales(s, row[g]);
      }
      if constexpr (!kCopied) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const Slot s = slot_of(i, g, ring, lane);
          if (!s.there) break;
          lay_down(s, raw[g]);
        }
        ask(i + at.turns);
      }
    }
  }

  PYFMT_DEVICE void run() const {
    Base::run([&](int lane) { bring_weights(lane); });
  }
};

template <int kBits>
void launch_groups(Params& p, const WideCall& call, Stream stream) {
  if (p.scale == Scale::kBF16) {
    return launch_elements<Groups<kBits, Scale::kBF16>>(p, call, stream);
  }
  if (p.scale == Scale::kFP16) {
    return launch_elements<Groups<kBits, Scale::kFP16>>(p, call, stream);
  }
  launch_elements<Groups<kBits, Scale::kFP32>>(p, call, stream);
}

}  // namespace tall
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
