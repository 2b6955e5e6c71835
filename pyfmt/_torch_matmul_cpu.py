# SPDX-License-Identifier: Apache-2.0
"""matmul and linear on CPU tensors: one call of the compiled kernels (csrc/cpu/matmul.h).

Packed operands are decoded in registers or once per panel, never expanded in memory; sums are
float32, a result's bits depend on nothing but its inputs and the processor's instruction set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfmt import _torch_matmul
from pyfmt._torch_matmul import _check_linear, _check_matmul

_OPS: Any = torch.ops.pyfmt


def matmul(
    a: Tensor,
    a_scales: Tensor | None,
    a_tensor_scale: Tensor | None,
    a_format: str | None,
    b: Tensor,
    b_scales: Tensor,
    b_tensor_scale: Tensor | None,
    b_format: str,
    k: int,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    path: str | None = None,
    precision: str = "full",
    batch_invariant: bool = False,
    expanded: Sequence[Tensor] | None = None,
) -> Tensor:
    """y = a b^T + bias; a of shape (*lead, K) dense or quantized, b of shape (N, K) quantized.

    What the GPU's paths are told is theirs to refuse; "portable" is expansion and a dense GEMM.
    """
    if path is not None or precision != "full" or batch_invariant or expanded:
        parts = (a, a_scales, a_tensor_scale, a_format, b, b_scales, b_tensor_scale, b_format, k)
        how = (path, precision, batch_invariant, expanded)
        return _torch_matmul.matmul(*parts, bias, dtype, *how)
    out = _check_matmul(a, a_scales, a_format, b, k, bias, dtype)
    left = (a, a_scales, a_tensor_scale, a_format)
    y: Tensor = _OPS._matmul_cpu.default(*left, b, b_scales, b_tensor_scale, b_format, k, bias, out)
    return y


def linear(
    x: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor | None,
    w_format: str,
    bias: Tensor | None = None,
    activation: str | None = None,
    rotation: int = 0,
    signs: Tensor | None = None,
    scale_rule: str | None = None,
    recipe: str | None = None,
    clip: str = "symmetric",
    expanded: Sequence[Tensor] | None = None,
    path: str | None = None,
    precision: str = "full",
    batch_invariant: bool = False,
) -> Tensor:
    """matmul(quantize(x, activation, rotation=...), w) + bias in x's dtype.

    Without an activation format the left operand is hadamard(x), rounded to x's dtype.
    """
    if path is not None or precision != "full" or batch_invariant or expanded:
        parts = (x, w_codes, w_scales, w_tensor_scale, w_format, bias, activation, rotation, signs)
        how = (expanded, path, precision, batch_invariant)
        return _torch_matmul.linear(*parts, scale_rule, recipe, clip, *how)
    _check_linear(x, w_codes, bias)
    weight = (w_codes, w_scales, w_tensor_scale, w_format)
    options = (scale_rule, recipe, clip)
    y: Tensor = _OPS._linear_cpu.default(x, *weight, bias, activation, rotation, signs, *options)
    return y
