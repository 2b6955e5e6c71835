# SPDX-License-Identifier: Apache-2.0
"""What bench/matmul.py times on the CPU: packed weights against torch's dense linear.

decode: M rows of bfloat16 times a packed 14336 x 4096 weight; weights alternate among copies that
no cache holds. large: 4096 x 4096 with both sides quantized, the left side ready, or x quantized
(and rotated) in the call. Bytes of a decode case are the weight's; "read" is the fastest of a few
plain readers of the same run. Every result is checked against float64 before anything is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Case, Line, machine, measure, report, save

import pyfmt
import pyfmt.ops

OPS: Any = torch.ops.pyfmt
DECODE = (
    "mxfp4",
    "nvfp4",
    "int4",
    "mxint8",
    "mxfp8_e4m3",
    "mxfp6_e2m3",
    "nvint4",
    "mxint4",
    "int8",
)
PAIRS = ("mxint8", "mxfp4", "nvfp4")
SHAPE, SQUARE = (14336, 4096), (4096, 4096)
ROWS = {"decode": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], "large": [256, 1024]}
CACHE = 48 << 20  # bytes that copies of a weight exceed together


def check() -> None:
    """Hold every timed path to its bound; AssertionError where one does not keep it."""
    torch.manual_seed(1)
    w = torch.randn(200, 512)
    for m in (1, 4, 16, 70):
        x = torch.randn(m, 512).bfloat16()
        for name in DECODE:
            q = pyfmt.quantize(w, name)
            b = q.dequantize().double()
            dense = OPS.matmul(x, None, None, None, *parts(q), 512, None, torch.float32)
            hold(f"{name} M={m}", dense, x.double(), b)
            p = pyfmt.quantize(x, name)
            both = OPS.matmul(*parts(p), *parts(q), 512, None, torch.float32)
            hold(f"{name} x {name} M={m}", both, p.dequantize().double(), b)


def hold(what: str, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    most = 2.0**-24 * (515 * a.abs() @ b.abs().T + (a @ b.T).abs())
    assert bool(((y - a @ b.T).abs() <= most).all()), f"{what}: beyond the bound"


def parts(q: pyfmt.QTensor) -> tuple[Any, ...]:
    return q.codes, q.scales, q.tensor_scale, q.format.key


def copies(weight: Any, size: int, clone: Callable[[Any], Any]) -> Any:
    """Endless turns of enough copies that a cache keeps none of them."""
    return itertools.cycle([weight, *(clone(weight) for _ in range(CACHE // size + 1))])


def clone_packed(p: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*(t.clone() if isinstance(t, torch.Tensor) else t for t in p[:3]), p[3])


def readers() -> list[Case]:
    """Plain readers of memory: the fastest is what reading can be."""
    x = torch.ones(256 << 20, dtype=torch.uint8)
    words, numbers = x.view(torch.int64), x.view(torch.bfloat16)
    return [
        Case("read sum", lambda: words.sum(), x.nbytes, x.numel(), "read"),
        Case("read max", lambda: words.max(), x.nbytes, x.numel(), "read"),
        Case("read amax", lambda: OPS.amax(numbers), x.nbytes, x.numel(), "read"),
    ]


def decode(sizes: list[int]) -> list[Case]:
    w = torch.randn(*SHAPE).bfloat16()
    k = SHAPE[1]
    dense = copies(w, w.nbytes, torch.Tensor.clone)
    wide = w.float()
    packed = {}
    for name in DECODE:
        q = pyfmt.quantize(w, name)
        packed[name] = (copies(parts(q), q.nbytes, clone_packed), q.nbytes)
    found = []
    linear = torch.nn.functional.linear
    for m in sizes:
        x, group = torch.randn(m, k).bfloat16(), f"M={m}"
        full, flops = x.float(), m * w.numel()
        found += [
            Case(f"torch bf16 {group}", lambda x=x: linear(x, next(dense)), w.nbytes, flops, group),
            Case(
                f"torch fp32 {group}",
                lambda x=full: linear(x, wide),
                wide.nbytes,
                flops,
                group,
            ),
        ]
        for name, (turns, size) in packed.items():
            found.append(
                Case(
                    f"{name} {group}",
                    lambda x=x, t=turns: OPS.matmul(
                        x, None, None, None, *next(t), k, None, torch.bfloat16
                    ),
                    size,
                    flops,
                    group,
                )
            )
    return found


def large(sizes: list[int]) -> list[Case]:
    n, k = SQUARE
    w = torch.randn(n, k).bfloat16()
    wide, linear, found = w.float(), torch.nn.functional.linear, []
    weights = {name: parts(pyfmt.quantize(w, name)) for name in PAIRS}
    for m in sizes:
        x, group, flops = torch.randn(m, k).bfloat16(), f"large M={m}", m * n * k
        full = x.float()
        found += [
            Case(f"torch bf16 {group}", lambda x=x: linear(x, w), 0, flops, group),
            Case(f"torch fp32 {group}", lambda x=full: linear(x, wide), 0, flops, group),
        ]
        for name in PAIRS:
            left, right = parts(pyfmt.quantize(x, name)), weights[name]
            calls = {
                f"{name} x {name}": lambda a=left, b=right: OPS.matmul(
                    *a, *b, k, None, torch.bfloat16
                ),
                f"linear {name} x {name}, rotation 32": lambda x=x, b=right, f=name: OPS.linear(
                    x, *b, None, f, 32
                ),
                f"bf16 x {name}": lambda x=x, b=right: OPS.matmul(
                    x, None, None, None, *b, k, None, torch.bfloat16
                ),
            }
            found += [Case(f"{what} {group}", f, 0, flops, group) for what, f in calls.items()]
    return found


def compare(lines: list[Line]) -> None:
    """Ratios to torch's lines of the same group, and rates as fractions of reading."""
    read = max(line.gbytes_per_s for line in lines if line.group == "read")
    dense = {(line.name.split()[1], line.group): line for line in lines if "torch" in line.name}
    for line in lines:
        line.of_copy = line.gbytes_per_s / read if line.gbytes_per_s else None
        if line.name.startswith(("torch", "read")):
            continue
        for kind in ("bf16", "fp32"):
            line.rivals[f"torch {kind}"] = dense[kind, line.group].median / line.median


