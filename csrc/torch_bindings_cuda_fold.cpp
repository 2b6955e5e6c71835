// SPDX-License-Identifier: Apache-2.0
// torch.ops.pyfmt._matmul_fold: folded activations by a weight that stays packed, for middle-sized
// M on Hopper, with the repair of what does not fold.
#include "cuda/matmul_fold.h"
#include "torch_expand.h"

namespace pyfmt {
namespace {

using namespace tensors;

// The left operand is x, still to be rotated and quantized, or codes and scales. w_scale, w_marks:
// of a weight folded before, else they are found here. tile, share and split choose a plan for
// measurements (0: the usual one).
Tensor matmul_fold(std::optional<Tensor> x, std::optional<Tensor> codes,
                   std::optional<Tensor> scales, std::string format, Text scale_rule,
                   std::string clip, int64_t rotation, std::optional<Tensor> signs, bool e5m2,
                   Tensor w_codes, Tensor w_scales, std::string w_format,
                   std::optional<Tensor> w_scale, std::optional<Tensor> w_marks,
                   std::optional<Tensor> bias, ScalarType dtype, std::optional<Tensor> total,
                   int64_t tile, int64_t share, int64_t split) {
  const Device device(w_codes);
  options::expect(w_scale.has_value() == w_marks.has_value(),
                  "w_marks: expected w_scale and w_marks, or neither");
  const Codes w(device, w_codes, w_scales, w_format);
  const LeftOperand given(device, x, codes, scales, format, scale_rule, clip, rotation, signs);
  given.expect_served(cuda::fold_values_serves);
  expect_folds(given.format, format, e5m2);
  given.expect_beside(w);
  const int64_t rows = given.rows, columns = given.columns;
  cuda::MatmulFoldArgs a;
  a.format = w.format;
  a.n = w.rows;
  if (const char* reason = cuda::matmul_fold_refuses(a.format, rows, a.n, columns)) {
    options::fail("matmul path fold: ", reason, "; choose another path");
  }
  a.plan = {int(tile), int(share ? share : 1), int(split ? split : 1)};
  a.a.rows = rows;
  a.a.columns = columns;
  a.plan = cuda::matmul_fold_plan(a);

  const Fold left(device, rows, columns, e5m2, true, total, a.plan.tokens, false);
  a.a = left.to;
  const Tensor panel = device.empty({cuda::matmul_fold_panel(a)}, ScalarType::Byte);
  a.a.panel = static_cast<uint8_t*>(panel.mutable_data_ptr());
  const int64_t w_padded = round_up(w.rows, 16);
  const Tensor found_scale = w_scale ? *w_scale : device.empty({w_padded}, ScalarType::Float);
  const Tensor found_marks = w_marks ? *w_marks : device.empty({w_padded}, ScalarType::Byte);
  device.expect_here("w_scale", found_scale);
  device.expect_here("w_marks", found_marks);
  options::expect(found_scale.numel() == w_padded && found_marks.numel() == w_padded &&
                      found_scale.scalar_type() == ScalarType::Float &&
                      found_marks.scalar_type() == ScalarType::Byte,
                  "w_scale: expected what _fold returned for this weight");
  cuda::Folded right;
  right.scale = static_cast<float*>(found_scale.mutable_data_ptr());
  right.marks = static_cast<uint8_t*>(found_marks.mutable_data_ptr());
  right.rows = w.rows;
  right.padded_rows = w_padded;
  right.columns = columns;
  right.total = left.to.total;
  cuda::FoldScanArgs scan;
  if (!w_scale) scan = cuda::fold_scan_args(w.args(right));
  if (x) {
    cuda::fold_values(given.values->args, a.a, device.stream, scan);
  } else {
    cuda::fold_codes(given.packed->args(a.a), device.stream, scan);
  }

  const Tensor y = device.empty({rows, w.rows}, dtype);
  a.codes = static_cast<const uint8_t*>(w.packed.const_data_ptr());
  a.scales = static_cast<const uint8_t*>(w.grid.const_data_ptr());
  a.w_scale = right.scale;
  Tensor float_bias;
  const void* added = nullptr;
  const DType bias_dtype = bias_into(device, bias, w.rows, &added);
  if (bias) {
    float_bias = bias_dtype == DType::kFP32 ? *bias : torch::stable::to(*bias, ScalarType::Float);
    a.bias = static_cast<const float*>(float_bias.const_data_ptr());
  }
  a.y = y.mutable_data_ptr();
  a.dtype = dtype_of("dtype", dtype);
  Tensor scratch;
  if (const int64_t bytes = cuda::matmul_fold_workspace(a)) {
    scratch = device.empty({bytes}, ScalarType::Byte);
    a.workspace = scratch.mutable_data_ptr();
  }

  cuda::RepairArgs& r = a.repair;
  r.y = a.y;
  r.dtype = a.dtype;
  r.rows = rows;
  r.columns = r.stride = w.rows;
  r.k = columns;
  r.a = a.a;
  r.w = right;
  r.w_codes = a.codes;
  r.w_scales = a.scales;
  r.w_format = w.format;
  r.bias = a.bias;
  cuda::matmul_fold(a, device.stream);
  return y;
}

// Empty where the kernel serves, else the reason why not; for tensors on `like`'s device.
std::string matmul_fold_serves(Tensor like, std::string w_format, int64_t m, int64_t n, int64_t k) {
  const Device device(like);
  const char* reason = cuda::matmul_fold_refuses(get_format(w_format), m, n, k);
  return reason ? reason : "";
}

}  // namespace
}  // namespace pyfmt

PYFMT_DEFINE(PYFMT_NAMESPACE, m) {
  m.def(
      "_matmul_fold(Tensor? x, Tensor? codes, Tensor? scales, str format, str? scale_rule, "
      "str clip, int rotation, Tensor? signs, bool e5m2, Tensor w_codes, Tensor w_scales, "
      "str w_format, Tensor? w_scale, Tensor? w_marks, Tensor? bias, ScalarType dtype, "
      "Tensor(a!)? total, int tile=0, int share=0, int split=0) -> Tensor");
  m.def("_matmul_fold_serves(Tensor like, str w_format, int m, int n, int k) -> str");
}

PYFMT_REGISTER(PYFMT_NAMESPACE, PYFMT_DISPATCH_KEY, m) {
  m.impl("_matmul_fold", TORCH_BOX(&pyfmt::matmul_fold));
  m.impl("_matmul_fold_serves", TORCH_BOX(&pyfmt::matmul_fold_serves));
}
