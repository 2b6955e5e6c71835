// SPDX-License-Identifier: Apache-2.0
// Rotate and quantize sixteen groups of 128 elements side by side, one to a lane: multipliers and
// codes need no shuffles either, until the codes are turned back. AVX-512; bfloat16 or float32,
// rotations up to 128, blocks of 16 or 32, byte scales.
#pragma once

#include "kernels_encode.h"
#include "kernels_lanes_e2m1.h"
#include "kernels_lanes_rotate.h"
#include "kernels_scale.h"

namespace pyfmt {
namespace PYFMT_ISA {

#if PYFMT_AVX512
// Codes of a block of `kSize` vectors, one element of each group in each, to words of each group.
template <class Element, class Codec, int kBits, int kSize>
PYFMT_INLINE void encode_lanes_block(const Codec& c, const float* x, F multiplier, U* words,
                                     uint8_t* ahead) {
  constexpr int kCodes = kBits == 6 ? 16 : 32 / kBits, kWords = kCodes * kBits / 32;
  for (int i = 0; i < kSize; i += kCodes, words += kWords, ahead += 64 * kWords) {
    fetch_output(ahead, 64 * kWords);
    U w[kWords] = {};
#pragma GCC unroll 16
    for (int k = 0; k < kCodes; ++k) {
      const F y = (F)_mm512_load_ps(x + (i + k) * kLanes) * multiplier;
      const U code = Element::encode(c, (U)y);
      const int at = k * kBits % 32, word = k * kBits / 32;
      w[word] = w[word] | code << at;
      if (at + kBits > 32) w[word + 1] = code >> (32 - at);
    }
    for (int k = 0; k < kWords; ++k) words[k] = w[k];
  }
}

// All codes of the groups; as many bytes are asked for from `ahead` on, to be written next.
template <class Element, int kBits, int kBlocks>
PYFMT_INLINE void encode_lanes(const ElementSpec& spec, bool full, const float* x,
                               const U* multipliers, U* words, uint8_t* ahead) {
  constexpr int kSize = kLaneGroup / kBlocks, kWords = kSize * kBits / 32;
  const auto c = Element::make(spec, full);
  using C = decltype(Element::make(spec, full));
  for (int b = 0; b < kBlocks; ++b) {
    encode_lanes_block<Element, C, kBits, kSize>(c, x + b * kSize * kLanes, (F)multipliers[b],
                                                 words + b * kWords, ahead + b * kWords * 64);
  }
}

// Words of each group to the groups' codes one after the other.
PYFMT_INLINE void turn_words(const U* words, int count, __m512i v[16]) {
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) v[k] = k < count ? (__m512i)words[k] : _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int k = 0; k < 16; k += 4) turn_lanes(v + k);
  turn_pieces(v);
}
static void leave_lanes(const U* words, int bits, bool past_caches, uint8_t* codes) {
  const int count = kLaneGroup * bits / 32;  // 16, 24 or 32
  past_caches &= count % 16 == 0 && (uintptr_t(codes) & 63) == 0;
  for (int first = 0; first < count; first += 16) {
    const int some = count - first;
    __m512i v[16];
    if (some >= 16) {
      turn_words(words + first, 16, v);
      if (past_caches) {
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) {
          _mm512_stream_si512((__m512i*)(codes + (k * count + first) * 4), v[k]);
        }
        continue;
      }
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) _mm512_storeu_si512(codes + (k * count + first) * 4, v[k]);
      continue;
    }
    turn_words(words + first, 8, v);
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      _mm256_storeu_si256((__m256i*)(codes + (k * count + first) * 4),
                          _mm512_castsi512_si256(v[k]));
    }
  }
}

using EncodeLanesFn = void (*)(const ElementSpec&, bool full, const float* x, const U* multipliers,
                               U* words, uint8_t* ahead);

template <class Element>
static EncodeLanesFn lanes_encoder_of(int bits, int blocks) {
  if (bits == 4) {
    return blocks == 4 ? encode_lanes<Element, 4, 4> : encode_lanes<Element, 4, 8>;
  }
  if (bits == 6) {
    return blocks == 4 ? encode_lanes<Element, 6, 4> : encode_lanes<Element, 6, 8>;
  }
  return blocks == 4 ? encode_lanes<Element, 8, 4> : encode_lanes<Element, 8, 8>;
}

static EncodeLanesFn find_lanes_encoder(const ElementSpec& e, bool full, int blocks) {
#define PYFMT_ELEMENT(id, name, kind, exp, man, bias, frac, is_signed, special)        \
  if (Kind::kind == Kind::kFloat && e == elements::id) {                               \
    return lanes_encoder_of<Choose<id##_element, Kind::kind>::type>(e.bits(), blocks); \
  }
#include "../formats.inc"
  if (!e.is_int() || !e.is_signed || full) return nullptr;
  return lanes_encoder_of<SymmetricInt>(e.bits(), blocks);
}

