// SPDX-License-Identifier: Apache-2.0
// y of bfloat16 or float16 where matmul_wide_turns.cuh decodes in place, in pieces of 16 bytes:
// half the instructions of pieces of 8 (matmul_wide_finish.cuh). A short loop: code that runs once
// costs what it takes to bring it.
#pragma once

#include "matmul_wide_finish.cuh"
#include "matmul_wide_turns_room.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {
namespace turns {

// Sixteen lanes write a token's 128 columns, a lane eight.
template <DType kType, int kTokens>
struct EndingOfHalves {
  static constexpr int kLanes = kRows / 8, kStep = kConsumers / kLanes;
  static_assert(kTokens <= kLanes * kStep, "a lane knows the scale of one token");
  int lane, token, n, m0, live;
  float of_token = 1.0f;  // of the lane's token number `lane % kLanes`
  float factor[8], bias[8];
  bool whole = true;  // no column of the lane's has scale 0

  // half: of the tokens, of two parts of K.
  PYFMT_DEVICE EndingOfHalves(const Params& p, const Place& at, int half)
      : lane(int(threadIdx.x) & 31), token(int(threadIdx.x) / kLanes) {
    const int count = kTokens >> (p.split - 1);
    m0 = at.m0 + (p.split > 1 ? half : 0) * count;
    live = min(p.m - m0, count);
    n = at.n0 + 8 * (lane % kLanes);
    const int mine = token + lane % kLanes * kStep;
    if (mine < live) of_token = p.x_scale[m0 + mine];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      factor[i] = n < p.n ? p.up * p.w_scale[n + i] : 0.0f;
      bias[i] = p.bias && n < p.n ? p.bias[n + i] : 0.0f;
      whole = whole && factor[i] != 0.0f;
    }
  }

  // staged: sums as stage_sums leaves them.
  PYFMT_DEVICE void write(const Params& p, uint32_t staged) const {
    uint16_t* to = static_cast<uint16_t*>(p.y) + int64_t(m0 + token) * p.n + n;
    const uint32_t first = staged + uint32_t((token * kPitch + 8 * (lane % kLanes)) * 4);
    // As many rounds for both halves of a warp, which exchange scales.
    const int rounds = (live + kStep - 1) / kStep;
#pragma unroll 2
    for (int i = 0; i < rounds; ++i) {
      const float of_row = hopper::from_lane(of_token, (lane & kLanes) + i);
      const uint32_t from = first + uint32_t(i * kStep * kPitch * 4);
      const float4 low = hopper::load_floats(from), high = hopper::load_floats(from + 16);
      const float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      uint32_t words[4];
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        words[e / 2] = to_halves<kType>(v[e] * (factor[e] * of_row) + bias[e],
                                        v[e + 1] * (factor[e + 1] * of_row) + bias[e + 1]);
      }
      if (token + i * kStep < live && of_row != 0.0f) {
        if (whole) {
          *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        } else if (n < p.n) {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            if (factor[e] != 0.0f) to[e] = uint16_t(words[e / 2] >> (e % 2 * 16));
          }
        }
      }
      to += int64_t(kStep) * p.n;
    }
  }
};

}  // namespace turns
}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
