// SPDX-License-Identifier: Apache-2.0
// Largest magnitudes of blocks to scale codes and the multipliers of their elements.
#pragma once

#include "elements.h"

namespace pyfmt {
namespace PYFMT_ISA {

using cpu::QuantizeArgs;
using cpu::ScaleArgs;

// The facts of a format that turn block amax into scales.
struct ScaleConstants {
  uint32_t addend;
  int emax;
  F qmax;
  const codec::RecipeConstants& recipe;

  PYFMT_HD explicit ScaleConstants(const QuantizeArgs& q)
      : addend(codec::e8m0_addend(q.rule, q.element)),
        emax(q.element.emax()),
        qmax((F)broadcast(q.element.max_bits())),
        recipe(q.recipe) {}
};

#if PYFMT_AVX512
// codec::e4m3_from_amax without torchao's recipe: what rounds to the code gives its value too.
PYFMT_INLINE U e4m3_by_table(const codec::RecipeConstants& r, U amax, U* encode) {
  constexpr codec::FloatCodec c = codec::e4m3_codec();
  constexpr TableFloat table(c, false);
  U s = min_u((U)((F)amax * (F)broadcast(r.amax_factor)), broadcast(c.max_bits));
  s = amax == 0u ? U{} : s;
  const U bounded = max_u(s, broadcast(c.emin_bits - (1u << 23)));
  const F base =
      (F)_mm512_permutexvar_epi32((__m512i)(bounded >> 23), _mm512_load_si512(table.base));
  const F sum = (F)s + base;
  const U code = (U)sum & c.magnitude_mask;
  *encode = codec::reciprocal<U>((sum - base) * (F)broadcast(r.tensor_scale), code);
  return code;
}
#endif

// kLanes blocks: scale codes, multipliers for encoding, and scales as float32.
template <Scale kScale>
PYFMT_INLINE U scales_of(const ScaleConstants& c, U amax, U* encode) {
  U code;
  if constexpr (kScale == Scale::kE8M0) {
    code = codec::e8m0_from_amax<U>(amax, c.addend, c.emax);
    *encode = codec::e8m0_encode_multiplier<U>(code);
  } else if constexpr (kScale == Scale::kE4M3) {
#if PYFMT_AVX512
    code = c.recipe.torchao ? codec::e4m3_from_amax<U>(c.recipe, amax, encode)
                            : e4m3_by_table(c.recipe, amax, encode);
#else
    code = codec::e4m3_from_amax<U>(c.recipe, amax, encode);
#endif
  } else {
    code = codec::round_scale<U>(kScale, (U)((F)amax / c.qmax));
    *encode = codec::reciprocal<U>((F)codec::decode_scale<U>(kScale, code), code);
  }
  // A block holding NaN or infinity: NaN scale, and a NaN multiplier as its mark.
  const auto poisoned = (I)amax >= int32_t(kFloatInf);
  code = poisoned ? broadcast(codec::scale_nan(kScale)) : code;
  *encode = poisoned ? broadcast(kFloatNaN) : *encode;
  return code;
}

template <int kBytes>
PYFMT_INLINE void store_codes(void* p, U codes) {
  if constexpr (kBytes == 4) {
    store<U>(p, codes);
  } else {
    store(p, __builtin_convertvector(codes, typename Narrow<kBytes>::V));
  }
}

// Returns whether a block was not finite.
template <Scale kScale>
PYFMT_INLINE bool scale_blocks_as(const ScaleArgs& a) {
  constexpr int kBytes = scale_bytes(kScale);
  const ScaleConstants c(*a.quantize);
  char* const scales = (char*)a.scales;
  uint32_t *const encodes = a.encode, *const decodes = a.decode;
  U largest{}, encode;
  int64_t i = 0;
  for (; i + kLanes <= a.count; i += kLanes) {
    const U amax = load<U>(a.amax + i);
    const U code = scales_of<kScale>(c, amax, &encode);
    largest = max_u(largest, amax);
    store<U>(encodes + i, encode);
    if (decodes) store<U>(decodes + i, codec::decode_scale<U>(kScale, code));
    if (scales) store_codes<kBytes>(scales + i * kBytes, code);
  }
  if (i < a.count) {
    const size_t rest = size_t(a.count - i);
    U amax{};
    memcpy(&amax, a.amax + i, rest * 4);
    const U code = scales_of<kScale>(c, amax, &encode);
    const U decode = codec::decode_scale<U>(kScale, code);
    largest = max_u(largest, amax);
    memcpy(encodes + i, &encode, rest * 4);
    if (decodes) memcpy(decodes + i, &decode, rest * 4);
    alignas(64) char narrow[4 * kLanes];
    store_codes<kBytes>(narrow, code);
    if (scales) memcpy(scales + i * kBytes, narrow, rest * kBytes);
  }
  uint32_t most = 0;
  for (int k = 0; k < kLanes; ++k) most = largest[k] > most ? largest[k] : most;
  return most >= kFloatInf;
}

static bool scale_tile(const ScaleArgs& a) {
  switch (a.quantize->scale) {
    case Scale::kE8M0:
      return scale_blocks_as<Scale::kE8M0>(a);
    case Scale::kE4M3:
      return scale_blocks_as<Scale::kE4M3>(a);
    case Scale::kBF16:
      return scale_blocks_as<Scale::kBF16>(a);
    case Scale::kFP16:
      return scale_blocks_as<Scale::kFP16>(a);
    default:
      return scale_blocks_as<Scale::kFP32>(a);
  }
}

static void scale_blocks(const ScaleArgs& a) {
  GradualUnderflow guard;
  scale_tile(a);
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
