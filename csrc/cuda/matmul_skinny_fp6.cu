// SPDX-License-Identifier: Apache-2.0
// Few tokens by MXFP6 weights.
#include "matmul_skinny.cuh"

namespace pyfmt {
namespace cuda {

SkinnyKernel skinny_fp6(const FormatSpec& f, int columns, Inputs inputs) {
  if (f.element == elements::e2m3 && f.scale == Scale::kE8M0) {
    return skinny_kernel<Weights<e2m3_element, Scale::kE8M0, Grouping::kBlocks>>(columns, inputs);
  }
  if (f.element == elements::e3m2 && f.scale == Scale::kE8M0) {
    return skinny_kernel<Weights<e3m2_element, Scale::kE8M0, Grouping::kBlocks>>(columns, inputs);
  }
  return {};
}

}  // namespace cuda
}  // namespace pyfmt
