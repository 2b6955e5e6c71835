// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for e2m1.
#include "matmul_wide_forms.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel fp4_kernel(const FormatSpec& f, Form form) {
  if (is_mx(f, elements::e2m1)) {
    return block_kernel<e2m1_element, Scale::kE8M0>(form);
  }
  if (is_nv(f, elements::e2m1)) {
    return block_kernel<e2m1_element, Scale::kE4M3>(form);
  }
  return {};
}

bool compiled() {
#if defined(__CUDACC__)
  using F = Weights<e2m1_element, Scale::kE8M0, false>;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, blocks::matmul_blocks_kernel<F, 128>), "kernel");
  return attributes.maxThreadsPerBlock >= blocks::kThreadsHere;
#else
  return true;
#endif
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
