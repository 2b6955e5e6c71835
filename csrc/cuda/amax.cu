// SPDX-License-Identifier: Apache-2.0
// Largest magnitudes: of a tensor (finite elements only) and of blocks.
#include "rotate.cuh"

namespace pyfmt {
namespace cuda {

namespace {

struct AmaxParams {
  const void* x = nullptr;
  DType dtype = DType::kFP32;
  View view;
  int64_t count = 0;
  bool aligned = false;
  RotationParams rotation;
  int64_t matrix_rows = 1;
  float *out = nullptr, *rows_out = nullptr;
  int64_t block = 0, blocks = 0;
};

// Adding one to the exponent field makes non-finite magnitudes negative, so that a signed maximum
// passes over them; the result is taken back at the end.
constexpr int32_t kOne = 0x00800000;

PYFMT_DEVICE int32_t lifted(float x) {
  return int32_t((as_uint(x) & 0x7fffffffu) + kOne);
}

// Words of two numbers each: their largest, lifted.
template <DType kIn, int kCount>
PYFMT_DEVICE int32_t max_lifted_pairs(const uint32_t (&words)[kCount], int32_t largest) {
  constexpr uint32_t one = kIn == DType::kBF16 ? 0x00800080u : 0x04000400u;
  uint32_t m = one;
#pragma unroll
  for (int i = 0; i < kCount; ++i) m = __vmaxs2(m, (words[i] & 0x7fff7fffu) + one);
  m -= one;
  largest = max(largest, lifted(half_at<kIn>(m, 0)));
  return max(largest, lifted(half_at<kIn>(m, 1)));
}

template <DType kIn>
PYFMT_DEVICE int32_t max_lifted(const Raw<kIn>& raw, int32_t largest) {
  if constexpr (kIn == DType::kFP32) {
#pragma unroll
    for (int i = 0; i < Raw<kIn>::kWords; ++i) largest = max(largest, lifted(as_float(raw.w[i])));
    return largest;
  } else {
    return max_lifted_pairs<kIn>(raw.w, largest);
  }
}

// The block's threads together: the largest of them all, in thread 0.
PYFMT_DEVICE int32_t max_of_threads(int32_t largest) {
  __shared__ int32_t of_warp[kWarps];
  for (int far = 16; far; far /= 2) largest = max(largest, __shfl_xor_sync(kAll, largest, far));
  if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) largest = max(largest, of_warp[i]);
  return largest;
}

template <DType kIn>
__global__ void __launch_bounds__(kThreads) amax_flat(const __grid_constant__ AmaxParams p) {
  constexpr int kBytes = dtype_bytes(kIn) * kUnit;
  allow_next_launch();
  const int64_t whole = p.aligned ? p.count / kUnit : 0;
  const int64_t units = (p.count + kUnit - 1) / kUnit;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  int32_t largest = kOne;
  for (int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x; unit < units; unit += step) {
    if (unit < whole) {
      Raw<kIn> raw;
      raw.load(static_cast<const char*>(p.x) + unit * kBytes);
      largest = max_lifted<kIn>(raw, largest);
    } else {
#pragma unroll 1
      for (int i = 0; i < kUnit; ++i) {
        const int64_t at = unit * kUnit + i;
        largest = max(largest, lifted(at < p.count ? load_element(p.x, kIn, at) : 0.0f));
      }
    }
  }
  largest = max_of_threads(largest);
  if (threadIdx.x == 0) p.out[blockIdx.x] = as_float(uint32_t(largest - kOne));
}

// Blocks of a multiprocessor, by what registers allow.
constexpr int rotated_blocks(DType dtype) {
  return dtype == DType::kFP32 ? 2 : 3;
}

// Of rotated rows. The factor multiplies the result alone: products with one positive number keep
// the order.
template <DType kIn>
__global__ void __launch_bounds__(kThreads, rotated_blocks(kIn))
    amax_rotated(const __grid_constant__ AmaxParams p) {
  constexpr int kBytes = dtype_bytes(kIn) * kUnit;
  allow_next_launch();
  const int64_t whole = p.aligned ? p.count / kUnit : 0;
  const int64_t units = (p.count + kUnit - 1) / kUnit;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  int32_t largest = kOne;
  Raw<kIn> raw;
  const auto fetch = [&](int64_t unit) {
    raw.clear();
    if (unit < whole) raw.load(static_cast<const char*>(p.x) + unit * kBytes);
  };
  int64_t base = int64_t(blockIdx.x) * kThreads;
  if (base < units) fetch(base + threadIdx.x);
  // Every lane of a warp takes part in each round: rotations may reach across lanes.
  for (; base < units; base += step) {
    const int64_t unit = base + threadIdx.x;
    float v[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = raw.get(i);
    if (unit >= whole && unit < units) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const int64_t at = unit * kUnit + i;
        v[i] = at < p.count ? load_element(p.x, kIn, at) : 0.0f;
      }
    }
    if (base + step < units) fetch(unit + step);
    butterflies(v, p.rotation, unit * kUnit);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) largest = max(largest, lifted(v[i]));
  }
  largest = max_of_threads(largest);
  if (threadIdx.x == 0) p.out[blockIdx.x] = as_float(uint32_t(largest - kOne)) * p.rotation.factor;
}

