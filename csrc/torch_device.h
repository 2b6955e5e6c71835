// SPDX-License-Identifier: Apache-2.0
// The device and stream of a call, for the bindings of CUDA kernels.
//
// The library names no CUDA flavour of torch: the current stream comes from whichever libtorch_cuda
// the process has loaded.
#pragma once

#include <dlfcn.h>

#include "cuda/args.h"
#include "torch_tensors.h"

// The emulation of tests/emulation runs the same text on CPU tensors.
#ifndef PYFMT_DISPATCH_KEY
#define PYFMT_NAMESPACE pyfmt
#define PYFMT_DISPATCH_KEY CUDA
#endif

#define PYFMT_DEFINE(name, m) STABLE_TORCH_LIBRARY_FRAGMENT(name, m)
#define PYFMT_REGISTER(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

namespace pyfmt {
namespace tensors {

using StreamOf = AOTITorchError (*)(int32_t, void**);

inline StreamOf find_stream_of() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* symbol = dlsym(RTLD_DEFAULT, kName);
  for (const char* library : {"libtorch_cuda.so", "torch_cuda.dll"}) {
    if (symbol) break;
    if (void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(loaded, kName);
  }
  options::expect(symbol != nullptr, "CUDA stream: this torch has no ", kName,
                  "; install a CUDA build of torch 2.10 or later");
  return reinterpret_cast<StreamOf>(symbol);
}

// The device of a tensor made current, with its current stream.
class Device {
 public:
  explicit Device(const Tensor& t) : index(t.get_device_index()), type_(t.is_cuda()) {
    if (!type_) return;
    guard_.emplace(index);
    cuda::set_device(index);
    static const StreamOf stream_of = find_stream_of();
    STABLE_TORCH_ERROR_CODE_CHECK(stream_of(index, &stream));
  }
  Tensor empty(const Shape& shape, ScalarType dtype) const {
    return tensors::empty(
        shape, dtype, type_ ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), index);
  }
  void expect_here(const char* what, const Tensor& t) const {
    options::expect(t.is_cuda() == type_ && t.get_device_index() == index, what,
                    ": expected a tensor on the device of the others, cuda:", index,
                    "; move it there with .to()");
  }

  int32_t index;
  cuda::Stream stream = nullptr;

 private:
  bool type_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace tensors
}  // namespace pyfmt
