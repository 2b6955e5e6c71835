// SPDX-License-Identifier: Apache-2.0
// Few tokens by MXINT4, MXINT6, MXINT8 and NVINT4 weights.
#include "matmul_skinny.cuh"

namespace pyfmt {
namespace cuda {

SkinnyKernel skinny_mxint(const FormatSpec& f, int columns, Inputs inputs) {
  if (f.element == elements::int4q2 && f.scale == Scale::kE8M0) {
    return skinny_kernel<Weights<int4q2_element, Scale::kE8M0, Grouping::kBlocks>>(columns, inputs);
  }
  if (f.element == elements::int6q4 && f.scale == Scale::kE8M0) {
    return skinny_kernel<Weights<int6q4_element, Scale::kE8M0, Grouping::kBlocks>>(columns, inputs);
  }
  if (f.element == elements::int8q6 && f.scale == Scale::kE8M0) {
    return skinny_kernel<Weights<int8q6_element, Scale::kE8M0, Grouping::kBlocks>>(columns, inputs);
  }
  if (f.element == elements::int4 && f.scale == Scale::kE4M3) {
    return skinny_kernel<Weights<int4_element, Scale::kE4M3, Grouping::kBlocks>>(columns, inputs);
  }
  return {};
}

}  // namespace cuda
}  // namespace pyfmt
