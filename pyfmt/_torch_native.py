# SPDX-License-Identifier: Apache-2.0
"""The native path: block-scaled tensor cores by way of Triton, on packed codes as they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfmt._torch_operands import Left, Out, Right, quantized
from pyfmt.formats import Format

# What tl.dot_scaled calls the elements.
_ELEMENTS = {"e2m1": "e2m1", "e4m3fn": "e4m3", "e5m2ieee": "e5m2"}


def constants(a: Format, b: Format, m: int) -> dict[str, Any]:
    """The compile-time arguments of the kernel for a pair of formats."""
    small = a.bits == 4 and b.bits == 4
    return {
        "A_ELEMENT": _ELEMENTS[a.element.name],
        "B_ELEMENT": _ELEMENTS[b.element.name],
        "A_PER_BYTE": 8 // a.bits,
        "B_PER_BYTE": 8 // b.bits,
        "BLOCK": a.block,
        "TILE_M": 128,
        "TILE_N": 128 if m > 64 else 64,
        "TILE_K": 256 if small else 128,
        "num_warps": 8 if m > 64 else 4,
        "num_stages": 3,
    }


def native(left: Left, right: Right, out: Out) -> Tensor:
    """y = RNE(a b^T + bias) with the products and block scales in the tensor cores."""
    from pyfmt.triton_kernels.matmul import matmul_scaled

    codes, scales, scale = quantized(left)
    assert left.format is not None
    m, n, k = left.rows, right.n, left.format.format.padded(left.k)
    y = torch.empty((m, n), dtype=out.dtype, device=codes.device)
    facts = constants(left.format.format, right.format.format, m)
    factors = [scale, right.tensor_scale]
    some = any(f is not None for f in factors)
    if some:
        one = torch.ones((), dtype=torch.float32, device=codes.device)
        factors = [one if f is None else f for f in factors]
    grid = (-(-m // facts["TILE_M"]), -(-n // facts["TILE_N"]))
    matmul_scaled[grid](
        codes.contiguous(), scales.contiguous(), right.codes.contiguous(),
        right.scales.contiguous(), y, out.bias, *factors, m, n, k, HAS_BIAS=out.bias is not None,
        HAS_FACTORS=some, **facts,
    )  # fmt: skip
    return y
