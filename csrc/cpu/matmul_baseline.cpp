// SPDX-License-Identifier: Apache-2.0
// Products for any processor.
#include "system.h"

#if defined(__clang__)
#pragma clang diagnostic ignored "-Wunused-function"
#else
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#define PYFMT_ISA baseline_matmul
#include "matmul_body.h"

namespace pyfmt::cpu {
const MatmulKernels kBaselineMatmul = PYFMT_MATMUL("baseline");
}
