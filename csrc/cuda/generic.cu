// SPDX-License-Identifier: Apache-2.0
#include "generic.h"
#include "scale.cuh"

namespace pyfmt {
namespace cuda {

namespace {

// An element codec whose constants are known at run time.
struct AnyCodec {
  bool is_int, stochastic;
  codec::FloatCodec f;
  codec::IntCodec i;
  int bits;

  AnyCodec(const ElementSpec& e, bool stochastic, bool full)
      : is_int(e.is_int()),
        stochastic(stochastic),
        f(e.is_int() ? elements::e2m1 : e),
        i(e.is_int() ? e : elements::int8, full),
        bits(e.bits()) {}

  PYFMT_DEVICE uint32_t encode(uint32_t y, uint32_t random24) const {
    if (stochastic) {
      return is_int ? codec::encode_int_stochastic<uint32_t>(i, y, random24)
                    : codec::encode_float_stochastic<uint32_t>(f, y, random24);
    }
    return is_int ? codec::encode_int<uint32_t>(i, y) : codec::encode_float<uint32_t>(f, y);
  }
  PYFMT_DEVICE float decode(uint32_t code) const {
    return as_float(is_int ? codec::decode_int<uint32_t>(i, code)
                           : codec::decode_float<uint32_t>(f, code));
  }
};

struct AnyParams {
  AnyCodec element;
  const void* x = nullptr;
  DType dtype = DType::kFP32;
  View view;
  int64_t matrix_rows = 1, block_rows = 1, block_columns = 1;
  int64_t matrix_strips = 1, strips = 0, blocks = 0, padded = 0, row_bytes = 0;
  ScaleParams scale;
  uint64_t seed = 0;
  uint8_t* codes = nullptr;
  void* scales = nullptr;
  const float* tensor_scale = nullptr;
  void* out = nullptr;  // rows of the `out_view`
  View out_view;

  explicit AnyParams(const AnyCodec& c) : element(c) {}
};

PYFMT_DEVICE int64_t place(const View& v, int64_t row, int64_t column) {
  return row / v.inner * v.outer_stride + row % v.inner * v.inner_stride + column * v.column_stride;
}

// A group of kGroup threads finds the scale of one block.
template <int kGroup>
__global__ void __launch_bounds__(kThreads) any_scales(const __grid_constant__ AnyParams p) {
  const codec::RecipeConstants r = start_recipe(p.scale);
  const int64_t group = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kGroup;
  const int lane = threadIdx.x % kGroup;
  const bool live = group < p.strips * p.blocks;
  const int64_t strip = group / (p.blocks ? p.blocks : 1);
  const int64_t first_row = strip % p.matrix_strips * p.block_rows;
  const int64_t first_column = group % (p.blocks ? p.blocks : 1) * p.block_columns;
  const int64_t rows_left = p.matrix_rows - first_row, columns_left = p.view.columns - first_column;
  const int64_t rows = rows_left < p.block_rows ? rows_left : p.block_rows;
  const int64_t columns = columns_left < p.block_columns ? columns_left : p.block_columns;
  uint32_t amax = 0;
  if (live) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = strip / p.matrix_strips * p.matrix_rows + first_row + i;
      for (int64_t c = lane; c < columns; c += kGroup) {
        const float x = load_element(p.x, p.dtype, place(p.view, row, first_column + c));
        amax = L::max(amax, as_uint(x) & 0x7fffffffu);
      }
    }
  }
  for (int far = 16; far; far /= 2) amax = L::max(amax, __shfl_xor_sync(kAll, amax, far));
  if constexpr (kGroup > 32) {
    __shared__ uint32_t of_warp[kWarps];
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = amax;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) amax = L::max(amax, of_warp[i]);
  }
  if (!live || lane) return;
  const BlockScale b = p.scale.kind == Scale::kE8M0 ? block_scale<true>(p.scale, r, amax)
                                                    : block_scale<false>(p.scale, r, amax);
  store_scale(p.scales, p.scale.kind, group, b.code);
}

// Where eight codes of a row belong.
struct Group8 {
  int64_t row, column, scale_row;
  bool live;
};

PYFMT_DEVICE Group8 group8(const AnyParams& p) {
  const int64_t groups = (p.padded + 7) / 8;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  Group8 g;
  g.row = groups ? thread / groups : 0;
  g.column = groups ? thread % groups * 8 : 0;
  g.live = groups && g.row < p.view.rows();
  g.scale_row = g.row / p.matrix_rows * p.matrix_strips + g.row % p.matrix_rows / p.block_rows;
  return g;
}

