# SPDX-License-Identifier: Apache-2.0
"""Where bits and scales lie: packed codes and scale layouts."""

from __future__ import annotations

import numpy as np
from array_api_compat import device

from pyfmt import _check
from pyfmt.reference.codec import Array, namespace


def pack(codes: Array, bits: int) -> Array:
    """Pack codes along the last axis into a little-endian bit stream.

    Element i lies at bits [i * bits, (i + 1) * bits) of its row; 8 codes fill `bits` bytes.
    codes: (..., n) uint8 below 2^bits; returns (..., ceil(n * bits / 8)) uint8.
    Source: OCP MX v1.0, section 5.1 leaves packing open; this is the order of PyTorch's
    float4_e2m1fn_x2 (even element in the low nibble).
    """
    _check.pack(codes.dtype, codes.shape, bits)
    if bits == 8:
        return codes.copy()
    xp, n = namespace(codes), codes.shape[-1]
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -n % 8)]
    words = xp.pad(codes, padding).astype(np.uint64) & np.uint64(2**bits - 1)
    words = words.reshape(*codes.shape[:-1], -(-n // 8), 8)
    word = (words << (np.uint64(bits) * xp.arange(8, dtype=np.uint64))).sum(
        axis=-1, dtype=np.uint64
    )
    out = (word[..., None] >> (8 * xp.arange(bits, dtype=np.uint64))) & np.uint64(0xFF)
    out = out.astype(np.uint8).reshape(*codes.shape[:-1], -(-n // 8) * bits)
    return xp.ascontiguousarray(out[..., : -(-n * bits // 8)])


def unpack(packed: Array, bits: int, length: int) -> Array:
    """Return the first `length` codes of each packed row; the inverse of `pack`.

    packed: (..., ceil(length * bits / 8) or more) uint8; returns (..., length) uint8.
    """
    _check.unpack(packed.dtype, packed.shape, bits, length)
    if bits == 8:
        return packed[..., :length].copy()
    xp, groups = namespace(packed), -(-length // 8)
    have = packed[..., : groups * bits]
    padding = [(0, 0)] * (packed.ndim - 1) + [(0, groups * bits - have.shape[-1])]
    rows = xp.pad(have, padding).astype(np.uint64).reshape(*packed.shape[:-1], groups, bits)
    word = (rows << (8 * xp.arange(bits, dtype=np.uint64))).sum(axis=-1, dtype=np.uint64)
    out = (word[..., None] >> (np.uint64(bits) * xp.arange(8, dtype=np.uint64))) & np.uint64(
        2**bits - 1
    )
    out = out.astype(np.uint8).reshape(*packed.shape[:-1], groups * 8)
    return xp.ascontiguousarray(out[..., :length])


def to_blocked(scales: Array) -> Array:
    """Arrange scales in the tiles that Blackwell's block-scaled tensor cores read.

    Rows and columns are padded with zeros to tiles of 128 x 4; scale (r, c) of a tile lies at
    (r % 32) * 16 + (r // 32) * 4 + c, tiles follow each other row-major.
    Any library of the array API (NumPy, CuPy, torch).
    scales: (..., rows, blocks) uint8; returns (..., tiles * 512) uint8.
    Source: NVIDIA cuBLAS documentation, 1D block scaling factors layout.
    """
    xp = namespace(scales)
    *lead, rows, columns = scales.shape
    tiles_r, tiles_c = -(-rows // 128), -(-columns // 4)
    shape = (*lead, tiles_r * 128, tiles_c * 4)
    padded = xp.zeros(shape, dtype=scales.dtype, device=device(scales))
    padded[..., :rows, :columns] = scales
    tiles = padded.reshape(*lead, tiles_r, 4, 32, tiles_c, 4)
    return _swap(tiles).reshape(*lead, tiles_r * tiles_c * 512)


def from_blocked(blocked: Array, rows: int, columns: int) -> Array:
    """Return the (..., rows, columns) scales of a 128 x 4 tiled layout; inverse of `to_blocked`."""
    lead = blocked.shape[:-1]
    tiles_r, tiles_c = -(-rows // 128), -(-columns // 4)
    tiles = _swap(blocked.reshape(*lead, tiles_r, tiles_c, 32, 4, 4))
    scales = tiles.reshape(*lead, tiles_r * 128, tiles_c * 4)[..., :rows, :columns]
    return scales.reshape(*lead, rows, columns)


def _swap(tiles: Array) -> Array:
    """Exchange the second and fourth of the last five axes (its own inverse)."""
    n = tiles.ndim - 5
    return namespace(tiles).permute_dims(tiles, (*range(n), n, n + 3, n + 2, n + 1, n + 4))
