# SPDX-License-Identifier: Apache-2.0
"""The exact product of decoded operands, rounded once; and the product block by block."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyfmt.reference.codec import Array, from_float32, namespace


def matmul(a: Array, b: Array, bias: Array | None = None, *, dtype: Any = np.float32) -> Array:
    """Multiply decoded operands: y = a b^T + bias, summed in float64, rounded to `dtype`.

    a: (..., M, K), b: (N, K), bias: (N,), all float32 values; returns (..., M, N) in `dtype`.
    Rooms with float32 accumulation are held to |err| <= c * sum|a||b| + half an output ulp of it.
    """
    xp = namespace(a)
    with np.errstate(invalid="ignore", over="ignore"):
        y = xp.matmul(a.astype(np.float64), b.astype(np.float64).T)
        if bias is not None:
            y = y + bias.astype(np.float64)
        return from_float32(y.astype(np.float32), dtype)


def matmul_by_blocks(
    a: Array,
    a_scales: Array,
    b: Array,
    b_scales: Array,
    block: int,
    bias: Array | None = None,
    *,
    dtype: Any = np.float32,
) -> Array:
    """Multiply in the order of the integer kernels: one rounded term and one addition a block.

    d_k = sum of a_i b_i over block k, exact        t_k = RNE(d_k * sa_k * sb_k)
    s_0 = 0, s_(k+1) = RNE(s_k + t_k)               y = RNE_dtype(RNE(s + bias))

    a: (M, K), b: (N, K): elements without their scales, integers times one power of two; a_scales:
    (M, blocks), b_scales: (N, blocks): powers of two or NaN, float32; bias: (N,). The last block
    may be cut by K. Returns (M, N) in `dtype`: bit for bit what every level of the CPU gives where
    both operands have E8M0 scales over `block` elements.
    """
    xp = namespace(a)
    sums = xp.zeros((a.shape[0], b.shape[0]), dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for k in range(a_scales.shape[1]):
            part = slice(k * block, (k + 1) * block)
            dot = xp.matmul(a[:, part].astype(np.float64), b[:, part].astype(np.float64).T)
            left = a_scales[:, k, None].astype(np.float64)
            term = dot * left * b_scales[None, :, k].astype(np.float64)
            sums = sums + term.astype(np.float32)
        if bias is not None:
            sums = sums + bias.astype(np.float32)
        return from_float32(sums, dtype)
