// SPDX-License-Identifier: Apache-2.0
// Any format, block and stride, by the codec with run-time constants: right, and slower.
#pragma once

#include "args.h"

namespace pyfmt {
namespace cuda {

// partial_count: how many maxima `args.partials` holds where the tensor scale is dynamic.
void quantize_any(const QuantizeArgs& args, int partial_count, Stream stream);
void dequantize_any(const DequantizeArgs& args, Stream stream);

}  // namespace cuda
}  // namespace pyfmt
