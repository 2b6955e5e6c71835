// SPDX-License-Identifier: Apache-2.0
// What the kernels of matmul_wide.h have in common on the host's side.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.cuh"
#include "matmul_wide_tiles.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

#if defined(PYFMT_SM90A)
#define PYFMT_WIDE_THREADS(count) (count)
#else
#define PYFMT_WIDE_THREADS(count) 32  // tells the host that there is nothing to launch
#endif

// Launches so many blocks, in clusters.
inline void launch_blocks(void (*kernel)(const Params), const Params& p, int blocks, int cluster,
                          int threads, uint32_t bytes, Stream stream) {
#if defined(__CUDACC__)
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
        "shared memory");
  cudaLaunchAttribute attributes[2];
  // Starts beside the end of the kernel before it, and waits for it before reading x.
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = unsigned(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, p), "launch");
#else
  (void)bytes;
  (void)stream;
  emulation::launch_clusters(kernel, blocks, threads, cluster, p);
#endif
}

// Those of a kernel whose blocks own `tokens` rows of x, in clusters of p's.
inline void launch_clusters(void (*kernel)(const Params), const Params& p, int cluster, int tokens,
                            int threads, uint32_t bytes, Stream stream) {
  const int blocks = int(p.n_clusters) * ((p.m + tokens - 1) / tokens) * cluster * p.parts;
  launch_blocks(kernel, p, blocks, cluster, threads, bytes, stream);
}

// Those whose clusters share what is read of x.
inline void launch_wide(void (*kernel)(const Params), const Params& p, int tokens, int threads,
                        uint32_t bytes, Stream stream) {
  launch_clusters(kernel, p, p.share * p.split, tokens, threads, bytes, stream);
}

inline bool is_mx(const FormatSpec& f, const ElementSpec& e) {
  return f.element == e && f.scale == Scale::kE8M0 && f.block_columns == 32;
}
inline bool is_nv(const FormatSpec& f, const ElementSpec& e) {
  return f.element == e && f.scale == Scale::kE4M3 && f.block_columns == 16;
}
inline bool has_groups(const FormatSpec& f, const ElementSpec& e) {
  return f.element == e && f.has_float_scales();
}

// Of weights F: boxes of so many of codes' bytes and rows, and what the decoder leaves out.
template <class F>
void describe_codes(Params& p, const WideCall& call, int box_bytes, int box_rows) {
  hopper::MatrixBox codes = call.codes;
  codes.box_bytes = box_bytes;
  codes.box_rows = box_rows;
  p.codes_map = hopper::encode(codes);
  p.up = L::as_float(power_of_two_bits(F::kDown));
}

// What the host needs to know of a kernel.
struct Kernel {
  void (*launch)(Params&, const WideCall&, Stream) = nullptr;
  int columns = 0;     // of a tile
  bool panel = false;  // reads x from a panel (matmul_wide_panel.cuh)
  int rows = kRows;    // of w, in a block
};

// The parts of a weight of n rows that are written out, `pitch` bytes a row, for tiles of 128 rows
// by `tokens` rows of x. The first is what all multiprocessors multiply at once, and each that
// follows is written out while the one before is multiplied. Even ones share a place, and odd ones.
struct WrittenParts {
  static constexpr int64_t kMostBytes = int64_t(1) << 28;  // of a part
  std::vector<int64_t> rows;
  int64_t room[2] = {0, 0};  // bytes

  WrittenParts(int64_t m, int64_t n, int64_t pitch, int tokens) {
    const int64_t tiles = (m + tokens - 1) / tokens;
    const int64_t most = std::max<int64_t>(kMostBytes / pitch / kRows, 1) * kRows;
    int64_t next = std::max<int64_t>(multiprocessors() / tiles, 1) * kRows;
    for (int64_t left = n; left > 0; left -= rows.back(), next = 3 * rows.back()) {
      int64_t& bytes = room[rows.size() % 2];
      rows.push_back(std::min({left, next, most}));
      bytes = std::max(bytes, rows.back() * pitch);
    }
  }
};

// Which of the kernels: of matmul_wide_tall.cuh, of matmul_wide_blocks.cuh and
// matmul_wide_turns.cuh, of matmul_wide_shared.cuh and matmul_wide_groups.cuh.
enum class Form { kTall, kTurns, kShared };

// By element and scale; no launch where there is none. One a file, so that they compile side by
// side.
Kernel fp4_kernel(const FormatSpec&, Form);
Kernel fp6_kernel(const FormatSpec&, Form);
Kernel fp8_kernel(const FormatSpec&, Form);
Kernel int_kernel(const FormatSpec&, Form);
Kernel group_kernel(const FormatSpec&, Form);
Kernel tall_group_kernel(const FormatSpec&, Form);
Kernel tall_small_group_kernel(const FormatSpec&, Form);
Kernel mxint_kernel(const FormatSpec&, Form);

// Whether kernels were compiled, or left empty for want of architecture 90a.
bool compiled();

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
