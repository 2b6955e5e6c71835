// SPDX-License-Identifier: Apache-2.0
// torch.ops.pyfmt on CUDA tensors, by the stable ABI: quantize, quantize_dual, dequantize,
// fake_quantize, hadamard and amax. The schemas stand in pyfmt/ops.py.
#include <tuple>

#include "torch_device.h"

namespace pyfmt {
namespace {

using namespace tensors;

// ---- rows -------------------------------------------------------------------------------------

// A tensor with the quantized axis last, as it lies in memory.
struct Rows {
  Tensor tensor;
  Shape shape;  // the quantized axis last
  int64_t axis, last;
  DType dtype;
  cuda::View view;

  Rows(const Tensor& x, int64_t asked)
      : tensor(x), axis(options::axis(asked, x.dim())), last(x.dim() - 1) {
    dtype = dtype_of("x", x.scalar_type());
    if (!set_view(x)) {
      tensor = torch::stable::contiguous(move_axis(x, axis, last));
      make_flat();
    }
    shape = move_axis(shape_of(x), axis, last);
  }

  const void* data() const { return tensor.const_data_ptr(); }
  int64_t matrix_rows() const { return shape.size() > 1 ? shape[shape.size() - 2] : 1; }
  // Copy rows that do not lie end to end.
  void flatten() {
    if (view.flat()) return;
    tensor = torch::stable::contiguous(move_axis(tensor, axis, last));
    make_flat();
  }
  Tensor moved_back(const Tensor& y) const {
    return axis == last ? y : torch::stable::contiguous(move_axis(y, last, axis));
  }

 private:
  void make_flat() {
    const Shape sizes = shape_of(tensor);
    view = {};
    view.columns = sizes.back();
    for (size_t i = 0; i + 1 < sizes.size(); ++i) view.outer *= sizes[i];
    view.outer_stride = view.columns;
  }

  // Rows evenly spaced with contiguous elements; false where a copy serves better.
  bool set_view(const Tensor& x) {
    const auto sizes = x.sizes(), strides = x.strides();
    view.columns = sizes[size_t(axis)];
    view.column_stride = strides[size_t(axis)];
    bool first = true;
    int64_t spacing = 0;
    // From the innermost of the other axes outwards; those that continue one another merge.
    for (int64_t i = last; i >= 0; --i) {
      const int64_t n = sizes[size_t(i)], stride = strides[size_t(i)];
      if (i == axis || n == 1) continue;
      if (first) {
        view.outer = n;
        view.outer_stride = stride;
        first = false;
      } else if (stride == spacing) {
        view.outer *= n;
      } else {
        return false;
      }
      spacing = view.outer_stride * view.outer;
    }
    if (first) view.outer_stride = view.columns;
    return view.column_stride == 1 || view.columns <= 1;
  }
};

// The caller's tensor scale: its value stays on the device, unread by the host.
const float* tensor_scale_of(const Device& device, const Tensor& t) {
  device.expect_here("tensor_scale", t);
  options::expect(t.scalar_type() == ScalarType::Float && t.numel() == 1,
                  "tensor_scale: expected one float32 number, got ", t.numel(), " of dtype ",
                  name_of(t.scalar_type()));
  return static_cast<const float*>(t.const_data_ptr());
}

struct Parts {
  Tensor codes, scales;
};

// quantize and fake_quantize in one: `codes` and `scales` only where asked for.
struct Quantization {
  Device device;
  Rows rows;
  cuda::QuantizeArgs args;
  bool has_tensor_scale, dynamic;
  // Kept alive until the kernels are launched.
  Tensor rotated, partials, partials_t, scratch, signs_words;

  Quantization(const Tensor& x, const cpu::Options& o, int64_t axis,
               const std::optional<Tensor>& tensor_scale)
      : device(x), rows(x, axis) {
    has_tensor_scale = o.has_tensor_scale();
    if (tensor_scale) {
      options::expect(has_tensor_scale,
                      "tensor_scale: this format or recipe has none; leave it out");
      args.tensor_scale = tensor_scale_of(device, *tensor_scale);
    }
    dynamic = has_tensor_scale && !tensor_scale;
    args.x = rows.data();
    args.dtype = rows.dtype;
    args.view = rows.view;
    args.matrix_rows = rows.matrix_rows();
    args.format = o.format;
    args.rule = o.rule;
    args.recipe = o.recipe;
    args.stochastic = o.stochastic;
    args.full = o.full;
    args.seed = o.seed;
  }

