// SPDX-License-Identifier: Apache-2.0
// The kernels of matmul_fold.h, by the weight's element and what the activations are.
#pragma once

#include "fold_weights.cuh"
#include "matmul_fold.h"
#include "matmul_wide.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

template <class E>
Kernel fold_kernel(bool x_e5m2) {
  return x_e5m2 ? kernel_of<FoldWeights<E, true>>() : kernel_of<FoldWeights<E, false>>();
}

// No launch where there is none; two files, so that they compile side by side.
Kernel fold4_kernel(const ElementSpec&, bool x_e5m2);
Kernel fold6_kernel(const ElementSpec&, bool x_e5m2);

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
