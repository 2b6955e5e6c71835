// SPDX-License-Identifier: Apache-2.0
// Launches whose blocks find the largest magnitude of all of them together (together.cuh).
#pragma once

#include <cstdint>

#include "args.h"

namespace pyfmt {
namespace cuda {

struct Together {
  // Device: 16 bytes of each block, whatever they hold. A later launch has to clear them, for a
  // graph may launch the same call again.
  void* slots = nullptr;
  uint64_t call = 0;  // a number that no other call has
};
uint64_t new_call();
// Blocks, and so slots, for as many elements.
int together_blocks(int64_t count);
void clear_together(void* slots, int count, Stream);

// Few rows of bfloat16, rotated and quantized to blocks with E4M3 scales, as exact bfloat16 values
// without the tensor scale, which is stored in args.tensor_scale_out, times *`factor` where that is
// given. together: for dynamic tensor scales.
bool round_together_serves(const QuantizeArgs&);
void round_together(const QuantizeArgs& args, const float* factor, const Together&, Stream);

}  // namespace cuda
}  // namespace pyfmt
