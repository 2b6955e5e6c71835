// SPDX-License-Identifier: Apache-2.0
// The kernels of matmul_fold.h, by the weight's element and what the activations are.
#pragma once

#include "matmul_fold.h"
#include "matmul_wide.cuh"
#include "matmul_wide_turns.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

template <class E>
Kernel fold_kernel(bool x_e5m2) {
  if (x_e5m2) return {turns::launch_fold<FoldWeights<E, true>>, kChunk, true};
  return {turns::launch_fold<FoldWeights<E, false>>, kChunk, true};
}

// No launch where there is none; two files, so that they compile side by side.
Kernel fold4_kernel(const ElementSpec&, bool x_e5m2);
Kernel fold6_kernel(const ElementSpec&, bool x_e5m2);

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
