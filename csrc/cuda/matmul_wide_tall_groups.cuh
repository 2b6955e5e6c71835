// SPDX-License-Identifier: Apache-2.0
// matmul_wide_tall.cuh for integers in groups: a code times its scale has more digits than
// bfloat16, so what is multiplied are integers. The products of a part of a chunk, 4 kRun columns,
// are summed apart, and its group's scale adds them to the sums with one rounding.
#pragma once

#include "matmul_wide_tall.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace tall {

// Integers of kBits, in groups of a multiple of 4 kRun columns; their scales have 2 or 4 bytes.
template <int kBitsOfCode, int kRunOfLane, Scale kScale>
struct Groups {
  using Codes = turns::Integers<kBitsOfCode, 32>;
  static constexpr int kBits = kBitsOfCode, kRun = kRunOfLane, kParts = 32 / kRun;
  static constexpr int kDown = Codes::kDown;  // tensor cores see weights times 2^-kDown
  static constexpr int kEntry = kScale == Scale::kFP32 ? 4 : 2;  // bytes of a scale
  static constexpr bool kGroups = true, kHasSpecials = false;
  // Copies are of at least four bytes: of two chunks' scales each slot has both, and a warpgroup
  // reads its own.
  static constexpr bool kTwoChunks = kBits == 8 && kParts * kEntry == 2;

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

  // The sums of a part of a chunk, which is a group's; with few rows of x those of two parts.
  static constexpr int kParts = F::kParts, kSets = kTokens == 16 && kParts > 1 ? 2 : 1;
  static constexpr int kRaw = kParts * F::kEntry <= 4 ? 1 : kParts * F::kEntry / 4;  // words
  float fresh[kSets][kCount];
  uint32_t next[2][kRaw], now[2][kRaw];  // scales of its two rows: as read, of these products

  PYFMT_DEVICE GroupMultiplier(const Params& p, const Place& at) : Base(p, at) {
    if constexpr (F::kTwoChunks) {
      Base::scales += uint32_t(at.first + hopper::uniform(int(threadIdx.x) >> 7 >> p.share_bits)) %
                      2 * F::kEntry;
    }
  }

  // Of half kHalf of the slot.
  template <uint32_t kHalf>
  PYFMT_DEVICE void load(Packed& c) {
#pragma unroll
    for (uint32_t r = 0; r < 2; ++r) {
      const uint32_t from = Base::template scales_at<kHalf>(r);
      if constexpr (kRaw == 4) {
        const uint4 v = hopper::load_shared16(from);
        next[r][0] = v.x, next[r][1] = v.y, next[r][2] = v.z, next[r][3] = v.w;
      } else if constexpr (kRaw == 2) {
        const uint2 v = hopper::load_shared8(from);
        next[r][0] = v.x, next[r][1] = v.y;
      } else {
        next[r][0] = hopper::load_shared_small<kParts * F::kEntry>(from);
      }
    }
    Base::template load<kHalf>(c);
  }
  PYFMT_DEVICE void release_codes() {
    uint32_t seen = 0;
#pragma unroll
    for (int i = 0; i < kRaw; ++i) seen |= now[0][i] | now[1][i];
    Base::release_codes(seen);
    if (F::kTwoChunks) Base::scales ^= uint32_t(at.turns & 1) * F::kEntry;
  }

