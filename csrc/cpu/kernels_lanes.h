// SPDX-License-Identifier: Apache-2.0
// Rotate and quantize sixteen groups of 128 elements side by side, one to a lane: butterflies,
// largest magnitudes, multipliers and codes need no shuffles then, only the input and the codes are
// turned. AVX-512; bfloat16 or float32, rotations up to 128, blocks of 16 or 32, byte scales.
#pragma once

#include "kernels_encode.h"
#include "kernels_rotate.h"
#include "kernels_scale.h"

namespace pyfmt {
namespace PYFMT_ISA {

#if PYFMT_AVX512
constexpr int kLaneGroup = 128, kLaneTile = kLanes * kLaneGroup;

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

// a + b and a - b, one of them as a fused multiply-add by 1, which other units compute.
PYFMT_INLINE void cross(__m512* a, __m512* b) {
  const __m512 sum = _mm512_add_ps(*a, *b);
  *b = _mm512_fnmadd_ps(*b, _mm512_set1_ps(1.0f), *a);
  *a = sum;
}

// Butterflies of vectors kStride apart; spelt out, so that the vectors stay in registers.
template <int kStride, int kCount>
PYFMT_INLINE void cross_all(__m512* v) {
#pragma GCC unroll 16
  for (int m = 0; m < kCount / 2; ++m) {
    __m512* const a = v + m / kStride * 2 * kStride + m % kStride;
    cross(a, a + kStride);
  }
}

// Store finished vectors, times the factor if need be, and note their largest magnitude.
template <bool kFactor, int kCount>
PYFMT_INLINE void keep_lanes(const __m512* v, float factor, U* amax, float* out) {
  U most = *amax;
#pragma GCC unroll 16
  for (int k = 0; k < kCount; ++k) {
    const __m512 y = kFactor ? _mm512_mul_ps(v[k], _mm512_set1_ps(factor)) : v[k];
    most = max_u(most, (U)y & 0x7fffffffu);
    _mm512_store_ps(out + k * kLanes, y);
  }
  *amax = most;
}

template <int kCount>
PYFMT_INLINE void put_lanes(const __m512* v, float* out) {
#pragma GCC unroll 16
  for (int k = 0; k < kCount; ++k) _mm512_store_ps(out + k * kLanes, v[k]);
}
template <int kCount>
PYFMT_INLINE void get_lanes(const float* in, int64_t stride, __m512* v) {
#pragma GCC unroll 16
  for (int k = 0; k < kCount; ++k) v[k] = _mm512_load_ps(in + k * stride * kLanes);
}

// 64 bytes of each group, turned up to turn_lanes.
PYFMT_INLINE void load_groups(const char* x, int64_t stride, __m512i* v) {
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) {
    v[row] = _mm512_loadu_si512(x + row * stride);
  }
  turn_pieces(v);
}

// Sixteen elements of each group as float32, times their signs.
template <DType kDType, bool kSigns>
PYFMT_INLINE void widen_lanes(__m512i* v, const float* signs, int64_t place, int64_t period,
                              __m512* e) {
  constexpr int kEach = 4 / dtype_bytes(kDType);  // elements to a lane of 32 bits
#pragma GCC unroll 4
  for (int k = 0; k < 16 / kEach; k += 4) turn_lanes(v + k);
#pragma GCC unroll 16
  for (int k = 0; k < 16 / kEach; ++k) {
    if constexpr (kEach == 2) {
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

// A rotation of x: vector e of `out` holds element e of each group, amax the largest magnitudes of
// the groups' blocks. kFactor: the rotation's factor is multiplied in. Signs repeat in a group.
template <DType kDType, bool kSigns, int kBlocks, bool kFactor>
static void rotate_lanes(const void* x, const Rotation& r, float factor, float* out, U* amax) {
  constexpr int kBytes = dtype_bytes(kDType), kStride = kLaneGroup * kBytes;
  constexpr int kSize = kLaneGroup / kBlocks;
  const int size = r.size;
  for (int b = 0; b < kBlocks; ++b) amax[b] = U{};
  for (int first = 0; first < kLaneGroup; first += 32) {
    const char* const p = (const char*)x + first * kBytes;
    float* const lower = out + first * kLanes;
    float* const upper = lower + 16 * kLanes;
    U* const low_most = amax + first / kSize;
    U* const high_most = amax + (first + 16) / kSize;
    __m512i v[16];
    __m512 e[16];
    load_groups(p, kStride, v);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if (kBytes == 4 && half) load_groups(p + 64, kStride, v);
      widen_lanes<kDType, kSigns>(v + (kBytes == 2 ? 8 * half : 0), r.signs, first + 16 * half,
                                  r.signs_length, e);
      cross_all<1, 16>(e);
      if (size > 2) cross_all<2, 16>(e);
      if (size > 4) cross_all<4, 16>(e);
      if (size > 8) cross_all<8, 16>(e);
      if (size <= 16) {
        keep_lanes<kFactor, 16>(e, factor, half ? high_most : low_most, half ? upper : lower);
      } else {
        put_lanes<16>(e, half ? upper : lower);
      }
    }
  }
  if (size <= 16) return;
  U most[kBlocks] = {};
  for (int i = 0; i < 16; ++i) {
    __m512 d[8];
    get_lanes<8>(out + i * kLanes, 16, d);
    cross_all<1, 8>(d);
    if (size > 32) cross_all<2, 8>(d);
    if (size > 64) cross_all<4, 8>(d);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      keep_lanes<kFactor, 1>(d + k, factor, most + 16 * k / kSize, out + (16 * k + i) * kLanes);
    }
  }
  for (int b = 0; b < kBlocks; ++b) amax[b] = most[b];
}

using RotateLanesFn = void (*)(const void* x, const Rotation&, float factor, float* out, U* amax);

template <DType kDType, int kBlocks, bool kFactor>
static RotateLanesFn lanes_rotator_of(bool has_signs) {
  return has_signs ? rotate_lanes<kDType, true, kBlocks, kFactor>
                   : rotate_lanes<kDType, false, kBlocks, kFactor>;
}

// Codes of a block of `kSize` vectors, one element of each group in each, to words of each group.
// What lies ahead of `in` is fetched meanwhile, `bytes` for each element, in an order that the
// hardware's own prefetching follows.
template <class Element, class Codec, int kBits, int kSize>
PYFMT_INLINE void encode_lanes_block(const Codec& c, const float* x, F multiplier, const char* in,
                                     int bytes, U* words) {
  constexpr int kCodes = kBits == 6 ? 16 : 32 / kBits, kWords = kCodes * kBits / 32;
  for (int i = 0; i < kSize; i += kCodes, words += kWords) {
    for (int at = 0; at < kCodes * bytes; at += 64) fetch_ahead(in + i * bytes + at);
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

template <class Element, int kBits, int kBlocks>
PYFMT_INLINE void encode_lanes(const ElementSpec& spec, bool full, const float* x,
                               const U* multipliers, const void* in, int bytes, U* words) {
  constexpr int kSize = kLaneGroup / kBlocks;
  const auto c = Element::make(spec, full);
  using C = decltype(Element::make(spec, full));
  for (int b = 0; b < kBlocks; ++b) {
    encode_lanes_block<Element, C, kBits, kSize>(c, x + b * kSize * kLanes, (F)multipliers[b],
                                                 (const char*)in + b * kSize * bytes, bytes,
                                                 words + b * kSize * kBits / 32);
  }
}

// Words of each group to the groups' codes one after the other.
static void leave_lanes(const U* words, int bits, uint8_t* codes) {
  const int count = kLaneGroup * bits / 32;  // 16, 24 or 32
  for (int first = 0; first < count; first += 16) {
    const int some = count - first < 16 ? count - first : 16;
    __m512i v[16];
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      v[k] = k < some ? (__m512i)words[first + k] : _mm512_setzero_si512();
    }
#pragma GCC unroll 16
    for (int k = 0; k < 16; k += 4) turn_lanes(v + k);
    turn_pieces(v);
    const __mmask16 present = __mmask16((1u << some) - 1);
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      _mm512_mask_storeu_epi32(codes + (k * count + first) * 4, present, v[k]);
    }
  }
}

using EncodeLanesFn = void (*)(const ElementSpec&, bool full, const float* x, const U* multipliers,
                               const void* in, int bytes, U* words);

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
    encode_ = served ? find_lanes_encoder(a.element, a.full, blocks_) : nullptr;
    factor_ = rotation_factor(r.size > 1 ? r.size : 1);
  }

