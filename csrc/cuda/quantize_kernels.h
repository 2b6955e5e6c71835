// SPDX-License-Identifier: Apache-2.0
// The compiled pairs of element and scale family, one source file for each kind of element.
#pragma once

namespace pyfmt {
namespace cuda {

struct QuantizeKernels;

// kPow2 (E8M0 scales) or a float32 multiplier (E4M3, bf16, fp16, fp32 scales).
QuantizeKernels e4m3fn_pow2();
QuantizeKernels e5m2ieee_pow2();
QuantizeKernels e2m3_pow2();
QuantizeKernels e3m2_pow2();
QuantizeKernels e2m1_pow2();
QuantizeKernels int8q6_pow2();
QuantizeKernels int6q4_pow2();
QuantizeKernels int4q2_pow2();
QuantizeKernels e2m1_multiplier();
QuantizeKernels int4_multiplier();
QuantizeKernels int8_multiplier();

}  // namespace cuda
}  // namespace pyfmt