// Rotated columns, 32 rows at a time, neighbouring columns (two of 16 bits) by neighbouring
// threads; kRows: of all numbers as they are, too.
template <DType kIn, bool kRows>
__global__ void __launch_bounds__(kThreads, 2) amax_across(const __grid_constant__ AmaxParams p) {
  constexpr int kSides = kIn == DType::kFP32 ? 1 : 2;
  const int64_t step = p.view.columns / kSides, strips = p.count / p.view.columns / kUnit;
  const int64_t in_matrix = p.matrix_rows / kUnit;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  int32_t largest = kOne, of_rows = kOne;
  allow_next_launch();
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < strips * step; i += threads) {
    const int64_t strip = i / step;
    const uint32_t* from = static_cast<const uint32_t*>(p.x) + strip * kUnit * step + i % step;
    uint32_t x[kUnit];
#pragma unroll
    for (int k = 0; k < kUnit; ++k, from += step) x[k] = *from;
    if constexpr (kRows && kSides == 2) of_rows = max_lifted_pairs<kIn>(x, of_rows);
#pragma unroll
    for (int s = 0; s < kSides; ++s) {
      float v[kUnit];
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        if constexpr (kSides == 2) {
          v[k] = half_at<kIn>(x[k], s);
        } else {
          v[k] = as_float(x[k]);
          if constexpr (kRows) of_rows = max(of_rows, lifted(v[k]));
        }
      }
      butterflies(v, p.rotation, strip % in_matrix * kUnit);
#pragma unroll
      for (int k = 0; k < kUnit; ++k) largest = max(largest, lifted(v[k]));
    }
  }
  largest = max_of_threads(largest);
  if (threadIdx.x == 0) p.out[blockIdx.x] = as_float(uint32_t(largest - kOne)) * p.rotation.factor;
  if constexpr (kRows) {
    __syncthreads();
    of_rows = max_of_threads(of_rows);
    if (threadIdx.x == 0) p.rows_out[blockIdx.x] = as_float(uint32_t(of_rows - kOne));
  }
}

template <bool kRows>
void launch_across(const AmaxParams& p, int64_t blocks, Stream stream) {
  launch(p.dtype == DType::kFP32   ? amax_across<DType::kFP32, kRows>
         : p.dtype == DType::kFP16 ? amax_across<DType::kFP16, kRows>
                                   : amax_across<DType::kBF16, kRows>,
         blocks, kThreads, stream, p);
}

PYFMT_DEVICE int64_t place(const View& v, int64_t row, int64_t column) {
  return row / v.inner * v.outer_stride + row % v.inner * v.inner_stride + column * v.column_stride;
}

__global__ void __launch_bounds__(kThreads) amax_strided(const __grid_constant__ AmaxParams p) {
  int32_t largest = kOne;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  allow_next_launch();
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.count; i += step) {
    const int64_t at = place(p.view, i / p.view.columns, i % p.view.columns);
    largest = max(largest, lifted(load_element(p.x, p.dtype, at)));
  }
  largest = max_of_threads(largest);
  if (threadIdx.x == 0) p.out[blockIdx.x] = as_float(uint32_t(largest - kOne));
}

