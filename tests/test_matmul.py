# SPDX-License-Identifier: Apache-2.0
"""Matmul of decoded values: exact cases first, then the stated bound against exact sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyfmt
from pyfmt.formats import FORMATS
from tests import mismatch
from tests.grids import BF16, DTYPES, noise
from tests.rooms import to_numpy, to_torch

ROOMS = [("numpy", "reference"), ("torch", "reference"), ("numpy", "cpu"), ("torch", "cpu")]
PAIRS = [(name, name) for name in FORMATS] + [
    ("mxint8", "mxfp4"), ("mxfp8_e4m3", "mxfp4"), ("nvfp4", "int4"), ("int8", "mxint4"),
]  # fmt: skip
# Half an ulp of each output dtype, relative; bf16 and fp16 are rounded once from float32.
HALF_ULP = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


@pytest.fixture(params=ROOMS, ids="-".join)
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def multiply(
    backend: tuple[str, str],
    a: np.ndarray,
    b: np.ndarray,
    formats: tuple[str | None, str],
    bias: np.ndarray | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The product in a room, and the decoded operands as float64."""
    library, room = backend
    give = to_torch if library == "torch" else lambda x: x
    qb = pyfmt.quantize(give(b), formats[1], backend=room)
    qa = give(a) if formats[0] is None else pyfmt.quantize(give(a), formats[0], backend=room)
    y = to_numpy(pyfmt.matmul(qa, qb, give(bias), backend=room, **options))
    left = a if formats[0] is None else to_numpy(qa.dequantize(backend="reference"))
    right = to_numpy(qb.dequantize(backend="reference"))
    return y, left.astype(np.float64), right.astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", [("mxint8", "mxint8"), ("mxfp4", "mxint4"), ("int8", "int4")])
def test_exact_where_all_partial_sums_are(
    backend: tuple[str, str], formats: tuple[str, str], dtype: str
) -> None:
    # Small integers with one maximum a block: powers of two for scales, sums far below 2^24.
    rng = np.random.default_rng(0)
    a = rng.integers(-3, 4, (37, 256)).astype(np.float32)
    b = rng.integers(-3, 4, (19, 256)).astype(np.float32)
    largest = {"mxint8": 4, "mxfp4": 4, "mxint4": 4, "int8": 127, "int4": 7}
    a[:, ::32], b[:, ::32] = largest[formats[0]], largest[formats[1]]
    bias = rng.integers(-50, 50, 19).astype(np.float32)
    y, left, right = multiply(backend, a, b, formats, bias, dtype=DTYPES[dtype].name)
    assert np.array_equal(left, a) and np.array_equal(right, b)
    want = (left @ right.T + bias).astype(np.float32).astype(DTYPES[dtype])
    mismatch.same_floats(f"{backend} {formats}", y, want)


@pytest.mark.parametrize("formats", PAIRS, ids="-".join)
def test_within_the_stated_bound(backend: tuple[str, str], formats: tuple[str, str]) -> None:
    a, b = noise(33, 384, seed=1) / 256, noise(21, 384, seed=2)  # float16 holds the sums
    bias = noise(1, 21, seed=3)[0]
    for dtype in DTYPES:
        y, left, right = multiply(backend, a, b, formats, bias, dtype=DTYPES[dtype].name)
        exact = left @ right.T + bias  # float64: 2^-53 relative, far below the bound
        weight = np.abs(left) @ np.abs(right).T + np.abs(bias)
        bound = 384 * 2.0**-24 * weight + HALF_ULP[dtype] * np.abs(exact) * 1.01 + 2.0**-25
        assert y.dtype == DTYPES[dtype]
        excess = np.abs(y.astype(np.float64) - exact) / bound
        assert excess.max() <= 1, f"{backend} {formats} {dtype}: {excess.max()} of the bound"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_left_side_keeps_its_dtype(backend: tuple[str, str], dtype: str) -> None:
    a, b = noise(5, 96, DTYPES[dtype]), noise(7, 96)
    y, left, right = multiply(backend, a, b, (None, "mxint8"))
    exact = left @ right.T
    weight = np.abs(left) @ np.abs(right).T
    assert y.dtype == DTYPES[dtype]
    bound = 96 * 2.0**-24 * weight + HALF_ULP[dtype] * np.abs(exact) * 1.01
    assert (np.abs(y.astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 3, 96), (1, 96), (4, 0)])
def test_shapes(backend: tuple[str, str], shape: tuple[int, ...]) -> None:
    k = shape[-1]
    a, b = noise(1, int(np.prod(shape))).reshape(shape), noise(7, k)
    for formats in ((None, "mxfp4"), ("mxfp4", "mxfp4")):
        y, left, right = multiply(backend, a, b, formats, np.ones(7, np.float32))
        assert y.shape == (*shape[:-1], 7)
        assert np.allclose(y, left @ right.T + 1, rtol=1e-5, atol=1e-4)


def test_nan_blocks_spoil_their_own_rows(backend: tuple[str, str]) -> None:
    a, b = noise(6, 64), noise(5, 64)
    a[2, 3], b[4, 40] = np.inf, np.nan
    y, _, _ = multiply(backend, a, b, ("mxint8", "mxint8"))
    spoilt = np.zeros((6, 5), bool)
    spoilt[2, :] = spoilt[:, 4] = True
    assert np.array_equal(np.isnan(y), spoilt)


def test_the_same_inputs_give_the_same_bits(backend: tuple[str, str]) -> None:
    a, b = noise(64, 512, BF16), noise(48, 512, BF16)
    first = multiply(backend, a, b, ("mxfp4", "mxfp4"))[0]
    for _ in range(5):
        again = multiply(backend, a, b, ("mxfp4", "mxfp4"))[0]
        mismatch.same_floats(f"{backend}", again, first)