// rotate_across, and meanwhile the codes of another group.
struct CellWords {
  const float* x;
  const U* multipliers;
  U* words;
  uint8_t* ahead;

  PYFMT_HD void run(int i) const {
    fetch_output(ahead + 64 * i, 64);
    words[i] = cell_word<Cells::kScaled>(x + 8 * i * kLanes, multipliers[i / 4]);
  }
};
static void rotate_across_encoding(int size, float factor, float* x, U* amax, CellWords other) {
  rotate_across<4, true>(size, factor, x, amax, other);
}

// Codes of so many bytes are stored past the caches, which could not keep them.
constexpr int64_t kPastCaches = 16 << 20;

class LaneQuantizer {
 public:
  PYFMT_HD explicit LaneQuantizer(const QuantizeArgs& a)
      : a_(a), blocks_(int(kLaneGroup / a.tiling.block_columns)), constants_(a) {
    const Tiling& t = a.tiling;
    const Rotation& r = a.rotation;
    const int bits = a.element.bits();
    const bool served = a.codes && a.scales && !a.stochastic && !a.given && t.block_rows == 1 &&
                        (t.block_columns == 16 || t.block_columns == 32) &&
                        t.tile_columns % kLaneTile == 0 && r.size > 1 && r.size <= kLaneGroup &&
                        (!r.signs || kLaneGroup % r.signs_length == 0) &&
                        (a.dtype == DType::kBF16 || a.dtype == DType::kFP32) &&
                        (a.scale == Scale::kE8M0 || a.scale == Scale::kE4M3) &&
                        (bits == 4 || bits == 6 || bits == 8);
    if (!served) return;
    cells_ = a.element == elements::e2m1;
    group_bytes_ = kLaneTile / 8 * bits;
    past_caches_ = t.batches * t.rows * a.row_bytes >= kPastCaches;
    factor_ = stored_factor_ = rotation_factor(r.size);
    rotate_ = rotator();
    if (r.size > 32) across_ = across();
    if (!cells_) {
      encode_ = encode_zeros_ = find_lanes_encoder(a.element, a.full, blocks_);
    } else if (a.scale == Scale::kE8M0) {
      stored_factor_ = tie_factor(r.size);
      encode_ = cell_encoder_of<Cells::kScaled>(blocks_);
      encode_zeros_ = cell_encoder_of<Cells::kZeros>(blocks_);
      waits_ = across_ && blocks_ == 4;
    } else {
      encode_ = encode_zeros_ = cell_encoder_of<Cells::kNumbers>(blocks_);
    }
  }

  // Once all tiles are done, or the caller does one: what the last one left to be done.
  PYFMT_HD void finish() {
    if (waiting_.codes) {
      encode(waiting_.x, false, waiting_.codes);
      waiting_.codes = nullptr;
    }
    if (past_caches_) _mm_sfence();  // others may read it
  }

  bool serves(const Tile& tile) const { return encode_ && tile.width % kLaneTile == 0; }

  // A tile of n elements; false where its numbers are too large or too small for the shortcuts
  // taken here: the caller starts over then. x has room for two groups.
  PYFMT_HD bool run(const void* in, int64_t n, float* x, void* scales, uint8_t* codes) {
    const int64_t step = kLaneTile * dtype_bytes(a_.dtype);
    for (int64_t i = 0; i < n; i += kLaneTile) {
      if (!run_one(in, x, scales, codes)) return false;
      in = (const char*)in + step;
      scales = (char*)scales + kLanes * blocks_;
      codes += group_bytes_;
    }
    return true;
  }

 private:
  PYFMT_HD bool run_one(const void* in, float* x, void* scales, uint8_t* codes) {
    U amax[8];
    if (waiting_.codes && waiting_.x == x) x += kLaneTile;
    const bool negative_zeros = rotate_(in, a_.rotation, stored_factor_, x, amax);
    if (waiting_.codes) {
      U words[32];
      const CellWords other{waiting_.x, multipliers_, words, ahead(waiting_.codes)};
      rotate_across_encoding(a_.rotation.size, stored_factor_, x, amax, other);
      leave_lanes(words, 4, past_caches_, waiting_.codes);
      waiting_.codes = nullptr;
    } else if (across_) {
      across_(a_.rotation.size, stored_factor_, x, amax);
    }
    const bool fine = a_.scale == Scale::kE8M0
                          ? find_scales<Scale::kE8M0>(amax, multipliers_, scales)
                          : find_scales<Scale::kE4M3>(amax, multipliers_, scales);
    if (!fine) return false;
    if (waits_ && !negative_zeros) {
      waiting_ = {x, codes};
    } else {
      encode(x, negative_zeros, codes);
    }
    return true;
  }

  PYFMT_HD void encode(const float* x, bool negative_zeros, uint8_t* codes) {
    U words[32];
    (negative_zeros ? encode_zeros_ : encode_)(a_.element, a_.full, x, multipliers_, words,
                                               ahead(codes));
    leave_lanes(words, a_.element.bits(), past_caches_, codes);
  }
  // Where codes are to be written next; nothing is to be fetched for stores past the caches.
  uint8_t* ahead(uint8_t* codes) { return past_caches_ ? spare_ : codes + group_bytes_; }