__global__ void __launch_bounds__(kThreads) any_encode(const __grid_constant__ AnyParams p) {
  codec::RecipeConstants r{};
  // The first kernel has written the tensor scale already; here it must not be read before.
  ScaleParams s = p.scale;
  s.tensor_scale_out = nullptr;
  r = start_recipe(s);
  const Group8 g = group8(p);
  if (!g.live) return;
  uint64_t word = 0;
  int64_t block = -1;
  uint32_t code = 0;
  float multiplier = 0.0f, scale = 0.0f;
  uint64_t random[4] = {0, 0, 0, 0}, counter = ~0ull;
  for (int i = 0; i < 8; ++i) {
    const int64_t column = g.column + i;
    if (column >= p.view.columns) break;
    if (column / p.block_columns != block) {
      block = column / p.block_columns;
      code = load_scale(p.scales, p.scale.kind, g.scale_row * p.blocks + block);
      multiplier = multiplier_of(p.scale, r, code);
      scale = as_float(codec::decode_scale<uint32_t>(p.scale.kind, code));
    }
    uint32_t random24 = 0;
    if (p.element.stochastic) {
      const uint64_t index = uint64_t(g.row * p.view.columns + column);
      if (index / 4 != counter) {
        counter = index / 4;
        random[0] = counter & 0xffffffffu;
        random[1] = counter >> 32;
        random[2] = random[3] = 0;
        codec::philox<uint64_t>(p.seed, random);
      }
      const uint32_t lane = index & 3;
      random24 = uint32_t(lane & 2 ? random[2 + (lane & 1)] : random[lane & 1]) >> 8;
    }
    const float x = load_element(p.x, p.dtype, place(p.view, g.row, column));
    const bool poisoned = code == codec::scale_nan(p.scale.kind);
    const uint32_t c = poisoned ? 0u : p.element.encode(as_uint(x * multiplier), random24);
    if (p.out) {
      float value = p.element.decode(c) * scale;
      if (p.scale.kind == Scale::kE4M3) value = value * as_float(r.tensor_scale);
      store_element(p.out, p.dtype, place(p.out_view, g.row, column), value);
    }
    word |= uint64_t(c) << (i * p.element.bits);
  }
  if (!p.codes) return;
  const int64_t first = g.column / 8 * p.element.bits;
  for (int i = 0; i < p.element.bits; ++i) {
    if (first + i < p.row_bytes) {
      p.codes[g.row * p.row_bytes + first + i] = uint8_t(word >> (8 * i));
    }
  }
}

__global__ void __launch_bounds__(kThreads) any_decode(const __grid_constant__ AnyParams p) {
  const Group8 g = group8(p);
  if (!g.live) return;
  const int bits = p.element.bits;
  uint64_t word = 0;
  const int64_t first = g.column / 8 * bits;
  for (int i = 0; i < bits; ++i) {
    if (first + i < p.row_bytes) {
      word |= uint64_t(p.codes[g.row * p.row_bytes + first + i]) << (8 * i);
    }
  }
  const float tensor_scale = p.tensor_scale ? *p.tensor_scale : 1.0f;
  int64_t block = -1;
  float scale = 0.0f;
  for (int i = 0; i < 8; ++i) {
    const int64_t column = g.column + i;
    if (column >= p.view.columns) break;
    if (column / p.block_columns != block) {
      block = column / p.block_columns;
      const uint32_t code = load_scale(p.scales, p.scale.kind, g.scale_row * p.blocks + block);
      scale = as_float(codec::decode_scale<uint32_t>(p.scale.kind, code));
    }
    float value = p.element.decode(uint32_t(word >> (i * bits)) & ((1u << bits) - 1)) * scale;
    if (p.tensor_scale) value = value * tensor_scale;
    store_element(p.out, p.dtype, place(p.view, g.row, column), value);
  }
}

template <class Args>
AnyParams any_params(const Args& a, const AnyCodec& element) {
  const FormatSpec& f = a.format;
  AnyParams p(element);
  p.dtype = a.dtype;
  p.view = a.view;
  p.matrix_rows = a.matrix_rows > 0 ? a.matrix_rows : 1;
  p.block_rows = f.block_rows;
  p.block_columns = f.columns(a.view.columns);
  p.matrix_strips = (p.matrix_rows + p.block_rows - 1) / p.block_rows;
  p.strips = a.view.rows() / p.matrix_rows * p.matrix_strips;
  p.blocks = f.blocks(a.view.columns);
  p.padded = f.padded(a.view.columns);
  p.row_bytes = f.row_bytes(a.view.columns);
  p.scale.kind = f.scale;
  p.out = a.out;
  return p;
}

int64_t groups_of(const AnyParams& p) {
  return p.view.rows() * ((p.padded + 7) / 8);
}

}  // namespace

void quantize_any(const QuantizeArgs& a, int partial_count, Stream stream) {
  AnyParams p = any_params(a, AnyCodec(a.format.element, a.stochastic, a.full));
  p.x = a.x;
  p.scale = scale_params(a);
  if (partial_count) {
    p.scale.partials = a.partials;
    p.scale.partial_count = partial_count;
  }
  p.seed = a.seed;
  p.codes = a.codes;
  p.scales = a.scales;
  p.out_view.outer = a.view.rows();
  p.out_view.outer_stride = p.out_view.columns = a.view.columns;
  const int64_t count = p.strips * p.blocks;
  const int64_t wide = p.block_rows * p.block_columns > 2048;
  int64_t blocks = wide ? count : blocks_for(count * 32);
  if (!blocks && a.tensor_scale_out) blocks = 1;
  launch_after(p.scale.partials && launches_overlap(), wide ? any_scales<kThreads> : any_scales<32>,
               blocks, kThreads, stream, p);
  launch(any_encode, blocks_for(groups_of(p)), kThreads, stream, p);
}

void dequantize_any(const DequantizeArgs& a, Stream stream) {
  AnyParams p = any_params(a, AnyCodec(a.format.element, false, false));
  p.codes = const_cast<uint8_t*>(a.codes);
  p.scales = const_cast<void*>(a.scales);
  p.tensor_scale = a.tensor_scale;
  launch(any_decode, blocks_for(groups_of(p)), kThreads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
