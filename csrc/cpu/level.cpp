// SPDX-License-Identifier: Apache-2.0
// Which kernels run here: the best instruction-set level that this processor has.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "matmul.h"

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

// The products have levels of their own above avx512, and take fused multiply-adds with AVX2.
bool has_fma() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool has_vnni() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

bool has_bf16() {
#if defined(__x86_64__)
  return has_vnni() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const MatmulKernels* find_matmul(const char* name) {
  const bool best = std::strcmp(name, "best") == 0;
#if defined(__x86_64__)
  if (has_bf16() && (best || std::strcmp(name, "avx512_bf16") == 0)) return &kAvx512Bf16Matmul;
  if (has_vnni() && (best || std::strcmp(name, "avx512_vnni") == 0)) return &kAvx512VnniMatmul;
  if (has_avx512() && (best || std::strcmp(name, "avx512") == 0)) return &kAvx512Matmul;
  if (has_fma() && (best || std::strcmp(name, "avx2") == 0)) return &kAvx2Matmul;
#endif
  return best || std::strcmp(name, "baseline") == 0 ? &kBaselineMatmul : nullptr;
}

std::atomic<const MatmulKernels*>& chosen_matmul() {
  static std::atomic<const MatmulKernels*> kernels{find_matmul("best")};
  return kernels;
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
  const MatmulKernels* products = find_matmul(name);
  // A level that only the products have is avx512 for the rest, one that they lack baseline.
  const bool above = std::strncmp(name, "avx512_", 7) == 0;
  const Kernels* found = above ? (products ? find("avx512") : nullptr) : find(name);
  if (!found) return false;
  chosen().store(found, std::memory_order_relaxed);
  chosen_matmul().store(products ? products : &kBaselineMatmul, std::memory_order_relaxed);
  return true;
}

const MatmulKernels& matmul_kernels() {
  return *chosen_matmul().load(std::memory_order_relaxed);
}

const char* matmul_levels() {
  return has_bf16()     ? "baseline,avx2,avx512,avx512_vnni,avx512_bf16"
         : has_vnni()   ? "baseline,avx2,avx512,avx512_vnni"
         : has_avx512() ? "baseline,avx2,avx512"
         : has_fma()    ? "baseline,avx2"
                        : "baseline";
}

const char* levels() {
  return has_avx512() ? "baseline,avx2,avx512" : has_avx2() ? "baseline,avx2" : "baseline";
}

}  // namespace pyfmt::cpu
