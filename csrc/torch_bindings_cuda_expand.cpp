// SPDX-License-Identifier: Apache-2.0
// The parts of the dense GEMM paths, for pyfmt/_torch_matmul.py: folded and rounded rows, repair of
// rows that do not fold, and the epilogue.
#include "torch_expand.h"

namespace pyfmt {
namespace {

using namespace tensors;

Parts fold(Tensor codes, Tensor scales, std::string format, bool e5m2, bool spare,
           std::optional<Tensor> total) {
  const Device device(codes);
  const Codes c(device, codes, scales, format);
  expect_folds(c.format, format, e5m2);
  const Fold to(device, c.rows, c.columns, e5m2, spare, total);
  cuda::fold_codes(c.args(to.to), device.stream);
  return to.parts();
}

// The left and the right operand of a product.
using TwoParts = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TwoParts both(const Fold& a, const Fold& w) {
  return {a.fp8, a.scale, a.marks, a.spare, w.fp8, w.scale, w.marks};
}

TwoParts fold_two(Tensor codes, Tensor scales, std::string format, bool e5m2, Tensor w_codes,
                  Tensor w_scales, std::string w_format, std::optional<Tensor> total) {
  const Device device(codes);
  const Codes a(device, codes, scales, format), w(device, w_codes, w_scales, w_format);
  expect_folds(a.format, format, e5m2);
  expect_folds(w.format, w_format, false);
  options::expect(a.columns == w.columns, "w_codes: expected rows of ", a.columns,
                  " elements like those of codes, got ", w.columns);
  const Fold left(device, a.rows, a.columns, e5m2, true, total);
  const Fold right(device, w.rows, w.columns, false, false, total);
  if (a.format.element == w.format.element) {
    cuda::fold_two(a.args(left.to), w.args(right.to), device.stream);
  } else {
    cuda::fold_codes(a.args(left.to), device.stream);
    cuda::fold_codes(w.args(right.to), device.stream);
  }
  return both(left, right);
}

// The left operand is x, still to be rotated and quantized: the weight is folded beside that. All
// buffers live until both are launched, so that none of one kernel's is another's meanwhile.
TwoParts fold_online(Tensor x, std::string format, Text scale_rule, std::string clip,
                     int64_t rotation, std::optional<Tensor> signs, bool e5m2, Tensor w_codes,
                     Tensor w_scales, std::string w_format, std::optional<Tensor> total) {
  Rows rows(x, format, scale_rule, std::nullopt, clip, rotation, signs);
  const Device& device = rows.device;
  cuda::QuantizeArgs& q = rows.args;
  const int64_t m = q.view.outer, k = q.view.columns;
  expect_folds(q.format, format, e5m2);
  options::expect(cuda::fold_values_serves(q) && !cuda::needs_rotated_rows(q),
                  "x: expected bfloat16 rows of whole blocks; quantize it first");
  const Codes w(device, w_codes, w_scales, w_format);
  expect_folds(w.format, w_format, false);
  options::expect(w.columns == k, "w_codes: expected rows of ", k,
                  " elements like those of x, got ", w.columns);
  const Tensor codes = device.empty({m, q.format.row_bytes(k)}, ScalarType::Byte);
  const Tensor scales = device.empty({m, q.format.blocks(k)}, ScalarType::Byte);
  q.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  q.scales = scales.mutable_data_ptr();
  const bool together = q.format.element == w.format.element;
  q.next_waits = together;
  const Codes a(device, codes, scales, format);
  const Fold left(device, m, k, e5m2, true, total);
  const Fold right(device, w.rows, k, false, false, total);
  cuda::quantize(q, device.stream);
  if (together) {
    cuda::fold_two(a.args(left.to), w.args(right.to), device.stream, true);
  } else {
    cuda::fold_codes(a.args(left.to), device.stream);
    cuda::fold_codes(w.args(right.to), device.stream);
  }
  return both(left, right);
}

Parts fold_values(Tensor x, std::string format, Text scale_rule, std::string clip, int64_t rotation,
                  std::optional<Tensor> signs, bool e5m2, std::optional<Tensor> total) {
  const Rows rows(x, format, scale_rule, std::nullopt, clip, rotation, signs);
  expect_folds(rows.args.format, format, e5m2);
  options::expect(cuda::fold_values_serves(rows.args),
                  "x: expected bfloat16 rows of whole blocks; quantize it first");
  Fold to(rows.device, rows.args.view.outer, rows.args.view.columns, e5m2, true, total);
  cuda::fold_values(rows.args, to.to, rows.device.stream);
  return to.parts();
}

// bf16 of element * scale, and the tensor scale (times `factor`), which is not in it; the second is
// empty for formats and recipes without a tensor scale.
std::tuple<Tensor, Tensor> round_values(Tensor x, std::string format, Text scale_rule, Text recipe,
                                        std::string clip, int64_t rotation,
                                        std::optional<Tensor> signs, std::optional<Tensor> factor,
                                        int64_t order) {
  Rows rows(x, format, scale_rule, recipe, clip, rotation, signs);
  cuda::QuantizeArgs& a = rows.args;
  options::expect(cuda::round_values_serves(a),
                  "x: expected bfloat16 rows of whole blocks of a format whose values are bfloat16 "
                  "numbers; use fake_quantize");
  options::expect(!order || cuda::round_few_serves(a, int(order)),
                  "order: expected up to 32 rows of a multiple of 128 columns; leave it out");
  const bool two_level = a.format.scale == Scale::kE4M3;
  Tensor out = rows.device.empty(shape_of(x), ScalarType::BFloat16);
  Tensor stored = rows.device.empty(two_level ? Shape{} : Shape{0}, ScalarType::Float);
  Tensor partials = rows.device.empty({two_level ? cuda::kPartials : 0}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  a.tensor_scale_out = static_cast<float*>(stored.mutable_data_ptr());
  a.partials = static_cast<float*>(partials.mutable_data_ptr());
  const float* times = nullptr;
  if (factor) {
    rows.device.expect_here("factor", *factor);
    options::expect(factor->scalar_type() == ScalarType::Float && factor->numel() == 1,
                    "factor: expected one float32 number");
    times = static_cast<const float*>(factor->const_data_ptr());
  }
  if (order) {
    cuda::round_few(a, times, int(order), rows.device.stream);
  } else {
    cuda::round_values(a, times, rows.device.stream);
  }
  return {out, stored};
}

// y (M, N), written by a GEMM of folded operands, mended in place where rows did not fold.
void repair(Tensor y, Tensor a8, Tensor a_scale, Tensor a_marks, Tensor a_spare, bool a_e5m2,
            Tensor w8, Tensor w_scale, Tensor w_marks, bool w_e5m2, Tensor w_codes, Tensor w_scales,
            std::string w_format, std::optional<Tensor> bias) {
  const Device device(y);
  cuda::RepairArgs r;
  r.rows = y.size(0);
  r.columns = y.size(1);
  options::expect(y.dim() == 2 && (y.stride(1) == 1 || y.numel() == 0),
                  "y: expected rows of neighbouring elements");
  options::expect(a_spare.numel() == r.rows * a8.size(1),
                  "a_spare: expected the rows of a as bfloat16");
  options::expect(a8.size(1) == w8.size(1), "a8: expected rows as long as those of w8");
  for (const Tensor* t : {&a8, &a_scale, &a_marks, &w8, &w_scale, &w_marks, &w_codes, &w_scales}) {
    device.expect_here("operand", *t);
  }
  r.y = y.mutable_data_ptr();
  r.dtype = dtype_of("y", y.scalar_type());
  r.stride = y.stride(0);
  r.k = a8.size(1);
  r.a = view_of(a8, a_scale, a_marks, a_spare, r.rows, a_e5m2);
  r.w = view_of(w8, w_scale, w_marks, Tensor(a_spare), r.columns, w_e5m2);
  r.w.spare = nullptr;
  r.w_format = get_format(w_format);
  expect_folds(r.w_format, w_format, w_e5m2);
  const Tensor packed = dense(w_codes), grid = dense(w_scales);
  options::expect(packed.numel() == r.columns * r.k * r.w_format.bits() / 8 &&
                      grid.numel() == r.columns * r.k / 32,
                  "w_codes: expected the codes and scales that w8 was made of");
  r.w_codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  r.w_scales = static_cast<const uint8_t*>(grid.const_data_ptr());
  r.bias_dtype = bias_into(device, bias, r.columns, &r.bias);
  cuda::repair(r, device.stream);
}

Tensor finish(Tensor y, int64_t columns, std::optional<Tensor> factor,
              std::optional<Tensor> factor2, std::optional<Tensor> row_scale,
              std::optional<Tensor> column_scale, std::optional<Tensor> bias, ScalarType dtype) {
  const Device device(y);
  options::expect(
      y.dim() == 2 && (y.stride(1) == 1 || y.numel() == 0) && y.scalar_type() == ScalarType::Float,
      "y: expected a float32 matrix with rows of neighbouring elements");
  cuda::FinishArgs f;
  f.y = static_cast<const float*>(y.const_data_ptr());
  f.rows = y.size(0);
  f.columns = columns;
  f.stride = y.stride(0);
  options::expect(columns <= y.size(1), "columns: expected at most ", y.size(1), ", got ", columns);
  const std::optional<Tensor>* scalars[] = {&factor, &factor2};
  for (int i = 0; i < 2; ++i) {
    if (!*scalars[i] || (*scalars[i])->numel() == 0) continue;
    device.expect_here("factor", **scalars[i]);
    f.factors[i] = static_cast<const float*>((*scalars[i])->const_data_ptr());
  }
  if (row_scale) f.row_scale = static_cast<const float*>(row_scale->const_data_ptr());
  if (column_scale) f.column_scale = static_cast<const float*>(column_scale->const_data_ptr());
  f.bias_dtype = bias_into(device, bias, columns, &f.bias);
  f.dtype = dtype_of("dtype", dtype);
  Tensor out = device.empty({f.rows, columns}, dtype);
  f.out = out.mutable_data_ptr();
  cuda::finish(f, device.stream);
  return out;
}

}  // namespace
}  // namespace pyfmt

PYFMT_DEFINE(PYFMT_NAMESPACE, m) {
  m.def(
      "_fold(Tensor codes, Tensor scales, str format, bool e5m2, bool spare, Tensor(a!)? total) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_fold_two(Tensor codes, Tensor scales, str format, bool e5m2, Tensor w_codes, "
      "Tensor w_scales, str w_format, Tensor(a!)? total) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "_fold_online(Tensor x, str format, str? scale_rule, str clip, int rotation, Tensor? signs, "
      "bool e5m2, Tensor w_codes, Tensor w_scales, str w_format, Tensor(a!)? total) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_fold_values(Tensor x, str format, str? scale_rule, str clip, int rotation, Tensor? signs, "
      "bool e5m2, Tensor(a!)? total) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_round_values(Tensor x, str format, str? scale_rule, str? recipe, str clip, int rotation, "
      "Tensor? signs, Tensor? factor, int order=0) -> (Tensor, Tensor)");
  m.def(
      "_repair(Tensor(a!) y, Tensor a8, Tensor a_scale, Tensor a_marks, Tensor a_spare, "
      "bool a_e5m2, Tensor w8, Tensor w_scale, Tensor w_marks, bool w_e5m2, Tensor w_codes, "
      "Tensor w_scales, str w_format, Tensor? bias) -> ()");
  m.def(
      "_finish(Tensor y, int columns, Tensor? factor, Tensor? factor2, Tensor? row_scale, "
      "Tensor? column_scale, Tensor? bias, ScalarType dtype) -> Tensor");
}

PYFMT_REGISTER(PYFMT_NAMESPACE, PYFMT_DISPATCH_KEY, m) {
  m.impl("_fold", TORCH_BOX(&pyfmt::fold));
  m.impl("_fold_two", TORCH_BOX(&pyfmt::fold_two));
  m.impl("_fold_online", TORCH_BOX(&pyfmt::fold_online));
  m.impl("_fold_values", TORCH_BOX(&pyfmt::fold_values));
  m.impl("_round_values", TORCH_BOX(&pyfmt::round_values));
  m.impl("_repair", TORCH_BOX(&pyfmt::repair));
  m.impl("_finish", TORCH_BOX(&pyfmt::finish));
}
