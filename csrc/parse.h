// SPDX-License-Identifier: Apache-2.0
// Names to facts: format names and spellings, options, and the sentences for unknown ones.
// The grammar is that of pyfmt/formats.py: e2m1-b16-e4m3-ts, int4-b64-bf16, ue4m3-brow-fp32, ...
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "formats.h"

namespace pyfmt {

// What misuse gets; the bindings turn it into the caller's exception.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace parse {

// Reads one grammar piece after the other from the front of a name.
struct Reader {
  std::string_view rest;

  bool word(std::string_view w) {
    if (rest.substr(0, w.size()) != w) return false;
    rest.remove_prefix(w.size());
    return true;
  }
  bool digit(int* out) {
    if (rest.empty() || rest[0] < '0' || rest[0] > '9') return false;
    *out = rest[0] - '0';
    rest.remove_prefix(1);
    return true;
  }
  bool number(int64_t* out, int64_t limit) {
    int d = 0;
    if (!digit(&d)) return false;
    int64_t n = d;
    while (digit(&d)) {
      n = n * 10 + d;
      if (n > limit) return false;
    }
    *out = n;
    return true;
  }
  bool small(int* out) {
    const bool negative = word("-");
    int64_t n = 0;
    if (!number(&n, 1000)) return false;
    *out = int(negative ? -n : n);
    return true;
  }
};

inline bool element(Reader& in, ElementSpec* e) {
  *e = ElementSpec{};
  e->is_signed = !in.word("u");
  if (in.word("int")) {
    int bits = 0;
    if (!in.digit(&bits)) return false;
    if (in.word("q") && !in.small(&e->frac)) return false;
    e->kind = Kind::kInt;
    e->man = bits - (e->is_signed ? 1 : 0);
  } else {
    if (!in.word("e") || !in.digit(&e->exp) || !in.word("m") || !in.digit(&e->man)) return false;
    e->special = in.word("fn") ? Special::kFn : in.word("ieee") ? Special::kIeee : Special::kNone;
    e->bias = e->exp > 0 ? (1 << (e->exp - 1)) - 1 : 0;
    if (in.word("bias") && !in.small(&e->bias)) return false;
  }
  return true;
}

inline bool scale(Reader& in, Scale* out) {
#define PYFMT_SCALE(id, name, bits) \
  if (in.word(name)) {              \
    *out = Scale::id;               \
    return true;                    \
  }
#include "formats.inc"
  return false;
}

inline bool format(std::string_view name, FormatSpec* f) {
  Reader in{name};
  *f = FormatSpec{};
  if (!element(in, &f->element) || !in.word("-b")) return false;
  constexpr int64_t kLimit = int64_t(1) << 40;
  if (in.word("row")) {
    f->block_columns = 0;
  } else {
    if (!in.number(&f->block_columns, kLimit)) return false;
    if (in.word("x")) {
      f->block_rows = f->block_columns;
      if (!in.number(&f->block_columns, kLimit)) return false;
    }
    if (f->block_columns < 1 || f->block_rows < 1) return false;
  }
  if (!in.word("-") || !scale(in, &f->scale)) return false;
  f->tensor_scale = in.word("-ts");
  return in.rest.empty();
}

inline std::string known_formats() {
  std::string list;
#define PYFMT_FORMAT(id, name, element, block_rows, block_columns, scale, tensor_scale) \
  list += list.empty() ? name : ", " name;
#include "formats.inc"
  return list;
}

// One of a few names, or an Error that lists them.
template <class Enum, size_t N>
Enum one_of(const char* what, std::string_view value, const char* const (&names)[N]) {
  for (size_t i = 0; i < N; ++i) {
    if (value == names[i]) return Enum(i);
  }
  std::string known;
  for (const char* name : names) known += (known.empty() ? "" : ", ") + std::string(name);
  throw Error(std::string(what) + ": unknown '" + std::string(value) + "'; known are " + known);
}

constexpr const char* kScaleRules[] = {"rceil", "floor", "ceil", "even"};
constexpr const char* kRecipes[] = {"nvidia", "torchao", "single_level"};
constexpr const char* kRoundings[] = {"nearest", "stochastic"};
constexpr const char* kClips[] = {"symmetric", "full"};

}  // namespace parse

// Return the format of a row's name or of a spelling; Error for anything else.
inline FormatSpec get_format(std::string_view name) {
#define PYFMT_FORMAT(id, row, element, block_rows, block_columns, scale, tensor_scale) \
  if (name == row) return formats::id;
#include "formats.inc"
  FormatSpec f;
  const std::string quoted = "'" + std::string(name) + "'";
  if (!parse::format(name, &f)) {
    throw Error("format: unknown " + quoted + "; known are " + parse::known_formats() +
                ", and spellings such as e2m1-b32-e8m0");
  }
  const ElementSpec& e = f.element;
  const int bits = e.bits();
  if (bits < 2 || bits > 8 || e.man < 0) {
    throw Error("format " + quoted + ": expected an element of 2 to 8 bits in all, got " +
                std::to_string(bits) + "; choose narrower or wider fields");
  }
  if (e.special == Special::kIeee && (e.exp < 2 || e.man < 1)) {
    throw Error("format " + quoted + ": infinity and NaN need exp >= 2 and man >= 1");
  }
  const bool in_range = e.step_exp() >= -100 && e.step_exp() <= 100 && e.max_exp() >= -110 &&
                        e.max_exp() <= 100 && e.max_code() > 0 && e.emax() >= -100 &&
                        e.emax() <= 100;
  if (!in_range) {
    throw Error("format " + quoted +
                ": expected element values with exponents within -100 to 100; choose another bias");
  }
  if (f.tensor_scale && f.scale != Scale::kE4M3) {
    throw Error("format " + quoted + ": only formats with an e4m3 scale have a tensor scale");
  }
  return f;
}

}  // namespace pyfmt
