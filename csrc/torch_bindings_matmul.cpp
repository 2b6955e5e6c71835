// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of matmul and linear, by the stable ABI. pyfmt/_torch_matmul_cpu.py calls them.
#include <vector>

#include "cpu/matmul.h"
#include "torch_cpu.h"

namespace pyfmt {
namespace {

using namespace cpu_tensors;
using MaybeTensor = std::optional<Tensor>;

// A quantized matrix and the contiguous tensors that hold it.
struct Held {
  Tensor codes, scales;
  cpu::Packed packed;

  Held(const char* what, const char* what_scales, const Tensor& c, const Tensor& s,
       const MaybeTensor& tensor_scale, const std::string& format, const Shape& shape)
      : codes(c), scales(s) {
    packed.format = get_format(format);
    expect_quantized(what, what_scales, c, s, packed.format, format, shape);
    options::expect(c.is_cpu(), what, ": expected a CPU tensor");
    packed.has_tensor_scale =
        has_tensor_scale(tensor_scale, packed.format, format, &packed.tensor_scale);
    codes = dense(c);
    scales = dense(s);
    packed.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
    packed.scales = scales.const_data_ptr();
    const cpu::View v = view_of(shape);
    packed.rows = v.batches * v.rows;
    packed.batch_rows = v.rows;
  }
};

int64_t rows_of(const Shape& shape) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return rows;
}

// What both operators have in common: the right side, the bias and the result.
struct Product {
  Held right;
  Tensor bias, out;
  std::vector<Tensor> borrowed;
  cpu::MatmulCall call;

  Product(const Shape& shape, const Tensor& b, const Tensor& b_scales, const MaybeTensor& b_scale,
          const std::string& b_format, const MaybeTensor& given_bias, ScalarType dtype)
      : right("codes", "scales", b, b_scales, b_scale, b_format, Shape{b.size(0), shape.back()}) {
    call.borrow = borrow;
    call.context = &borrowed;
    call.m = rows_of(shape);
    call.n = b.size(0);
    call.k = shape.back();
    call.right = right.packed;
    if (given_bias) {
      options::expect(
          given_bias->is_cpu() && given_bias->dim() == 1 && given_bias->size(0) == call.n,
          "bias: expected ", call.n, " numbers on the CPU");
      bias = dense(*given_bias);
      call.bias = bias.const_data_ptr();
      call.bias_dtype = dtype_of("bias", bias.scalar_type());
    }
    out = new_tensor(with_last(shape, call.n), dtype);
    call.out = out.mutable_data_ptr();
    call.out_dtype = dtype_of("dtype", dtype);
  }

  // Memory of torch's allocator, until the product is made.
  static void* borrow(void* context, int64_t bytes) {
    auto* const held = static_cast<std::vector<Tensor>*>(context);
    held->push_back(new_tensor(Shape{bytes}, ScalarType::Byte));
    return held->back().mutable_data_ptr();
  }

  // A dense left side, alive while the product is made.
  void set_left(const Tensor& a) {
    options::expect(a.is_cpu(), "x: expected a CPU tensor");
    call.a = a.const_data_ptr();
    call.a_dtype = dtype_of("x", a.scalar_type());
    call.view = view_of(shape_of(a));
  }
};

Tensor matmul(Tensor a, MaybeTensor a_scales, MaybeTensor a_tensor_scale, Text a_format, Tensor b,
              Tensor b_scales, MaybeTensor b_tensor_scale, std::string b_format, int64_t k,
              MaybeTensor bias, ScalarType dtype) {
  const Shape shape = with_last(shape_of(a), k);
  Product p(shape, b, b_scales, b_tensor_scale, b_format, bias, dtype);
  if (!a_format) {
    const Tensor left = dense(a);
    p.set_left(left);
    cpu::matmul(kParallel, p.call);
    return p.out;
  }
  options::expect(a_scales.has_value(), "a_scales: expected the scales of a");
  const Held left("codes", "scales", a, *a_scales, a_tensor_scale, *a_format, shape);
  p.call.left = &left.packed;
  cpu::matmul(kParallel, p.call);
  return p.out;
}

Tensor linear(Tensor x, Tensor w_codes, Tensor w_scales, MaybeTensor w_tensor_scale,
              std::string w_format, MaybeTensor bias, Text activation, int64_t rotation,
              MaybeTensor signs, Text scale_rule, Text recipe, std::string clip) {
  const Tensor left = dense(x);
  Product p(shape_of(left), w_codes, w_scales, w_tensor_scale, w_format, bias, left.scalar_type());
  p.set_left(left);
  cpu::Rotation r;
  if (rotation) r = rotation_of(rotation, p.call.k, signs);
  cpu::Options o;
  if (activation) {
    o = options_of(*activation, scale_rule, recipe, "nearest", std::nullopt, clip, std::nullopt);
    o.rotation = r;
    p.call.quantize = &o;
  } else {
    p.call.rotation = r;
  }
  cpu::matmul(kParallel, p.call);
  return p.out;
}

std::string matmul_levels() {
  return cpu::matmul_levels();
}

std::string matmul_level() {
  return cpu::matmul_kernels().name;
}

}  // namespace
}  // namespace pyfmt

STABLE_TORCH_LIBRARY_FRAGMENT(pyfmt, m) {
  m.def(
      "_matmul_cpu(Tensor a, Tensor? a_scales, Tensor? a_tensor_scale, str? a_format, Tensor b, "
      "Tensor b_scales, Tensor? b_tensor_scale, str b_format, int k, Tensor? bias, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "_linear_cpu(Tensor x, Tensor w_codes, Tensor w_scales, Tensor? w_tensor_scale, "
      "str w_format, Tensor? bias, str? activation, int rotation, Tensor? signs, "
      "str? scale_rule, str? recipe, str clip) -> Tensor");
  m.def("_cpu_matmul_level() -> str");
  m.def("_cpu_matmul_levels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyfmt, CompositeExplicitAutograd, m) {
  m.impl("_cpu_matmul_level", TORCH_BOX(&pyfmt::matmul_level));
  m.impl("_cpu_matmul_levels", TORCH_BOX(&pyfmt::matmul_levels));
}

STABLE_TORCH_LIBRARY_IMPL(pyfmt, CPU, m) {
  m.impl("_matmul_cpu", TORCH_BOX(&pyfmt::matmul));
  m.impl("_linear_cpu", TORCH_BOX(&pyfmt::linear));
}
