// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX-512 F, BW, DQ, VL and CD.
#if defined(__x86_64__)
#include "system.h"

#if defined(__clang__)
#pragma clang attribute push(                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,bmi,bmi2,prefer-vector-width=512")
#endif
#define PYFMT_ISA avx512
#define PYFMT_LANES 16
#include "kernels_body.h"

namespace pyfmt::cpu {
const Kernels kAvx512Kernels = PYFMT_KERNELS("avx512");
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