  // By part kPart of chunk kChunk of the stage, kHalf of the tokens.
  template <uint32_t kChunk, int kPart, int kHalf>
  PYFMT_DEVICE void multiply(const Fragments& w) {
    constexpr uint32_t kSteps = 8 / kParts;
    hopper::products_fence();
    const uint64_t first = hopper::tile_descriptor(x, 0);
#pragma unroll
    for (uint32_t s = kPart * kSteps; s < (kPart + 1) * kSteps; ++s) {
      const uint32_t tile = (2 * kChunk + s / 4) * (R::kTile / 16) + kHalf * (kWide * 128 / 16);
      Product::add_to(fresh[kPart % kSets], w[s], first + (tile + s % 4 * 2), s > kPart * kSteps);
    }
    hopper::products_commit();
  }
  template <int kPart, int kHalf>
  PYFMT_DEVICE void add(float (&sums)[kAll]) const {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t raw = now[r][kPart * F::kEntry / 4];
      factor[r] = F::factor(F::kEntry == 2 && kPart % 2 ? raw >> 16 : raw);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float& sum = sums[kHalf * kCount + j];
      sum = fused(factor[j >> 1 & 1], fresh[kPart % kSets][j], sum);
    }
  }
  // Of the products that are under way: up to kPart, kHalf.
  template <int kPart, int kHalf>
  PYFMT_DEVICE void add_sets(float (&sums)[kAll]) const {
    if constexpr (kSets == 2) add<kPart - 1, kHalf>(sums);
    add<kPart, kHalf>(sums);
  }
  PYFMT_DEVICE void add_last(float (&sums)[kAll]) const { add_sets<kParts - 1, kHalves - 1>(sums); }
  PYFMT_DEVICE void wait_sums() {
#pragma unroll
    for (int i = 0; i < kSets; ++i) hopper::pin(fresh[i]);
  }

  // Products number kAt and on, of parts and halves of the tokens, all but the last with their end.
  template <uint32_t kChunk, int kAt>
  PYFMT_DEVICE void multiply_from(const Fragments& w, float (&sums)[kAll]) {
    constexpr int kPart = kAt / kHalves, kHalf = kAt % kHalves;
    multiply<kChunk, kPart, kHalf>(w);
    if constexpr (kAt + 1 < kParts * kHalves) {
      if constexpr ((kPart + 1) % kSets == 0) {
        hopper::products_wait<0>();
        wait_sums();
        add_sets<kPart, kHalf>(sums);
      }
      multiply_from<kChunk, kAt + 1>(w, sums);
    }
  }
  // Products of what lies in c, all but their last: those are under way.
  template <uint32_t kChunk>
  PYFMT_DEVICE void start(const Packed& c, float (&sums)[kAll]) {
    Fragments w;
    Base::template to_fragments<false>(c, w);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kRaw; ++i) now[r][i] = next[r][i];
    }
    if (kChunk == 0) hopper::barrier_wait(at.base + kFull + 8 * stage.place, stage.parity);
    multiply_from<kChunk, 0>(w, sums);
  }

  PYFMT_DEVICE void run(float (&sums)[kAll]) {
#pragma unroll
    for (int j = 0; j < kAll; ++j) sums[j] = 0.0f;
    if (mine == 0) return;
    Packed c;
    wait_codes();
    load<0>(c);
#pragma unroll 1
    for (int left = mine;;) {
      find_stage();
      if constexpr (R::kSpan == 2) {
        start<0>(c, sums);
        if (kEarly) load<R::kSpan - 1>(c);
        Base::template finish_products<R::kJoined == 1, false>();
        wait_sums();
        if (!kEarly) load<R::kSpan - 1>(c);
        add_last(sums);
        if (R::kJoined == 1) find_stage();
      }
      start<R::kJoined - 1>(c, sums);
      release_codes();
      if (--left == 0) break;
      if (kEarly) {
        wait_codes();
        load<0>(c);
      }
      Base::template finish_products<true, true>();
      wait_sums();
      if (!kEarly) {
        wait_codes();
        load<0>(c);
      }
      add_last(sums);
    }
    hopper::products_wait<0>();
    wait_sums();
    add_last(sums);
  }
};

// ---- what brings codes and scales --------------------------------------------------------------

