// SPDX-License-Identifier: Apache-2.0
// The arguments of the verbs, checked: what both bindings say about wrong ones.
#pragma once

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

#include "cpu/cpu.h"
#include "parse.h"

namespace pyfmt {
namespace options {

inline void append(std::string& out, const char* s) {
  out += s;
}
inline void append(std::string& out, std::string_view s) {
  out += s;
}
inline void append(std::string& out, const std::string& s) {
  out += s;
}
inline void append(std::string& out, int64_t n) {
  out += std::to_string(n);
}
inline void append(std::string& out, int n) {
  out += std::to_string(n);
}
inline void append(std::string& out, float f) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", double(f));
  out += text;
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string message;
  (append(message, parts), ...);
  throw Error(message);
}

template <class... Parts>
void expect(bool good, const Parts&... parts) {
  if (__builtin_expect(!good, 0)) fail(parts...);
}

// The axis counted from the front.
inline int64_t axis(int64_t axis, int64_t dims) {
  expect(dims > 0, "x: expected at least one dimension, got a 0-dim tensor; reshape it to (1,)");
  expect(-dims <= axis && axis < dims, "axis: expected ", -dims, " to ", dims - 1, " for ", dims,
         " dimensions, got ", axis);
  return axis < 0 ? axis + dims : axis;
}

// The options of quantize and fake_quantize; defaults are filled in.
inline cpu::Options quantize(std::string_view format, std::optional<std::string_view> scale_rule,
                             std::optional<std::string_view> recipe, std::string_view rounding,
                             std::optional<int64_t> seed, std::string_view clip) {
  cpu::Options o;
  o.format = get_format(format);
  if (scale_rule) {
    expect(o.format.scale == Scale::kE8M0, "scale_rule: ", format,
           " takes none (its scale is not e8m0), got '", *scale_rule, "'; leave it out");
    o.rule = parse::one_of<ScaleRule>("scale_rule", *scale_rule, parse::kScaleRules);
  }
  o.recipe = o.format.tensor_scale ? Recipe::kNvidia : Recipe::kSingleLevel;
  if (recipe) {
    expect(o.format.scale == Scale::kE4M3, "recipe: ", format,
           " takes none (its scale is not e4m3), got '", *recipe, "'; leave it out");
    o.recipe = parse::one_of<Recipe>("recipe", *recipe, parse::kRecipes);
    expect(o.format.tensor_scale || o.recipe == Recipe::kSingleLevel, "recipe: ", format,
           " has no tensor scale, so it takes single_level only, got '", *recipe, "'");
  }
  o.stochastic =
      parse::one_of<Rounding>("rounding", rounding, parse::kRoundings) == Rounding::kStochastic;
  expect(!o.stochastic || seed.has_value(),
         "seed: stochastic rounding needs one; pass seed=<int of 64 bits>");
  o.seed = uint64_t(seed.value_or(0));
  o.full = parse::one_of<Clip>("clip", clip, parse::kClips) == Clip::kFull;
  return o;
}

// The same in one number, for callers that ask the same again and again: row of the table |
// rule << 8 | recipe << 10 | full << 12, rounding to nearest. See pyfmt/_direct.py.
inline cpu::Options planned(int64_t plan) {
#define PYFMT_FORMAT(id, name, element, block_rows, block_columns, scale, tensor_scale) formats::id,
  static constexpr FormatSpec kRows[] = {
#include "formats.inc"
  };
  constexpr int64_t kCount = sizeof(kRows) / sizeof(kRows[0]);
  expect((plan & 0xff) < kCount && 0 <= plan && plan < 1 << 13 && (plan >> 10 & 3) < 3,
         "plan: expected what pyfmt makes of options, got ", plan);
  cpu::Options o;
  o.format = kRows[plan & 0xff];
  o.rule = ScaleRule(plan >> 8 & 3);
  o.recipe = Recipe(plan >> 10 & 3);
  o.full = plan >> 12 & 1;
  return o;
}

// A caller's tensor scale.
inline void set_tensor_scale(cpu::Options& o, float value) {
  expect(o.has_tensor_scale(), "tensor_scale: this format or recipe has none; leave it out");
  expect(std::isfinite(value) && value > 0.0f,
         "tensor_scale: expected a positive finite number, got ", value,
         "; it is the decode multiplier, for example amax / (448 * 6)");
  o.has_given = true;
  o.given = value;
}

inline cpu::Rotation rotation(int64_t size, int64_t length, const float* signs,
                              int64_t signs_length) {
  const bool power = size >= 2 && size <= 1024 && (size & (size - 1)) == 0;
  expect(power, "rotation: expected a power of two from 2 to 1024, got ", size);
  expect(length % size == 0, "rotation: the axis has ", length, " elements, not a multiple of ",
         size, "; pad it or choose a smaller size");
  cpu::Rotation r;
  r.size = int(size);
  if (signs) {
    expect(signs_length == size || signs_length == length, "signs: expected ", size, " or ", length,
           " values of +1 and -1, got ", signs_length);
    // An empty axis has signs of length 0, which nothing reads.
    r.signs = signs_length > 0 ? signs : nullptr;
    r.signs_length = signs_length;
  }
  return r;
}

inline void bits(int64_t bits) {
  expect(2 <= bits && bits <= 8, "bits: expected 2 to 8, got ", bits);
}

inline void packed_bytes(int64_t bytes, int64_t length, int64_t bits) {
  options::bits(bits);
  const int64_t need = length < 0 ? 0 : (length * bits + 7) / 8;
  expect(length >= 0 && bytes >= need, "packed: expected at least ", need, " bytes a row for ",
         length, " codes of ", bits, " bits, got ", bytes);
}

inline const char* scale_dtype(Scale scale) {
  return scale == Scale::kBF16   ? "bfloat16"
         : scale == Scale::kFP16 ? "float16"
         : scale == Scale::kFP32 ? "float32"
                                 : "uint8";
}

}  // namespace options
}  // namespace pyfmt
