// SPDX-License-Identifier: Apache-2.0
// Codes, one a byte, to packed bits and back: eight codes a thread.
#include "device.cuh"

namespace pyfmt {
namespace cuda {

namespace {

PYFMT_DEVICE uint64_t load_bytes(const uint8_t* p, int64_t have) {
  uint64_t w = 0;
  for (int i = 0; i < 8; ++i) {
    if (i < have) w |= uint64_t(p[i]) << (8 * i);
  }
  return w;
}

PYFMT_DEVICE void store_bytes(uint8_t* p, int64_t room, uint64_t w) {
  for (int i = 0; i < 8; ++i) {
    if (i < room) p[i] = uint8_t(w >> (8 * i));
  }
}

template <bool kPack>
__global__ void __launch_bounds__(kThreads) repack(const __grid_constant__ PackArgs p) {
  const int64_t groups = (p.length + 7) / 8;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= p.rows * groups) return;
  const int64_t row = thread / groups, group = thread % groups;
  const int64_t left = p.length - 8 * group, codes = left < 8 ? left : 8;
  const int64_t bytes = (codes * p.bits + 7) / 8;
  if constexpr (kPack) {
    const uint64_t w = load_bytes(p.in + row * p.in_stride + 8 * group, codes);
    store_bytes(p.out + row * p.out_stride + p.bits * group, bytes,
                p.bits == 8 ? w : codec::pack8<uint64_t>(w, p.bits));
  } else {
    const uint64_t w = load_bytes(p.in + row * p.in_stride + p.bits * group, bytes);
    store_bytes(p.out + row * p.out_stride + 8 * group, codes,
                p.bits == 8 ? w : codec::unpack8<uint64_t>(w, p.bits));
  }
}

}  // namespace

void pack(const PackArgs& a, Stream stream) {
  launch(repack<true>, blocks_for(a.rows * ((a.length + 7) / 8)), kThreads, stream, a);
}

void unpack(const PackArgs& a, Stream stream) {
  launch(repack<false>, blocks_for(a.rows * ((a.length + 7) / 8)), kThreads, stream, a);
}

}  // namespace cuda
}  // namespace pyfmt
