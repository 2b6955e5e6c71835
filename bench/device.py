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


def event_time(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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


def small(rows: int = 64, columns: int = 4096) -> list[dict[str, Any]]:
    """Small tensors in every room: time on the GPU, and the whole eager call."""
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
            "pyfmt.quantize mxfp4": lambda r=room: pyfmt.quantize(x, "mxfp4", backend=r.name),
        }
        for name, call in calls.items():
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            on_device = graph_time([call] * 50)
            eager = []
            for _ in range(9):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(50):
                    call()
                eager.append((time.perf_counter() - start) / 50)
                torch.cuda.synchronize()
            us = (on_device * 1e6, statistics.median(eager) * 1e6)
            aims = SMALL_AIMS if room.name == "cuda" else (None, None)
            lines.append(
                {
                    "name": name,
                    "room": room.name,
                    "shape": [rows, columns],
                    "gpu_us": us[0],
                    "eager_us": us[1],
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