def plot(lines: list[Line], path: Path) -> None:
    """Draw time against M, a line for each format, torch's dashed."""
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        name, _, rows = line.name.rpartition(" M=")
        if line.group.startswith("M="):
            series.setdefault(name, []).append((int(rows), line.median * 1e3))
    figure = Figure(figsize=(7.6, 4.6))
    axes = figure.subplots()
    for name, points in series.items():
        rows, times = zip(*points, strict=True)
        dashed = name.startswith("torch")
        axes.plot(
            rows, times, marker=".", label=name, linestyle="--" if dashed else "-",
            color={"torch bf16": "#212529", "torch fp32": "#868e96"}.get(name),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(rows, [str(m) for m in rows])
    axes.set_xlabel("rows of x (M), bfloat16")
    axes.set_ylabel("milliseconds")
    axes.set_title(f"x times a {SHAPE[0]} x {SHAPE[1]} weight, {machine()['cpu']}, "
                   f"{torch.get_num_threads()} threads", fontsize=10)  # fmt: skip
    axes.grid(which="both", color="#e9ecef")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, bbox_inches="tight")


PARTS = {"decode": decode, "large": large}


def run(args: Any) -> None:
    """Check, then time the parts of `args.part` in one run; print, save and draw them."""
    check()
    torch.manual_seed(0)
    cases = readers()
    for part in args.part or PARTS:
        cases += PARTS[part](args.rows or ROWS[part])
    print("timing", len(cases), "cases", flush=True)
    lines = measure(cases, seconds=args.seconds or 1.5, rounds=args.rounds)
    compare(lines)
    facts = {"decode": SHAPE, "large": SQUARE, "level": OPS._cpu_matmul_level()}
    print(machine(), facts)
    report("bfloat16 x; G elem/s counts multiply-adds, of copy is of reading", lines)
    if args.save:
        print(save(args.save, lines, **facts))
    if args.plot:
        plot(lines, args.plot)
