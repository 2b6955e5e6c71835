# SPDX-License-Identifier: Apache-2.0
"""The same work by others, timed in the same run: torchao, eager formulas, torch.mm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import GIVEN, Turns
from harness import Case

import pyfmt

# Fractions of a copy's rate on an H200, by size: quoted as known, not measured in this run.
PUBLISHED = {
    "fast-hadamard-transform": {32: 0.05, 64: 0.10, 128: 0.21, 256: 0.41, 512: 0.80, 1024: 0.52}
}
# torchao's nearest format to each of ours: no other library has integer ones.
NEAREST = {"mxfp4": "mxfp4", "mxint8": "mxfp8_e4m3", "nvfp4": "nvfp4", "mxfp8_e4m3": "mxfp8_e4m3"}


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


def torchao_quantize(name: str, rule: str = "RCEIL", given: Any = None) -> Any:
    """Return torchao's quantizer of a format, as a function of x; ImportError without torchao."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    if name == "nvfp4":
        if given is not None:
            return lambda x: nvfp4_quantize(x, 16, given)
        return lambda x: nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.float().abs().max()))
    dtype = torch.float4_e2m1fn_x2 if name == "mxfp4" else torch.float8_e4m3fn
    mode = ScaleCalculationMode[rule]
    return lambda x: to_mx(x, dtype, 32, mode)


def rivals(turns: Turns, device: str, notes: list[str]) -> list[Case]:
    """Return the rivals, each named with what it is the rival of; what is missing goes to notes."""
    x, found = turns.xs[0], []
    n = x.numel()

    def add(name: str, call: Callable[[torch.Tensor], Any], rival_of: str, count: int = 0) -> None:
        found.append(Case(name, lambda: call(turns.x), count, n, "rivals", rival_of))

    try:
        for ours, theirs in NEAREST.items():
            suffix = "" if ours == theirs else f" (for {ours})"
            if device == "cpu":
                if ours != "mxfp8_e4m3":
                    add(f"torchao {theirs}{suffix}", torchao_quantize(theirs), f"quantize {ours}")
                continue
            if suffix:
                continue
            given = torch.tensor(GIVEN, device=device) if theirs == "nvfp4" else None
            for rule in ("RCEIL", "FLOOR") if given is None else ("",):
                call = torch.compile(torchao_quantize(theirs, rule, given))
                name = " ".join(filter(None, ("torchao", theirs, rule.lower(), "compiled")))
                add(name, call, f"quantize {ours}")
    except ImportError as error:
        notes.append(f"torchao is left out: {error}")
    for name in ("mxfp4", "mxint8"):
        formula: Callable[..., Any] = lambda y, f=name: eager_fake_quantize(y, f)  # noqa: E731
        if device == "cpu":
            add(f"eager formula {name}", formula, f"fake_quantize {name}")
    if device == "cuda":
        add("torch.compile of an eager mxfp4", torch.compile(eager_mxfp4), "quantize mxfp4")
        for size in (32, 128, 1024):
            eye = torch.eye(size, device=device)
            h = pyfmt.hadamard(eye, size).to(x.dtype)
            product: Callable[..., Any] = lambda y, h=h: torch.mm(y.view(-1, len(h)), h)  # noqa: E731
            add(f"torch.mm, block {size}", product, f"hadamard {size}", 2 * x.nbytes)
    return found
