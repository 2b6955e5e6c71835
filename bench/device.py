# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU: events around a few calls, graphs of many small ones, compilation beforehand."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import GIVEN, rooms
from harness import Case, Line, lines_of

import pyfmt
import pyfmt.ops

# What a small call may cost: microseconds of the GPU, microseconds of the whole eager call.
SMALL_AIMS = (4.0, 25.0)


# About 0.2 ms: the host is ahead of the device when the clock starts, whatever a call costs it.
AHEAD = 400_000


def event_time(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def measure(cases: Sequence[Case], rounds: int = 7, target: float = 0.004) -> list[Line]:
    """Time all cases in turn, round by round, each for about `target` seconds a round."""
    counts = []
    for case in cases:
        case.call()
        torch.cuda.synchronize()
        counts.append(max(2, min(20, round(target / event_time(case.call, 2)))))
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for samples, case, count in zip(times, cases, counts, strict=True):
            samples.append(event_time(case.call, count))
    return lines_of(cases, times)


def graph_time(calls: Sequence[Callable[[], Any]], repeats: int = 4, rounds: int = 9) -> float:
    """Seconds of one call, from replays of a graph of all of them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    graph.replay()
    median = statistics.median(event_time(graph.replay, repeats) for _ in range(rounds))
    del kept
    return median / len(calls)


def host_time(call: Callable[[], Any], calls: int = 50, rounds: int = 9) -> float:
    """Seconds of one eager call, launches included, as the host sees it."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return statistics.median(times)


def plain_calls(x: torch.Tensor) -> dict[str, float]:
    """Microseconds of torch's own small calls on this host, for comparison: hosts differ by 3."""
    y = torch.randn(x.shape[1], x.shape[1], device="cuda", dtype=x.dtype)
    calls: dict[str, Callable[[], Any]] = {
        "torch.add": lambda: torch.add(x, x),
        "torch.empty": lambda: torch.empty(x.shape, dtype=x.dtype, device="cuda"),
        "F.linear": lambda: torch.nn.functional.linear(x[:1], y),
    }
    return {name: host_time(call) * 1e6 for name, call in calls.items()}


def small(rows: int = 64, columns: int = 4096) -> list[dict[str, Any]]:
    """Small tensors in every room: time on the GPU, and the whole eager call.

    Calls in grad mode, which is the default and the dearest, and in inference mode.
    """
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    given = torch.tensor(GIVEN, device="cuda")
    lines = []
    for room in rooms("cuda"):
        calls: dict[str, Callable[[], Any]] = {
            "quantize mxfp4": lambda r=room: r.quantize(x, "mxfp4"),
            "quantize mxint8": lambda r=room: r.quantize(x, "mxint8"),
            "quantize nvfp4": lambda r=room: r.quantize(x, "nvfp4", tensor_scale=given),
            "quantize nvfp4 dynamic": lambda r=room: r.quantize(x, "nvfp4"),
            "rotate 64 + quantize mxfp4": lambda r=room: r.quantize(x, "mxfp4", rotation=64),
            "fake_quantize mxfp4": lambda r=room: r.fake_quantize(x, "mxfp4"),
            "hadamard 64": lambda r=room: r.hadamard(x, 64),
            "quantize nvint4 dynamic": lambda r=room: r.quantize(x, "nvint4"),
        }
        if room.name == "cuda":
            calls["pyfmt.quantize mxfp4"] = lambda: pyfmt.quantize(x, "mxfp4")
            calls["pyfmt.fake_quantize mxfp4"] = lambda: pyfmt.fake_quantize(x, "mxfp4")
        for name, call in calls.items():
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            on_device = graph_time([call] * 50)
            us = (on_device * 1e6, host_time(call) * 1e6)
            with torch.inference_mode():
                inference = host_time(call) * 1e6
            aims = SMALL_AIMS if room.name == "cuda" else (None, None)
            lines.append(
                {
                    "name": name,
                    "room": room.name,
                    "shape": [rows, columns],
                    "gpu_us": us[0],
                    "eager_us": us[1],
                    "inference_us": inference,
                    "aims_us": aims,
                    "missed": [
                        aim is not None and t > aim for t, aim in zip(us, aims, strict=True)
                    ],
                }
            )
    return lines


def compile_beforehand(argv: Sequence[str], jobs: int) -> None:
    """Let `jobs` copies of this program compile their share of the kernels into the disk caches."""
    if jobs < 2:
        return
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, *argv, "--compile", f"{i}/{jobs}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for i in range(jobs)
    ]
    # One that fails leaves its kernels to be compiled, and to fail aloud, where they are timed.
    for process in running:
        process.wait()
