// SPDX-License-Identifier: Apache-2.0
// Integers with one float scale a row.
#pragma once

#include "args.h"

namespace pyfmt {
namespace cuda {

bool wide_serves(const QuantizeArgs& args);
void quantize_wide(const QuantizeArgs& args, Stream stream);

}  // namespace cuda
}  // namespace pyfmt
