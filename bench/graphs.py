# SPDX-License-Identifier: Apache-2.0
"""GPU timing by replays of CUDA graphs, in turn: no host time, and drift hits all cases alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


class Timed:
    """A case captured as a graph of `calls` calls; call(i) is given the number of the call."""

    def __init__(self, call: Callable[[int], Any], calls: int) -> None:
        self.calls = calls
        self.times: list[float] = []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(min(calls, 2)):
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(calls):
                call(i)

    def replay(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        return start, end


def in_turn(
    cases: Mapping[str, Callable[[int], Any]],
    *,
    seconds: float = 0.3,
    rotate: int = 1,
    least: int = 5,
    yardstick: bool = True,
) -> dict[str, tuple[float, float, float]]:
    """Return (median, p20, p80) seconds of one call of each case.

    Every round replays each case once; a replay holds as many calls as last 400 us, and at least
    `rotate`, so that weights rotate among that many copies. The first case is the yardstick: it
    runs before each of the others too, so that the clocks of a hot GPU are the same for both;
    yardstick=False leaves that out.
    """
    timed = {}
    for name, call in cases.items():
        once = _once(call)
        calls = max(rotate, min(200, round(400e-6 / once)), 1)
        timed[name] = Timed(call, -(-calls // rotate) * rotate)
    names = list(timed)
    total = 0.0
    for case in timed.values():
        start, end = case.replay()
        end.synchronize()
        total += start.elapsed_time(end) / 1e3
    first = timed[names[0]]
    rounds = max(least, min(60, round(seconds * len(names) / (2 * total))))
    pending = []
    for _ in range(rounds):
        for name in names:
            if yardstick and name != names[0]:
                pending.append((first, first.replay()))
            pending.append((timed[name], timed[name].replay()))
    torch.cuda.synchronize()
    for case, (start, end) in pending:
        case.times.append(start.elapsed_time(end) / 1e3 / case.calls)
    return {name: quantiles(case.times) for name, case in timed.items()}


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return (median, p20, p80)."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def _once(call: Callable[[int], Any]) -> float:
    for i in range(2):
        call(i)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(3):
        call(i)
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / 3e3, 1e-6)
