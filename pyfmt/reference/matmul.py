# SPDX-License-Identifier: Apache-2.0
"""The exact product of decoded operands, rounded once."""

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
