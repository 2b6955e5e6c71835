// SPDX-License-Identifier: Apache-2.0
// Products for AVX-512 F, BW, DQ, VL and CD.
#if defined(__x86_64__)
#include "system.h"

#if defined(__clang__)
#pragma clang attribute push(                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,bmi,bmi2"))), \
    apply_to = function)
#pragma clang diagnostic ignored "-Wunused-function"
#else
#pragma GCC push_options
// What other kernels of the level use is not all used here; and GCC 12 takes the deliberately
// undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,bmi,bmi2,prefer-vector-width=512")
#endif
#define PYFMT_ISA avx512_matmul
#define PYFMT_LANES 16
#include "matmul_body.h"

namespace pyfmt::cpu {
const MatmulKernels kAvx512Matmul = PYFMT_MATMUL("avx512");
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
