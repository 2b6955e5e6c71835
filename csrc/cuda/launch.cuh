// SPDX-License-Identifier: Apache-2.0
// How kernels are launched: one after the other, or before the one ahead ends.
#pragma once

#include <cuda_runtime.h>

#include "args.h"

#define PYFMT_DEVICE __device__ __forceinline__

namespace pyfmt {
namespace cuda {

// ---- launches that overlap the one before -----------------------------------------------------

// Wait for what the launches before wrote; nothing to wait for in an ordinary launch.
PYFMT_DEVICE void wait_for_earlier_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Let the next launch start: it waits, as above, before it reads what this one writes.
PYFMT_DEVICE void allow_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- launches ---------------------------------------------------------------------------------

void check(cudaError_t error, const char* what);
// Of the current device.
int multiprocessors();
// Whether kernels here wait for the launch ahead of them: they do as compiled for 9.0 and later.
bool launches_overlap();

#if defined(__CUDACC__)
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, Stream stream, const A&... args) {
  if (blocks <= 0) return;
  kernel<<<dim3(unsigned(blocks)), threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), "launch");
}
// Started before the launch ahead ends, where `overlap`: the kernel waits by itself.
template <class... P, class... A>
void launch_after(bool overlap, void (*kernel)(P...), int64_t blocks, int threads, Stream stream,
                  const A&... args) {
  if (!overlap) return launch(kernel, blocks, threads, stream, args...);
  if (blocks <= 0) return;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, P(args)...), "launch");
}
#else
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, Stream, const A&... args) {
  emulation::launch(kernel, blocks, threads, args...);
}
template <class... P, class... A>
void launch_after(bool, void (*kernel)(P...), int64_t blocks, int threads, Stream stream,
                  const A&... args) {
  launch(kernel, blocks, threads, stream, args...);
}
#endif

}  // namespace cuda
}  // namespace pyfmt
