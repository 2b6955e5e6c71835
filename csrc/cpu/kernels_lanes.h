// SPDX-License-Identifier: Apache-2.0
// Rotate and quantize sixteen groups of 128 elements side by side, one to a lane: butterflies,
// largest magnitudes, multipliers and codes need no shuffles then, only the input and the codes are
// turned. AVX-512; bfloat16 or float32, rotations up to 128, blocks of 16 or 32, byte scales.
#pragma once

#include "kernels_encode.h"
#include "kernels_lanes_e2m1.h"
#include "kernels_rotate.h"
#include "kernels_scale.h"

namespace pyfmt {
namespace PYFMT_ISA {

#if PYFMT_AVX512
constexpr int kLaneGroup = 128, kLaneTile = kLanes * kLaneGroup;
// How far ahead input is asked for, in the order of memory and all the time: in bursts it waits.
constexpr int kLanesAhead = 8192;

// v[4 i + k], of 128-bit pieces p: piece p of v[4 i + k] goes to piece i of v[4 p + k].
PYFMT_INLINE void turn_pieces(__m512i v[16]) {
#pragma GCC unroll 16
  for (int k = 0; k < 4; ++k) {
    const __m512i a = _mm512_shuffle_i32x4(v[k], v[4 + k], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(v[k], v[4 + k], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(v[8 + k], v[12 + k], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(v[8 + k], v[12 + k], 0xdd);
    v[k] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[4 + k] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[8 + k] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[12 + k] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}
// Within each piece: lane k of v[j] goes to lane j of v[k].
PYFMT_INLINE void turn_lanes(__m512i v[4]) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c);
  v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d);
  v[3] = _mm512_unpackhi_epi64(b, d);
}

// a + b and a - b, with kFused as a fused multiply-add by 1, which other units compute.
template <bool kFused>
PYFMT_INLINE void cross(__m512* a, __m512* b) {
  const __m512 sum = _mm512_add_ps(*a, *b);
  *b = kFused ? _mm512_fnmadd_ps(*b, _mm512_set1_ps(1.0f), *a) : _mm512_sub_ps(*a, *b);
  *a = sum;
}

// Butterflies of vectors kStride apart; spelt out, so that the vectors stay in registers. Strides
// in turn on two kinds of units and on one: the others multiply too.
template <int kStride, int kCount>
PYFMT_INLINE void cross_all(__m512* v) {
  constexpr bool kFused = kStride == 1 || kStride == 4;
#pragma GCC unroll 16
  for (int m = 0; m < kCount / 2; ++m) {
    __m512* const a = v + m / kStride * 2 * kStride + m % kStride;
    cross<kFused>(a, a + kStride);
  }
}

PYFMT_INLINE U magnitude(__m512 v) {
  return (U)v & 0x7fffffffu;
}
// The larger magnitude of two. Of a NaN and a number it is the number: see where it is used.
PYFMT_INLINE U larger_magnitude(__m512 a, __m512 b) {
  return (U)_mm512_range_ps(a, b, 0b1011);
}

// The largest magnitude of 16 vectors after their last butterflies. A butterfly's results are both
// NaN, or one of them is infinite, or none is NaN: as a pair they hide none.
PYFMT_INLINE U largest_of(const __m512* v, int size, U most) {
  if (size == 16) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) most = max_u(most, larger_magnitude(v[k], v[k + 8]));
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) most = max_u(most, magnitude(v[k]));
  }
  return most;
}

// The same for vectors 16 elements apart, eight of them, each to its block. Pairs are 16 elements
// apart here, so that a butterfly's results may lie in different pairs; but if one of its terms was
// infinite or NaN before these last three strides, so is a result in the first two vectors.
template <int kBlocks>
PYFMT_INLINE void largest_of_blocks(const __m512* d, int size, U* most) {
  if constexpr (kBlocks == 4) {
    most[0] = max_u(most[0], size == 32 ? larger_magnitude(d[0], d[1])
                                        : max_u(magnitude(d[0]), magnitude(d[1])));
#pragma GCC unroll 3
    for (int b = 1; b < 4; ++b) {
      most[b] = max_u(most[b], larger_magnitude(d[2 * b], d[2 * b + 1]));
    }
  } else {
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) most[b] = max_u(most[b], magnitude(d[b]));
  }
}

template <bool kFactor, int kCount>
PYFMT_INLINE void put_lanes(const __m512* v, float factor, int64_t stride, float* out) {
#pragma GCC unroll 16
  for (int k = 0; k < kCount; ++k) {
    _mm512_store_ps(out + k * stride * kLanes,
                    kFactor ? _mm512_mul_ps(v[k], _mm512_set1_ps(factor)) : v[k]);
  }
}
template <int kCount>
PYFMT_INLINE void get_lanes(const float* in, int64_t stride, __m512* v) {
#pragma GCC unroll 16
  for (int k = 0; k < kCount; ++k) v[k] = _mm512_load_ps(in + k * stride * kLanes);
}

