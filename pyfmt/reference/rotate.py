# SPDX-License-Identifier: Apache-2.0
"""Block Hadamard rotation, in float32 with a fixed order of additions."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyfmt import _check
from pyfmt.reference.codec import Array, from_float32, namespace, to_float32


def rotate_rows(rows: Array, size: int, signs: Array | None = None) -> Array:
    """Rotate float32 rows (..., K) by blocks of `size`; see `hadamard`. Returns float32."""
    xp = namespace(rows)
    if signs is not None:
        period = signs.reshape(-1).astype(np.float32)
        rows = rows * xp.tile(period, rows.shape[-1] // period.shape[0])
    y = rows.reshape(-1, size)
    stride = 1
    with np.errstate(invalid="ignore", over="ignore"):
        while stride < size:
            pairs = y.reshape(-1, size // (2 * stride), 2, stride)
            a, b = pairs[:, :, 0, :], pairs[:, :, 1, :]
            y = xp.stack([a + b, a - b], axis=2).reshape(-1, size)
            stride *= 2
        y = y * np.float32(2.0 ** (-(size.bit_length() - 1) / 2))
    return y.reshape(rows.shape)


def hadamard(x: Array, size: int, signs: Array | None = None, *, axis: int = -1) -> Array:
    """Rotate `x` along `axis` by an orthonormal Hadamard matrix, block by block.

    y = H (signs * x) / sqrt(size), H in Sylvester order; float32 butterflies (a + b, a - b) at
    strides 1, 2, 4, ..., then one multiply by float32(2^(-k/2)) and one rounding to x's dtype.

    x: any shape whose `axis` is a multiple of `size` (2 to 1024, a power of two), bfloat16,
    float16 or float32; signs: +-1, of length `size` or the axis's. Returns x's shape and dtype.
    NaN results are the canonical quiet NaN. Raises ValueError or TypeError on other input.
    """
    xp = namespace(x)
    _check.float_dtype(x.dtype)
    axis = _check.axis(axis, x.shape)
    _check.rotation(size, signs, x.shape[axis])
    rows = xp.moveaxis(to_float32(x), axis, -1)
    rotated = rotate_rows(xp.ascontiguousarray(rows), size, signs)
    return xp.moveaxis(from_float32(rotated, x.dtype), -1, axis)


def rotate_by_matrix(x: Any, matrix: Any, axis: int = -1) -> Any:
    """Multiply each block of B along `axis` by an orthogonal B x B matrix, in float32.

    y_block = matrix @ x_block: a GEMM in the library's order of additions, so results are within
    B * 2^-24 * sum|m||x| of the exact product rather than bit-exact.

    x: any shape and library of the array API, `axis` a multiple of B; returns float32.
    Raises ValueError for a matrix that is not square or does not divide the axis.
    """
    xp = namespace(x)
    axis = _check.axis(axis, x.shape)
    _check.matrix(matrix, x.shape[axis])
    rows = xp.moveaxis(xp.astype(x, xp.float32), axis, -1)
    blocks = rows.reshape(*rows.shape[:-1], -1, matrix.shape[0])
    rotated = xp.matmul(blocks, xp.astype(matrix, xp.float32).T).reshape(rows.shape)
    return xp.moveaxis(rotated, -1, axis)
