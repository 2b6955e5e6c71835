# SPDX-License-Identifier: Apache-2.0
"""torch.ops.pyfmt by the Triton kernels, for machines where the compiled GPU library is not built.

Triton itself is imported by the first call. Wrong input raises RuntimeError with the sentences of
the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfmt._torch_matmul import raw
from pyfmt.backends import triton
from pyfmt.formats import get_format


def _here(x: Tensor, **others: Tensor | None) -> None:
    """Expect all tensors on one device, and a tensor scale to be one float32 number."""
    for what, t in others.items():
        if t is None:
            continue
        if t.device != x.device:
            raise RuntimeError(
                f"{what}: expected a tensor on the device of the others, {x.device}; move it there "
                "with .to()"
            )
        if what == "tensor_scale" and (t.dtype != torch.float32 or t.numel() != 1):
            raise RuntimeError(
                f"tensor_scale: expected one float32 number, got {t.numel()} of dtype "
                f"{str(t.dtype).removeprefix('torch.')}"
            )


def _call(verb: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return raw(lambda: verb(*args, **options))


def quantize(
    x: Tensor,
    format: str,
    axis: int = -1,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Tensor | None = None,
    rotation: int = 0,
    signs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    fmt = raw(get_format, format)
    _here(x, tensor_scale=tensor_scale, signs=signs)
    codes, scales, stored = _call(
        triton.quantize,
        x,
        fmt,
        axis=axis,
        scale_rule=scale_rule,
        recipe=recipe,
        rounding=rounding,
        seed=seed,
        clip=clip,
        tensor_scale=tensor_scale,
        rotation=rotation,
        signs=signs,
    )
    return codes, scales, x.new_empty((0,), dtype=torch.float32) if stored is None else stored


def dequantize(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    shape: Sequence[int],
    axis: int = -1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    fmt = raw(get_format, format)
    _here(codes, scales=scales, tensor_scale=tensor_scale)
    y: Tensor = _call(
        triton.dequantize, codes, scales, tensor_scale, fmt, shape, axis=axis, dtype=dtype
    )
    return y


def fake_quantize(
    x: Tensor,
    format: str,
    axis: int = -1,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Tensor | None = None,
) -> Tensor:
    fmt = raw(get_format, format)
    _here(x, tensor_scale=tensor_scale)
    y: Tensor = _call(
        triton.fake_quantize,
        x,
        fmt,
        axis=axis,
        scale_rule=scale_rule,
        recipe=recipe,
        rounding=rounding,
        seed=seed,
        clip=clip,
        tensor_scale=tensor_scale,
    )
    return y


def hadamard(x: Tensor, size: int, signs: Tensor | None = None, axis: int = -1) -> Tensor:
    _here(x, signs=signs)
    y: Tensor = _call(triton.hadamard, x, size, signs, axis=axis)
    return y


def pack(codes: Tensor, bits: int) -> Tensor:
    y: Tensor = _call(triton.pack, codes, bits)
    return y


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    y: Tensor = _call(triton.unpack, packed, bits, length)
    return y


def amax(x: Tensor, block: int | None = None, axis: int = -1) -> Tensor:
    y: Tensor = _call(triton.amax, x, block, axis=axis)
    return y


def register(library: Any, key: str = "CUDA") -> None:
    """Register the kernels of all verbs that hold arithmetic of their own for a dispatch key."""
    for kernel in (quantize, dequantize, fake_quantize, hadamard, pack, unpack, amax):
        library.impl(kernel.__name__, kernel, key)
