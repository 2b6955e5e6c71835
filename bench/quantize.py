# SPDX-License-Identifier: Apache-2.0
"""Quantize, dequantize, fake-quantize and rotate + quantize on the CPU, against a copy and torchao.

    python bench/quantize.py [--rows 4096 --columns 4096] [--save NAME]

Bytes count what a call must read and write: input and codes and scales. Every kernel's result is
checked against the reference before anything is timed; a failed check stops the run.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from harness import Case, against_copy, arguments, machine, measure, report, save

import pyfmt
import pyfmt.ops

FORMATS = tuple(pyfmt.FORMATS)
# The rivals' nearest format: no other library has integer ones.
NEAREST = {"mxfp4": "mxfp4", "mxint8": "mxfp8_e4m3", "nvfp4": "nvfp4"}
ROTATIONS = (16, 32, 64, 128)


def check(x: torch.Tensor) -> None:
    """Compare every timed verb with the reference on a corner of x; AssertionError if unequal."""
    part = x[:8].contiguous()
    for name in FORMATS:
        for rotation in (None, *ROTATIONS):
            ours = pyfmt.quantize(part, name, rotation=rotation)
            oracle = pyfmt.quantize(part, name, rotation=rotation, backend="reference")
            assert torch.equal(ours.codes, oracle.codes), f"{name}: codes differ"
            assert torch.equal(ours.scales, oracle.scales), f"{name}: scales differ"
            same = torch.equal(ours.dequantize("bfloat16"), oracle.dequantize("bfloat16"))
            assert same, f"{name}: values differ"
        fake = pyfmt.fake_quantize(part, name)
        assert torch.equal(fake, pyfmt.fake_quantize(part, name, backend="reference")), name


def eager_fake_quantize(x: torch.Tensor, name: str) -> torch.Tensor:
    """The formula as studies write it: a dozen eager tensor operations (MX formats)."""
    element = pyfmt.get_format(name).element
    blocks = x.float().reshape(-1, 32)
    amax = blocks.abs().amax(dim=1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2(amax / element.max)))
    y = blocks / scale
    if element.kind == "int":
        step = 2.0**element.step_exp
    else:
        emin = 1 - element.bias
        step = torch.exp2(torch.floor(torch.log2(y.abs())).clamp(min=emin) - element.man)
    y = (torch.round(y / step) * step).clamp(-element.max, element.max)
    return (y * scale).to(x.dtype).reshape(x.shape)


def torchao_quantize(name: str) -> Any:
    """Return torchao's quantizer of a format, as a function of x."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    if name == "nvfp4":
        return lambda x: nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.float().abs().max()))
    dtype = torch.float4_e2m1fn_x2 if name == "mxfp4" else torch.float8_e4m3fn
    return lambda x: to_mx(x, dtype, 32, ScaleCalculationMode.RCEIL)


def cases(x: torch.Tensor) -> list[Case]:
    """Return everything to time on x."""
    ops, n, size = torch.ops.pyfmt, x.numel(), x.nbytes
    out = torch.empty_like(x)
    found = [Case("copy", lambda: out.copy_(x), 2 * size, n, "copy")]
    for name in FORMATS:
        q = pyfmt.quantize(x, name)
        both = size + q.nbytes
        found += [
            Case(f"quantize {name}", lambda f=name: ops.quantize(x, f), both, n, "quantize"),
            Case(
                f"dequantize {name}",
                lambda q=q: ops.dequantize(
                    q.codes, q.scales, q.tensor_scale, q.format.key, q.shape, -1, x.dtype
                ),
                both,
                n,
                "dequantize",
            ),
            Case(
                f"fake_quantize {name}",
                lambda f=name: ops.fake_quantize(x, f),
                2 * size,
                n,
                "fake_quantize",
            ),
        ]
    both = size + pyfmt.quantize(x, "mxfp4").nbytes
    for rotation in ROTATIONS:
        found.append(
            Case(
                f"rotate {rotation} + quantize mxfp4",
                lambda r=rotation: ops.quantize(x, "mxfp4", rotation=r),
                both,
                n,
                "rotate + quantize",
            )
        )
        found.append(
            Case(
                f"hadamard {rotation}",
                lambda r=rotation: ops.hadamard(x, r),
                2 * size,
                n,
                "hadamard",
            )
        )
    return found


def rivals(x: torch.Tensor) -> list[Case]:
    """Return the rivals, each named with what it is the rival of."""
    n, found = x.numel(), []
    for ours, theirs in NEAREST.items():
        call = torchao_quantize(theirs)
        found.append(
            Case(
                f"torchao {theirs}" + ("" if ours == theirs else f" (for {ours})"),
                lambda call=call: call(x),
                0,
                n,
                "rivals",
                f"quantize {ours}",
            )
        )
    for name in ("mxfp4", "mxint8"):
        found.append(
            Case(
                f"eager formula {name}",
                lambda f=name: eager_fake_quantize(x, f),
                0,
                n,
                "rivals",
                f"fake_quantize {name}",
            )
        )
    return found


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--no-rivals", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(args.rows, args.columns).to(torch.bfloat16)
    check(x)
    everything = sorted(cases(x), key=lambda c: c.group != "copy") + (
        [] if args.no_rivals else rivals(x)
    )
    lines = measure(everything, seconds=args.seconds, rounds=args.rounds)
    against_copy(lines, lines[0])
    order = {group: i for i, group in enumerate(dict.fromkeys(c.group for c in everything))}
    lines.sort(key=lambda line: order[line.group])
    print(machine())
    report(f"bfloat16 {args.rows} x {args.columns}", lines)
    if args.save:
        print(save(args.save, lines, shape=[args.rows, args.columns], dtype="bfloat16"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
