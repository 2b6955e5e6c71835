// SPDX-License-Identifier: Apache-2.0
// The verbs of the CPU room on plain pointers: contiguous row views in, contiguous results out.
#pragma once

#include <cstdint>

#include "../formats.h"
#include "kernels.h"

namespace pyfmt {
namespace cpu {

// How the caller runs body(context, begin, end) over pieces of [0, n), each at least `grain` long
// where there is that much.
struct ParallelFor {
  void (*run)(void* self, int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
              void* context);
  void* self;

  template <class Body>
  void operator()(int64_t n, int64_t grain, const Body& body) const {
    run(
        self, n, grain,
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<const Body*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

// A tensor with the quantized axis last. Square blocks do not cross batches.
struct View {
  int64_t batches = 1, rows = 1, columns = 0;

  int64_t count() const { return batches * rows * columns; }
};

struct Source {
  const void* x = nullptr;
  DType dtype = DType::kFP32;
  View view;
};

struct Options {
  FormatSpec format;
  ScaleRule rule = ScaleRule::kRceil;
  Recipe recipe = Recipe::kNvidia;
  bool stochastic = false, full = false;
  uint64_t seed = 0;
  bool has_given = false;  // a caller's tensor scale
  float given = 1.0f;
  Rotation rotation;

  bool has_tensor_scale() const { return format.tensor_scale && recipe != Recipe::kSingleLevel; }
};

// codes: (batches * rows, row_bytes); scales: (batches * ceil(rows / block_rows), blocks);
// tensor_scale: one float where options.has_tensor_scale().
void quantize(const ParallelFor&, const Source&, const Options&, uint8_t* codes, void* scales,
              float* tensor_scale);

// out: x's dtype and shape.
void fake_quantize(const ParallelFor&, const Source&, const Options&, void* out);

// tensor_scale may be null.
void dequantize(const ParallelFor&, const uint8_t* codes, const void* scales,
                const float* tensor_scale, const FormatSpec&, const View&, DType, void* out);

// out: x's dtype and shape.
void hadamard(const ParallelFor&, const Source&, const Rotation&, void* out);

// The same in float32, for rotations that do not fit a tile of the quantizer.
void rotate_to_float(const ParallelFor&, const Source&, const Rotation&, float* out);

float finite_amax(const ParallelFor&, const Source&);
// out: (batches * rows, ceil(columns / block)); NaN for blocks that are not finite.
void block_amax(const ParallelFor&, const Source&, int64_t block, float* out);

// codes: (rows, length), one a byte; packed: (rows, stride) bytes, ceil(length * bits / 8) used.
void pack(const ParallelFor&, const uint8_t* codes, int64_t rows, int64_t length, int bits,
          uint8_t* packed, int64_t stride);
void unpack(const ParallelFor&, const uint8_t* packed, int64_t rows, int64_t stride, int64_t length,
            int bits, uint8_t* codes);

// Ask for huge pages under a large output that nobody has touched yet: faulting it in by small
// pages costs several times what the kernels do.
constexpr size_t kHugePageBytes = size_t(4) << 20;
void prefer_huge_pages(void* p, size_t bytes);

}  // namespace cpu
}  // namespace pyfmt
