// SPDX-License-Identifier: Apache-2.0
// Tensors of torch's stable ABI as the bindings need them: dtypes, shapes, fresh tensors, axes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "options.h"

namespace pyfmt {
namespace tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;
using Text = std::optional<std::string>;

inline const char* name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::ComplexHalf:
    case ScalarType::ComplexFloat:
    case ScalarType::ComplexDouble:
      return "complex";
    default:
      return "another dtype";
  }
}

inline DType dtype_of(const char* what, ScalarType t) {
  switch (t) {
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kFP16;
    case ScalarType::Float:
      return DType::kFP32;
    default:
      options::fail(what, ": expected dtype bfloat16, float16 or float32, got ", name_of(t),
                    "; convert it to float32 first");
  }
}

inline ScalarType scale_type(Scale s) {
  return s == Scale::kBF16   ? ScalarType::BFloat16
         : s == Scale::kFP16 ? ScalarType::Half
         : s == Scale::kFP32 ? ScalarType::Float
                             : ScalarType::Byte;
}

inline int32_t shim_dtype(ScalarType t) {
  return t == ScalarType::Byte       ? aoti_torch_dtype_uint8()
         : t == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
         : t == ScalarType::Half     ? aoti_torch_dtype_float16()
                                     : aoti_torch_dtype_float32();
}

// A contiguous tensor with nothing written to it.
inline Tensor empty(const Shape& shape, ScalarType type, int32_t device_type,
                    int32_t device_index) {
  Shape strides(shape.size());
  int64_t count = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = count;
    count *= shape[i] > 0 ? shape[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(),
                                                         strides.data(), shim_dtype(type),
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// A shape as a message has it, spelled where the message is.
struct ShapeText {
  const Shape& shape;
};
inline ShapeText text_of(const Shape& shape) {
  return {shape};
}
inline void append(std::string& out, ShapeText t) {
  out += "(";
  for (size_t i = 0; i < t.shape.size(); ++i) {
    out += (i ? ", " : "") + std::to_string(t.shape[i]);
  }
  out += t.shape.size() == 1 ? ",)" : ")";
}

inline void expect_sizes(const Shape& shape) {
  for (int64_t n : shape) {
    if (n < 0) options::fail("shape: expected no negative sizes, got ", text_of(shape));
  }
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Move one axis elsewhere; the rest keep their order. A view.
inline Tensor move_axis(const Tensor& t, int64_t from, int64_t to) {
  if (from == to) return t;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t),
                                    torch::stable::detail::from(from),
                                    torch::stable::detail::from(to)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::movedim", "int", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Shape move_axis(Shape shape, int64_t from, int64_t to) {
  const int64_t length = shape[size_t(from)];
  shape.erase(shape.begin() + from);
  shape.insert(shape.begin() + to, length);
  return shape;
}

inline Shape with_last(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

inline Shape scales_shape(Shape moved, const FormatSpec& f) {
  moved.back() = f.blocks(moved.back());
  if (moved.size() > 1) {
    int64_t& rows = moved[moved.size() - 2];
    rows = (rows + f.block_rows - 1) / f.block_rows;
  }
  return moved;
}

inline void expect_bytes(const char* what, const Tensor& t) {
  options::expect(t.scalar_type() == ScalarType::Byte, what, ": expected dtype uint8, got ",
                  name_of(t.scalar_type()));
  options::expect(t.dim() > 0, what, ": expected at least one dimension, got a 0-dim tensor");
}

}  // namespace tensors
}  // namespace pyfmt
