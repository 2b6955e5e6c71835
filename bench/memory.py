# SPDX-License-Identifier: Apache-2.0
"""Where a CPU operator's result lies: in memory that is there already, or in fresh pages.

A fresh page costs the system's work of finding and clearing it, which can exceed what a kernel
does with it, is the same for whoever asks, and depends on the machine's state (a virtual machine
may not even have it). So kernels are timed with an allocator that keeps what was freed, as
tcmalloc and jemalloc do and glibc's malloc does when told; fresh pages are timed apart.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def huge_pages() -> None:
    """Let torch's own tensors lie in huge pages, as pyfmt's large ones do; before the first one."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _told(**thresholds: int) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(
        mallopt(M_MMAP_THRESHOLD, thresholds["mapped"])
        and mallopt(M_TRIM_THRESHOLD, thresholds["trimmed"])
    )


def fresh() -> bool:
    """Map each large tensor anew; False where this C library cannot be told. Only before keep."""
    return _told(mapped=1 << 20, trimmed=1 << 20)


def keep() -> bool:
    """Keep freed memory for the next tensor; False where this C library cannot be told."""
    return _told(mapped=1 << 30, trimmed=LARGEST)
