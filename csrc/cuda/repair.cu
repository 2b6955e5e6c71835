// SPDX-License-Identifier: Apache-2.0
// After the GEMM: rows that did not fold are computed from exact values, and the epilogue that a
// library's GEMM lacks.
//
// Which rows they are is known on the device alone, so the launch is always the same; usually every
// block of threads reads the marks, finds none and ends.
#include "repair.cuh"

namespace pyfmt {
namespace cuda {

namespace {

// Whether a row is marked; all threads of a block call.
PYFMT_DEVICE bool any_marked(const Folded& a, const Folded& w) {
  __shared__ int any;
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  uint32_t mine = 0;
  for (const Folded* f : {&a, &w}) {
    for (int64_t at = 16 * threadIdx.x; at < f->padded_rows; at += 16 * kThreads) {
      const uint4 v = *reinterpret_cast<const uint4*>(f->marks + at);
      mine |= v.x | v.y | v.z | v.w;
    }
  }
  if (mine) any = 1;
  __syncthreads();
  return any != 0;
}

__global__ void __launch_bounds__(kThreads) repair_rows(const __grid_constant__ RepairParams p) {
  __shared__ Marked found;
  // The marks are older than the GEMM, which this kernel may overlap.
  const bool any = any_marked(p.args.a, p.args.w);
  wait_for_earlier_launch();
  if (any) repair_marked<kRepairTile>(p, found, blockIdx.x, gridDim.x, [] { __syncthreads(); });
}

constexpr int kColumns = 8;  // of one thread

__global__ void __launch_bounds__(kThreads) finish_rows(const __grid_constant__ FinishArgs p) {
  const int64_t across = (p.columns + kColumns - 1) / kColumns;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = thread / across, first = thread % across * kColumns;
  if (row >= p.rows) return;
  const float one = p.factors[0] ? *p.factors[0] : 1.0f;
  const float two = p.factors[1] ? *p.factors[1] : 1.0f;
  const float own = p.row_scale ? p.row_scale[row] : 1.0f;
  const bool wide = p.stride % 4 == 0 && p.columns % kColumns == 0;
  float v[kColumns];
  if (wide) {
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
      const uint4 w = *reinterpret_cast<const uint4*>(p.y + row * p.stride + first + i);
      v[i] = as_float(w.x);
      v[i + 1] = as_float(w.y);
      v[i + 2] = as_float(w.z);
      v[i + 3] = as_float(w.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      v[i] = first + i < p.columns ? p.y[row * p.stride + first + i] : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int64_t column = first + i < p.columns ? first + i : first;
    const float scale = p.column_scale ? p.column_scale[column] : 1.0f;
    v[i] = v[i] * own * scale * one * two;
    if (p.bias) v[i] = v[i] + load_element(p.bias, p.bias_dtype, column);
  }
  const int64_t at = row * p.columns + first;
  if (wide && p.dtype != DType::kFP32) {
    uint32_t w[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      w[i] = p.dtype == DType::kBF16 ? to_halves<DType::kBF16>(v[2 * i], v[2 * i + 1])
                                     : to_halves<DType::kFP16>(v[2 * i], v[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + at) =
        make_uint4(w[0], w[1], w[2], w[3]);
  } else {
    for (int i = 0; i < kColumns; ++i) {
      if (first + i < p.columns) store_element(p.out, p.dtype, at + i, v[i]);
    }
  }
}

}  // namespace

void repair(const RepairArgs& a, Stream stream) {
  int device = 0, processors = 1;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
  if (a.rows && a.columns) {
    // Starts while the GEMM ends.
    launch_after(launches_overlap(), repair_rows, processors, kThreads, stream, RepairParams(a));
  }
}

void finish(const FinishArgs& a, Stream stream) {
  const int64_t threads = a.rows * ((a.columns + kColumns - 1) / kColumns);
  launch(finish_rows, blocks_for(threads), kThreads, stream, a);
}

}  // namespace cuda
}  // namespace pyfmt
