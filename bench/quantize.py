# SPDX-License-Identifier: Apache-2.0
"""Quantize, dequantize, fake-quantize and rotate, against a copy and against rivals.

    python bench/quantize.py [--device cpu|cuda] [--only mxfp4] [--save NAME] [--sweep PATH]

On a GPU every room that is there is timed (CUDA, Triton), else the CPU room. Bytes count what a
call must read and write, so that each line is a fraction of a copy of the same run; aims are
fractions of it too. On the CPU results lie in memory that the allocator kept (bench/memory.py),
where x.clone() runs as fast as a copy into memory that is there; a part is timed into fresh pages
besides, against x.clone() into such. Every call's result is first compared with the reference in
some of its rows: a wrong bit stops the run before anything is timed. --sweep times quantize to
mxfp4 from 2^12 to 2^31 elements, with a plot beside the JSON. PYFMT_COMMIT names the commit where
there is no git.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import memory
import torch
from cases import Turns, cases
from harness import (
    Case,
    Line,
    against_copy,
    arguments,
    machine,
    measure,
    report,
    save,
    verify,
)
from rivals import PUBLISHED, rivals

SIDE = {"cpu": 8192, "cuda": 16384}  # x and its copy exceed any last-level cache
# What is timed into fresh pages too, on the CPU.
FRESH = (
    "copy",
    "clone",
    "quantize mxfp4",
    "quantize mxint8",
    "quantize nvfp4 dynamic",
    "dequantize mxfp4",
    "dequantize mxint8",
    "rotate 32 + quantize mxfp4",
    "hadamard 32",
)


def options() -> Any:
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where one is")
    parser.add_argument("--rows", type=int, help="default: 16384 on a GPU, 8192 on the CPU")
    parser.add_argument("--columns", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--only", default="", help="cases whose room and name hold this")
    parser.add_argument("--no-rivals", action="store_true", help="leave out what others would do")
    parser.add_argument("--sweep", type=Path, help="JSON of times over sizes; a plot beside it")
    parser.add_argument("--compile", help="i/n: only compile the i-th of n shares of the kernels")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.rows = args.rows or SIDE[args.device]
    args.columns = args.columns or SIDE[args.device]
    return args


def chosen(turns: Turns, args: Any, notes: list[str]) -> list[Case]:
    found = cases(turns, args.device)
    copy, found = found[0], [c for c in found[1:] if args.only in f"{c.room} {c.name}"]
    if not args.no_rivals:
        names = {case.name for case in found}
        found += [c for c in rivals(turns, args.device, notes) if c.rival_of in names]
    return [copy, *found]


def compile_share(found: Sequence[Case], share: str) -> None:
    """Call what compiles itself: one of n shares of it."""
    mine, n = map(int, share.split("/"))
    slow = [c for c in found if c.room == "triton"]
    slow = [c for c in found if "compile" in c.name] + slow
    for case in slow[mine::n]:
        case.call()
    torch.cuda.synchronize()


def on_cpu(found: Sequence[Case], args: Any) -> tuple[list[Line], dict[str, Any]]:
    """Time everything with results in memory that is kept, before that a part in fresh pages."""
    fresh = []
    some = [case for case in found if case.name in FRESH]
    if not args.only and memory.fresh():
        fresh = measure(some, seconds=args.seconds / 2, rounds=args.rounds or 7)
        against_copy(fresh, next(line for line in fresh if line.name == "clone"))
    kept = memory.keep()
    lines = measure(found, seconds=args.seconds, rounds=args.rounds or 15)
    return lines, {"memory_kept": kept, "fresh_of_clone": [asdict(line) for line in fresh]}


def on_gpu(found: Sequence[Case], args: Any) -> tuple[list[Line], dict[str, Any]]:
    import device

    lines = device.measure(found, rounds=args.rounds or 7)
    if args.only:
        return lines, {}
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    plain = device.plain_calls(x)
    return lines, {"small": device.small(), "plain_us": plain, "published": PUBLISHED}


def summary(lines: Sequence[Line], more: dict[str, Any]) -> None:
    """Print what is not in the table: small tensors, quoted figures, aims reached and missed."""
    for line in more.get("small", ()):
        words = (
            f"{t:.2f} us {what}" + ("" if aim is None else f" (aim {aim:g}{', missed' * miss})")
            for t, what, aim, miss in zip(
                (line["gpu_us"], line["eager_us"]),
                ("on the GPU", "a call"),
                line["aims_us"],
                line["missed"],
                strict=True,
            )
        )
        shape = " x ".join(map(str, line["shape"]))
        inference = f"{line['inference_us']:.2f} in inference mode"
        print(f"{shape} {line['room']:6} {line['name']:28} {', '.join(words)}, {inference}")
    if "plain_us" in more:
        plain = ", ".join(f"{name} {us:.2f} us" for name, us in more["plain_us"].items())
        print(f"torch's own calls on this host: {plain}")
    for line in more.get("fresh_of_clone", ()):
        ratio, ms = line["of_copy"], line["median"] * 1e3
        print(f"into fresh pages: {line['name']:28} {ms:.2f} ms, {ratio:.2f} of x.clone()")
    for library, figures in more.get("published", {}).items():
        words = ", ".join(f"{size}: {figure:.2f}" for size, figure in figures.items())
        print(f"{library}, quoted, not measured here: {words} of a copy")
    aimed = [line for line in lines if line.aim is not None]
    missed = [line for line in aimed if line.missed]
    if aimed:
        print(f"aims: {len(aimed) - len(missed)} reached, {len(missed)} missed")
    for line in missed:
        print(f"  missed: {line.room} {line.name}: {line.of_copy:.3f}, aim {line.aim:.2f}")


def main() -> int:
    args = options()
    memory.huge_pages()
    started = time.perf_counter()
    torch.manual_seed(0)
    count = 2 if args.device == "cuda" else 1
    if args.device == "cuda" and not args.compile:
        import device

        device.compile_beforehand(sys.argv, min((os.cpu_count() or 2) - 2, 14))
        print(f"kernels compiled: {time.perf_counter() - started:.0f} s", flush=True)
    shape, dtype = (args.rows, args.columns), getattr(torch, args.dtype)
    turns = Turns([torch.randn(shape, device=args.device).to(dtype) for _ in range(count)])
    notes: list[str] = []
    found = chosen(turns, args, notes)
    if args.compile:
        compile_share(found, args.compile)
        return 0
    checked = verify(found)
    ready = time.perf_counter()
    lines, more = (on_cpu if args.device == "cpu" else on_gpu)(found, args)
    against_copy(lines, lines[0])
    order = {group: i for i, group in enumerate(dict.fromkeys(c.group for c in found))}
    lines.sort(key=lambda line: order[line.group])
    for note in notes:
        print(note)
    print(machine())
    report(f"{args.dtype} {args.rows} x {args.columns}", lines)
    summary(lines, more)
    print(
        f"{checked} results compared with the reference first ({ready - started:.0f} s, "
        f"compilation included), then {time.perf_counter() - ready:.0f} s of timing"
    )
    if args.save:
        facts = {"shape": [args.rows, args.columns], "dtype": args.dtype, "notes": notes, **more}
        print(save(args.save, lines, **facts))
    if args.sweep and args.device == "cuda":
        from sweep import sweep

        del found, turns
        torch.cuda.empty_cache()
        sweep(args.sweep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
