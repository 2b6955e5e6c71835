// SPDX-License-Identifier: Apache-2.0
// Quantize to MXFP4 and NVFP4.
#include "quantize.cuh"
#include "quantize_kernels.h"

namespace pyfmt {
namespace cuda {

QuantizeKernels e2m1_pow2() {
  return quantize_kernels<e2m1_element, true>();
}
QuantizeKernels e2m1_multiplier() {
  return quantize_kernels<e2m1_element, false>();
}

}  // namespace cuda
}  // namespace pyfmt
