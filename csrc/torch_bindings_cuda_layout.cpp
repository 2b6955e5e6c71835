// SPDX-License-Identifier: Apache-2.0
// torch.ops.pyfmt on CUDA tensors: pack and unpack, and what tests and the room ask of the library.
#include "torch_device.h"

#ifndef PYFMT_CUDA_ARCHS
#define PYFMT_CUDA_ARCHS ""
#endif

namespace pyfmt {
namespace {

using namespace tensors;

int64_t rows_of(const Shape& shape) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return rows;
}

Tensor pack(Tensor codes, int64_t bits) {
  options::bits(bits);
  expect_bytes("codes", codes);
  const Device device(codes);
  const Tensor in = dense(codes);
  const Shape shape = shape_of(in);
  const int64_t length = shape.back(), bytes = (length * bits + 7) / 8;
  Tensor out = device.empty(with_last(shape, bytes), ScalarType::Byte);
  cuda::PackArgs a{static_cast<const uint8_t*>(in.const_data_ptr()),
                   static_cast<uint8_t*>(out.mutable_data_ptr()),
                   int(bits),
                   rows_of(shape),
                   length,
                   bytes,
                   length};
  cuda::pack(a, device.stream);
  return out;
}

Tensor unpack(Tensor packed, int64_t bits, int64_t length) {
  expect_bytes("packed", packed);
  const Device device(packed);
  const Tensor in = dense(packed);
  const Shape shape = shape_of(in);
  options::packed_bytes(shape.back(), length, bits);
  Tensor out = device.empty(with_last(shape, length), ScalarType::Byte);
  cuda::PackArgs a{static_cast<const uint8_t*>(in.const_data_ptr()),
                   static_cast<uint8_t*>(out.mutable_data_ptr()),
                   int(bits),
                   rows_of(shape),
                   shape.back(),
                   length,
                   length};
  cuda::unpack(a, device.stream);
  return out;
}

// Element codes, one a byte, of x / 2^(scale - 127).
Tensor encode(Tensor x, std::string element, int64_t scale, std::string clip, int64_t rotation) {
  const Device device(x);
  const Tensor in = dense(x);
  Tensor out = device.empty(shape_of(in), ScalarType::Byte);
  cuda::EncodeArgs a;
  a.x = in.const_data_ptr();
  a.dtype = dtype_of("x", x.scalar_type());
  a.codes = static_cast<uint8_t*>(out.mutable_data_ptr());
  a.count = in.numel();
  a.element = get_format(element + "-b32-e8m0").element;
  a.scale = uint32_t(scale);
  a.full = clip == "full";
  a.rotation = int(rotation);
  cuda::encode(a, device.stream);
  return out;
}

// What this library was compiled for, as in PYFMT_CUDA_ARCHS.
std::string cuda_archs() {
  return PYFMT_CUDA_ARCHS;
}

}  // namespace
}  // namespace pyfmt

PYFMT_DEFINE(PYFMT_NAMESPACE, m) {
  m.def("_cuda_archs() -> str");
  m.def(
      "_encode(Tensor x, str element, int scale=127, str clip='symmetric', int rotation=0) -> "
      "Tensor");
}

PYFMT_REGISTER(PYFMT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_cuda_archs", TORCH_BOX(&pyfmt::cuda_archs));
}

PYFMT_REGISTER(PYFMT_NAMESPACE, PYFMT_DISPATCH_KEY, m) {
  m.impl("pack", TORCH_BOX(&pyfmt::pack));
  m.impl("unpack", TORCH_BOX(&pyfmt::unpack));
  m.impl("_encode", TORCH_BOX(&pyfmt::encode));
}
