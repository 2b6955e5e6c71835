// SPDX-License-Identifier: Apache-2.0
// Kernels that start before the one ahead ends, and let the next one start: it then fetches
// weights, or at least is there, while this one runs. Each waits for what was written before it
// reads.
#pragma once

#include "warp.cuh"

namespace pyfmt {
namespace cuda {

// At the start of a kernel launched by launch_ahead, before it touches memory.
PYFMT_DEVICE void take_turn() {
  allow_next_launch();
  wait_for_earlier_launch();
}

template <class P>
void launch_ahead(void (*kernel)(P), int64_t blocks, int threads, Stream stream, const P& params) {
  if (blocks <= 0) return;
#if defined(__CUDACC__)
  ClusterLaunch l;
  l.clusters = blocks;
  l.threads = threads;
  launch_clusters(kernel, l, stream, params);
#else
  launch(kernel, blocks, threads, stream, params);
#endif
}

}  // namespace cuda
}  // namespace pyfmt
