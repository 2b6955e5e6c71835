// SPDX-License-Identifier: Apache-2.0
// The kernels of matmul_wide.h for elements with scales of their blocks.
#pragma once

#include "matmul_wide_blocks.cuh"
#include "matmul_wide_shared.cuh"
#include "matmul_wide_tall.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

template <class E, Scale kScale>
Kernel block_kernel(Form form) {
  return form == Form::kTall     ? tall_kernel<E, kScale>()
         : form == Form::kShared ? shared_kernel<E, kScale>()
                                 : blocks_kernel<E, kScale>();
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
