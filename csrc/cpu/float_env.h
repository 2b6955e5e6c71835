// SPDX-License-Identifier: Apache-2.0
// The float environment that the arithmetic of codec.h is stated for.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../formats.h"

namespace pyfmt {
namespace cpu {

// The host may run with flush-to-zero; kernels must not.
class GradualUnderflow {
 public:
#if defined(__x86_64__)
  PYFMT_HD GradualUnderflow() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  PYFMT_HD ~GradualUnderflow() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  PYFMT_HD GradualUnderflow() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
  }
  PYFMT_HD ~GradualUnderflow() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace cpu
}  // namespace pyfmt
