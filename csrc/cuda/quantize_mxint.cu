// SPDX-License-Identifier: Apache-2.0
// Quantize to MXINT8, MXINT6 and MXINT4.
#include "quantize.cuh"
#include "quantize_kernels.h"

namespace pyfmt {
namespace cuda {

QuantizeKernels int8q6_pow2() {
  return quantize_kernels<int8q6_element, true>();
}
QuantizeKernels int6q4_pow2() {
  return quantize_kernels<int6q4_element, true>();
}
QuantizeKernels int4q2_pow2() {
  return quantize_kernels<int4q2_element, true>();
}

}  // namespace cuda
}  // namespace pyfmt
