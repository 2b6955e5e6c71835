// SPDX-License-Identifier: Apache-2.0
// Block scales on the device: a block's amax to its scale code and the elements' multiplier, and
// the constants of the two-level recipes from a tensor scale or a tensor's amax.
#pragma once

#include "device.cuh"

namespace pyfmt {
namespace cuda {

struct ScaleParams {
  Scale kind = Scale::kE8M0;
  Recipe recipe = Recipe::kNvidia;
  uint32_t addend = 0;  // E8M0: the rule's
  bool covers = false;  // E8M0: by the rule, no element exceeds the largest; see `covered`
  int emax = 0;
  float qmax = 1.0f, inverse_qmax = 1.0f, top = 1.0f;  // Q, fp32(1 / Q), 448 Q
  const float* given = nullptr;                        // the caller's tensor scale
  const float* partials = nullptr;  // or partial maxima, to be finished by every block of threads
  int partial_count = 0;
  float* tensor_scale_out = nullptr;
};

ScaleParams scale_params(const QuantizeArgs& args);

PYFMT_DEVICE codec::RecipeConstants recipe_constants(const ScaleParams& p, float tensor_amax) {
  codec::RecipeConstants r{};
  r.torchao = p.recipe == Recipe::kTorchao;
  r.qmax = as_uint(p.qmax);
  float tensor_scale = 1.0f;
  if (r.torchao) {
    tensor_scale = p.given ? *p.given : tensor_amax / p.top;
    // An amax of zero, and one so small that the quotient underflows.
    if (tensor_scale == 0.0f) tensor_scale = 1.0f;
    r.inverse = as_uint(1.0f / tensor_scale);
  } else {
    float s = 1.0f;
    if (p.recipe == Recipe::kNvidia) {
      if (p.given) {
        tensor_scale = *p.given;
        s = 1.0f / tensor_scale;
      } else {
        s = tensor_amax == 0.0f ? 1.0f : fminf(p.top / tensor_amax, as_float(kFloatMax));
        tensor_scale = 1.0f / s;
      }
    }
    r.amax_factor = as_uint(s * p.inverse_qmax);
  }
  r.tensor_scale = as_uint(tensor_scale);
  return r;
}

// The constants for this block of threads (all of them must call); writes the tensor scale once.
PYFMT_DEVICE codec::RecipeConstants start_recipe(const ScaleParams& p) {
  if (p.kind != Scale::kE4M3) return {};
  uint32_t largest = 0;
  if (p.partials) {
    __shared__ uint32_t of_warp[kWarps];
    const uint32_t* partials = reinterpret_cast<const uint32_t*>(p.partials);
    wait_for_earlier_launch();
    for (int i = threadIdx.x; i < p.partial_count; i += int(blockDim.x)) {
      largest = L::max(largest, partials[i]);
    }
    for (int far = 16; far; far /= 2) {
      largest = L::max(largest, __shfl_xor_sync(kAll, largest, far));
    }
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = largest;
    __syncthreads();
    for (int i = 0; i < int(blockDim.x) / 32; ++i) largest = L::max(largest, of_warp[i]);
  }
  const codec::RecipeConstants r = recipe_constants(p, as_float(largest));
  if (p.tensor_scale_out && blockIdx.x == 0 && threadIdx.x == 0) {
    *p.tensor_scale_out = as_float(r.tensor_scale);
  }
  return r;
}

// codec::e4m3_from_amax in two steps, with the conversions of the hardware.
PYFMT_DEVICE float e4m3_multiplier(const codec::RecipeConstants& r, uint32_t code) {
  float value, unused;
  from_e4m3(code, &value, &unused);
  const float e =
      r.torchao ? as_float(r.inverse) / value : 1.0f / (value * as_float(r.tensor_scale));
  return code == 0 ? 0.0f : fminf(e, as_float(kFloatMax));
}
PYFMT_DEVICE uint32_t e4m3_code(const codec::RecipeConstants& r, float amax) {
  float s;
  if (r.torchao) {
    s = amax / as_float(r.qmax) / as_float(r.tensor_scale);
    s = fmaxf(fminf(s, 448.0f), 0.015625f);
  } else {
    s = fminf(amax * as_float(r.amax_factor), as_float(kFloatMax));
    // An infinite factor times nothing.
    s = amax == 0.0f ? 0.0f : s;
  }
  return to_fp8<false>(s, 0.0f);
}

// The elements' multipliers of all E4M3 scales, for blocks of threads that look them up rather than
// divide for every scale. All threads must call; a barrier has to follow.
struct Multipliers {
  float* of;  // 128 of shared memory, or null

