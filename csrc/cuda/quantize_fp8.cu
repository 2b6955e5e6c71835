// SPDX-License-Identifier: Apache-2.0
// Quantize to MXFP8.
#include "quantize.cuh"
#include "quantize_kernels.h"

namespace pyfmt {
namespace cuda {

QuantizeKernels e4m3fn_pow2() {
  return quantize_kernels<e4m3fn_element, true>();
}
QuantizeKernels e5m2ieee_pow2() {
  return quantize_kernels<e5m2ieee_element, true>();
}

}  // namespace cuda
}  // namespace pyfmt
