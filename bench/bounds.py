# SPDX-License-Identifier: Apache-2.0
"""What a GPU cannot beat: the bytes of a call at a copy's rate, its products at the tensor cores'.

Both rates are measured in the run that they are bounds of: a copy of 4 GiB (called as it is: within
a graph it is a node of another kind, at two thirds of the rate), and the library's GEMMs of 8192^3
on zeros, which hardly draw power, so that clocks stay where random operands push them down. No
ordinary operands reach the second; it is what the silicon can do.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from graphs import in_turn

SIZE = 8192
COPY = 2 << 30  # elements of two bytes


@dataclass(frozen=True)
class Call:
    """A call to time, the bytes that it must move, and the tensor cores that its products need."""

    call: Callable[[int], Any]
    nbytes: int
    pipe: str = "bf16"  # or "fp8"

    def __call__(self, i: int) -> Any:
        return self.call(i)


def _copy_rate() -> float:
    source = torch.empty(COPY, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(times[1:])


@functools.cache
def rates() -> dict[str, float]:
    """Return bytes a second of a copy, and operations a second of either pipe."""
    zeros = torch.zeros(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    small = zeros.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    fp8 = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
    found = in_turn(
        {
            "bf16": lambda _: torch.mm(zeros, zeros.t()),
            "fp8": lambda _: fp8(small, small.t(), one, one),
        },
        seconds=0.4,
        yardstick=False,
    )
    # Of the faster calls: a device that was hot, or asleep, takes a while to its highest clock.
    products = {name: 2 * SIZE**3 / fast for name, (_, fast, _) in found.items()}
    return {"copy": _copy_rate()} | products


def bound(call: Call, shape: tuple[int, int, int]) -> float:
    """Return the seconds below which no call of (M, N, K) can be."""
    m, n, k = shape
    return max(call.nbytes / rates()["copy"], 2 * m * n * k / rates()[call.pipe])