  bool serves(const Tile& tile) const { return encode_ && tile.width % kLaneTile == 0; }

  // A tile of n elements; false where its numbers are too large or too small for the shortcuts
  // taken here: the caller starts over then.
  PYFMT_HD bool run(const void* in, int64_t n, float* x, void* scales, uint8_t* codes) const {
    for (int64_t i = 0; i < n; i += kLaneTile) {
      void* const some = (char*)scales + i / a_.tiling.block_columns;
      if (!run_one(at(in, a_.dtype, i), x, some, codes + i / 8 * a_.element.bits())) return false;
    }
    return true;
  }

 private:
  PYFMT_HD bool run_one(const void* in, float* x, void* scales, uint8_t* codes) const {
    fetch_output(codes, kLaneTile / 8 * a_.element.bits());
    U multipliers[8], words[32];
    const bool fine = a_.scale == Scale::kE8M0 ? rotate<Scale::kE8M0>(in, x, multipliers, scales)
                                               : rotate<Scale::kE4M3>(in, x, multipliers, scales);
    if (!fine) return false;
    const int bytes = kLanes * int(dtype_bytes(a_.dtype));
    encode_(a_.element, a_.full, x, multipliers, in, bytes, words);
    leave_lanes(words, a_.element.bits(), codes);
    return true;
  }

