// SPDX-License-Identifier: Apache-2.0
// Few tokens by int8 weights with a float scale for each group.
#include "matmul_skinny.cuh"

namespace pyfmt {
namespace cuda {

SkinnyKernel skinny_int8(const FormatSpec& f, int columns, Inputs inputs) {
  if (f.element == elements::int8 && f.has_float_scales()) {
    if (f.block_columns % 128 == 0) {
      return skinny_kernel<Weights<int8_element, Scale::kBF16, Grouping::kSteps>>(columns, inputs);
    }
    return skinny_kernel<Weights<int8_element, Scale::kBF16, Grouping::k32>>(columns, inputs);
  }
  return {};
}

}  // namespace cuda
}  // namespace pyfmt