  void rotate(int64_t size, const std::optional<Tensor>& signs) {
    args.rotation = rotation_of(device, size, rows.view.columns, signs, signs_words);
    if (!cuda::needs_rotated_rows(args)) return;
    rows.flatten();
    rotated = device.empty(rows.shape, ScalarType::Float);
    cuda::HadamardArgs h;
    h.x = rows.data();
    h.out = rotated.mutable_data_ptr();
    h.dtype = rows.dtype;
    h.out_dtype = DType::kFP32;
    h.count = rows.view.count();
    h.rotation = args.rotation;
    cuda::hadamard(h, device.stream);
    args.x = h.out;
    args.dtype = DType::kFP32;
    args.view = rows.view;
    args.rotation = {};
  }

  // Fresh codes and scales of a tensor with the quantized axis last.
  Parts parts(const Shape& shape) const {
    const FormatSpec& f = args.format;
    return {device.empty(with_last(shape, f.row_bytes(shape.back())), ScalarType::Byte),
            device.empty(scales_shape(shape, f), scale_type(f.scale))};
  }
  void write_to(const Parts& p) {
    args.codes = static_cast<uint8_t*>(p.codes.mutable_data_ptr());
    args.scales = p.scales.mutable_data_ptr();
  }
  // For a tensor scale: empty for formats and recipes without one.
  Tensor one_number() const {
    return device.empty(has_tensor_scale ? Shape{} : Shape{0}, ScalarType::Float);
  }
  Tensor store_tensor_scale() {
    Tensor stored = one_number();
    if (has_tensor_scale) args.tensor_scale_out = static_cast<float*>(stored.mutable_data_ptr());
    return stored;
  }

  void run() {
    start();
    cuda::quantize(args, device.stream);
  }
  // The axis before the last as well, or alone; its tensor scale goes to `stored`.
  void run_across(const Parts& parts, const Tensor& stored, cuda::DualRows of_rows) {
    start();
    cuda::Across across;
    across.codes = static_cast<uint8_t*>(parts.codes.mutable_data_ptr());
    across.scales = parts.scales.mutable_data_ptr();
    if (has_tensor_scale) {
      across.tensor_scale_out = static_cast<float*>(stored.mutable_data_ptr());
    }
    if (dynamic && args.rotation.size) {
      partials_t = device.empty({cuda::kPartials}, ScalarType::Float);
      across.partials = static_cast<float*>(partials_t.mutable_data_ptr());
    }
    cuda::quantize_dual(args, across, of_rows, device.stream);
  }
  void run_fake_across() {
    start();
    cuda::fake_quantize_across(args, device.stream);
  }
  Shape across_shape() const {
    const int64_t last = rows.last;
    return move_axis(rows.shape, last - 1, last);
  }