template <class F, int kTokens>
struct GroupBringer : Bringer<F, kTokens> {
  using Base = Bringer<F, kTokens>;
  using R = Room<F, kTokens>;
  static constexpr int kSpan = int(R::kSpan), kParts = F::kParts, kUnits = kSpan * kParts;
  static constexpr int kBytes = int(R::kRowScales), kCopy = kBytes < 16 ? kBytes : 16;
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
    const int from = F::kTwoChunks ? s.chunk / 2 * 4 : s.chunk * (kParts * F::kEntry);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kBytes; i += kCopy) {
        hopper::copy_small<kCopy>(s.scales + uint32_t(r) * 32 * R::kRowScales + uint32_t(i),
                                  row[r] + from + i, kCopy);
      }
    }
    hopper::arrive_after_copies(s.full);
  }

  // Where copies cannot serve, scales go through registers: of whole chunks a round ahead.
  using Raw = uint32_t[2][kUnits];
  PYFMT_DEVICE void read_scales(int chunk, const uint8_t* const (&row)[2], Raw& raw) const {
    const float groups = float(F::kRun / 8) / float(p.group_runs);  // of a part
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      // Half a part is more than what the quotient is off by.
      const int group = min(int((float(chunk * kParts + i) + 0.5f) * groups), int(p.blocks) - 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint8_t* const from = row[r] + group * F::kEntry;
        raw[r][i] = F::kEntry == 4 ? *reinterpret_cast<const uint32_t*>(from)
                                   : *reinterpret_cast<const uint16_t*>(from);
      }
    }
  }
  // Beyond the last chunk scales are zeros.
  PYFMT_DEVICE void lay_down(const Slot& s, const Raw& raw) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t to = s.scales + uint32_t(r) * 32 * R::kRowScales;
      uint32_t v[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i) v[i] = s.chunk + i / kParts < p.tiles ? raw[r][i] : 0;
      if constexpr (kUnits == 1) {
        hopper::store_shared(to, F::kEntry == 2 ? v[0] * 0x10001u : v[0]);
      } else if constexpr (F::kEntry == 2) {
#pragma unroll
        for (int i = 0; i < kUnits; i += 2) {
          hopper::store_shared(to + uint32_t(2 * i), v[i] | v[i + 1] << 16);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kUnits; i += 2) {
          hopper::store_shared8(to + uint32_t(4 * i), v[i], v[i + 1]);
        }
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
    // Of whole slots, whose scales are those of as many groups.
    const bool copied = p.group_runs == F::kRun / 8 && p.scales_align >= kCopy &&
                        int(p.blocks) * F::kEntry % kBytes == 0;
    if (copied) {
      bring_slots<true>(lane, row);
    } else {
      bring_slots<false>(lane, row);
    }
  }
  template <bool kCopied>
  PYFMT_DEVICE void bring_slots(int lane, const uint8_t* const (&row)[kGroups][2]) const {
    constexpr bool kAhead = !kCopied && kParts == 1;
    Raw raw[kAhead ? kGroups : 1];
    const auto ask = [&](int i) {
      if constexpr (kAhead) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          read_scales(at.first + (i + (g >> p.share_bits)) * kSpan, row[g], raw[g]);
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
          if (!kAhead) read_scales(s.chunk, row[g], raw[0]);
          lay_down(s, raw[kAhead ? g : 0]);
        }
        ask(i + at.turns);
      }
    }
  }

  PYFMT_DEVICE void run() const {
    Base::run([&](int lane) { bring_weights(lane); });
  }
};

template <int kBits, int kRun>
void launch_groups(Params& p, const WideCall& call, Stream stream) {
  if (p.scale == Scale::kBF16) {
    return launch_elements<Groups<kBits, kRun, Scale::kBF16>>(p, call, stream);
  }
  if (p.scale == Scale::kFP16) {
    return launch_elements<Groups<kBits, kRun, Scale::kFP16>>(p, call, stream);
  }
  launch_elements<Groups<kBits, kRun, Scale::kFP32>>(p, call, stream);
}

}  // namespace tall

// A lane takes as many codes that lie together as a group allows.
template <int kRun>
Kernel tall_groups(const FormatSpec& f) {
  if (has_groups(f, elements::int4)) return {tall::launch_groups<4, kRun>, kChunk, false, 64};
  if (has_groups(f, elements::int8)) return {tall::launch_groups<8, kRun>, kChunk, false, 64};
  return {};
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
