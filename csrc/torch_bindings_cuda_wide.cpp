// SPDX-License-Identifier: Apache-2.0
// torch.ops.pyfmt._matmul_wide: dense bfloat16 x by packed w for middle-sized M on Hopper.
#include "cuda/matmul_wide.h"
#include "torch_device.h"

namespace pyfmt {
namespace {

using namespace tensors;

// x: (M, K) bfloat16. w_tensor_scale multiplies the sums of any format. tile, share, split and
// written choose a plan for measurements (tile 0: the usual one).
Tensor matmul_wide(Tensor x, Tensor w_codes, Tensor w_scales, std::optional<Tensor> w_tensor_scale,
                   std::string w_format, int64_t k, std::optional<Tensor> bias, ScalarType dtype,
                   int64_t tile, int64_t share, int64_t split, bool written, bool ordered) {
  const Device device(x);
  cuda::MatmulWideArgs a;
  a.format = get_format(w_format);
  const FormatSpec& f = a.format;
  options::expect(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && x.sizes()[1] == k,
                  "x: expected a bfloat16 matrix of ", k, " columns, got ",
                  name_of(x.scalar_type()), " of shape ", text_of(shape_of(x)));
  expect_bytes("w_codes", w_codes);
  a.m = x.sizes()[0];
  a.n = w_codes.sizes()[0];
  a.k = k;
  if (const char* reason = cuda::matmul_wide_refuses(f, a.m, a.n, k)) {
    options::fail("matmul path wide: ", reason, "; choose another path");
  }
  device.expect_here("w_codes", w_codes);
  device.expect_here("w_scales", w_scales);
  const Shape codes = shape_of(w_codes), scales = shape_of(w_scales);
  options::expect(codes.size() == 2 && codes[1] == f.row_bytes(k), "w_codes: expected shape (N, ",
                  f.row_bytes(k), ") for ", w_format, " of ", k, " columns, got ", text_of(codes));
  options::expect(scales == Shape{codes[0], f.blocks(k)}, "w_scales: expected shape ",
                  text_of({codes[0], f.blocks(k)}), ", got ", text_of(scales));
  options::expect(w_scales.scalar_type() == scale_type(f.scale), "w_scales: expected dtype ",
                  name_of(scale_type(f.scale)), ", got ", name_of(w_scales.scalar_type()));
  Tensor y = device.empty({a.m, a.n}, dtype);
  const Tensor dense_x = dense(x), dense_codes = dense(w_codes), dense_scales = dense(w_scales);
  Tensor float_bias;
  if (bias) {
    device.expect_here("bias", *bias);
    options::expect(bias->dim() == 1 && bias->numel() == a.n, "bias: expected ", a.n,
                    " numbers, got shape ", text_of(shape_of(*bias)));
    float_bias = bias->scalar_type() == ScalarType::Float
                     ? dense(*bias)
                     : torch::stable::to(dense(*bias), ScalarType::Float);
    a.bias = static_cast<const float*>(float_bias.const_data_ptr());
  }
  if (w_tensor_scale && w_tensor_scale->numel()) {
    device.expect_here("w_tensor_scale", *w_tensor_scale);
    options::expect(
        w_tensor_scale->scalar_type() == ScalarType::Float && w_tensor_scale->numel() == 1,
        "w_tensor_scale: expected one float32 number, got ", w_tensor_scale->numel(), " of dtype ",
        name_of(w_tensor_scale->scalar_type()));
    a.tensor_scale = static_cast<const float*>(w_tensor_scale->const_data_ptr());
  }
  a.x = dense_x.const_data_ptr();
  a.codes = static_cast<const uint8_t*>(dense_codes.const_data_ptr());
  a.scales = dense_scales.const_data_ptr();
  a.y = y.mutable_data_ptr();
  a.dtype = dtype_of("dtype", dtype);
  a.plan = {int(tile), int(share ? share : 1), int(split ? split : 1), written};
  const bool groups = f.has_float_scales();
  options::expect(!tile || tile >= 64 || !groups,
                  "tile: expected 64 rows or more for groups of integers, got ", tile);
  options::expect(tile != 64 || groups || share == 2 || share == 4,
                  "share: expected 2 or 4 with a tile of 64 rows, got ", share);
  options::expect(split <= 2 || (tile <= 64 && !groups && (split == 4 || split == 8)),
                  "split: expected 1 or 2, or 4 or 8 with a tile of 64 rows or less, got ", split);
  options::expect(!written || ((tile == 192 || tile == 256) && groups),
                  "written: expected groups of integers and a tile of 192 or 256, got tile ", tile);
  a.plan = cuda::matmul_wide_plan(a);
  a.ordered = ordered;
  options::expect(
      !ordered || cuda::takes_ordered(a),
      "ordered: expected up to 32 aligned rows of a multiple of 128 columns, and a weight "
      "with scales of its blocks");
  Tensor aligned;  // x again, where its rows are not
  if (const int64_t bytes = cuda::matmul_wide_workspace(a)) {
    aligned = device.empty({bytes}, ScalarType::Byte);
    a.workspace = aligned.mutable_data_ptr();
  }
  cuda::matmul_wide(a, device.stream);
  return y;
}

// Empty where the path serves, else the reason why not; for tensors on `like`'s device.
std::string matmul_wide_serves(Tensor like, std::string w_format, int64_t m, int64_t n, int64_t k) {
  const Device device(like);
  const char* reason = cuda::matmul_wide_refuses(get_format(w_format), m, n, k);
  return reason ? reason : "";
}

}  // namespace
}  // namespace pyfmt

PYFMT_DEFINE(PYFMT_NAMESPACE, m) {
  m.def(
      "_matmul_wide(Tensor x, Tensor w_codes, Tensor w_scales, Tensor? w_tensor_scale, "
      "str w_format, int k, Tensor? bias, ScalarType dtype, int tile=0, int share=0, int split=0, "
      "bool written=False, bool ordered=False) -> Tensor");
  m.def("_matmul_wide_serves(Tensor like, str w_format, int m, int n, int k) -> str");
}

PYFMT_REGISTER(PYFMT_NAMESPACE, PYFMT_DISPATCH_KEY, m) {
  m.impl("_matmul_wide", TORCH_BOX(&pyfmt::matmul_wide));
  m.impl("_matmul_wide_serves", TORCH_BOX(&pyfmt::matmul_wide_serves));
}
