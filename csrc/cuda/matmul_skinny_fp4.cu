// SPDX-License-Identifier: Apache-2.0
// Few tokens by MXFP4 and NVFP4 weights.
#include "matmul_skinny.cuh"

namespace pyfmt {
namespace cuda {

SkinnyKernel skinny_fp4(const FormatSpec& f, int columns, Inputs inputs) {
  if (f.element == elements::e2m1 && f.scale == Scale::kE8M0) {
    return skinny_kernel<Weights<e2m1_element, Scale::kE8M0, Grouping::kBlocks>>(columns, inputs);
  }
  if (f.element == elements::e2m1 && f.scale == Scale::kE4M3) {
    return skinny_kernel<Weights<e2m1_element, Scale::kE4M3, Grouping::kBlocks>>(columns, inputs);
  }
  return {};
}

}  // namespace cuda
}  // namespace pyfmt
