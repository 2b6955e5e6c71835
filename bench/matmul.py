# SPDX-License-Identifier: Apache-2.0
"""Time matmul and linear against torch's dense products of the same run.

    python bench/matmul.py [--device cpu|cuda] [--part dense decode ...] [--save NAME]
    python bench/matmul.py --device cpu [--rows 1 16 256] [--plot docs/matmul_cpu.svg]

On a GPU all cases of a line are replays of CUDA graphs in turn, cuBLAS bfloat16 before each.
Operands are fresh random data; the baseline multiplies the tensors that were quantized. Up to 64
rows the weights rotate among copies larger than the cache. Every path is checked against float64
first, and nothing is printed after a failed check. Rivals: torch._scaled_mm in fp8 with row
scales, and gemlite where it is installed. Each line has its bound, measured in the same run
(bench/bounds.py). bench/paths.py makes the table of paths. On the CPU: bench/matmul_cpu.py.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gemlite_rival
import matmul_cpu
import torch
from bounds import Call, bound, rates
from graphs import in_turn
from harness import arguments, machine, write

import pyfmt
import pyfmt.nn
from pyfmt import _matmul_paths as paths
from pyfmt import _torch_matmul

OPS = torch.ops.pyfmt
SHAPES = ((8192, 8192), (28672, 8192), (4096, 14336))
FOLDING = ("mxfp4", "mxint4", "mxfp6_e3m2", "mxfp6_e2m3")
EXACT = ("mxint8", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4", "nvint4")
CACHE = 160 << 20
LINES: list[dict[str, Any]] = []
Tensors = Sequence[torch.Tensor]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def show(part: str, shape: tuple[int, int, int], cases: dict[str, Call], **timing: Any) -> None:
    """Time cases in turn, print and keep their lines; the first is the baseline."""
    m, n, k = shape
    found = in_turn(cases, **timing)
    base = next(iter(found.values()))[0]
    for name, (median, p20, p80) in found.items():
        rate = 2 * m * n * k / median
        floor = bound(cases[name], shape)
        LINES.append(
            {
                "part": part, "name": name, "shape": shape, "median": median, "p20": p20,
                "p80": p80, "flops_per_s": rate, "of_bf16": base / median, "bound": floor,
            }
        )  # fmt: skip
        print(
            f"{part:7} {m:5} x {n:5} x {k:5}  {name:34} {median * 1e6:9.1f} us "
            f"({p20 * 1e6:.1f} to {p80 * 1e6:.1f})  {rate / 1e12:7.1f} TFLOP/s  "
            f"{base / median:5.2f}x  {floor / median:4.2f} of the bound"
        )


class Weights:
    """A weight in copies, dense and quantized, and the calls on it."""

    def __init__(self, n: int, k: int, copies: int = 1) -> None:
        self.n, self.k = n, k
        self.dense = [randn(n, k) for _ in range(copies)]
        self.found: dict[str, list[Any]] = {}

    def of(self, fmt: str) -> list[Any]:
        if fmt not in self.found:
            self.found[fmt] = [pyfmt.quantize(w, fmt) for w in self.dense]
        return self.found[fmt]

    def out_nbytes(self, x: torch.Tensor) -> int:
        return len(x) * self.n * 2

    def bf16(self, x: torch.Tensor) -> Call:
        moved = x.nbytes + self.dense[0].nbytes + self.out_nbytes(x)
        return Call(lambda i: torch.mm(x, self.dense[i % len(self.dense)].t()), moved)

    def matmul(self, x: torch.Tensor, fmt: str, *, expanded: Tensors = (), **options: Any) -> Call:
        """Both operands quantized before."""
        qa, ws = pyfmt.quantize(x, fmt), self.of(fmt)
        left = (qa.codes, qa.scales, qa.tensor_scale, fmt)
        dtype = torch.bfloat16
        if expanded:
            options["expanded"] = expanded
        return Call(
            lambda i: OPS.matmul(
                *left, *parts(ws[i % len(ws)]), fmt, self.k, None, dtype, **options
            ),
            qa.nbytes + weight_nbytes(ws[0], expanded) + self.out_nbytes(x),
            "fp8" if fmt in FOLDING else "bf16",
        )

    def linear(
        self,
        x: torch.Tensor,
        fmt: str,
        activation: str | None,
        rotation: int = 0,
        *,
        expanded: Tensors = (),
        **options: Any,
    ) -> Call:
        ws = self.of(fmt)
        if expanded:
            options["expanded"] = expanded
        return Call(
            lambda i: OPS.linear(
                x, *parts(ws[i % len(ws)]), fmt, None, activation, rotation, **options
            ),
            x.nbytes + weight_nbytes(ws[0], expanded) + self.out_nbytes(x),
            "fp8" if activation in FOLDING and fmt in FOLDING else "bf16",
        )

    def gemlite(self, x: torch.Tensor, rival: Callable[[int], Any]) -> Call:
        return Call(rival, x.nbytes + self.of("int4")[0].nbytes + self.out_nbytes(x))

    def kept(self, fmt: str, kind: str) -> Tensors:
        q = self.of(fmt)[0]
        return OPS._expand_weight(q.codes, q.scales, fmt, self.k, kind)


def parts(q: Any) -> tuple[Any, Any, Any]:
    return q.codes, q.scales, q.tensor_scale


def weight_nbytes(q: Any, expanded: Tensors) -> int:
    """What a call reads of a weight: its codes and scales, or what was expanded of them."""
    return sum(t.nbytes for t in expanded) if expanded else q.nbytes


def fp8_rival(x: torch.Tensor, w: Weights) -> Call:
    """torch._scaled_mm on what torch would quantize by rows; its quantization is not timed."""

    def rows(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = t.float().abs().amax(1, keepdim=True) / 448
        return (t.float() / scale).to(torch.float8_e4m3fn), scale

    a, a_scale = rows(x)
    ws = [rows(t) for t in w.dense]
    return Call(
        lambda i: torch._scaled_mm(
            a, ws[i % len(ws)][0].t(), a_scale, ws[i % len(ws)][1].t(), out_dtype=torch.bfloat16
        ),
        a.nbytes + ws[0][0].nbytes + w.out_nbytes(x),
        "fp8",
    )


# ---- parts ------------------------------------------------------------------------------------


def dense(seconds: float) -> None:
    """Many rows: prequantized, online, kept, fast; fold and exact formats."""
    for n, k in SHAPES:
        w = Weights(n, k)
        for m in (8192, 4096, 1024, 256):
            x = randn(m, k)
            cases = {"cuBLAS bf16": w.bf16(x)}
            formats = FOLDING if (n, k) == SHAPES[0] else FOLDING[:1]
            for fmt in formats if m != 4096 else ():
                kept = w.kept(fmt, "fold")
                cases[f"{fmt} x {fmt}"] = w.matmul(x, fmt)
                cases[f"{fmt} x kept"] = w.matmul(x, fmt, expanded=kept)
                cases[f"rotate 32, {fmt} x {fmt}"] = w.linear(x, fmt, fmt, 32)
                cases[f"rotate 32, {fmt} x kept"] = w.linear(x, fmt, fmt, 32, expanded=kept)
                if fmt == "mxfp4":
                    cases["mxfp4 x mxfp4 fast"] = w.matmul(x, fmt, precision="fast")
            for fmt in EXACT if m >= 4096 and (n, k) == SHAPES[0] else ():
                cases[f"{fmt} x {fmt}"] = w.matmul(x, fmt)
                cases[f"rotate 32, {fmt} x {fmt}"] = w.linear(x, fmt, fmt, 32)
            cases["rival: torch fp8, prequantized"] = fp8_rival(x, w)
            rival = gemlite_rival.rival(x, w.dense) if m != 8192 else None
            if rival is not None:
                cases["rival: gemlite int4 g128"] = w.gemlite(x, rival)
            show("dense", (m, n, k), cases, seconds=seconds)
            del cases
        del w
        torch.cuda.empty_cache()


DECODE = ("mxfp4", "nvfp4", "mxint4", "nvint4", "int4", "mxfp6_e2m3", "mxint6", "mxint8", "int8")


def decode(seconds: float) -> None:
    """Few rows, weights rotated among copies: weight-only, and 4-bit activations online."""
    for n, k in ((8192, 8192), (28672, 8192)):
        copies = max(2, math.ceil(CACHE / (n * k // 2)) + 1)
        w = Weights(n, k, copies)
        for m in (1, 4, 8, 16, 32, 64):
            x = randn(m, k)
            cases = {"cuBLAS bf16": w.bf16(x)}
            for fmt in DECODE if n == 8192 else DECODE[:2]:
                cases[f"dense x {fmt}"] = w.linear(x, fmt, None)
            for fmt in ("mxfp4", "nvfp4", "mxint4"):
                cases[f"rotate 32, {fmt} x {fmt}"] = w.linear(x, fmt, fmt, 32)
            cases["rival: torch fp8, prequantized"] = fp8_rival(x, w)
            rival = gemlite_rival.rival(x, w.dense)
            if rival is not None:
                cases["rival: gemlite int4 g128"] = w.gemlite(x, rival)
            show("decode", (m, n, k), cases, seconds=seconds, rotate=copies)
        del w
        torch.cuda.empty_cache()


ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)


def sweep(seconds: float) -> None:
    """Every format at every number of rows, by the table's choice."""
    n, k = SHAPES[0]
    w = Weights(n, k, 4)
    for m in ROWS:
        x = randn(m, k)
        cases = {"cuBLAS bf16": w.bf16(x)}
        for fmt in pyfmt.FORMATS:
            cases[f"dense x {fmt}"] = w.linear(x, fmt, None)
            cases[f"{fmt} x {fmt}"] = w.linear(x, fmt, fmt)
        rotate = 4 if m <= 64 else 1
        show("sweep", (m, n, k), cases, seconds=seconds, rotate=rotate, least=3)


