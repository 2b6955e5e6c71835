# SPDX-License-Identifier: Apache-2.0
"""The packed path of matmul and linear: the compiled CPU kernels (csrc/cpu/matmul.h).

Packed operands are decoded in registers or a piece at a time, never expanded in memory; sums are
float32, a result's bits depend on nothing but its inputs and the processor's instruction set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfmt._torch_operands import Left, Out, Right

_OPS: Any = torch.ops.pyfmt


def available() -> bool:
    """Whether the compiled kernels are there."""
    return hasattr(_OPS, "_matmul_cpu")


def packed(left: Left, right: Right, out: Out) -> Tensor:
    """y = RNE(a b^T + bias); rows still to be rotated or quantized are, a few at a time."""
    fmt = None if left.format is None else left.format.key
    weight = (right.codes, right.scales, right.tensor_scale, right.format.key)
    y: Tensor
    if left.codes is None and (fmt is not None or left.rotation):
        options = (left.scale_rule, left.recipe, left.clip)
        rotated = (left.rotation, left.signs)
        y = _OPS._linear_cpu.default(left.x, *weight, out.bias, fmt, *rotated, *options)
        return y
    parts = (left.x if left.codes is None else left.codes, left.scales, left.tensor_scale, fmt)
    y = _OPS._matmul_cpu.default(*parts, *weight, left.k, out.bias, out.dtype)
    return y
