// SPDX-License-Identifier: Apache-2.0
// Weights whose products are bfloat16 numbers: elements with scales of their blocks, for
// matmul_wide_blocks.cuh and matmul_wide_shared.cuh.
#pragma once

#include <type_traits>

#include "matmul_skinny_decode.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

// Elements E, scales of blocks of 32 (E8M0) or 16 (E4M3). kInOrder: they leave in their own order.
template <class E, Scale kScale, bool kInOrder>
struct Weights {
  // Factors of integers with E4M3 scales stay in reach of codes that are subnormal numbers.
  static constexpr bool kSubnormal = kScale == Scale::kE4M3 && E::spec.is_int() && !kInOrder;
  using D = std::conditional_t<kSubnormal, SkinnyDecoder<E, kScale>, Decoder<E, kScale, kInOrder>>;
  static constexpr int kBits = D::kBits;
  static constexpr bool kGroups = false;
  static constexpr int kRun = 32;         // codes of a row that lie together for a lane
  static constexpr int kDown = D::kDown;  // tensor cores see weights times 2^-kDown
  static constexpr int kEntry = kScale == Scale::kE4M3 ? 2 : 1;  // bytes of scales of 32 codes

  // Codes of NaN or infinity, or scales beyond the reach of one factor, take more steps: those of
  // which `special` tells ask for decode<true>.
  static constexpr bool kHasSpecials = kScale == Scale::kE8M0;
  PYFMT_DEVICE static bool special(const uint32_t (&words)[kBits], uint32_t raw) {
    return D::special_scale(raw) || D::template special_codes<kBits>(words);
  }

  // 32 codes to pairs of element * scale. raw: their scale bytes.
  template <bool kAll>
  PYFMT_DEVICE static void decode(const uint32_t (&words)[kBits], uint32_t raw,
                                  uint32_t (&out)[16]) {
    Factor factors[2];
    if constexpr (kScale == Scale::kE4M3) {
      D::factors(raw, factors);
    } else {
      factors[0] = factors[1] = D::template factor<kAll>(raw);
    }
    constexpr int kUnits = 32 / D::kElements;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      D::template scaled<kAll>(words + u * D::kWords, factors[2 * u / kUnits], out + u * D::kPairs);
    }
  }
};

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
