// SPDX-License-Identifier: Apache-2.0
// Few activations, rotated and quantized to blocks with E4M3 scales, as exact bfloat16 values, in
// one launch that finds room beside the products before and after it.
#include <atomic>

#include "emit.cuh"
#include "together.cuh"

namespace pyfmt {
namespace cuda {

namespace {

struct TogetherParams {
  const void* x = nullptr;
  uint32_t eights = 0;
  ScaleParams scale;
  Limits limits;
  RotationParams rotation;
  Together together;
  void* out = nullptr;
  const float* factor = nullptr;
  float* tensor_scale = nullptr;
};

constexpr int64_t kMostTogether = 256;  // blocks: two of a multiprocessor, beside a product's

template <class E>
__global__ void __launch_bounds__(kThreadsTogether, 32)
    round_values_together(const __grid_constant__ TogetherParams p) {
  allow_next_launch();
  // Parameters come from memory too: those of each 64 bytes are asked for while there is time.
  void *slots = p.together.slots, *out = p.out;
  int size = p.rotation.size;
  keep(slots);
  keep(out);
  keep(size);
  wait_for_earlier_launch();
  const uint32_t eight = blockIdx.x * uint32_t(kThreadsTogether) + threadIdx.x;
  const bool live = eight < p.eights;
  float v[8];
  load_rotated_eight(p.x, p.rotation, eight, live, v);
  uint32_t largest = 0;
  if (slots) largest = largest_of_x(p.together, p.x, p.rotation, p.eights, eight, v);
  const codec::RecipeConstants r = recipe_constants(p.scale, as_float(largest));
  if (eight == 0) *p.tensor_scale = as_float(r.tensor_scale) * (p.factor ? *p.factor : 1.0f);
  float m = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) m = max_abs_nan(m, v[i]);
  m = max_abs_nan(m, __shfl_xor_sync(kAll, m, 1));
  const BlockScale b = block_scale<false>(p.scale, r, as_uint(m));
  uint32_t words[4];
  round_values<E, false, 8>(v, b, scale_value<false>(b.code), p.scale, p.limits, words);
  if (live) static_cast<uint4*>(out)[eight] = make_uint4(words[0], words[1], words[2], words[3]);
}

__global__ void clear_slots_alone(void* slots, int count) {
  wait_for_earlier_launch();
  clear_slots(slots, count);
}

}  // namespace

uint64_t new_call() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

int together_blocks(int64_t count) {
  return int((count / 8 + kThreadsTogether - 1) / kThreadsTogether);
}

void clear_together(void* slots, int count, Stream stream) {
  launch_after(launches_overlap(), clear_slots_alone, 1, kThreadsTogether, stream, slots, count);
}

bool round_together_serves(const QuantizeArgs& a) {
  const FormatSpec& f = a.format;
  return f.scale == Scale::kE4M3 && f.block_columns == 16 && few_rows(a) &&
         (f.element == elements::e2m1 || f.element == elements::int4) &&
         a.rotation.size <= kWarpTurn && together_blocks(a.view.count()) <= kMostTogether;
}

void round_together(const QuantizeArgs& a, const float* factor, const Together& together,
                    Stream stream) {
  TogetherParams p;
  p.x = a.x;
  p.eights = uint32_t(a.view.count() / 8);
  p.scale = scale_params(a);
  p.scale.tensor_scale_out = nullptr;
  p.limits = limits(a.format.element, a.full);
  p.rotation = rotation_params(a.rotation);
  if (a.recipe != Recipe::kSingleLevel && !a.tensor_scale) p.together = together;
  p.out = a.out;
  p.factor = factor;
  p.tensor_scale = a.tensor_scale_out;
  const auto kernel = a.format.element == elements::e2m1 ? round_values_together<e2m1_element>
                                                         : round_values_together<int4_element>;
  launch_after(launches_overlap(), kernel, together_blocks(a.view.count()), kThreadsTogether,
               stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
