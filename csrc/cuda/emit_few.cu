// SPDX-License-Identifier: Apache-2.0
// Few activations, rotated and quantized, as exact bfloat16 values, by launches that find room
// beside the products before and after them.
#include <algorithm>

#include "beside.cuh"
#include "emit.cuh"
#include "expand.h"

namespace pyfmt {
namespace cuda {

namespace {

struct FewParams {
  const void* x = nullptr;
  uint32_t eights = 0;
  int lanes = 4;  // of a block
  ScaleParams scale;
  Limits limits;
  RotationParams rotation;
  void* out = nullptr;
  int order = 0;  // see round_few
  const float* factor = nullptr;
  float* tensor_scale_out = nullptr;
};

// Registers, at most; of scales with more bits than an exponent, divisions take some.
constexpr int registers_of(bool pow2) {
  return pow2 ? 32 : 40;
}

// The order in which products have columns, by chunks of 128 (matmul_wide_panel.cuh): lane t of a
// quad has 32 of weights' codes, of which pairs of eight (of sixteen, of 6 bits) leave decoding
// together, and the fragment's columns 2 t and 2 t + 1 are one of these pairs. words: two numbers
// each, of the eight.
PYFMT_DEVICE void store_ordered(void* out, int bits, uint32_t eight, bool live,
                                const uint32_t (&words)[4]) {
  uint32_t low[2] = {words[0], words[1]}, high[2] = {words[2], words[3]};
  if (bits == 6) {
    // An even lane has the lower numbers of eight pairs, and keeps four.
    const bool odd = eight & 1;
    const uint32_t a = __shfl_xor_sync(kAll, odd ? words[0] : words[2], 1);
    const uint32_t b = __shfl_xor_sync(kAll, odd ? words[1] : words[3], 1);
    if (odd) {
      low[0] = a, low[1] = b;
    } else {
      high[0] = a, high[1] = b;
      low[0] = words[0], low[1] = words[1];
    }
  }
  uint32_t pairs[4];
  if (bits == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = pick_bytes(words[i / 2 * 2], words[i / 2 * 2 + 1], i & 1 ? 0x7632 : 0x5410);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = pick_bytes(low[i / 2], high[i / 2], i & 1 ? 0x7632 : 0x5410);
    }
  }
  if (!live) return;
  const uint32_t t = eight / 4 % 4;
  uint32_t* const to = static_cast<uint32_t*>(out) + eight / 16 * 64 + eight % 4 * 16 + t;
#pragma unroll
  for (int i = 0; i < 4; ++i) to[4 * i] = pairs[i];
}

// The constants of a two-level recipe, by partial maxima that were asked for before: four, and
// more by fours.
template <int kCount>
PYFMT_DEVICE codec::RecipeConstants few_recipe(const ScaleParams& p, const uint4& four) {
  __shared__ uint32_t of_warp[kCount / 32];
  if (!p.partials) return recipe_constants(p, 0.0f);
  uint32_t largest = L::max(L::max(four.x, four.y), L::max(four.z, four.w));
#pragma unroll 1
  for (int i = 4 * (kCount + int(threadIdx.x)); i < p.partial_count; i += 4 * kCount) {
    const uint4 more = *reinterpret_cast<const uint4*>(p.partials + i);
    largest = L::max(largest, L::max(L::max(more.x, more.y), L::max(more.z, more.w)));
  }
  largest = largest_of_lanes(largest);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount / 32; ++i) largest = L::max(largest, of_warp[i]);
  return recipe_constants(p, as_float(largest));
}

template <class E, bool kPow2, bool kLong>
__global__ void __launch_bounds__(beside_threads<kLong>()) __maxnreg__(registers_of(kPow2))
    round_few_values(const __grid_constant__ FewParams p) {
  constexpr int kCount = beside_threads<kLong>();
  allow_next_launch();
  // Parameters come from memory too: those of each 64 bytes are asked for while there is time.
  int size = p.rotation.size, order = p.order;
  keep(size);
  keep(order);
  wait_for_earlier_launch();
  const uint32_t eight = blockIdx.x * uint32_t(kCount) + threadIdx.x;
  const bool live = eight < p.eights;
  float v[8];
  load_eight(p.x, p.rotation, eight, live, v);
  uint4 four = make_uint4(0, 0, 0, 0);
  if (!kPow2 && 4 * int(threadIdx.x) < p.scale.partial_count) {
    four = reinterpret_cast<const uint4*>(p.scale.partials)[threadIdx.x];
  }
  if (size) rotate_eight<kLong>(v, p.rotation);
  float m = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) m = max_abs_nan(m, v[i]);
#pragma unroll 1
  for (int far = 1; far < p.lanes; far *= 2) m = max_abs_nan(m, __shfl_xor_sync(kAll, m, far));
  codec::RecipeConstants r{};
  if constexpr (!kPow2) {
    r = few_recipe<kCount>(p.scale, four);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      *p.tensor_scale_out = as_float(r.tensor_scale) * (p.factor ? *p.factor : 1.0f);
    }
  }
  const BlockScale b = block_scale<kPow2>(p.scale, r, as_uint(m));
  uint32_t words[4];
  round_values<E, kPow2, 8>(v, b, scale_value<kPow2>(b.code), p.scale, p.limits, words);
  if (order) {
    store_ordered(p.out, order, eight, live, words);
  } else if (live) {
    static_cast<uint4*>(p.out)[eight] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

using FewKernel = void (*)(FewParams);

template <class E, bool kPow2>
FewKernel kernel_of(bool is_long) {
  return is_long ? round_few_values<E, kPow2, true> : round_few_values<E, kPow2, false>;
}

FewKernel find_few(const FormatSpec& f, bool is_long) {
  const ElementSpec& e = f.element;
  if (f.scale == Scale::kE8M0) {
    if (e == elements::e2m1) return kernel_of<e2m1_element, true>(is_long);
    if (e == elements::e2m3) return kernel_of<e2m3_element, true>(is_long);
    if (e == elements::e3m2) return kernel_of<e3m2_element, true>(is_long);
    if (e == elements::e4m3fn) return kernel_of<e4m3fn_element, true>(is_long);
    if (e == elements::e5m2ieee) return kernel_of<e5m2ieee_element, true>(is_long);
    if (e == elements::int8q6) return kernel_of<int8q6_element, true>(is_long);
    if (e == elements::int6q4) return kernel_of<int6q4_element, true>(is_long);
    if (e == elements::int4q2) return kernel_of<int4q2_element, true>(is_long);
  } else if (f.scale == Scale::kE4M3) {
    if (e == elements::e2m1) return kernel_of<e2m1_element, false>(is_long);
    if (e == elements::int4) return kernel_of<int4_element, false>(is_long);
  }
  return nullptr;
}

}  // namespace

