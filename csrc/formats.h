// SPDX-License-Identifier: Apache-2.0
// The format table for C++ and CUDA: elements, scales and block formats, and what follows from
// them. The rows come from formats.inc, which is generated from pyfmt/formats.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYFMT_HD __host__ __device__ __forceinline__
#else
#define PYFMT_HD inline __attribute__((always_inline))
#endif

namespace pyfmt {

enum class Kind : uint8_t { kFloat, kInt };
enum class Special : uint8_t { kNone, kFn, kIeee };
enum class Scale : uint8_t { kE8M0, kE4M3, kBF16, kFP16, kFP32 };
enum class DType : uint8_t { kBF16, kFP16, kFP32 };
enum class ScaleRule : uint8_t { kRceil, kFloor, kCeil, kEven };
enum class Recipe : uint8_t { kNvidia, kTorchao, kSingleLevel };
enum class Rounding : uint8_t { kNearest, kStochastic };
enum class Clip : uint8_t { kSymmetric, kFull };

constexpr uint32_t kFloatNaN = 0x7fc00000u;
constexpr uint32_t kFloatInf = 0x7f800000u;
constexpr uint32_t kFloatMax = 0x7f7fffffu;

// The bits of the float32 2^e, for e from -126 to 127.
PYFMT_HD constexpr uint32_t power_of_two_bits(int e) {
  return uint32_t(e + 127) << 23;
}

// One element of a block: a float ExMy in sign-magnitude codes,
//   (-1)^s * 2^(max(e, 1) - bias) * ([e > 0] + m / 2^man),
// or a two's complement integer counting steps of 2^-frac.
struct ElementSpec {
  Kind kind = Kind::kFloat;
  int exp = 0, man = 0, bias = 0, frac = 0;
  bool is_signed = true;
  Special special = Special::kNone;

  PYFMT_HD constexpr bool is_int() const { return kind == Kind::kInt; }
  PYFMT_HD constexpr int bits() const { return exp + man + (is_signed ? 1 : 0); }
  PYFMT_HD constexpr uint32_t magnitude_mask() const { return (1u << (exp + man)) - 1; }
  PYFMT_HD constexpr uint32_t sign_bit() const { return is_signed ? 1u << (exp + man) : 0u; }

  // The code of the largest finite value.
  PYFMT_HD constexpr uint32_t max_code() const {
    return magnitude_mask() - (special == Special::kFn     ? 1u
                               : special == Special::kIeee ? 1u << man
                                                           : 0u);
  }

  // log2 of the smallest positive value, and the exponent below which the grid is even.
  PYFMT_HD constexpr int step_exp() const { return is_int() ? -frac : 1 - bias - man; }
  PYFMT_HD constexpr int emin() const { return 1 - bias; }

  // The largest value is `max_significand` * 2^`max_exp`.
  PYFMT_HD constexpr uint32_t max_significand() const {
    if (is_int() || max_code() >> man == 0) return max_code();
    return (max_code() & ((1u << man) - 1)) | (1u << man);
  }
  PYFMT_HD constexpr int max_exp() const {
    const int e = is_int() ? 0 : int(max_code() >> man);
    return step_exp() + (e > 1 ? e - 1 : 0);
  }

  // The float32 bits of n * 2^e for 1 <= n < 2^23 and a normal result.
  PYFMT_HD static constexpr uint32_t scaled_bits(uint32_t n, int e) {
    int top = 0;
    for (uint32_t rest = n; rest > 1; rest >>= 1) ++top;
    return power_of_two_bits(e + top) + ((n - (1u << top)) << (23 - top));
  }
  PYFMT_HD constexpr uint32_t max_bits() const { return scaled_bits(max_significand(), max_exp()); }
  // Integers with clip "full" reach one step further below zero.
  PYFMT_HD constexpr uint32_t full_min_bits() const {
    return scaled_bits(max_significand() + 1, max_exp());
  }

  // floor(log2(largest)), and the fraction bits of the largest value.
  PYFMT_HD constexpr int emax() const { return int(max_bits() >> 23) - 127; }
  PYFMT_HD constexpr int significand() const { return exp ? man : man - 1; }

  PYFMT_HD constexpr bool operator==(const ElementSpec& o) const {
    return kind == o.kind && exp == o.exp && man == o.man && bias == o.bias && frac == o.frac &&
           is_signed == o.is_signed && special == o.special;
  }
};

// A block format. block_columns 0 makes the whole row one block.
struct FormatSpec {
  ElementSpec element;
  int64_t block_rows = 1, block_columns = 32;
  Scale scale = Scale::kE8M0;
  bool tensor_scale = false;

  constexpr int bits() const { return element.bits(); }
  constexpr bool has_float_scales() const {  // groups, not blocks
    return scale != Scale::kE8M0 && scale != Scale::kE4M3;
  }
  constexpr int64_t columns(int64_t length) const {
    return block_columns ? block_columns : (length > 0 ? length : 1);
  }
  constexpr int64_t blocks(int64_t length) const {
    return (length + columns(length) - 1) / columns(length);
  }
  constexpr int64_t padded(int64_t length) const { return blocks(length) * columns(length); }
  constexpr int64_t row_bytes(int64_t length) const { return (padded(length) * bits() + 7) / 8; }
};

constexpr int scale_bytes(Scale scale) {
  return scale == Scale::kFP32 ? 4 : scale == Scale::kBF16 || scale == Scale::kFP16 ? 2 : 1;
}
constexpr int dtype_bytes(DType dtype) {
  return dtype == DType::kFP32 ? 4 : 2;
}

// The named elements as constants: elements::e2m1, elements::int8q6, ...
namespace elements {
#define PYFMT_ELEMENT(id, name, kind, exp, man, bias, frac, is_signed, special) \
  constexpr ElementSpec id{Kind::kind, exp, man, bias, frac, is_signed, Special::special};
#include "formats.inc"
}  // namespace elements

// The same facts where a template wants a type: Traits<e2m1_element>.
#define PYFMT_ELEMENT(id, name, kind, exp, man, bias, frac, is_signed, special) \
  struct id##_element {                                                         \
    static constexpr ElementSpec spec = elements::id;                           \
  };
#include "formats.inc"

template <class Element>
struct Traits {
  static constexpr ElementSpec spec = Element::spec;
  static constexpr int bits = spec.bits();
  static constexpr uint32_t max_code = spec.max_code();
  static constexpr uint32_t max_bits = spec.max_bits();
};

// The named formats as constants: formats::mxfp4, formats::nvfp4, ...
namespace formats {
#define PYFMT_FORMAT(id, name, element_id, block_rows, block_columns, scale, tensor_scale) \
  constexpr FormatSpec id{elements::element_id, block_rows, block_columns, Scale::scale,   \
                          tensor_scale};
#include "formats.inc"
}  // namespace formats

}  // namespace pyfmt
