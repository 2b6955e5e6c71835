// SPDX-License-Identifier: Apache-2.0
// Few tokens by MXFP8 weights.
#include "matmul_skinny.cuh"

namespace pyfmt {
namespace cuda {

SkinnyKernel skinny_fp8(const FormatSpec& f, int columns, Inputs inputs) {
  if (f.element == elements::e4m3fn && f.scale == Scale::kE8M0) {
    return skinny_kernel<Weights<e4m3fn_element, Scale::kE8M0, Grouping::kBlocks>>(columns, inputs);
  }
  if (f.element == elements::e5m2ieee && f.scale == Scale::kE8M0) {
    return skinny_kernel<Weights<e5m2ieee_element, Scale::kE8M0, Grouping::kBlocks>>(columns,
                                                                                     inputs);
  }
  return {};
}

}  // namespace cuda
}  // namespace pyfmt
