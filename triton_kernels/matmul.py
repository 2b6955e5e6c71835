# SPDX-License-Identifier: Apache-2.0
"""Matmul of packed codes on block-scaled tensor cores: tl.dot_scaled, one tile of y a program.

On compute capability 10 and 12 it becomes tcgen05.mma or mma.sync with block scales; elsewhere, and
in Triton's interpreter, the same product by way of bfloat16. Scales lie as quantize wrote them,
(rows, blocks); the compiler moves them to where the instructions want them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _as_element(codes, ELEMENT: tl.constexpr):
    """Bytes as what dot_scaled calls them; two e2m1 codes stay a byte."""
    if ELEMENT == "e4m3":
        codes = codes.to(tl.float8e4nv, bitcast=True)
    if ELEMENT == "e5m2":
        codes = codes.to(tl.float8e5, bitcast=True)
    return codes


@triton.jit
def _as_scale(codes, BLOCK: tl.constexpr):
    """Bytes as scales: E4M3 for blocks of 16; E8M0 bytes are taken as they are."""
    if BLOCK == 16:
        codes = codes.to(tl.float8e4nv, bitcast=True)
    return codes


@triton.jit
def matmul_scaled(
    a, a_scales, b, b_scales, y, bias, a_factor, b_factor, m, n, k,
    A_ELEMENT: tl.constexpr, B_ELEMENT: tl.constexpr, A_PER_BYTE: tl.constexpr,
    B_PER_BYTE: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_FACTORS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """y (m, n) = a b^T (* a_factor * b_factor) (+ bias); k: padded to whole blocks of codes."""
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    columns = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    row_there, column_there = rows < m, columns < n
    far_rows, far_columns = rows.to(tl.int64), columns.to(tl.int64)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for first in range(0, k, TILE_K):
        at = first // A_PER_BYTE + tl.arange(0, TILE_K // A_PER_BYTE)
        there = row_there[:, None] & (at < k // A_PER_BYTE)[None, :]
        x = tl.load(a + far_rows[:, None] * (k // A_PER_BYTE) + at[None, :], there, other=0)
        at = first // B_PER_BYTE + tl.arange(0, TILE_K // B_PER_BYTE)
        there = column_there[None, :] & (at < k // B_PER_BYTE)[:, None]
        w = tl.load(b + far_columns[None, :] * (k // B_PER_BYTE) + at[:, None], there, other=0)
        at = first // BLOCK + tl.arange(0, TILE_K // BLOCK)
        inside = (at < k // BLOCK)[None, :]
        place = far_rows[:, None] * (k // BLOCK) + at[None, :]
        x_scale = tl.load(a_scales + place, row_there[:, None] & inside, other=0)
        place = far_columns[:, None] * (k // BLOCK) + at[None, :]
        w_scale = tl.load(b_scales + place, column_there[:, None] & inside, other=0)
        total = tl.dot_scaled(
            _as_element(x, A_ELEMENT), _as_scale(x_scale, BLOCK), A_ELEMENT,
            _as_element(w, B_ELEMENT), _as_scale(w_scale, BLOCK), B_ELEMENT, total,
        )  # fmt: skip
    if HAS_FACTORS:
        total = total * (tl.load(a_factor) * tl.load(b_factor))
    if HAS_BIAS:
        total += tl.load(bias + columns, column_there, other=0.0).to(tl.float32)[None, :]
    out = y + far_rows[:, None] * n + columns[None, :]
    tl.store(out, total.to(y.dtype.element_ty), row_there[:, None] & column_there[None, :])
