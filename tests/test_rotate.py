# SPDX-License-Identifier: Apache-2.0
"""Block Hadamard: its matrix, its order of additions, and rotation fused into quantize."""

from __future__ import annotations

import decimal

import ml_dtypes
import numpy as np
import pytest

from pyfmt import reference
from pyfmt.formats import FORMATS, ROTATION_SIZES, get_format
from tests import grids, mismatch
from tests.grids import BF16, DTYPES, FP32
from tests.rooms import Room, same_everywhere, same_quantized

FUSED = [
    "mxfp4",
    "mxint8",
    "nvfp4",
    "int4",
    "e3m1-b5-e8m0",
    "e2m1-b16x16-e4m3-ts",
    "int8-brow-fp16",
]


def sylvester(size: int) -> np.ndarray:
    """H of +1 and -1: entry (i, j) is -1 where i and j share an odd number of one bits."""
    index = np.arange(size)
    return np.array([[(-1) ** bin(i & j).count("1") for j in index] for i in index], np.float64)


def norm(size: int) -> np.float32:
    """The float32 nearest to 1 / sqrt(size), by way of fifty digits."""
    with decimal.localcontext() as context:
        context.prec = 50
        return np.float32(1 / decimal.Decimal(size).sqrt())


def by_hand(row: np.ndarray, size: int, signs: np.ndarray | None) -> np.ndarray:
    """One row, one float32 addition at a time, in the order that the design fixes."""
    y = row.astype(np.float32)
    if signs is not None:
        y = y * np.resize(signs.astype(np.float32), y.shape)
    for start in range(0, len(y), size):
        stride = 1
        while stride < size:
            for i in range(size):
                if not i & stride:
                    a, b = y[start + i], y[start + i + stride]
                    y[start + i], y[start + i + stride] = a + b, a - b
            stride *= 2
    return y * norm(size)


@pytest.mark.parametrize("size", ROTATION_SIZES)
def test_integers_are_rotated_exactly(implementations: list[Room], size: int) -> None:
    # Sums of integers below 2^24 are exact: every room must give the matrix product.
    rng = np.random.default_rng(size)
    x = rng.integers(-128, 128, (3, 2 * size)).astype(np.float32)
    exact = x.reshape(3, 2, size).astype(np.float64) @ sylvester(size)
    want = (exact.astype(np.float32) * norm(size)).reshape(3, 2 * size)
    same_everywhere(implementations, want, "hadamard", x, size)


@pytest.mark.parametrize("size", [2, 4, 16, 64, 256, 1024])
def test_an_even_power_is_its_own_inverse_on_integers(size: int) -> None:
    rng = np.random.default_rng(size)
    x = rng.integers(-128, 128, (2, size)).astype(np.float32)
    once = reference.hadamard(x, size)
    if np.log2(size) % 2 == 0:
        assert np.array_equal(reference.hadamard(once, size), x)
    # Rotations keep lengths.
    assert np.allclose(np.linalg.norm(once, axis=1), np.linalg.norm(x, axis=1), rtol=1e-6)


@pytest.mark.parametrize("size", [2, 4, 8, 32, 128])
@pytest.mark.parametrize("signed", [False, True])
def test_the_order_of_additions(implementations: list[Room], size: int, signed: bool) -> None:
    x = grids.noise(4, 2 * size, seed=size) * np.float32(1 + 2**-20)
    for length in (size, 2 * size) if signed else (0,):
        signs = np.where(np.random.default_rng(1).random(length) < 0.5, -1.0, 1.0)
        signs = signs.astype(np.float32) if signed else None
        want = np.stack([by_hand(row, size, signs) for row in x])
        same_everywhere(implementations, want, "hadamard", x, size, signs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ROTATION_SIZES)
def test_rooms_equal_the_reference(every_room: list[Room], size: int, dtype: str) -> None:
    x = grids.matrix(get_format(f"e2m1-b{size}-e8m0"), DTYPES[dtype], 60)
    x = np.ascontiguousarray(x[:, : x.shape[1] // size * size])
    signs = np.where(np.arange(size) % 3, 1.0, -1.0).astype(np.float32)
    for options in ({}, {"signs": signs}):
        want = reference.hadamard(x, size, **options)
        same_everywhere(every_room, want, "hadamard", x, size, **options)


def test_rooms_on_axes_strides_and_empty_arrays(every_room: list[Room]) -> None:
    x = grids.noise(64, 96, BF16)
    for y, axis in [
        (x, 0),
        (x.T, 1),
        (x[:, ::3], 1),
        (x[1:33, 5:69], 0),
        (x.reshape(8, 8, 96), 1),
        (x[:0], 1),
        (x[:, :0], 0),
        (x[:32, :1], 0),
    ]:
        size = 32 if y.shape[axis] % 8 or y.shape[axis] >= 32 else 8
        want = reference.hadamard(y, size, axis=axis)
        same_everywhere(every_room, want, "hadamard", y, size, axis=axis)


def test_nan_spoils_its_block_only_and_is_canonical(implementations: list[Room]) -> None:
    x = np.ones((1, 64), np.float32)
    x[0, 5] = np.array(0xFFC12345, np.uint32).view(np.float32)
    x[0, 40] = np.inf
    want = reference.hadamard(np.ones((1, 64), np.float32), 16)
    want[0, :16] = np.nan
    want[0, 32:48] = np.where(sylvester(16)[8] > 0, np.inf, -np.inf)
    same_everywhere(implementations, want, "hadamard", x, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", FUSED)
def test_rotation_fused_into_quantize(implementations: list[Room], spec: str, dtype: str) -> None:
    """quantize(x, rotation=n) = quantize(hadamard(x.float(), n)), bit for bit."""
    fmt = get_format(spec)
    x = grids.noise(9, 320, DTYPES[dtype])
    x[3, 70], x[5, 300] = np.nan, np.inf
    signs = np.where(np.random.default_rng(0).random(320) < 0.5, -1.0, 1.0).astype(np.float32)
    options = {"rounding": "stochastic", "seed": 9}
    for size, given in ((32, None), (64, signs), (16, signs[:16]), (2, None)):
        rotated = reference.hadamard(x.astype(np.float32), size, given)
        codes, scales, tensor_scale = reference.quantize(rotated, fmt, **options)
        for room in implementations:
            got = room.quantize(x, fmt, rotation=size, signs=given, **options)
            what = f"{room.name} {spec} rotation {size}"
            mismatch.same_scales(f"{what} scales", got[1], scales, fmt)
            mismatch.same_shape(f"{what} codes", got[0], codes)
            assert np.array_equal(got[0], codes), f"{what}: codes"
            if tensor_scale is not None:
                mismatch.same_floats(what, np.asarray(got[2]), np.asarray(tensor_scale))


@pytest.mark.parametrize("name", FORMATS)
def test_fused_rotation_of_every_size(every_room: list[Room], name: str) -> None:
    x = grids.noise(3, 1024, BF16)
    for size in ROTATION_SIZES:
        same_quantized(every_room, x, FORMATS[name], rotation=size)
    same_quantized(every_room, x.T, FORMATS[name], axis=0, rotation=128)


def test_signs_of_any_float_dtype_count_the_same(implementations: list[Room]) -> None:
    x = grids.noise(2, 64)
    signs = np.where(np.arange(32) % 5, 1.0, -1.0)
    want = reference.hadamard(x, 32, signs.astype(np.float32))
    for dtype in (FP32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8):
        same_everywhere(implementations, want, "hadamard", x, 32, signs.astype(dtype))
