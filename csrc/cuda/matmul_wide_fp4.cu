// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for e2m1.
#include "matmul_wide.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Kernel fp4_kernel(const FormatSpec& f) {
  if (is_mx(f, elements::e2m1)) return kernel_of<Weights<e2m1_element, Scale::kE8M0>>();
  if (is_nv(f, elements::e2m1)) return kernel_of<Weights<e2m1_element, Scale::kE4M3>>();
  return {};
}

bool compiled() {
#if defined(__CUDACC__)
  using F = Weights<e2m1_element, Scale::kE8M0>;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, matmul_wide_kernel<F, 64>), "kernel");
  return attributes.maxThreadsPerBlock >= kThreadsOfBlock;
#else
  return true;
#endif
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