  // A power of two commutes with rounding: the rotation's factor is left to the multipliers of
  // E8M0 blocks. That holds while values are normal numbers or round to zero anyhow.
  template <Scale kScale>
  PYFMT_HD bool rotate(const void* in, float* x, U* multipliers, void* scales) const {
    return blocks_ == 4 ? rotate_blocks<kScale, 4>(in, x, multipliers, scales)
                        : rotate_blocks<kScale, 8>(in, x, multipliers, scales);
  }

  template <Scale kScale, int kBlocks>
  PYFMT_HD bool rotate_blocks(const void* in, float* x, U* multipliers, void* scales) const {
    constexpr bool kFold = kScale == Scale::kE8M0;
    constexpr uint32_t kLeast = kFold ? power_of_two_bits(-90) : 1;
    constexpr uint32_t kMost = kFold ? power_of_two_bits(90) : kFloatInf;
    const Rotation& r = a_.rotation;
    const auto turn = a_.dtype == DType::kBF16
                          ? lanes_rotator_of<DType::kBF16, kBlocks, !kFold>(r.signs != nullptr)
                          : lanes_rotator_of<DType::kFP32, kBlocks, !kFold>(r.signs != nullptr);
    U amax[kBlocks];
    turn(in, r, factor_, x, amax);
    bool fine = true;
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i above = _mm512_sub_epi32((__m512i)amax[b], _mm512_set1_epi32(int(kLeast)));
      const __mmask16 outside =
          _mm512_cmpge_epu32_mask(above, _mm512_set1_epi32(int(kMost - kLeast)));
      fine &= _mm512_mask_test_epi32_mask(outside, (__m512i)amax[b], (__m512i)amax[b]) == 0;
    }
    if (!fine) return false;
    const F factor = (F)broadcast(codec::Lane<uint32_t>::as_uint(kFold ? factor_ : 1.0f));
    U words[kBlocks / 4] = {};
    for (int b = 0; b < kBlocks; ++b) {
      U encode;
      const U code = scales_of<kScale>(constants_, (U)((F)amax[b] * factor), &encode);
      multipliers[b] = (U)((F)encode * factor);
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
  EncodeLanesFn encode_;
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
