// SPDX-License-Identifier: Apache-2.0
// matmul_fold.h for e2m1 and integers of 4 bits.
#include "matmul_fold.cuh"

namespace pyfmt {
namespace cuda {
namespace folding {

Launch fold4_launch(const ElementSpec& e) {
  if (e == elements::e2m1) return launch_element<e2m1_element>;
  if (e == elements::int4q2) return launch_element<int4q2_element>;
  return nullptr;
}

bool compiled() {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, matmul_fold_kernel<FoldWeights<e2m1_element>, 64, true>),
        "kernel");
  return attributes.maxThreadsPerBlock >= kFoldThreads;
#else
  return true;
#endif
}

}  // namespace folding
}  // namespace cuda
}  // namespace pyfmt