  // A power of two commutes with rounding: the rotation's factor is left to the multipliers of
  // E8M0 blocks, or breaks ties for cells. That holds while values are normal numbers or round to
  // zero anyhow.
  template <DType kDType, int kBlocks>
  RotateLanesFn rotator_of() const {
    const bool signs = a_.rotation.signs != nullptr;
    return a_.scale == Scale::kE8M0 && !cells_ ? lanes_rotator_of<kDType, kBlocks, false>(signs)
                                               : lanes_rotator_of<kDType, kBlocks, true>(signs);
  }
  AcrossFn across() const {
    const bool plain = a_.scale == Scale::kE8M0 && !cells_;
    if (blocks_ == 4) return plain ? rotate_across_alone<4, false> : rotate_across_alone<4, true>;
    return plain ? rotate_across_alone<8, false> : rotate_across_alone<8, true>;
  }
  RotateLanesFn rotator() const {
    if (a_.dtype == DType::kBF16) {
      return blocks_ == 4 ? rotator_of<DType::kBF16, 4>() : rotator_of<DType::kBF16, 8>();
    }
    return blocks_ == 4 ? rotator_of<DType::kFP32, 4>() : rotator_of<DType::kFP32, 8>();
  }

  // As scales_of, of a normal number or zero.
  U e8m0_of_normal(U amax, U* encode) const {
    const I biased = (I)((amax + constants_.addend) >> 23) - constants_.emax;
    const U code = (U)_mm512_max_epi32((__m512i)biased, _mm512_setzero_si512());
    *encode = (254u - code) << 23;
    return code;
  }

  template <Scale kScale>
  PYFMT_HD bool find_scales(const U* amax, U* multipliers, void* scales) const {
    return blocks_ == 4 ? find_scales_of<kScale, 4>(amax, multipliers, scales)
                        : find_scales_of<kScale, 8>(amax, multipliers, scales);
  }

  template <Scale kScale, int kBlocks>
  PYFMT_HD bool find_scales_of(const U* amax, U* multipliers, void* scales) const {
    constexpr bool kFold = kScale == Scale::kE8M0;
    constexpr uint32_t kLeast = kFold ? power_of_two_bits(-80) : 1;
    constexpr uint32_t kMost = kFold ? power_of_two_bits(80) : kFloatInf;
    U most = amax[0], least = amax[0] - 1u;  // zero is as good as a large number there
    for (int b = 1; b < kBlocks; ++b) {
      most = max_u(most, amax[b]);
      least = min_u(least, amax[b] - 1u);
    }
    const __mmask16 outside =
        _mm512_cmpge_epu32_mask((__m512i)most, _mm512_set1_epi32(int(kMost))) |
        _mm512_cmplt_epu32_mask((__m512i)least, _mm512_set1_epi32(int(kLeast - 1)));
    if (outside) return false;
    const F factor = (F)broadcast(codec::Lane<uint32_t>::as_uint(factor_));
    U words[kBlocks / 4] = {};
    for (int b = 0; b < kBlocks; ++b) {
      U encode;
      const U code = kFold ? e8m0_of_normal((U)((F)amax[b] * factor), &encode)
                           : scales_of<kScale>(constants_, (U)((F)amax[b] * factor), &encode);
      multipliers[b] = kFold && !cells_ ? (U)((F)encode * factor) : encode;
      words[b / 4] |= code << (b % 4 * 8);
    }
    if constexpr (kBlocks == 4) {
      store<U>(scales, words[0]);
    } else {
      store<U>(scales, lower_in_turn(words[0], words[1]));
      store<U>((char*)scales + sizeof(U), upper_in_turn(words[0], words[1]));
    }
    return true;
  }

  const QuantizeArgs& a_;
  int blocks_;
  ScaleConstants constants_;
  int group_bytes_ = 0;
  bool past_caches_ = false;
  float factor_ = 1.0f, stored_factor_ = 1.0f;
  bool cells_ = false;
  RotateLanesFn rotate_ = nullptr;
  AcrossFn across_ = nullptr;
  EncodeLanesFn encode_ = nullptr, encode_zeros_ = nullptr;

  // A group of a large rotation that has its scales: its codes are made beside the next one's
  // butterflies, for which there are other units.
  struct Waiting {
    float* x = nullptr;
    uint8_t* codes = nullptr;
  };
  bool waits_ = false;
  Waiting waiting_;
  U multipliers_[8];
  uint8_t spare_[2048];
};
#else
struct LaneQuantizer {
  PYFMT_HD explicit LaneQuantizer(const QuantizeArgs&) {}
  bool serves(const Tile&) const { return false; }
  bool run(const void*, int64_t, float*, void*, uint8_t*) const { return false; }
  void finish() {}
};
#endif

}  // namespace PYFMT_ISA
}  // namespace pyfmt
