// SPDX-License-Identifier: Apache-2.0
// torch.ops.pyfmt on CPU tensors, by the stable ABI. The schemas stand in pyfmt/ops.py; here are
// the kernels of quantize, dequantize, fake_quantize, hadamard, pack, unpack and amax.
#include <tuple>
#include <vector>

#include "cpu/matmul.h"
#include "torch_cpu.h"

namespace pyfmt {
namespace {

using namespace tensors;
using namespace cpu_tensors;

// ---- tensors ----------------------------------------------------------------------------------

// A tensor with the quantized axis last, contiguous.
struct Rows {
  Tensor tensor;
  Shape shape;
  int64_t axis, last;
  cpu::Source source;

  Rows(const Tensor& x, int64_t asked) : axis(options::axis(asked, x.dim())), last(x.dim() - 1) {
    source.dtype = dtype_of("x", x.scalar_type());
    tensor = dense(move_axis(x, axis, last));
    shape = shape_of(tensor);
    source.x = tensor.const_data_ptr();
    source.view = view_of(shape);
  }
  Tensor new_like() const { return new_tensor(shape, tensor.scalar_type()); }
  Tensor moved_back(const Tensor& y) const { return dense(move_axis(y, last, axis)); }
};

// ---- the verbs --------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> quantize_by(const Tensor& x, cpu::Options& o, int64_t axis,
                                               int64_t rotation, std::optional<Tensor>& signs) {
  const Rows rows(x, axis);
  if (rotation) o.rotation = rotation_of(rotation, rows.source.view.columns, signs);
  const FormatSpec& f = o.format;
  Tensor codes =
      new_tensor(with_last(rows.shape, f.row_bytes(rows.shape.back())), ScalarType::Byte);
  Tensor scales = new_tensor(scales_shape(rows.shape, f), scale_type(f.scale));
  Tensor stored = new_tensor(o.has_tensor_scale() ? Shape{} : Shape{0}, ScalarType::Float);
  cpu::quantize(kParallel, rows.source, o, static_cast<uint8_t*>(codes.mutable_data_ptr()),
                scales.mutable_data_ptr(),
                o.has_tensor_scale() ? static_cast<float*>(stored.mutable_data_ptr()) : nullptr);
  return {std::move(codes), std::move(scales), std::move(stored)};
}

std::tuple<Tensor, Tensor, Tensor> quantize(Tensor x, std::string format, int64_t axis,
                                            Text scale_rule, Text recipe, std::string rounding,
                                            std::optional<int64_t> seed, std::string clip,
                                            std::optional<Tensor> tensor_scale, int64_t rotation,
                                            std::optional<Tensor> signs) {
  cpu::Options o = options_of(format, scale_rule, recipe, rounding, seed, clip, tensor_scale);
  return quantize_by(x, o, axis, rotation, signs);
}

std::tuple<Tensor, Tensor, Tensor> quantize_planned(Tensor x, int64_t plan, int64_t axis,
                                                    int64_t rotation,
                                                    std::optional<Tensor> tensor_scale,
                                                    std::optional<Tensor> signs) {
  cpu::Options o = options::planned(plan);
  if (tensor_scale) options::set_tensor_scale(o, scalar_of(*tensor_scale));
  return quantize_by(x, o, axis, rotation, signs);
}

Tensor fake_quantize_by(const Tensor& x, const cpu::Options& o, int64_t axis) {
  const Rows rows(x, axis);
  Tensor out = rows.new_like();
  cpu::fake_quantize(kParallel, rows.source, o, out.mutable_data_ptr());
  return rows.moved_back(out);
}

Tensor fake_quantize(Tensor x, std::string format, int64_t axis, Text scale_rule, Text recipe,
                     std::string rounding, std::optional<int64_t> seed, std::string clip,
                     std::optional<Tensor> tensor_scale) {
  return fake_quantize_by(
      x, options_of(format, scale_rule, recipe, rounding, seed, clip, tensor_scale), axis);
}

Tensor fake_quantize_planned(Tensor x, int64_t plan, int64_t axis,
                             std::optional<Tensor> tensor_scale) {
  cpu::Options o = options::planned(plan);
  if (tensor_scale) options::set_tensor_scale(o, scalar_of(*tensor_scale));
  return fake_quantize_by(x, o, axis);
}

Tensor dequantize(Tensor codes, Tensor scales, std::optional<Tensor> tensor_scale,
                  std::string format, std::vector<int64_t> shape, int64_t axis, ScalarType dtype) {
  const FormatSpec f = get_format(format);
  const int64_t last = int64_t(shape.size()) - 1, from = options::axis(axis, last + 1);
  const DType out_dtype = dtype_of("dtype", dtype);
  expect_sizes(shape);
  const Shape moved = move_axis(shape, from, last);
  expect_quantized("codes", "scales", codes, scales, f, format, moved);
  float multiplier = 1.0f;
  const bool multiplies = has_tensor_scale(tensor_scale, f, format, &multiplier);
  const Tensor packed = dense(codes), grid_scales = dense(scales);
  Tensor out = new_tensor(moved, dtype);
  cpu::dequantize(kParallel, static_cast<const uint8_t*>(packed.const_data_ptr()),
                  grid_scales.const_data_ptr(), multiplies ? &multiplier : nullptr, f,
                  view_of(moved), out_dtype, out.mutable_data_ptr());
  return dense(move_axis(out, last, from));
}

Tensor hadamard(Tensor x, int64_t size, std::optional<Tensor> signs, int64_t axis) {
  const Rows rows(x, axis);
  const cpu::Rotation r = rotation_of(size, rows.source.view.columns, signs);
  Tensor out = rows.new_like();
  cpu::hadamard(kParallel, rows.source, r, out.mutable_data_ptr());
  return rows.moved_back(out);
}

Tensor pack(Tensor codes, int64_t bits) {
  options::bits(bits);
  expect_bytes("codes", codes);
  const Tensor in = dense(codes);
  const Shape shape = shape_of(in);
  const int64_t length = shape.back(), bytes = (length * bits + 7) / 8;
  Tensor out = new_tensor(with_last(shape, bytes), ScalarType::Byte);
  const cpu::View v = view_of(shape);
  cpu::pack(kParallel, static_cast<const uint8_t*>(in.const_data_ptr()), v.batches * v.rows, length,
            int(bits), static_cast<uint8_t*>(out.mutable_data_ptr()), bytes);
  return out;
}

Tensor unpack(Tensor packed, int64_t bits, int64_t length) {
  expect_bytes("packed", packed);
  const Tensor in = dense(packed);
  const Shape shape = shape_of(in);
  options::packed_bytes(shape.back(), length, bits);
  Tensor out = new_tensor(with_last(shape, length), ScalarType::Byte);
  const cpu::View v = view_of(shape);
  cpu::unpack(kParallel, static_cast<const uint8_t*>(in.const_data_ptr()), v.batches * v.rows,
              v.columns, length, int(bits), static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor amax(Tensor x, std::optional<int64_t> block, int64_t axis) {
  if (!block) {
    cpu::Source s;
    s.dtype = dtype_of("x", x.scalar_type());
    const Tensor all = dense(x);
    s.x = all.const_data_ptr();
    s.view.columns = all.numel();
    Tensor out = new_tensor({}, ScalarType::Float);
    *static_cast<float*>(out.mutable_data_ptr()) = cpu::finite_amax(kParallel, s);
    return out;
  }
  options::expect(*block >= 1, "block: expected a positive int, got ", *block);
  const Rows rows(x, axis);
  const int64_t blocks = (rows.shape.back() + *block - 1) / *block;
  Tensor out = new_tensor(with_last(rows.shape, blocks), ScalarType::Float);
  cpu::block_amax(kParallel, rows.source, *block, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

// ---- the instruction-set level, for tests and reports ------------------------------------------

std::string cpu_level() {
  return cpu::level();
}

std::string cpu_levels() {
  return cpu::levels();
}

void set_cpu_level(std::string level) {
  options::expect(cpu::set_level(level.c_str()), "level: this processor has ", cpu::matmul_levels(),
                  " (or best), got ", level);
}

}  // namespace
}  // namespace pyfmt

STABLE_TORCH_LIBRARY_FRAGMENT(pyfmt, m) {
  m.def("_cpu_level() -> str");
  m.def("_cpu_levels() -> str");
  m.def("_set_cpu_level(str level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyfmt, CompositeExplicitAutograd, m) {
  m.impl("_cpu_level", TORCH_BOX(&pyfmt::cpu_level));
  m.impl("_cpu_levels", TORCH_BOX(&pyfmt::cpu_levels));
  m.impl("_set_cpu_level", TORCH_BOX(&pyfmt::set_cpu_level));
}

STABLE_TORCH_LIBRARY_IMPL(pyfmt, CPU, m) {
  m.impl("quantize", TORCH_BOX(&pyfmt::quantize));
  m.impl("_quantize", TORCH_BOX(&pyfmt::quantize_planned));
  m.impl("_fake_quantize", TORCH_BOX(&pyfmt::fake_quantize_planned));
  m.impl("dequantize", TORCH_BOX(&pyfmt::dequantize));
  m.impl("fake_quantize", TORCH_BOX(&pyfmt::fake_quantize));
  m.impl("hadamard", TORCH_BOX(&pyfmt::hadamard));
  m.impl("pack", TORCH_BOX(&pyfmt::pack));
  m.impl("unpack", TORCH_BOX(&pyfmt::unpack));
  m.impl("amax", TORCH_BOX(&pyfmt::amax));
}
