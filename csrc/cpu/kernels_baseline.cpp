// SPDX-License-Identifier: Apache-2.0
// Kernels for any processor: SSE2 on x86-64, whatever the compiler targets elsewhere.
#include "system.h"

#define PYFMT_ISA baseline
#include "kernels_body.h"

namespace pyfmt::cpu {
const Kernels kBaselineKernels = PYFMT_KERNELS("baseline");
}
