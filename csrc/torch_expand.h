// SPDX-License-Identifier: Apache-2.0
// Folded matrices and what they are made of, for the bindings of the dense GEMM paths.
#pragma once

#include <tuple>

#include "cuda/expand.h"
#include "torch_device.h"

namespace pyfmt {
namespace tensors {

// What a folded matrix is: fp8 (padded rows, padded columns) as bytes, a scale and a mark for each
// row (1 where it does not fold), and those rows as bf16 (empty where not asked for).
using Parts = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

inline cuda::Folded view_of(const Tensor& fp8, const Tensor& scale, const Tensor& marks,
                            const Tensor& spare, int64_t rows, bool e5m2) {
  options::expect(fp8.dim() == 2 && scale.numel() == fp8.size(0) && marks.numel() == fp8.size(0),
                  "folded: expected what _fold returned");
  cuda::Folded f;
  f.fp8 = static_cast<uint8_t*>(fp8.mutable_data_ptr());
  f.scale = static_cast<float*>(scale.mutable_data_ptr());
  f.marks = static_cast<uint8_t*>(marks.mutable_data_ptr());
  if (spare.numel()) f.spare = static_cast<uint16_t*>(spare.mutable_data_ptr());
  f.rows = rows;
  f.padded_rows = fp8.size(0);
  f.columns = fp8.size(1);
  f.e5m2 = e5m2;
  return f;
}

struct Fold {
  Tensor fp8, scale, marks, spare;
  cuda::Folded to;

  // pad: rows are padded to a multiple of it. written: there is room for fp8.
  Fold(const Device& device, int64_t rows, int64_t columns, bool e5m2, bool keep_spare,
       const std::optional<Tensor>& total, int64_t pad = 16, bool written = true)
      : fp8(device.empty({round_up(rows, pad), written ? columns : 0}, ScalarType::Byte)),
        scale(device.empty({round_up(rows, pad)}, ScalarType::Float)),
        marks(device.empty({round_up(rows, pad)}, ScalarType::Byte)),
        spare(device.empty({keep_spare ? rows : 0, columns}, ScalarType::BFloat16)),
        to(view_of(fp8, scale, marks, spare, rows, e5m2)) {
    to.columns = columns;
    if (!written) to.fp8 = nullptr;
    if (!total) return;
    options::expect(total->scalar_type() == ScalarType::Long && total->numel() == 1,
                    "total: expected one int64 number");
    to.total = static_cast<unsigned long long*>(total->mutable_data_ptr());
  }
  Parts parts() const { return {fp8, scale, marks, spare}; }
};

inline void expect_folds(const FormatSpec& f, const std::string& format, bool e5m2) {
  options::expect(cuda::folds(f, e5m2), "format: ", format, " does not fold into ",
                  e5m2 ? "float8_e5m2" : "float8_e4m3fn");
}

// Packed codes and where they are folded to.
struct Codes {
  FormatSpec format;
  Tensor packed, grid;
  int64_t rows, columns;

  Codes(const Device& device, const Tensor& codes, const Tensor& scales, const std::string& name)
      : format(get_format(name)), packed(dense(codes)), grid(dense(scales)) {
    expect_bytes("codes", codes);
    expect_bytes("scales", scales);
    device.expect_here("codes", codes);
    device.expect_here("scales", scales);
    const int64_t blocks = grid.size(grid.dim() - 1);
    rows = blocks ? grid.numel() / blocks : 0;
    columns = format.block_columns * blocks;
    const int64_t bytes = rows * columns * format.bits() / 8;
    options::expect(packed.numel() == bytes, "codes: expected ", bytes,
                    " bytes for scales of shape ", text_of(shape_of(scales)), ", got ",
                    packed.numel());
  }
  cuda::FoldCodesArgs args(const cuda::Folded& to) const {
    cuda::FoldCodesArgs a;
    a.codes = static_cast<const uint8_t*>(packed.const_data_ptr());
    a.scales = static_cast<const uint8_t*>(grid.const_data_ptr());
    a.format = format;
    a.to = to;
    return a;
  }
};

// The arguments of a quantization of x's rows, which must lie end to end.
struct Rows {
  Device device;
  Tensor x;
  Tensor signs_words;  // kept alive until the kernels are launched
  cuda::QuantizeArgs args;

  Rows(const Tensor& input, const std::string& format, const Text& scale_rule, const Text& recipe,
       const std::string& clip, int64_t rotation, const std::optional<Tensor>& signs)
      : device(input), x(dense(input)) {
    const cpu::Options o =
        options::quantize(format, scale_rule, recipe, "nearest", std::nullopt, clip);
    args.format = o.format;
    args.rule = o.rule;
    args.recipe = o.recipe;
    args.full = o.full;
    args.x = x.const_data_ptr();
    args.dtype = dtype_of("x", x.scalar_type());
    args.view.columns = x.size(x.dim() - 1);
    args.view.outer = args.view.columns ? x.numel() / args.view.columns : 0;
    args.view.outer_stride = args.view.columns;
    if (rotation) {
      args.rotation = rotation_of(device, rotation, args.view.columns, signs, signs_words);
    }
  }
};

// The left operand of a product: x, still to be rotated and quantized, or codes and scales.
struct LeftOperand {
  std::optional<Rows> values;
  std::optional<Codes> packed;
  FormatSpec format;
  int64_t rows, columns;

  LeftOperand(const Device& device, const std::optional<Tensor>& x,
              const std::optional<Tensor>& codes, const std::optional<Tensor>& scales,
              const std::string& name, const Text& scale_rule, const std::string& clip,
              int64_t rotation, const std::optional<Tensor>& signs,
              const Text& recipe = std::nullopt) {
    options::expect(x.has_value() != codes.has_value() && codes.has_value() == scales.has_value(),
                    "codes: expected x, or codes and scales");
    if (x) {
      device.expect_here("x", *x);
      values.emplace(*x, name, scale_rule, recipe, clip, rotation, signs);
      rows = values->args.view.outer;
      columns = values->args.view.columns;
    } else {
      packed.emplace(device, *codes, *scales, name);
      rows = packed->rows;
      columns = packed->columns;
    }
    format = x ? values->args.format : packed->format;
  }
  // Whether x can be quantized on the way, by what the kernel says of its arguments.
  void expect_served(bool (*serves)(const cuda::QuantizeArgs&)) const {
    options::expect(!values || serves(values->args),
                    "x: expected bfloat16 rows of whole blocks; quantize it first");
  }
  void expect_beside(const Codes& w) const {
    options::expect(w.columns == columns, "w_codes: expected rows of ", columns,
                    " elements like those of the left operand, got ", w.columns);
  }
};

inline DType bias_into(const Device& device, const std::optional<Tensor>& bias, int64_t columns,
                       const void** data) {
  if (!bias) return DType::kFP32;
  device.expect_here("bias", *bias);
  options::expect(bias->dim() == 1 && bias->size(0) == columns && bias->is_contiguous(),
                  "bias: expected ", columns, " numbers end to end");
  *data = bias->const_data_ptr();
  return dtype_of("bias", bias->scalar_type());
}

}  // namespace tensors
}  // namespace pyfmt
