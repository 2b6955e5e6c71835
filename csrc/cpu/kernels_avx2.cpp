// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX2.
#if defined(__x86_64__)
#include "system.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2")
#endif
#define PYFMT_ISA avx2
#define PYFMT_LANES 8
#include "kernels_body.h"

namespace pyfmt::cpu {
const Kernels kAvx2Kernels = PYFMT_KERNELS("avx2");
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
