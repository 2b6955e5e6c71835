// SPDX-License-Identifier: Apache-2.0
// Advice to the system about fresh output memory.
#include <cstddef>
#include <cstdint>

#include "cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyfmt {
namespace cpu {

void prefer_huge_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHuge = size_t(1) << 21;
  if (bytes < kHugePageBytes) return;
  const uintptr_t first = (uintptr_t(p) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (uintptr_t(p) + bytes) & ~(kHuge - 1);
  // Advice only: where the kernel declines, ordinary pages serve.
  if (first < last) (void)madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

}  // namespace cpu
}  // namespace pyfmt