  PYFMT_DEVICE void fill(const ScaleParams& p, const codec::RecipeConstants& r) const {
    if (p.kind == Scale::kE4M3 && threadIdx.x < 128)
      of[threadIdx.x] = e4m3_multiplier(r, threadIdx.x);
  }
};

struct BlockScale {
  uint32_t code;
  float multiplier;  // of the elements; 0 for a poisoned block
  bool poisoned;     // NaN or infinity inside: NaN scale, codes 0
};

// Whether no number of two blocks exceeds the largest: by the rule, unless a scale was cut to
// 2^127, which the integers' largest number, below 2, does not cover.
template <class E>
PYFMT_DEVICE bool covered(const ScaleParams& p, const BlockScale (&b)[2]) {
  return p.covers && (!E::spec.is_int() || (b[0].code != 254u && b[1].code != 254u));
}

// kPow2: the scale is E8M0. amax: float32 bits, infinity's or more for non-finite blocks.
template <bool kPow2>
PYFMT_DEVICE BlockScale block_scale(const ScaleParams& p, const codec::RecipeConstants& r,
                                    uint32_t amax, Multipliers known = {nullptr}) {
  BlockScale b;
  b.poisoned = amax >= kFloatInf;
  if constexpr (kPow2) {
    b.code = codec::e8m0_from_amax<uint32_t>(amax, p.addend, p.emax);
    b.multiplier = as_float(codec::e8m0_encode_multiplier<uint32_t>(b.code));
  } else {
    const uint32_t finite = b.poisoned ? 0u : amax;
    if (p.kind == Scale::kE4M3) {
      b.code = e4m3_code(r, as_float(finite));
      b.multiplier = known.of ? known.of[b.code] : e4m3_multiplier(r, b.code);
    } else {
      const uint32_t s = as_uint(as_float(finite) / p.qmax);
      b.code = codec::round_scale<uint32_t>(p.kind, s);
      const float value = as_float(codec::decode_scale<uint32_t>(p.kind, b.code));
      b.multiplier = as_float(codec::reciprocal<uint32_t>(value, b.code));
    }
    if (b.poisoned) b.code = codec::scale_nan(p.kind);
  }
  return b;
}

// The same for E4M3 scales by the recipes that multiply (all but torchao's), without branches.
PYFMT_DEVICE BlockScale product_scale(const codec::RecipeConstants& r, uint32_t amax,
                                      Multipliers known) {
  BlockScale b;
  b.poisoned = amax >= kFloatInf;
  const uint32_t finite = b.poisoned ? 0u : amax;
  const float s = fminf(as_float(finite) * as_float(r.amax_factor), as_float(kFloatMax));
  b.code = to_fp8<false>(finite ? s : 0.0f, 0.0f);
  b.multiplier = known.of[b.code];
  if (b.poisoned) b.code = codec::scale_nan(Scale::kE4M3);
  return b;
}

// The multiplier of elements from a stored scale code (0 for NaN).
PYFMT_DEVICE float multiplier_of(const ScaleParams& p, const codec::RecipeConstants& r,
                                 uint32_t code) {
  if (code == codec::scale_nan(p.kind)) return 0.0f;
  if (p.kind == Scale::kE8M0) return as_float(codec::e8m0_encode_multiplier<uint32_t>(code));
  const float value = as_float(codec::decode_scale<uint32_t>(p.kind, code));
  if (p.kind != Scale::kE4M3) return as_float(codec::reciprocal<uint32_t>(value, code));
  if (r.torchao) {
    return as_float(L::min(as_uint(as_float(r.inverse) / value), kFloatMax));
  }
  return as_float(codec::reciprocal<uint32_t>(value * as_float(r.tensor_scale), code));
}

PYFMT_DEVICE uint32_t load_scale(const void* scales, Scale kind, int64_t i) {
  if (kind == Scale::kFP32) return static_cast<const uint32_t*>(scales)[i];
  if (kind == Scale::kBF16 || kind == Scale::kFP16) return static_cast<const uint16_t*>(scales)[i];
  return static_cast<const uint8_t*>(scales)[i];
}

PYFMT_DEVICE void store_scale(void* scales, Scale kind, int64_t i, uint32_t code) {
  if (kind == Scale::kFP32) {
    static_cast<uint32_t*>(scales)[i] = code;
  } else if (kind == Scale::kBF16 || kind == Scale::kFP16) {
    static_cast<uint16_t*>(scales)[i] = uint16_t(code);
  } else {
    static_cast<uint8_t*>(scales)[i] = uint8_t(code);
  }
}

}  // namespace cuda
}  // namespace pyfmt
