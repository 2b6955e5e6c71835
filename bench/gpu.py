# SPDX-License-Identifier: Apache-2.0
"""Time the GPU kernels against a copy of the same run: fractions of the copy's bytes a second.

    python bench/gpu.py [--rows 16384 --columns 16384] [--only mxfp4] [--json PATH]

Each line's bytes are what the call must read and write. Cases are timed in turn, round by round,
by CUDA events around a few calls; the inputs alternate so that no call finds its input in cache.
Small tensors are timed as replays of a graph of many calls, and as whole eager calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyfmt
import pyfmt.ops

OPS = torch.ops.pyfmt
CLAIMS = {"mxfp4": 0.95, "mxfp6_e2m3": 0.85, "mxfp6_e3m2": 0.85, "mxint6": 0.85}


class Case:
    """A call on one of several inputs, the bytes it must move, and the fraction aimed at."""

    def __init__(
        self, name: str, call: Callable[[int], Any], size: int, aim: float | None = None
    ) -> None:
        self.name, self.call, self.bytes, self.aim = name, call, size, aim
        self.times: list[float] = []


def event_time(call: Callable[[int], Any], repeats: int) -> float:
    """Seconds of one call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(repeats):
        call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def cases(xs: list[torch.Tensor], only: str) -> list[Case]:
    """Everything to time on inputs of one shape."""
    x, n = xs[0], xs[0].nbytes
    out = torch.empty_like(x)
    found = [Case("copy", lambda i: out.copy_(xs[i % len(xs)]), 2 * n)]

    def add(name: str, call: Callable[[torch.Tensor], Any], size: int, aim: float | None) -> None:
        if only in name:
            found.append(Case(name, lambda i: call(xs[i % len(xs)]), size, aim))

    for name, fmt in pyfmt.FORMATS.items():
        aim = CLAIMS.get(name, 0.92)
        given = torch.tensor(0.002, device="cuda") if fmt.tensor_scale else None
        parts = [OPS.quantize(y, name, tensor_scale=given) for y in xs]
        both = n + parts[0][0].nbytes + parts[0][1].nbytes
        add(
            f"quantize {name}",
            lambda y, f=name, g=given: OPS.quantize(y, f, tensor_scale=g),
            both,
            aim,
        )
        if fmt.tensor_scale:
            add(f"quantize {name} dynamic", lambda y, f=name: OPS.quantize(y, f), both + n, 0.88)

        def expand(i: int, parts: Any = parts, f: str = name, g: Any = given) -> Any:
            codes, scales, _ = parts[i % len(parts)]
            return OPS.dequantize(codes, scales, g, f, x.shape, -1, x.dtype)

        if only in f"dequantize {name}":
            found.append(Case(f"dequantize {name}", expand, both, aim))
        add(
            f"fake_quantize {name}",
            lambda y, f=name, g=given: OPS.fake_quantize(y, f, tensor_scale=g),
            2 * n,
            0.92,
        )
    four = OPS.quantize(x, "mxfp4")
    both = n + four[0].nbytes + four[1].nbytes
    for size in (16, 32, 64, 128, 256, 1024):
        aim = 0.85 if size <= 128 else None
        add(
            f"rotate {size} + quantize mxfp4",
            lambda y, r=size: OPS.quantize(y, "mxfp4", rotation=r),
            both,
            aim,
        )
    signs = torch.randn(128, device="cuda").sign()
    add(
        "rotate 128 with signs + quantize mxfp4",
        lambda y: OPS.quantize(y, "mxfp4", rotation=128, signs=signs),
        both,
        None,
    )
    add(
        "rotate 32 + quantize mxint8",
        lambda y: OPS.quantize(y, "mxint8", rotation=32),
        n + n // 2 + n // 64,
        0.85,
    )
    for size in pyfmt.formats.ROTATION_SIZES:
        add(
            f"hadamard {size}",
            lambda y, r=size: OPS.hadamard(y, r),
            2 * n,
            0.92 if size <= 256 else 0.85,
        )
    add("quantize mxfp4 across (axis -2)", lambda y: OPS.quantize(y, "mxfp4", -2), both, None)
    if hasattr(OPS, "quantize_dual"):
        twice = n + 2 * (both - n)
        for name in ("mxfp4", "mxfp8_e4m3", "mxint8"):
            q = OPS.quantize(x, name)
            twice = n + 2 * (q[0].nbytes + q[1].nbytes)
            add(f"quantize_dual {name}", lambda y, f=name: OPS.quantize_dual(y, f), twice, 0.75)
        add(
            "quantize_dual mxfp4 rotated 32",
            lambda y: OPS.quantize_dual(y, "mxfp4", rotation=32),
            n + 2 * (both - n),
            None,
        )
    for name in ("int8-brow-bf16", "e2m1-b32x32-e8m0", "e2m1-b16x16-e4m3"):
        q = OPS.quantize(x, name)
        add(
            f"quantize {name}",
            lambda y, f=name: OPS.quantize(y, f),
            n + q[0].nbytes + q[1].nbytes,
            None,
        )
    add(
        "quantize mxfp4 stochastic",
        lambda y: OPS.quantize(y, "mxfp4", rounding="stochastic", seed=1),
        both,
        None,
    )
    add("amax of the tensor", lambda y: OPS.amax(y), n, None)
    return found