bool few_rows(const QuantizeArgs& a) {
  return a.dtype == DType::kBF16 && a.format.block_rows == 1 && !a.stochastic && a.view.flat() &&
         a.view.columns % kUnit == 0 && a.view.count() > 0 && a.view.rows() <= kFewRows &&
         a.view.columns <= 1 << 24 && aligned16(a.x) && a.rotation.size <= kLongestTurn;
}

int launch_largest(const QuantizeArgs& a, Stream stream) {
  LargestParams p;
  p.x = a.x;
  p.eights = uint32_t(a.view.count() / 8);
  p.rotation = rotation_params(a.rotation);
  p.partials = a.partials;
  const bool is_long = a.rotation.size > kWarpTurn;
  const int threads = is_long ? beside_threads<true>() : beside_threads<false>();
  // Their number is a multiple of four, by which they are read.
  const int64_t blocks = std::min<int64_t>(beside_blocks(p.eights, threads), kPartials);
  launch_beside(is_long ? largest_beside<true> : largest_beside<false>, blocks, threads, stream, p);
  return int(blocks);
}

bool round_few_serves(const QuantizeArgs& a, int order) {
  if (order && a.view.columns % 128 != 0) return false;
  return few_rows(a) && a.format.block_columns <= kWarpTurn && find_few(a.format, false);
}

void round_few(const QuantizeArgs& a, const float* factor, int order, Stream stream) {
  FewParams p;
  p.x = a.x;
  p.eights = uint32_t(a.view.count() / 8);
  p.lanes = int(a.format.block_columns / 8);
  p.scale = scale_params(a);
  p.scale.tensor_scale_out = nullptr;
  p.limits = limits(a.format.element, a.full);
  p.rotation = rotation_params(a.rotation);
  p.out = a.out;
  p.order = order;
  p.factor = factor;
  p.tensor_scale_out = a.tensor_scale_out;
  if (a.format.scale == Scale::kE4M3 && a.recipe != Recipe::kSingleLevel && !a.tensor_scale) {
    p.scale.partial_count = launch_largest(a, stream);
    p.scale.partials = a.partials;
  }
  const bool is_long = a.rotation.size > kWarpTurn;
  const int threads = is_long ? beside_threads<true>() : beside_threads<false>();
  launch_beside(find_few(a.format, is_long), beside_blocks(p.eights, threads), threads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
