// SPDX-License-Identifier: Apache-2.0
// Advice to the system about fresh output memory.
#include <cstddef>
#include <cstdint>

#include "cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pyfmt {
namespace cpu {

void prefer_huge_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugePageBytes) return;
  // Whole pages only, so that no neighbour's memory is meant.
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (uintptr_t(p) + page - 1) & ~(page - 1);
  const uintptr_t last = (uintptr_t(p) + bytes) & ~(page - 1);
  // Advice only: where the kernel declines, ordinary pages serve.
  (void)madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

}  // namespace cpu
}  // namespace pyfmt