def check(x: torch.Tensor) -> None:
    """Compare every format with the reference on a few rows; stops on a difference."""
    part = x[:16].contiguous()
    for name in pyfmt.FORMATS:
        for rotation in (None, 64):
            ours = pyfmt.quantize(part, name, rotation=rotation, backend="cuda")
            oracle = pyfmt.quantize(part, name, rotation=rotation, backend="reference")
            assert torch.equal(ours.codes, oracle.codes), f"{name}: codes differ"
            assert torch.equal(ours.scales, oracle.scales), f"{name}: scales differ"
        got, want = (pyfmt.fake_quantize(part, name, backend=b) for b in ("cuda", "reference"))
        assert torch.equal(got, want), f"{name}: values differ"


def measure(found: list[Case], rounds: int, target: float = 0.004) -> list[dict[str, Any]]:
    """Time all cases in turn; returns one record a case."""
    counts = []
    for case in found:
        case.call(0)
        torch.cuda.synchronize()
        once = event_time(case.call, 2)
        counts.append(max(1, min(20, round(target / once))))
    for _ in range(rounds):
        for case, count in zip(found, counts, strict=True):
            case.times.append(event_time(case.call, count))
    copy = found[0].bytes / statistics.median(found[0].times)
    lines = []
    for case in found:
        times = sorted(case.times)
        median = statistics.median(times)
        rate = case.bytes / median
        lines.append(
            {
                "name": case.name,
                "us": median * 1e6,
                "p20": times[len(times) // 5] * 1e6,
                "p80": times[-1 - len(times) // 5] * 1e6,
                "TB/s": rate / 1e12,
                "of_copy": rate / copy,
                "aim": case.aim,
            }
        )
    return lines


def small(rows: int = 64, columns: int = 4096) -> list[dict[str, Any]]:
    """Small tensors: GPU time within a graph of many calls, and the whole eager call."""
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    given = torch.tensor(0.002, device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "quantize mxfp4": lambda: OPS.quantize(x, "mxfp4"),
        "quantize mxint8": lambda: OPS.quantize(x, "mxint8"),
        "quantize nvfp4": lambda: OPS.quantize(x, "nvfp4", tensor_scale=given),
        "quantize nvfp4 dynamic": lambda: OPS.quantize(x, "nvfp4"),
        "rotate 64 + quantize mxfp4": lambda: OPS.quantize(x, "mxfp4", rotation=64),
        "fake_quantize mxfp4": lambda: OPS.fake_quantize(x, "mxfp4"),
        "hadamard 64": lambda: OPS.hadamard(x, 64),
        "pyfmt.quantize mxfp4": lambda: pyfmt.quantize(x, "mxfp4", backend="cuda"),
    }
    lines = []
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for _ in range(50)]
        replay = graph.replay
        replay()
        times = [event_time(lambda _, f=replay: f(), 4) for _ in range(9)]
        on_device = statistics.median(times) / 50
        del kept
        eager = []
        for _ in range(9):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                call()
            eager.append((time.perf_counter() - start) / 50)
            torch.cuda.synchronize()
        lines.append(
            {"name": name, "gpu_us": on_device * 1e6, "eager_us": statistics.median(eager) * 1e6}
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--columns", type=int, default=16384)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    xs = [torch.randn(args.rows, args.columns, device="cuda").to(dtype) for _ in range(2)]
    check(xs[0])
    lines = measure(cases(xs, args.only), args.rounds)
    for line in lines:
        aim = (
            ""
            if line["aim"] is None
            else f"  aim {line['aim']:.2f}" + ("" if line["of_copy"] >= line["aim"] else "  MISSED")
        )
        print(
            f"{line['name']:44} {line['us']:9.1f} us {line['TB/s']:6.2f} TB/s "
            f"{line['of_copy']:5.2f} of copy{aim}"
        )
    tiny = small() if not args.only else []
    for line in tiny:
        print(
            f"64 x 4096 {line['name']:34} {line['gpu_us']:6.2f} us on the GPU, "
            f"{line['eager_us']:6.2f} us a call"
        )
    if args.json:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        record = {
            "gpu": torch.cuda.get_device_name(),
            "driver": driver,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "shape": [args.rows, args.columns],
            "dtype": args.dtype,
            "lines": lines,
            "small": tiny,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
