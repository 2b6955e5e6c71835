// SPDX-License-Identifier: Apache-2.0
// torch.ops.pyfmt._matmul_codes: few rows in four bits by a weight in four bits.
#include "cuda/matmul_codes.h"
#include "torch_expand.h"

namespace pyfmt {
namespace {

using namespace tensors;

const float* tensor_scale_of(const Device& device, const char* what,
                             const std::optional<Tensor>& t) {
  if (!t || t->numel() == 0) return nullptr;
  device.expect_here(what, *t);
  options::expect(t->scalar_type() == ScalarType::Float && t->numel() == 1, what,
                  ": expected one float32 number, got ", t->numel(), " of dtype ",
                  name_of(t->scalar_type()));
  return static_cast<const float*>(t->const_data_ptr());
}

// The left operand is x, still to be rotated and quantized, or codes and scales.
Tensor matmul_codes(std::optional<Tensor> x, std::optional<Tensor> codes,
                    std::optional<Tensor> scales, std::optional<Tensor> tensor_scale,
                    std::string format, Text scale_rule, Text recipe, std::string clip,
                    int64_t rotation, std::optional<Tensor> signs, Tensor w_codes, Tensor w_scales,
                    std::optional<Tensor> w_tensor_scale, std::string w_format,
                    std::optional<Tensor> bias, ScalarType dtype,
                    std::optional<std::vector<int64_t>> plan) {
  const Device device(w_codes);
  const Codes w(device, w_codes, w_scales, w_format);
  const LeftOperand left(device, x, codes, scales, format, scale_rule, clip, rotation, signs,
                         recipe);
  left.expect_served(cuda::round_codes_serves);
  left.expect_beside(w);
  const int64_t m = left.rows, k = left.columns;
  cuda::MatmulCodesArgs a;
  a.x_format = left.format;
  a.format = w.format;
  a.n = w.rows;
  if (const char* reason = cuda::matmul_codes_refuses(a.x_format, a.format, m, a.n, k)) {
    options::fail("_matmul_codes: ", reason, "; choose another path");
  }
  const Tensor bytes = device.empty({cuda::codes_bytes(m, k)}, ScalarType::Byte);
  const Tensor numbers = device.empty({cuda::codes_scales(m, k)}, ScalarType::Float);
  a.x.bytes = bytes.mutable_data_ptr();
  a.x.scales = static_cast<float*>(numbers.mutable_data_ptr());
  const bool two_level = left.format.scale == Scale::kE4M3;
  // What the launches that round leave to each other and to the product.
  const int64_t slots = two_level && x ? cuda::together_blocks(m * k) : 0;
  const Tensor found = device.empty({4 * (slots + 1)}, ScalarType::Float);
  if (slots) {
    a.x.tensor_scale = static_cast<float*>(found.mutable_data_ptr());
    a.x.together = {a.x.tensor_scale + 4, cuda::new_call()};
  }
  a.x_tensor_scale = x ? a.x.tensor_scale : tensor_scale_of(device, "tensor_scale", tensor_scale);
  a.tensor_scale = tensor_scale_of(device, "w_tensor_scale", w_tensor_scale);
  a.x.m = int(m);
  a.x.k = int(k);
  a.x.halves = cuda::codes_in_halves(a.format);
  a.codes = static_cast<const uint8_t*>(w.packed.const_data_ptr());
  a.scales = static_cast<const uint8_t*>(w.grid.const_data_ptr());
  options::expect(
      cuda::matmul_codes_reads(a.format, a.codes, a.scales),
      "w_codes: expected codes at a multiple of 16 bytes and scales at one of 8, or of 16 where "
      "they are of blocks of 16; copy them");
  if (left.values) {
    cuda::round_codes(left.values->args, a.x, device.stream);
  } else {
    const auto* packed = static_cast<const uint8_t*>(left.packed->packed.const_data_ptr());
    options::expect(reinterpret_cast<uintptr_t>(packed) % 4 == 0,
                    "codes: expected them at a multiple of 4 bytes; copy them");
    cuda::place_codes(packed, static_cast<const uint8_t*>(left.packed->grid.const_data_ptr()),
                      left.format, a.x, device.stream);
  }
  const Tensor y = device.empty({m, w.rows}, dtype);
  Tensor flat_bias;
  if (bias) {
    flat_bias = dense(*bias);
    a.bias_dtype = bias_into(device, flat_bias, w.rows, &a.bias);
  }
  a.out = y.mutable_data_ptr();
  a.out_dtype = dtype_of("dtype", dtype);
  if (plan) {
    options::expect(plan->size() == 3, "plan: expected three numbers, got ", int64_t(plan->size()));
    a.blocks = int((*plan)[0]);
    a.overlap = (*plan)[1] != 0;
    a.early = int((*plan)[2]);
  }
  cuda::matmul_codes(a, device.stream);
  return y;
}

}  // namespace
}  // namespace pyfmt

PYFMT_DEFINE(PYFMT_NAMESPACE, m) {
  // plan: for measurements; blocks that share the rows (0: chosen), whether to start before the
  // launch ahead ends, slots that are filled ahead of x (0: chosen).
  m.def(
      "_matmul_codes(Tensor? x, Tensor? codes, Tensor? scales, Tensor? tensor_scale, str format, "
      "str? scale_rule, str? recipe, str clip, int rotation, Tensor? signs, Tensor w_codes, "
      "Tensor w_scales, Tensor? w_tensor_scale, str w_format, Tensor? bias, ScalarType dtype, "
      "int[]? plan=None) -> Tensor");
}

PYFMT_REGISTER(PYFMT_NAMESPACE, PYFMT_DISPATCH_KEY, m) {
  m.impl("_matmul_codes", TORCH_BOX(&pyfmt::matmul_codes));
}
