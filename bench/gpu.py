# SPDX-License-Identifier: Apache-2.0
"""Time the GPU kernels against a copy of the same run: fractions of the copy's bytes a second.

    python bench/gpu.py [--rows 16384 --columns 16384] [--only mxfp4] [--json PATH] [--sweep PATH]

Each line's bytes are what the call must read and write. Cases are timed in turn, round by round,
by CUDA events around a few calls; the inputs alternate so that no call finds its input in cache.
Small tensors are timed as replays of a graph of many calls, and as whole eager calls. Rivals run
among the cases: an eager MXFP4 formula under torch.compile, torch.mm with a block Hadamard matrix.
--sweep times quantize to mxfp4 from 2^12 to 2^31 elements, with a plot beside the JSON.
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
    for size in (32, 128):
        signs = torch.randn(size, device="cuda").sign()
        add(
            f"rotate {size} with signs + quantize mxfp4",
            lambda y, r=size, s=signs: OPS.quantize(y, "mxfp4", rotation=r, signs=s),
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


def eager_mxfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 with scale rule rceil as one would write it in torch (finite inputs)."""
    blocks = x.float().view(-1, 32)
    largest = blocks.abs().amax(1, keepdim=True)
    exponent = (((largest.view(torch.int32) + 0x3FFFFF) >> 23) - 129).clamp(-127, 127)
    y = blocks * torch.exp2(-exponent.float())
    size = y.abs()
    code = (size > 0.25).to(torch.uint8) + (size >= 0.75) + (size > 1.25) + (size >= 1.75)
    code = code + (size > 2.5) + (size >= 3.5) + (size > 5) + torch.signbit(y) * 8
    pairs = code.to(torch.uint8).view(-1, 2)
    packed = pairs[:, 0] | pairs[:, 1] << 4
    lead = x.shape[:-1]
    return packed.view(*lead, -1), (exponent + 127).to(torch.uint8).view(*lead, -1)


def rivals(xs: list[torch.Tensor]) -> list[Case]:
    """The same work by torch itself."""
    x, found = xs[0], []
    name = "rival: torch.compile of eager mxfp4"
    compiled = torch.compile(eager_mxfp4)
    want = OPS.quantize(x, "mxfp4")
    try:
        got = compiled(x)
    except Exception as error:  # no compiler on this machine: the other lines still count
        print(f"{name}: not timed, {type(error).__name__}: {str(error)[:200]}")
    else:
        # It may flush subnormals: reported, not asserted.
        differ = (got[0] != want[0]).float().mean().item()
        print(f"{name}: {differ:.2e} of the bytes differ from quantize's")
        size = x.nbytes + want[0].nbytes + want[1].nbytes
        found.append(Case(name, lambda i: compiled(xs[i % len(xs)]), size))
    for n in (32, 128, 1024):
        h = OPS.hadamard(torch.eye(n, device=x.device), n).to(x.dtype)
        found.append(
            Case(
                f"rival: torch.mm with a block matrix {n}",
                lambda i, h=h, n=n: torch.mm(xs[i % len(xs)].view(-1, n), h),
                2 * x.nbytes,
            )
        )
    return found


def sweep(path: Path, largest: int = 31) -> None:
    """Time of quantize to mxfp4 and of a copy over the number of elements; JSON and a plot."""
    columns, points = 1024, []
    for power in range(12, largest + 1):
        n = 1 << power
        # Small inputs alternate among copies beyond the L2 cache, as larger ones do by themselves.
        copies = max(1, min(64, (1 << 27) // n))
        xs = torch.randn(copies, min(n, 1 << 24), device="cuda").bfloat16()
        xs = xs.repeat(1, n // xs.shape[1]).view(copies, -1, columns)
        out = torch.empty_like(xs[0])
        calls = 64 if power <= 22 else 8
        record: dict[str, Any] = {"elements": n}
        for what, call in (
            ("quantize_us", lambda i, xs=xs: OPS.quantize(xs[i % len(xs)], "mxfp4")),
            ("copy_us", lambda i, xs=xs, out=out: out.copy_(xs[i % len(xs)])),
        ):
            call(0)
            torch.cuda.synchronize()
            if power <= 22:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for i in range(calls):
                        call(i)
                times = [event_time(lambda _, g=graph: g.replay(), 2) / calls for _ in range(7)]
                del graph
            else:
                times = [event_time(call, calls) for _ in range(5)]
            record[what] = statistics.median(times) * 1e6
        points.append(record)
        print(f"2^{power:<3} {record['quantize_us']:10.2f} us, copy {record['copy_us']:10.2f} us")
        del xs, out
        torch.cuda.empty_cache()
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "points": points}
    path.write_text(json.dumps(record, indent=1) + "\n")
    plot(points, path.with_suffix(".svg"))


def plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    sizes = [p["elements"] for p in points]
    axes.loglog(sizes, [p["quantize_us"] for p in points], "o-", label="quantize to mxfp4")
    axes.loglog(sizes, [p["copy_us"] for p in points], "s--", label="copy of the input")
    axes.set(xlabel="elements (bfloat16)", ylabel="microseconds", title="Time over size")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


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
    parser.add_argument("--sweep", type=Path, help="JSON of times over sizes; a plot beside it")
    parser.add_argument("--no-rivals", action="store_true", help="leave out what torch would do")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    xs = [torch.randn(args.rows, args.columns, device="cuda").to(dtype) for _ in range(2)]
    check(xs[0])
    found = cases(xs, args.only)
    if not args.no_rivals and not args.only:
        found += rivals(xs)
    lines = measure(found, args.rounds)
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
    del found, xs
    torch.cuda.empty_cache()
    if args.sweep:
        sweep(args.sweep)
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