// 32 bytes of row a and of row b.
PYFMT_INLINE __m512i two_rows(const char* a, const char* b) {
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a));
  return _mm512_mask_loadu_epi32(low, 0xff00, b - 32);  // what is masked is not touched
}
// Sixteen elements of each group, turned up to turn_lanes, in steps k from 0 to 3: each gives the
// vectors k, k + 4, ... of v.
template <int kBytes>
PYFMT_INLINE void load_step(const char* x, int k, __m512i* v) {
  constexpr int kStride = kLaneGroup * kBytes;
  x += k * kStride;
#pragma GCC unroll 2
  for (int at = 0; at < 16 * kBytes; at += 32, x += 32, v += 8) {
    const __m512i low = two_rows(x, x + 4 * kStride);
    const __m512i high = two_rows(x + 8 * kStride, x + 12 * kStride);
    v[k] = _mm512_shuffle_i32x4(low, high, 0x88);
    v[k + 4] = _mm512_shuffle_i32x4(low, high, 0xdd);
  }
}

// Those as float32, times their signs.
template <int kBytes, bool kSigns>
PYFMT_INLINE void widen_lanes(__m512i* v, const float* signs, int64_t place, int64_t period,
                              __m512* e) {
#pragma GCC unroll 4
  for (int k = 0; k < 4 * kBytes; k += 4) turn_lanes(v + k);
#pragma GCC unroll 16
  for (int k = 0; k < 4 * kBytes; ++k) {
    if constexpr (kBytes == 2) {
      e[2 * k] = _mm512_castsi512_ps(_mm512_slli_epi32(v[k], 16));
      e[2 * k + 1] = _mm512_castsi512_ps((__m512i)((U)v[k] & 0xffff0000u));
    } else {
      e[k] = _mm512_castsi512_ps(v[k]);
    }
  }
  if constexpr (kSigns) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) e[k] *= _mm512_set1_ps(signs[(place + k) % period]);
  }
}

// The strides from 16 on, in place.
template <int kBlocks, bool kFactor>
PYFMT_INLINE void rotate_across(int size, float factor, float* x, U* amax) {
  U most[kBlocks] = {};
  for (int i = 0; i < 16; ++i, x += kLanes) {
    __m512 d[8];
    get_lanes<8>(x, 16, d);
    cross_all<1, 8>(d);
    if (size > 32) cross_all<2, 8>(d);
    if (size > 64) cross_all<4, 8>(d);
    largest_of_blocks<kBlocks>(d, size, most);
    put_lanes<kFactor, 8>(d, factor, 16, x);
  }
  for (int b = 0; b < kBlocks; ++b) amax[b] = most[b];
}

// Where a is -0 and b a zero: only there can a rotation give -0, a and b being its first terms.
PYFMT_INLINE __mmask16 negative_zeros(__m512 a, __m512 b) {
  const __m512i sign = _mm512_set1_epi32(int(0x80000000u));
  const __mmask16 first = _mm512_cmpeq_epi32_mask(_mm512_castps_si512(a), sign);
  return _mm512_mask_testn_epi32_mask(first, _mm512_castps_si512(b), _mm512_set1_epi32(0x7fffffff));
}

// A rotation of x, without its factor: vector e of `out` holds element e of each group, times
// `factor` with kFactor, amax the largest magnitudes of the groups' blocks (not times it). Returns
// whether a result may be -0. Signs repeat in a group.
//
// While sixteen elements' butterflies are computed, the next sixteen are loaded and turned, a step
// after each stride: the processor looks ahead some hundred instructions only, and its units for
// sums and for shuffles would wait for each other in turn.
template <DType kDType, bool kSigns, int kBlocks, bool kFactor>
static bool rotate_lanes(const void* x, const Rotation& r, float factor, float* out, U* amax) {
  constexpr int kBytes = dtype_bytes(kDType), kSize = kLaneGroup / kBlocks;
  constexpr bool kAhead = kBytes == 2;  // registers for both
  const int size = r.size;
  const char* p = (const char*)x;
  __m512i v[4 * kBytes];
  U most{};
  __mmask16 negative = 0;
#pragma GCC unroll 4
  for (int k = 0; kAhead && k < 4; ++k) load_step<kBytes>(p, k, v);
  for (int i = 0; i < kLaneGroup; i += 16) {
    float* const to = out + i * kLanes;
    __m512 e[16];
#pragma GCC unroll 4
    for (int k = 0; !kAhead && k < 4; ++k) load_step<kBytes>(p, k, v);
    widen_lanes<kBytes, kSigns>(v, r.signs, i, r.signs_length, e);
    // The last time there is no next one: any will do.
    p = i < kLaneGroup - 16 ? p + 16 * kBytes : (const char*)x;
#pragma GCC unroll 16
    for (int at = 0; at < 256 * kBytes; at += 64) {
      __builtin_prefetch((const char*)x + kLanesAhead + i * 16 * kBytes + at);
    }
    negative |= negative_zeros(e[0], e[1]);
    if (size < 16) {
#pragma GCC unroll 7
      for (int k = 2; k < 16; k += 2) negative |= negative_zeros(e[k], e[k + 1]);
    }
    cross_all<1, 16>(e);
    if (kAhead) load_step<kBytes>(p, 0, v);
    if (size > 2) cross_all<2, 16>(e);
    if (kAhead) load_step<kBytes>(p, 1, v);
    if (size > 4) cross_all<4, 16>(e);
    if (kAhead) load_step<kBytes>(p, 2, v);
    if (size > 8) cross_all<8, 16>(e);
    if (kAhead) load_step<kBytes>(p, 3, v);
    if (size > 16) {
      put_lanes<false, 16>(e, factor, 1, to);
      continue;
    }
    most = largest_of(e, size, i % kSize ? most : U{});
    amax[i / kSize] = most;
    put_lanes<kFactor, 16>(e, factor, 1, to);
  }
  if (size > 16) rotate_across<kBlocks, kFactor>(size, factor, out, amax);
  return negative != 0;
}