def check() -> None:
    """Compare every path that can serve with float64; raises where one is wrong."""
    device = _torch_matmul.machine_of(torch.device("cuda", 0))
    assert device is not None
    for m, n, k in ((5, 272, 1024), (160, 272, 1024), (2100, 272, 1024)):
        a, w = randn(m, k), randn(n, k)
        for left, right in [(f, f) for f in pyfmt.FORMATS] + [(None, f) for f in pyfmt.FORMATS]:
            fmt = None if left is None else pyfmt.get_format(left)
            call = paths.Call(fmt, "bfloat16", pyfmt.get_format(right), m, n, k)
            qw = pyfmt.quantize(w, right)
            qa = a if fmt is None else pyfmt.quantize(a, fmt)
            decoded = a.double() if fmt is None else qa.dequantize().double()
            exact = decoded @ qw.dequantize().double().t()
            weight = decoded.abs() @ qw.dequantize().double().abs().t()
            for path, words in paths.explain(call, device).items():
                if words == "able" or words.startswith("chosen"):
                    y = pyfmt.matmul(qa, qw, dtype=torch.bfloat16, path=path).double()
                    c = 2.0**-6 if path == "fold" else k * 2.0**-24
                    off = (y - exact).abs() > c * weight + 2.0**-8 * exact.abs()
                    if off.any():
                        raise SystemExit(f"wrong: {left} x {right} by {path} at M = {m}")


