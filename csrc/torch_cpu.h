// SPDX-License-Identifier: Apache-2.0
// What the bindings of the CPU kernels share: torch's threads, fresh tensors, checked arguments.
#pragma once

#include "cpu/cpu.h"
#include "options.h"
#include "torch_tensors.h"

namespace pyfmt {
namespace cpu_tensors {

using namespace tensors;

// ---- torch's threads --------------------------------------------------------------------------

inline void run_torch(void*, int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                      void* context) {
  if (n <= grain) {
    if (n > 0) body(context, 0, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

inline const cpu::ParallelFor kParallel{run_torch, nullptr};

// ---- tensors ----------------------------------------------------------------------------------

inline Tensor new_tensor(const Shape& shape, ScalarType type) {
  Tensor t = empty(shape, type, aoti_torch_device_type_cpu(), 0);
  int64_t bytes = aoti_torch_dtype_element_size(shim_dtype(type));
  for (int64_t n : shape) bytes *= n;
  if (size_t(bytes) >= cpu::kHugePageBytes) {
    cpu::prefer_huge_pages(t.mutable_data_ptr(), size_t(bytes));
  }
  return t;
}

inline cpu::View view_of(const Shape& moved) {
  cpu::View v;
  v.columns = moved.back();
  if (moved.size() > 1) v.rows = moved[moved.size() - 2];
  for (size_t i = 0; i + 2 < moved.size(); ++i) v.batches *= moved[i];
  return v;
}

inline float scalar_of(const Tensor& t) {
  options::expect(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.numel() == 1,
                  "tensor_scale: expected one float32 number on the CPU, got ", t.numel(),
                  " of dtype ", name_of(t.scalar_type()));
  return *static_cast<const float*>(t.const_data_ptr());
}

// signs as contiguous float32, kept alive by the caller.
inline cpu::Rotation rotation_of(int64_t size, int64_t length, std::optional<Tensor>& signs) {
  if (!signs) return options::rotation(size, length, nullptr, 0);
  options::expect(signs->is_cpu() && signs->dim() == 1,
                  "signs: expected a CPU tensor of one dimension, got ", signs->dim());
  if (signs->scalar_type() != ScalarType::Float) {
    signs = torch::stable::to(*signs, ScalarType::Float);
  }
  signs = dense(*signs);
  static const float nothing = 1.0f;
  const float* data = static_cast<const float*>(signs->const_data_ptr());
  return options::rotation(size, length, data ? data : &nothing, signs->numel());
}

inline cpu::Options options_of(const std::string& format, const Text& scale_rule,
                               const Text& recipe, const std::string& rounding,
                               std::optional<int64_t> seed, const std::string& clip,
                               const std::optional<Tensor>& tensor_scale) {
  cpu::Options o = options::quantize(format, scale_rule, recipe, rounding, seed, clip);
  if (tensor_scale) options::set_tensor_scale(o, scalar_of(*tensor_scale));
  return o;
}

// Codes and scales that belong to one tensor of shape `moved`, the quantized axis last.
inline void expect_quantized(const char* what, const char* what_scales, const Tensor& codes,
                             const Tensor& scales, const FormatSpec& f, const std::string& format,
                             const Shape& moved) {
  expect_bytes(what, codes);
  const Shape want = with_last(moved, f.row_bytes(moved.back())), have = shape_of(codes);
  if (have != want) {
    options::fail(what, ": expected shape ", text_of(want), " for ", format, " of logical shape ",
                  text_of(moved), " (quantized axis last), got ", text_of(have));
  }
  const Shape grid = scales_shape(moved, f), scales_have = shape_of(scales);
  if (scales_have != grid) {
    options::fail(what_scales, ": expected shape ", text_of(grid), " for ", format, ", got ",
                  text_of(scales_have));
  }
  options::expect(scales.scalar_type() == scale_type(f.scale), what_scales, ": expected dtype ",
                  name_of(scale_type(f.scale)), " for ", format, ", got ",
                  name_of(scales.scalar_type()));
  options::expect(scales.is_cpu(), what_scales, ": expected a CPU tensor, as codes are");
}

// Formats without a tensor scale come with None or the empty one that quantize returned.
inline bool has_tensor_scale(const std::optional<Tensor>& tensor_scale, const FormatSpec& f,
                             const std::string& format, float* value) {
  if (!tensor_scale || tensor_scale->numel() == 0) return false;
  options::expect(f.tensor_scale, "tensor_scale: ", format, " has none; pass None");
  *value = scalar_of(*tensor_scale);
  return true;
}

}  // namespace cpu_tensors
}  // namespace pyfmt
