// SPDX-License-Identifier: Apache-2.0
// Weights as the operand of products in bfloat16: a policy of matmul_wide.cuh. A policy says
//
//   kBits, kColumns      of a code; of a tile (128 bytes a row)
//   kRun                 codes that a lane decodes at a time, kColumns / 2: 64 bytes
//   kEntry, kScalePitch  bytes of the scales of a run and of a row of eight runs, in shared memory
//   kFresh, kGroups      whether sums of a tile are kept apart; whether factors multiply them
//   Type                 what products multiply (wgmma.cuh)
//   kDown                tensor cores see weights times 2^-kDown
//   special              whether a run asks for decode<true>, if kHasSpecials
//   kFolded              whether decoding asks for the row's scale and a table (fold_weights.cuh)
//   decode               the codes of a run to a row's 64 bytes
#pragma once

#include "decode.cuh"
#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

// Elements of w and their scales. Blocks of 32 (E8M0) or 16 (E4M3); float scales belong to groups
// of integers, whose sums they multiply.
template <class E, Scale kScale>
struct Weights {
  using D = Decoder<E, kScale, true>;
  using Type = hopper::Bf16;
  static constexpr int kBits = D::kBits, kColumns = 64, kRun = 32, kDown = D::kDown;
  static constexpr bool kGroups = kScale != Scale::kE8M0 && kScale != Scale::kE4M3;
  static constexpr bool kFresh = kGroups, kFolded = false;
  static constexpr int kEntry = kGroups ? 4 : kScale == Scale::kE4M3 ? 2 : 1;
  static constexpr int kScalePitch = 8 * kEntry + (kGroups ? 16 : 0);

  // Whether codes of NaN or infinity, or scales beyond the reach of one factor, take more steps.
  static constexpr bool kHasSpecials = kScale == Scale::kE8M0;
  PYFMT_DEVICE static bool special(const uint32_t (&words)[kBits], uint32_t raw) {
    return D::special_scale(raw) || D::template special_codes<kBits>(words);
  }

  // raw: the scale bytes of the run.
  template <bool kAll>
  PYFMT_DEVICE static void decode(const uint32_t (&words)[kBits], uint32_t raw,
                                  uint32_t (&out)[16]) {
    Factor factors[2];
    if constexpr (kGroups) {
      factors[0] = factors[1] = D::unit_factor();
    } else if constexpr (kScale == Scale::kE4M3) {
      D::factors(raw, factors);
    } else {
      factors[0] = factors[1] = D::template factor<kAll>(raw);
    }
    constexpr int kUnits = kRun / D::kElements;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      D::template scaled<kAll>(words + u * D::kWords, factors[2 * u / kUnits], out + u * D::kPairs);
    }
  }
};

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
