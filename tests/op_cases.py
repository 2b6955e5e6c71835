# SPDX-License-Identifier: Apache-2.0
"""What the tests of torch.ops.pyfmt share."""

from __future__ import annotations

import torch

import pyfmt.ops  # noqa: F401

ops = torch.ops.pyfmt

# One of each kind: both scale widths, both blocks, whole rows, odd bit widths, unsigned.
FORMATS = ("mxfp4", "nvfp4", "mxfp6_e2m3", "int4-brow-fp16", "e2m1-b16x16-e4m3-ts", "uint3-b7-e8m0")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(grad)


def quantized(x: torch.Tensor, fmt: str, **options: object) -> tuple[object, ...]:
    """Codes, scales, tensor scale (or None) and format, as matmul and linear take them."""
    codes, scales, tensor_scale = ops.quantize(x, fmt, **options)
    return codes, scales, tensor_scale if tensor_scale.numel() else None, fmt


def decoded(q: tuple[object, ...], k: int) -> torch.Tensor:
    codes = q[0]
    return ops.dequantize(*q, (*codes.shape[:-1], k))