def errors(_: float) -> None:
    """|err| / sum|a||b| of each path in float32 over kinds of operands."""
    k = 8192
    generator = torch.Generator("cuda").manual_seed(0)

    def gaussian(rows: int) -> torch.Tensor:
        return torch.randn(rows, k, device="cuda", generator=generator)

    def wide(rows: int) -> torch.Tensor:
        powers = torch.randint(-11, 12, (rows, k // 32), device="cuda", generator=generator)
        return gaussian(rows) * torch.exp2(powers.float()).repeat_interleave(32, 1)

    def outlier(rows: int) -> torch.Tensor:
        x = gaussian(rows)
        x[:, ::1021] *= 1000
        return x

    def adversarial(rows: int) -> torch.Tensor:
        # One block in four holds one large number alone; against ones on the other side (below).
        x = torch.full((rows, k), 1.5 * 2.0**-12, device="cuda")
        x.view(rows, -1, 128)[..., :32] = 0
        x[:, ::128] = 1
        return x

    kinds = {"gaussian": gaussian, "outlier": outlier, "all-positive": lambda r: gaussian(r).abs()}
    kinds |= {"wide-spread": wide, "adversarial": adversarial}
    cases = [("mxfp4", "mxfp4", "fold", "full"), ("mxfp4", "mxfp4", "fold", "fast")]
    cases += [("mxfp6_e3m2", "mxfp6_e3m2", "fold", "full"), ("mxfp4", "mxfp4", "exact", "full")]
    cases += [("mxint8", "mxint8", "exact", "full"), ("nvfp4", "nvfp4", "exact", "full")]
    cases += [(None, "mxfp4", p, "full") for p in ("skinny", "wide", "exact", "portable")]
    for kind, make in kinds.items():
        for left, right, path, precision in cases:
            m = 16 if path == "skinny" else 256
            a, w = make(m), make(512)
            if kind == "adversarial":
                w = torch.ones_like(w)
            qw = pyfmt.quantize(w, right)
            qa = a.bfloat16() if left is None else pyfmt.quantize(a, left)
            decoded = qa.double() if left is None else qa.dequantize().double()
            values = qw.dequantize().double()
            try:
                y = pyfmt.matmul(qa, qw, dtype=torch.float32, path=path, precision=precision)
            except ValueError:
                continue
            again = pyfmt.matmul(qa, qw, dtype=torch.float32, path=path, precision=precision)
            if not torch.equal(y, again):
                raise SystemExit(f"{path}: other bits the second time")
            weight = decoded.abs() @ values.abs().t()
            c = float(((y.double() - decoded @ values.t()).abs() / weight).max())
            name = f"{left or 'dense'} x {right} {path}" + (" fast" if precision == "fast" else "")
            LINES.append({"part": "errors", "name": name, "operands": kind, "c": c})
            print(f"errors  {name:34} {kind:14} {c:.2e}")


def calls(_: float) -> None:
    """Microseconds of the host for a whole eager call, small enough that the device never waits."""
    x = randn(4, 256)
    lin = torch.nn.Linear(256, 256, bias=False, device="cuda", dtype=torch.bfloat16)
    found: dict[str, Callable[[], Any]] = {"nn.Linear bf16": lambda: lin(x)}
    for weight, activation, rotation in (
        ("mxfp4", None, None), ("nvfp4", None, None), ("mxfp4", "mxfp4", 32), ("mxint8", None, None)
    ):  # fmt: skip
        q = pyfmt.nn.QuantLinear.from_linear(lin, weight, activation, rotation)
        name = f"QuantLinear {weight}" + (f", rotate 32, {activation}" if activation else "")
        found[name] = lambda q=q: q(x)
    with torch.inference_mode():
        for name, call in found.items():
            best = math.inf
            for _ in range(5):
                for _ in range(20):
                    call()
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(300):
                    call()
                best = min(best, (time.perf_counter() - start) / 300)
            torch.cuda.synchronize()
            LINES.append({"part": "calls", "name": name, "median": best})
            print(f"calls   {name:40} {best * 1e6:6.1f} us")


PARTS = {f.__name__: f for f in (errors, calls, dense, decode, sweep)}


def run(args: Any) -> None:
    """Check, then time the parts of `args.part`; print and save their lines."""
    print(json.dumps(machine()))
    start = time.perf_counter()
    check()
    print(json.dumps(rates()))
    with torch.no_grad():
        for part in args.part or [name for name in PARTS if name != "sweep"]:
            began = time.perf_counter()
            PARTS[part](args.seconds or 0.3)
            print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"all: {time.perf_counter() - start:.0f} s")
    if args.save:
        print(write(args.save, LINES, rates=rates()))


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(seconds=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where one is")
    parser.add_argument("--part", nargs="+", help="parts to time; default: all but sweep")
    parser.add_argument("--json", dest="save", metavar="PATH", help="the same as --save")
    parser.add_argument("--rows", type=int, nargs="+", help="CPU: numbers of rows of x")
    parser.add_argument("--plot", type=Path, help="CPU: draw time against rows of x")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    parts = PARTS if args.device == "cuda" else matmul_cpu.PARTS
    for part in args.part or ():
        if part not in parts:
            parser.error(f"--part: {args.device} has {', '.join(parts)}, got {part!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible; leave it out, or pass --device cpu")
    run(args) if args.device == "cuda" else matmul_cpu.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