__global__ void __launch_bounds__(kThreads)
    amax_finish(const float* partials, int count, float* out) {
  int32_t largest = 0;
  wait_for_earlier_launch();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    largest = max(largest, int32_t(as_uint(partials[i])));
  }
  largest = max_of_threads(largest);
  if (threadIdx.x == 0) *out = as_float(uint32_t(largest));
}

// One warp a block of elements.
__global__ void __launch_bounds__(kThreads) amax_blocks(const __grid_constant__ AmaxParams p) {
  const int64_t warp = (int64_t(blockIdx.x) * kThreads + threadIdx.x) >> 5;
  if (warp >= p.view.rows() * p.blocks) return;
  const int64_t row = warp / p.blocks, first = warp % p.blocks * p.block;
  const int64_t left = p.view.columns - first, width = left < p.block ? left : p.block;
  uint32_t largest = 0;
  for (int64_t i = threadIdx.x & 31; i < width; i += 32) {
    const float x = load_element(p.x, p.dtype, place(p.view, row, first + i));
    largest = L::max(largest, as_uint(x) & 0x7fffffffu);
  }
  for (int far = 16; far; far /= 2) {
    largest = L::max(largest, __shfl_xor_sync(kAll, largest, far));
  }
  if ((threadIdx.x & 31) == 0) {
    p.out[warp] = as_float(largest >= kFloatInf ? kFloatNaN : largest);
  }
}

AmaxParams params(const AmaxArgs& a) {
  AmaxParams p;
  p.x = a.x;
  p.dtype = a.dtype;
  p.view = a.view;
  p.count = a.view.count();
  p.aligned = aligned16(a.x);
  p.rotation = rotation_params(a.rotation);
  return p;
}

void launch_flat(const AmaxParams& p, int64_t blocks, Stream stream) {
  const bool rotated = p.rotation.size != 0;
  const auto kernel =
      p.dtype == DType::kBF16   ? rotated ? amax_rotated<DType::kBF16> : amax_flat<DType::kBF16>
      : p.dtype == DType::kFP16 ? rotated ? amax_rotated<DType::kFP16> : amax_flat<DType::kFP16>
      : rotated                 ? amax_rotated<DType::kFP32>
                                : amax_flat<DType::kFP32>;
  launch(kernel, blocks, kThreads, stream, p);
}

int64_t partials_for(int64_t threads, int blocks_at_once = 4) {
  const int64_t most = int64_t(multiprocessors()) * blocks_at_once;
  const int64_t blocks = blocks_for(threads) < most ? blocks_for(threads) : most;
  return blocks > kPartials ? kPartials : blocks < 1 ? 1 : blocks;
}

}  // namespace

int amax_partials(const AmaxArgs& a, Stream stream) {
  AmaxParams p = params(a);
  p.out = a.partials;
  const bool flat = a.view.flat();
  const int64_t blocks = flat ? partials_for((p.count + kUnit - 1) / kUnit,
                                             p.rotation.size ? rotated_blocks(p.dtype) : 4)
                              : partials_for((p.count + 7) / 8);
  if (flat) {
    launch_flat(p, blocks, stream);
  } else {
    launch(amax_strided, blocks, kThreads, stream, p);
  }
  return int(blocks);
}

int amax_partials_across(const AmaxArgs& a, Stream stream) {
  AmaxParams p = params(a);
  p.out = a.partials;
  p.matrix_rows = a.matrix_rows;
  p.rows_out = a.rows_partials;
  const int64_t blocks = partials_for(p.count / kUnit / (a.dtype == DType::kFP32 ? 1 : 2), 2);
  p.rows_out ? launch_across<true>(p, blocks, stream) : launch_across<false>(p, blocks, stream);
  return int(blocks);
}

void amax(const AmaxArgs& a, Stream stream) {
  if (!a.block) {
    const int count = amax_partials(a, stream);
    launch_after(launches_overlap(), amax_finish, 1, kThreads, stream,
                 static_cast<const float*>(a.partials), count, a.out);
    return;
  }
  AmaxParams p = params(a);
  p.out = a.out;
  p.block = a.block;
  p.blocks = (a.view.columns + a.block - 1) / a.block;
  launch(amax_blocks, blocks_for(a.view.rows() * p.blocks * 32), kThreads, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
