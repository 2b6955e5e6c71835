# SPDX-License-Identifier: Apache-2.0
"""The CPU's products on every instruction set: block order, bounds, extremes, threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pyfmt
from pyfmt import reference
from pyfmt.formats import FORMATS, Format, get_format
from pyfmt.reference.codec import decode_scale
from pyfmt.tensor import QTensor
from tests import mismatch
from tests.grids import BF16, DTYPES, FP32, noise
from tests.rooms import native, to_numpy, to_torch

LEVELS = native().matmul_levels().split(",")
# Formats whose elements are a few steps of a power of two, with E8M0 scales.
STEPS = ("mxint8", "mxint6", "mxint4", "mxfp4", "mxfp6_e2m3", "int7q5-b32-e8m0", "e1m1-b32-e8m0")
MADE = """
e2m1-b5-e8m0 e2m1-b16x16-e8m0 int8q6-b32x32-e8m0 e4m3fn-b2x3-e8m0 uint4-b16-e8m0 ue4m3-b32-e8m0
e4m3ieee-b32-e8m0 int8q20-b32-e8m0 e2m1bias20-b32-e8m0 int2-b32-e8m0 e2m1-b16-e4m3 int4-b32-e4m3-ts
e3m2-b20-e4m3-ts e2m1-brow-e4m3-ts int4-brow-fp32 int8-b256-bf16 int8-brow-bf16 int8-b3x5-fp16
e4m3fn-b128-fp32 int3-b10-fp16 uint8-b64-bf16 int4-b24-bf16 int6-b48-bf16
""".split()
HALF_ULP = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native().set_level(request.param)
    yield request.param
    native().set_level("best")


def parts(q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """The elements without their scales, and the scales."""
    fmt = q.format
    codes = reference.unpack(q.codes, fmt.bits, fmt.padded(q.shape[-1]))[..., : q.shape[-1]]
    return reference.decode(codes, fmt.element), decode_scale(q.scales, fmt.scale)


def by_blocks(a: QTensor, b: QTensor, bias: Any = None, dtype: Any = FP32) -> np.ndarray:
    return reference.matmul_by_blocks(*parts(a), *parts(b), a.format.block, bias, dtype=dtype)


def any_tensor(fmt: Format, rows: int, k: int, low: int, high: int, seed: int) -> QTensor:
    """Codes of every kind, unused ones included, and scale bytes from low to high."""
    rng = np.random.default_rng([seed, rows, k])
    codes = rng.integers(0, 256, (rows, fmt.row_bytes(k)), dtype=np.uint8)
    scales = rng.integers(low, high + 1, (rows, fmt.blocks(k)), dtype=np.uint8)
    return QTensor(codes, scales, None, fmt, (rows, k), 1)


@pytest.mark.parametrize("left", STEPS)
@pytest.mark.parametrize("right", ["mxint8", "mxfp4", "mxfp6_e2m3", "int7q5-b32-e8m0"])
def test_block_order_bit_for_bit(level: str, left: str, right: str) -> None:
    for m, n, k in ((1, 5, 32), (6, 70, 96), (37, 33, 1000), (3, 130, 2112), (70, 17, 64)):
        a, b = noise(m, k, seed=1), noise(n, k, seed=2)
        a[m // 2, : k // 2] = 0
        qa, qb = pyfmt.quantize(a, left), pyfmt.quantize(b, right)
        bias = noise(1, n, seed=3)[0]
        for dtype in DTYPES:
            want = by_blocks(qa, qb, bias, DTYPES[dtype])
            got = pyfmt.matmul(qa, qb, bias, dtype=DTYPES[dtype].name, backend="cpu")
            mismatch.same_floats(f"{level} {left} {right} {(m, n, k)} {dtype}", got, want)


@pytest.mark.parametrize("name", ["mxint8", "mxfp4", "mxint6"])
@pytest.mark.parametrize("scales", [(100, 150), (0, 60), (0, 0), (190, 254), (0, 254), (250, 255)])
def test_block_order_of_any_codes_and_scales(
    level: str, name: str, scales: tuple[int, int]
) -> None:
    fmt = get_format(name)
    for m, n, k in ((1, 66, 320), (9, 40, 96), (14, 5, 704)):
        a, b = any_tensor(fmt, m, k, *scales, seed=1), any_tensor(fmt, n, k, *scales, seed=2)
        got = pyfmt.matmul(a, b, backend="cpu")
        mismatch.same_floats(f"{level} {name} {scales} {(m, n, k)}", got, by_blocks(a, b))


def bound(left: np.ndarray, right: np.ndarray, bias: Any, dtype: str, terms: int) -> Any:
    """The exact result, and what the kernels may differ from it."""
    exact, weight = left @ right.T, np.abs(left) @ np.abs(right).T
    if bias is not None:
        exact, weight = exact + bias, weight + np.abs(bias)
    return exact, (terms + 3) * 2.0**-24 * weight + HALF_ULP[dtype] * np.abs(
        exact
    ) * 1.01 + 2.0**-25


@pytest.mark.parametrize("name", [*FORMATS, *MADE])
def test_every_level_is_within_its_bound(level: str, name: str) -> None:
    for m, n, k in ((1, 37, 160), (3, 70, 320), (7, 65, 96), (50, 34, 100), (1, 3, 7)):
        b, bias = noise(n, k, seed=2), noise(1, n, seed=3)[0]
        qb = pyfmt.quantize(b, name)
        right = qb.dequantize(backend="reference").astype(np.float64)
        for dtype in DTYPES:
            dense = (noise(m, k, seed=1) / 256).astype(DTYPES[dtype])
            y = pyfmt.matmul(dense, qb, bias, backend="cpu")
            exact, most = bound(dense.astype(np.float64), right, bias, dtype, k)
            excess = (np.abs(y.astype(np.float64) - exact) / most).max()
            assert excess <= 1, f"{level} {name} {(m, n, k)} dense {dtype}: {excess} of the bound"
        for other in (name, "mxfp8_e4m3", "mxint8", "nvfp4"):
            qa = pyfmt.quantize(noise(m, k, seed=1) / 256, other)
            left = qa.dequantize(backend="reference").astype(np.float64)
            exact, most = bound(left, right, bias, "fp32", k)
            y = pyfmt.matmul(qa, qb, bias, backend="cpu")
            excess = (np.abs(y.astype(np.float64) - exact) / most).max()
            assert excess <= 1, f"{level} {other} {name} {(m, n, k)}: {excess} of the bound"


@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize("sizes", [(2.0**100, -110), (2.0**-100, 110), (2.0**126, -127)])
def test_extreme_numbers_meet_extreme_scales(
    level: str, rows: int, sizes: tuple[float, int]
) -> None:
    # Elements times numbers would overflow or vanish before the scale brings them back.
    size, exponent = sizes
    rng = np.random.default_rng(rows)
    a = (rng.uniform(0.5, 1.9, (rows, 96)) * size).astype(BF16)
    for name in ("mxfp4", "mxint8", "mxfp8_e4m3"):
        fmt = get_format(name)
        codes = pyfmt.quantize(noise(40, 96), name).codes
        scales = np.full((40, 3), exponent + 127, np.uint8)
        b = QTensor(codes, scales, None, fmt, (40, 96), 1)
        y = pyfmt.matmul(a, b, dtype="float32", backend="cpu")
        right = b.dequantize(backend="reference").astype(np.float64)
        exact, most = bound(a.astype(np.float64), right, None, "fp32", 96)
        assert (np.abs(y - exact) <= most).all(), f"{level} {name} {size}"


@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "mxfp8_e5m2", "nvfp4", "int4", "mxfp6_e3m2"])
def test_nan_scales_and_numbers_spoil_their_own_results(level: str, name: str) -> None:
    for m in (1, 3, 9):
        b = noise(37, 320)
        b[5, 40], b[36, 319] = np.nan, np.inf
        qb = pyfmt.quantize(b, name)
        for dtype in DTYPES:
            a = (noise(m, 320) / 64).astype(DTYPES[dtype])
            a[m // 2, 100] = np.nan if m > 1 else 0
            y = pyfmt.matmul(a, qb, backend="cpu").astype(np.float32)
            spoilt = np.zeros(y.shape, bool)
            spoilt[:, [5, 36]] = True
            spoilt[m // 2] |= m > 1
            assert np.array_equal(np.isnan(y), spoilt), f"{level} {name} {m} {dtype}"


@pytest.mark.parametrize(
    "name",
    ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxint8", "mxint6", "mxint4", "nvfp4", "nvint4"]
    + ["int8-b16-e8m0", "e3m2-b16-e8m0", "e4m3fn-b16-e4m3", "e2m1-b48-e4m3", "int8-b128-bf16"],
)
def test_every_code_counts_in_tiles_of_every_size(level: str, name: str) -> None:
    fmt = get_format(name)
    rng = np.random.default_rng(7)
    for m, n, k in ((3, 70, 192), (17, 66, 576), (37, 20, 1104), (130, 9, 96)):
        codes = rng.integers(0, 256, (n, fmt.row_bytes(k)), dtype=np.uint8)
        scales = pyfmt.quantize(noise(n, k, seed=m), name).scales
        scale = np.float32(0.75) if fmt.tensor_scale else None
        b = QTensor(codes, scales, scale, fmt, (n, k), 1)
        a = rng.integers(-9, 10, (m, k)).astype(BF16)
        y = pyfmt.matmul(a, b, dtype="float32", backend="cpu")
        right = b.dequantize(backend="reference").astype(np.float64)
        spoilt = ~np.isfinite(right).all(axis=1)
        assert (np.isfinite(y).all(axis=0) == ~spoilt).all(), f"{level} {name} {(m, n, k)}"
        exact, most = bound(a.astype(np.float64), right[~spoilt], None, "fp32", k)
        excess = (np.abs(y[:, ~spoilt] - exact) / most).max(initial=0)
        assert excess <= 1, f"{level} {name} {(m, n, k)}: {excess} of the bound"


def test_results_do_not_depend_on_threads(level: str) -> None:
    for m, n, k in ((1, 301, 1024), (4, 200, 4096), (30, 130, 512), (130, 70, 256), (300, 70, 640)):
        a, b = noise(m, k, BF16), noise(n, k, BF16)
        for left, right in (
            (None, "mxfp4"),
            (None, "mxint8"),
            ("mxint8", "mxint8"),
            (None, "int8"),
        ):
            qa, qb = a if left is None else pyfmt.quantize(a, left), pyfmt.quantize(b, right)
            results = []
            for threads in (1, 2, 3, 7):
                native().set_threads(threads)
                results.append(pyfmt.matmul(qa, qb, backend="cpu"))
            native().set_threads(0)
            for other in results[1:]:
                mismatch.same_floats(f"{level} {left} {right} {(m, n, k)}", other, results[0])


def test_tensors_and_arrays_give_the_same_bits() -> None:
    import torch

    import pyfmt.ops

    assert torch.ops.pyfmt._cpu_matmul_levels().split(",") == LEVELS
    for m in (1, 3, 40):
        a, b = noise(m, 320, BF16), noise(70, 320, BF16)
        for left, right in (
            (None, "mxfp4"),
            ("mxfp4", "mxfp4"),
            ("nvfp4", "nvfp4"),
            (None, "int8"),
        ):
            qa = a if left is None else pyfmt.quantize(a, left)
            y = pyfmt.matmul(qa, pyfmt.quantize(b, right), backend="cpu")
            ta, tb = to_torch(a), pyfmt.quantize(to_torch(b), right)
            z = pyfmt.matmul(ta if left is None else pyfmt.quantize(ta, left), tb, backend="cpu")
            mismatch.same_floats(f"{left} {right} {m}", to_numpy(z), y)


@pytest.mark.parametrize(
    "activation", ["mxint8", "mxfp4", "nvfp4", "mxfp8_e4m3", "e2m1-b16x16-e8m0"]
)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_linear_quantizes_as_quantize_does(activation: str, rows: int) -> None:
    import torch

    import pyfmt.ops  # noqa: F401

    torch.manual_seed(rows)
    ops: Any = torch.ops.pyfmt
    x, w = torch.randn(rows, 1024).bfloat16(), torch.randn(70, 1024).bfloat16()
    weight = ops.quantize(w, "mxfp4", rotation=64)
    left = ops.quantize(x, activation, rotation=64)
    want = ops.matmul(*left, activation, *weight[:2], None, "mxfp4", 1024, None, torch.bfloat16)
    got = ops.linear(x, *weight[:2], None, "mxfp4", None, activation, 64)
    assert torch.equal(got, want)