using RotateLanesFn = bool (*)(const void* x, const Rotation&, float factor, float* out, U* amax);

template <DType kDType, int kBlocks, bool kFactor>
static RotateLanesFn lanes_rotator_of(bool has_signs) {
  return has_signs ? rotate_lanes<kDType, true, kBlocks, kFactor>
                   : rotate_lanes<kDType, false, kBlocks, kFactor>;
}

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
static void leave_lanes(const U* words, int bits, uint8_t* codes) {
  const int count = kLaneGroup * bits / 32;  // 16, 24 or 32
  for (int first = 0; first < count; first += 16) {
    const int some = count - first;
    __m512i v[16];
    if (some >= 16) {
      turn_words(words + first, 16, v);
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
    factor_ = rotation_factor(r.size > 1 ? r.size : 1);
    cells_ = a.element == elements::e2m1;
    if (!served) return;
    if (!cells_) {
      encode_ = encode_zeros_ = find_lanes_encoder(a.element, a.full, blocks_);
    } else if (a.scale == Scale::kE8M0) {
      encode_ = cell_encoder_of<Cells::kScaled>(blocks_);
      encode_zeros_ = cell_encoder_of<Cells::kZeros>(blocks_);
    } else {
      encode_ = encode_zeros_ = cell_encoder_of<Cells::kNumbers>(blocks_);
    }
  }

  bool serves(const Tile& tile) const { return encode_ && tile.width % kLaneTile == 0; }

  // A tile of n elements; false where its numbers are too large or too small for the shortcuts
  // taken here: the caller starts over then.
  PYFMT_HD bool run(const void* in, int64_t n, float* x, void* scales, uint8_t* codes) const {
    for (int64_t i = 0; i < n; i += kLaneTile) {
      void* const some = (char*)scales + (blocks_ == 4 ? i / 32 : i / 16);
      if (!run_one(at(in, a_.dtype, i), x, some, codes + i / 8 * a_.element.bits())) return false;
    }
    return true;
  }

 private:
  PYFMT_HD bool run_one(const void* in, float* x, void* scales, uint8_t* codes) const {
    U amax[8], multipliers[8], words[32];
    const bool negative_zeros = rotator()(in, a_.rotation, stored_factor(), x, amax);
    const bool fine = a_.scale == Scale::kE8M0
                          ? find_scales<Scale::kE8M0>(amax, multipliers, scales)
                          : find_scales<Scale::kE4M3>(amax, multipliers, scales);
    if (!fine) return false;
    const EncodeLanesFn encode = negative_zeros ? encode_zeros_ : encode_;
    encode(a_.element, a_.full, x, multipliers, words, codes + kLaneTile / 8 * a_.element.bits());
    leave_lanes(words, a_.element.bits(), codes);
    return true;
  }

  // A power of two commutes with rounding: the rotation's factor is left to the multipliers of
  // E8M0 blocks, or breaks ties for cells. That holds while values are normal numbers or round to
  // zero anyhow.
  float stored_factor() const {
    return cells_ && a_.scale == Scale::kE8M0 ? tie_factor(a_.rotation.size) : factor_;
  }

  template <DType kDType, int kBlocks>
  RotateLanesFn rotator_of() const {
    const bool signs = a_.rotation.signs != nullptr;
    return a_.scale == Scale::kE8M0 && !cells_ ? lanes_rotator_of<kDType, kBlocks, false>(signs)
                                               : lanes_rotator_of<kDType, kBlocks, true>(signs);
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
  float factor_;
  bool cells_;
  EncodeLanesFn encode_ = nullptr, encode_zeros_ = nullptr;
};
#else
struct LaneQuantizer {
  PYFMT_HD explicit LaneQuantizer(const QuantizeArgs&) {}
  bool serves(const Tile&) const { return false; }
  bool run(const void*, int64_t, float*, void*, uint8_t*) const { return false; }
};
#endif

}  // namespace PYFMT_ISA
}  // namespace pyfmt