 private:
  void start() {
    if (!dynamic) return;
    partials = device.empty({cuda::kPartials}, ScalarType::Float);
    args.partials = static_cast<float*>(partials.mutable_data_ptr());
  }
};

// Whether an axis runs down the columns of matrices as they lie, which kernels take by tiles.
bool before_last(const Tensor& x, int64_t axis) {
  return x.dim() >= 2 && (axis == -2 || axis == x.dim() - 2) && x.is_contiguous();
}

// ---- the verbs --------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> quantize_by(const Tensor& x, const cpu::Options& o, int64_t axis,
                                               const std::optional<Tensor>& tensor_scale,
                                               int64_t rotation,
                                               const std::optional<Tensor>& signs) {
  if (before_last(x, axis)) {
    Quantization q(x, o, -1, tensor_scale);
    if (rotation) {
      q.args.rotation = rotation_of(q.device, rotation, q.rows.matrix_rows(), signs, q.signs_words);
    }
    if (cuda::dual_serves(q.args, cuda::DualRows::kNone)) {
      const Parts across = q.parts(q.across_shape());
      const Tensor stored = q.one_number();
      q.run_across(across, stored, cuda::DualRows::kNone);
      return {across.codes, across.scales, stored};
    }
  }
  Quantization q(x, o, axis, tensor_scale);
  if (rotation) q.rotate(rotation, signs);
  Parts parts = q.parts(q.rows.shape);
  q.write_to(parts);
  Tensor stored = q.store_tensor_scale();
  q.run();
  return {std::move(parts.codes), std::move(parts.scales), std::move(stored)};
}

std::tuple<Tensor, Tensor, Tensor> quantize(Tensor x, std::string format, int64_t axis,
                                            Text scale_rule, Text recipe, std::string rounding,
                                            std::optional<int64_t> seed, std::string clip,
                                            std::optional<Tensor> tensor_scale, int64_t rotation,
                                            std::optional<Tensor> signs) {
  return quantize_by(x, options::quantize(format, scale_rule, recipe, rounding, seed, clip), axis,
                     tensor_scale, rotation, signs);
}

std::tuple<Tensor, Tensor, Tensor> quantize_planned(Tensor x, int64_t plan, int64_t axis,
                                                    int64_t rotation,
                                                    std::optional<Tensor> tensor_scale,
                                                    std::optional<Tensor> signs) {
  return quantize_by(x, options::planned(plan), axis, tensor_scale, rotation, signs);
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// of_rows: whether the rotation is theirs too, or the columns' alone.
Six quantize_both(Tensor x, const std::string& format, const Text& scale_rule, const Text& recipe,
                  const std::string& rounding, std::optional<int64_t> seed, const std::string& clip,
                  const std::optional<Tensor>& tensor_scale, int64_t rotation,
                  const std::optional<Tensor>& signs, cuda::DualRows of_rows) {
  options::expect(x.dim() >= 2, "x: expected at least two dimensions, got ", x.dim());
  x = dense(x);
  const bool alike = of_rows == cuda::DualRows::kAlike;
  const cpu::Options o = options::quantize(format, scale_rule, recipe, rounding, seed, clip);
  Quantization q(x, o, -1, tensor_scale);
  if (rotation) {
    expect_rotation(q.device, rotation, q.rows.matrix_rows(), signs);
    const int64_t length = alike ? q.rows.view.columns : q.rows.matrix_rows();
    q.args.rotation = rotation_of(q.device, rotation, length, signs, q.signs_words);
  }
  if (cuda::dual_serves(q.args, of_rows)) {
    const Parts along = q.parts(q.rows.shape), across = q.parts(q.across_shape());
    q.write_to(along);
    const Tensor stored = q.store_tensor_scale(), stored_t = q.one_number();
    q.run_across(across, stored_t, of_rows);
    return {along.codes, along.scales, stored, across.codes, across.scales, stored_t};
  }
  auto [codes, scales, stored] =
      quantize_by(x, o, -1, tensor_scale, alike ? rotation : 0, alike ? signs : std::nullopt);
  auto [codes_t, scales_t, stored_t] = quantize_by(x, o, -2, tensor_scale, rotation, signs);
  return {codes, scales, stored, codes_t, scales_t, stored_t};
}

Six quantize_dual(Tensor x, std::string format, Text scale_rule, Text recipe, std::string rounding,
                  std::optional<int64_t> seed, std::string clip, std::optional<Tensor> tensor_scale,
                  int64_t rotation, std::optional<Tensor> signs) {
  return quantize_both(x, format, scale_rule, recipe, rounding, seed, clip, tensor_scale, rotation,
                       signs, cuda::DualRows::kAlike);
}

Six quantize_turned(Tensor x, std::string format, Text scale_rule, Text recipe,
                    std::string rounding, std::optional<int64_t> seed, std::string clip,
                    int64_t rotation, std::optional<Tensor> signs) {
  return quantize_both(x, format, scale_rule, recipe, rounding, seed, clip, std::nullopt, rotation,
                       signs, cuda::DualRows::kPlain);
}

Tensor fake_quantize_by(const Tensor& x, const cpu::Options& o, int64_t axis,
                        const std::optional<Tensor>& tensor_scale) {
  if (before_last(x, axis)) {
    Quantization q(x, o, -1, tensor_scale);
    Tensor out = q.device.empty(q.rows.shape, x.scalar_type());
    q.args.out = out.mutable_data_ptr();
    if (cuda::dual_serves(q.args)) {
      q.run_fake_across();
      return out;
    }
  }
  Quantization q(x, o, axis, tensor_scale);
  Tensor out = q.device.empty(q.rows.shape, x.scalar_type());
  q.args.out = out.mutable_data_ptr();
  if (cuda::needs_scales(q.args)) {
    const FormatSpec& f = q.args.format;
    q.scratch = q.device.empty(scales_shape(q.rows.shape, f), scale_type(f.scale));
    q.args.scales = q.scratch.mutable_data_ptr();
  }
  q.run();
  return q.rows.moved_back(out);
}

Tensor fake_quantize(Tensor x, std::string format, int64_t axis, Text scale_rule, Text recipe,
                     std::string rounding, std::optional<int64_t> seed, std::string clip,
                     std::optional<Tensor> tensor_scale) {
  return fake_quantize_by(x, options::quantize(format, scale_rule, recipe, rounding, seed, clip),
                          axis, tensor_scale);
}

Tensor fake_quantize_planned(Tensor x, int64_t plan, int64_t axis,
                             std::optional<Tensor> tensor_scale) {
  return fake_quantize_by(x, options::planned(plan), axis, tensor_scale);
}

Tensor dequantize(Tensor codes, Tensor scales, std::optional<Tensor> tensor_scale,
                  std::string format, std::vector<int64_t> shape, int64_t axis, ScalarType dtype) {
  const FormatSpec f = get_format(format);
  const int64_t last = int64_t(shape.size()) - 1, from = options::axis(axis, last + 1);
  const DType out_dtype = dtype_of("dtype", dtype);
  expect_sizes(shape);
  const Shape moved = move_axis(shape, from, last);
  expect_bytes("codes", codes);
  const Shape want = with_last(moved, f.row_bytes(moved.back())), have = shape_of(codes);
  if (have != want) {
    options::fail("codes: expected shape ", text_of(want), " for ", format, " of logical shape ",
                  text_of(moved), " (quantized axis last), got ", text_of(have));
  }
  const Shape grid = scales_shape(moved, f), scales_have = shape_of(scales);
  if (scales_have != grid) {
    options::fail("scales: expected shape ", text_of(grid), " for ", format, ", got ",
                  text_of(scales_have));
  }
  options::expect(scales.scalar_type() == scale_type(f.scale), "scales: expected dtype ",
                  name_of(scale_type(f.scale)), " for ", format, ", got ",
                  name_of(scales.scalar_type()));
  const Device device(codes);
  device.expect_here("scales", scales);
  const Tensor packed = dense(codes), grid_scales = dense(scales);
  Tensor out = device.empty(moved, dtype);
  cuda::DequantizeArgs a;
  // Formats without a tensor scale come with the empty one that quantize returned.
  if (tensor_scale && tensor_scale->numel() != 0) {
    options::expect(f.tensor_scale, "tensor_scale: ", format, " has none; pass None");
    a.tensor_scale = tensor_scale_of(device, *tensor_scale);
  }
  a.codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  a.scales = grid_scales.const_data_ptr();
  a.format = f;
  a.matrix_rows = moved.size() > 1 ? moved[moved.size() - 2] : 1;
  a.view.columns = moved.back();
  for (size_t i = 0; i + 1 < moved.size(); ++i) a.view.outer *= moved[i];
  a.view.outer_stride = a.view.columns;
  a.dtype = out_dtype;
  a.out = out.mutable_data_ptr();
  cuda::dequantize(a, device.stream);
  return from == last ? out : torch::stable::contiguous(move_axis(out, last, from));
}

Tensor hadamard(Tensor x, int64_t size, std::optional<Tensor> signs, int64_t axis) {
  const Device device(x);
  Rows rows(x, axis);
  cuda::HadamardArgs a;
  Tensor words;
  a.rotation = rotation_of(device, size, rows.view.columns, signs, words);
  rows.flatten();
  Tensor out = device.empty(rows.shape, x.scalar_type());
  a.x = rows.data();
  a.out = out.mutable_data_ptr();
  a.dtype = a.out_dtype = rows.dtype;
  a.count = rows.view.count();
  cuda::hadamard(a, device.stream);
  return rows.moved_back(out);
}

Tensor amax(Tensor x, std::optional<int64_t> block, int64_t axis) {
  const Device device(x);
  cuda::AmaxArgs a;
  if (!block) {
    a.dtype = dtype_of("x", x.scalar_type());
    const Tensor all = dense(x);
    a.x = all.const_data_ptr();
    a.view.columns = all.numel();
    Tensor out = device.empty({}, ScalarType::Float);
    const Tensor partials = device.empty({cuda::kPartials}, ScalarType::Float);
    a.out = static_cast<float*>(out.mutable_data_ptr());
    a.partials = static_cast<float*>(partials.mutable_data_ptr());
    cuda::amax(a, device.stream);
    return out;
  }
  options::expect(*block >= 1, "block: expected a positive int, got ", *block);
  const Rows rows(x, axis);
  const int64_t blocks = (rows.shape.back() + *block - 1) / *block;
  Tensor out = device.empty(with_last(rows.shape, blocks), ScalarType::Float);
  a.x = rows.data();
  a.dtype = rows.dtype;
  a.view = rows.view;
  a.block = *block;
  a.out = static_cast<float*>(out.mutable_data_ptr());
  cuda::amax(a, device.stream);
  return out;
}

}  // namespace
}  // namespace pyfmt

PYFMT_DEFINE(PYFMT_NAMESPACE, m) {
  m.def(
      "_quantize_turned(Tensor x, str format, str? scale_rule, str? recipe, str rounding, "
      "int? seed, str clip, int rotation, Tensor? signs) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
}

PYFMT_REGISTER(PYFMT_NAMESPACE, PYFMT_DISPATCH_KEY, m) {
  m.impl("quantize", TORCH_BOX(&pyfmt::quantize));
  m.impl("_quantize", TORCH_BOX(&pyfmt::quantize_planned));
  m.impl("_fake_quantize", TORCH_BOX(&pyfmt::fake_quantize_planned));
  m.impl("quantize_dual", TORCH_BOX(&pyfmt::quantize_dual));
  m.impl("_quantize_turned", TORCH_BOX(&pyfmt::quantize_turned));
  m.impl("dequantize", TORCH_BOX(&pyfmt::dequantize));
  m.impl("fake_quantize", TORCH_BOX(&pyfmt::fake_quantize));
  m.impl("hadamard", TORCH_BOX(&pyfmt::hadamard));
  m.impl("amax", TORCH_BOX(&pyfmt::amax));
}
