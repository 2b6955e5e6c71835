// SPDX-License-Identifier: Apache-2.0
// Quantize to MXFP6.
#include "quantize.cuh"
#include "quantize_kernels.h"

namespace pyfmt {
namespace cuda {

QuantizeKernels e2m3_pow2() {
  return quantize_kernels<e2m3_element, true>();
}
QuantizeKernels e3m2_pow2() {
  return quantize_kernels<e3m2_element, true>();
}

}  // namespace cuda
}  // namespace pyfmt
