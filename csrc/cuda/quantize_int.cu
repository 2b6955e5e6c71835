// SPDX-License-Identifier: Apache-2.0
// Quantize to NVINT4 and to groups of int4 and int8.
#include "quantize.cuh"
#include "quantize_kernels.h"

namespace pyfmt {
namespace cuda {

QuantizeKernels int4_multiplier() {
  return quantize_kernels<int4_element, false>();
}
QuantizeKernels int8_multiplier() {
  return quantize_kernels<int8_element, false>();
}

}  // namespace cuda
}  // namespace pyfmt
