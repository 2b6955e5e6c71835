// SPDX-License-Identifier: Apache-2.0
// Which kernels run here: the best instruction-set level that this processor has.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace pyfmt::cpu {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

const Kernels* find(const char* name) {
  const bool best = std::strcmp(name, "best") == 0;
#if defined(__x86_64__)
  if (has_avx512() && (best || std::strcmp(name, "avx512") == 0)) return &kAvx512Kernels;
  if (has_avx2() && (best || std::strcmp(name, "avx2") == 0)) return &kAvx2Kernels;
#endif
  return best || std::strcmp(name, "baseline") == 0 ? &kBaselineKernels : nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{find("best")};
  return kernels;
}

}  // namespace

const Kernels& kernels() {
  return *chosen().load(std::memory_order_relaxed);
}

const char* level() {
  return kernels().name;
}

bool set_level(const char* name) {
  const Kernels* found = find(name);
  if (found) chosen().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

const char* levels() {
  return has_avx512() ? "baseline,avx2,avx512" : has_avx2() ? "baseline,avx2" : "baseline";
}

}  // namespace pyfmt::cpu
