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
  const float* factor = nullptr;
  float* tensor_scale_out = nullptr;
};

// At most, for room beside a product of 120 a thread.
constexpr int kRegisters = 32;

template <class E, bool kPow2, bool kLong>
__global__ void __launch_bounds__(beside_threads<kLong>()) __maxnreg__(kRegisters)
    round_few_values(const __grid_constant__ FewParams p) {
  allow_next_launch();
  wait_for_earlier_launch();
  const uint32_t eight = blockIdx.x * uint32_t(beside_threads<kLong>()) + threadIdx.x;
  const bool live = eight < p.eights;
  float v[8];
  load_eight(p.x, p.rotation, eight, live, v);
  codec::RecipeConstants r{};
  if constexpr (!kPow2) {
    r = start_recipe(p.scale);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      *p.tensor_scale_out = as_float(r.tensor_scale) * (p.factor ? *p.factor : 1.0f);
    }
  }
  if (p.rotation.size) rotate_eight<kLong>(v, p.rotation);
  float m = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) m = max_abs_nan(m, v[i]);
#pragma unroll 1
  for (int far = 1; far < p.lanes; far *= 2) m = max_abs_nan(m, __shfl_xor_sync(kAll, m, far));
  const BlockScale b = block_scale<kPow2>(p.scale, r, as_uint(m));
  uint32_t words[4];
  round_values<E, kPow2, 8>(v, b, scale_value<kPow2>(b.code), p.scale, p.limits, words);
  if (live) static_cast<uint4*>(p.out)[eight] = make_uint4(words[0], words[1], words[2], words[3]);
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
  const int64_t blocks = std::min<int64_t>(beside_blocks(p.eights, threads), kPartials);
  launch_after(launches_overlap(), is_long ? largest_beside<true> : largest_beside<false>, blocks,
               threads, stream, p);
  return int(blocks);
}

bool round_few_serves(const QuantizeArgs& a) {
  return few_rows(a) && a.format.block_columns <= kWarpTurn && find_few(a.format, false);
}

void round_few(const QuantizeArgs& a, const float* factor, Stream stream) {
  FewParams p;
  p.x = a.x;
  p.eights = uint32_t(a.view.count() / 8);
  p.lanes = int(a.format.block_columns / 8);
  p.scale = scale_params(a);
  p.scale.tensor_scale_out = nullptr;
  p.limits = limits(a.format.element, a.full);
  p.rotation = rotation_params(a.rotation);
  p.out = a.out;
  p.factor = factor;
  p.tensor_scale_out = a.tensor_scale_out;
  if (a.format.scale == Scale::kE4M3 && a.recipe != Recipe::kSingleLevel && !a.tensor_scale) {
    p.scale.partial_count = launch_largest(a, stream);
    p.scale.partials = a.partials;
  }
  const bool is_long = a.rotation.size > kWarpTurn;
  const int threads = is_long ? beside_threads<true>() : beside_threads<false>();
  launch_after(launches_overlap(), find_few(a.format, is_long), beside_blocks(p.eights, threads),
               threads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
