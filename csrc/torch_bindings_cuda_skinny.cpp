// SPDX-License-Identifier: Apache-2.0
// torch.ops.pyfmt._matmul_skinny and _matmul_rounded: few tokens, dense or rounded on the way, by a
// packed weight, for the ops that choose it.
#include "cuda/matmul_skinny.h"
#include "cuda/together.h"
#include "torch_expand.h"

namespace pyfmt {
namespace {

using namespace tensors;

// slots: of the launch that made x.
Tensor multiply(const Tensor& x, const Tensor& w_codes, const Tensor& w_scales,
                const std::optional<Tensor>& w_tensor_scale, const std::string& w_format, int64_t k,
                const std::optional<Tensor>& bias, ScalarType dtype, bool batch_invariant,
                const std::optional<std::vector<int64_t>>& plan, void* slots, int slot_count) {
  const FormatSpec f = get_format(w_format);
  options::expect(cuda::skinny_serves(f), "w_format: the kernel for few tokens does not serve ",
                  w_format, "; expected a row of pyfmt.FORMATS or int4 or int8 with float scales ",
                  "for groups of a multiple of 32");
  options::expect(x.dim() == 2 && x.size(1) == k, "x: expected shape (tokens, ", k, "), got ",
                  text_of(shape_of(x)));
  options::expect(k >= 1 && k < (int64_t(1) << 28), "k: expected 1 to 2^28 - 1, got ", k);
  options::expect(x.size(0) < (int64_t(1) << 20), "x: expected fewer than 2^20 tokens, got ",
                  x.size(0));
  expect_bytes("w_codes", w_codes);
  const int64_t n = w_codes.dim() == 2 ? w_codes.size(0) : -1;
  options::expect(n < (int64_t(1) << 31) - 128, "w_codes: expected fewer rows than 2^31, got ", n);
  const Shape codes_want{n, f.row_bytes(k)}, scales_want{n, f.blocks(k)};
  const Shape codes_have = shape_of(w_codes), scales_have = shape_of(w_scales);
  options::expect(codes_have == codes_want, "w_codes: expected shape (rows, ", f.row_bytes(k),
                  ") for ", w_format, " of ", k, " columns, got ", text_of(codes_have));
  options::expect(scales_have == scales_want, "w_scales: expected shape ", text_of(scales_want),
                  " for ", w_format, ", got ", text_of(scales_have));
  options::expect(w_scales.scalar_type() == scale_type(f.scale), "w_scales: expected dtype ",
                  name_of(scale_type(f.scale)), " for ", w_format, ", got ",
                  name_of(w_scales.scalar_type()));
  const Device device(x);
  device.expect_here("w_codes", w_codes);
  device.expect_here("w_scales", w_scales);
  const Tensor rows = k > 1 && x.stride(1) != 1 ? torch::stable::contiguous(x) : x;
  const Tensor codes = dense(w_codes), scales = dense(w_scales);
  Tensor out = device.empty({x.size(0), n}, dtype);

  cuda::SkinnyArgs a;
  a.x = rows.const_data_ptr();
  a.x_dtype = dtype_of("x", x.scalar_type());
  a.x_stride = rows.stride(0);
  a.m = x.size(0);
  a.n = n;
  a.k = k;
  a.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  a.scales = scales.const_data_ptr();
  a.format = f;
  if (w_tensor_scale && w_tensor_scale->numel() != 0) {
    const Tensor& t = *w_tensor_scale;
    device.expect_here("w_tensor_scale", t);
    options::expect(t.scalar_type() == ScalarType::Float && t.numel() == 1,
                    "w_tensor_scale: expected one float32 number, got ", t.numel(), " of dtype ",
                    name_of(t.scalar_type()));
    a.tensor_scale = static_cast<const float*>(t.const_data_ptr());
  }
  std::optional<Tensor> flat_bias;
  if (bias) {
    device.expect_here("bias", *bias);
    options::expect(bias->dim() == 1 && bias->size(0) == n, "bias: expected shape (", n, ",), got ",
                    text_of(shape_of(*bias)));
    flat_bias.emplace(dense(*bias));
    a.bias = flat_bias->const_data_ptr();
    a.bias_dtype = dtype_of("bias", bias->scalar_type());
  }
  a.out = out.mutable_data_ptr();
  a.out_dtype = dtype_of("dtype", dtype);
  a.batch_invariant = batch_invariant;
  if (plan) {
    options::expect(plan->size() >= 2 && plan->size() <= 4, "plan: expected two to four numbers, ",
                    "got ", int64_t(plan->size()));
    a.blocks = int((*plan)[0]);
    a.overlap = (*plan)[1] != 0;
    if (plan->size() > 2) a.split = int((*plan)[2]);
    if (plan->size() > 3) a.early = int((*plan)[3]);
  }
  a.slots = slots;
  a.slot_count = slot_count;
  cuda::matmul_skinny(a, device.stream);
  return out;
}

Tensor matmul_skinny(Tensor x, Tensor w_codes, Tensor w_scales,
                     std::optional<Tensor> w_tensor_scale, std::string w_format, int64_t k,
                     std::optional<Tensor> bias, ScalarType dtype, bool batch_invariant,
                     std::optional<std::vector<int64_t>> plan) {
  return multiply(x, w_codes, w_scales, w_tensor_scale, w_format, k, bias, dtype, batch_invariant,
                  plan, nullptr, 0);
}

// The same of x rotated and rounded to blocks of 16 on the way.
Tensor matmul_rounded(Tensor x, std::string format, Text recipe, std::string clip, int64_t rotation,
                      std::optional<Tensor> signs, Tensor w_codes, Tensor w_scales,
                      std::optional<Tensor> w_tensor_scale, std::string w_format,
                      std::optional<Tensor> bias, ScalarType dtype) {
  Rows rows(x, format, std::nullopt, recipe, clip, rotation, signs);
  cuda::QuantizeArgs& a = rows.args;
  options::expect(cuda::round_together_serves(a),
                  "x: expected few bfloat16 rows of whole blocks of NVFP4 or NVINT4; use "
                  "_round_values and _matmul_skinny");
  const int slots = cuda::together_blocks(a.view.count());
  const Tensor out = rows.device.empty(shape_of(x), ScalarType::BFloat16);
  const Tensor stored = rows.device.empty({}, ScalarType::Float);
  const Tensor room = rows.device.empty({4 * slots}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  a.tensor_scale_out = static_cast<float*>(stored.mutable_data_ptr());
  const bool given = w_tensor_scale && w_tensor_scale->numel() != 0;
  if (given) rows.device.expect_here("w_tensor_scale", *w_tensor_scale);
  const float* factor =
      given ? static_cast<const float*>(w_tensor_scale->const_data_ptr()) : nullptr;
  cuda::round_together(a, factor, {room.mutable_data_ptr(), cuda::new_call()}, rows.device.stream);
  return multiply(out, w_codes, w_scales, stored, w_format, x.size(1), bias, dtype, false,
                  std::nullopt, room.mutable_data_ptr(), slots);
}

}  // namespace
}  // namespace pyfmt

PYFMT_DEFINE(PYFMT_NAMESPACE, m) {
  // plan: for measurements; blocks that share the rows (0: chosen), whether to start before the
  // launch ahead ends, blocks that share k where activations stay in registers (0: chosen, -1: no
  // such kernel).
  m.def(
      "_matmul_skinny(Tensor x, Tensor w_codes, Tensor w_scales, Tensor? w_tensor_scale, "
      "str w_format, int k, Tensor? bias, ScalarType dtype, bool batch_invariant=False, "
      "int[]? plan=None) -> Tensor");
  m.def(
      "_matmul_rounded(Tensor x, str format, str? recipe, str clip, int rotation, Tensor? signs, "
      "Tensor w_codes, Tensor w_scales, Tensor? w_tensor_scale, str w_format, Tensor? bias, "
      "ScalarType dtype) -> Tensor");
}

PYFMT_REGISTER(PYFMT_NAMESPACE, PYFMT_DISPATCH_KEY, m) {
  m.impl("_matmul_skinny", TORCH_BOX(&pyfmt::matmul_skinny));
  m.impl("_matmul_rounded", TORCH_BOX(&pyfmt::matmul_rounded));
}
