# SPDX-License-Identifier: Apache-2.0
"""Rows of whole tiles, where the CPU kernels take their shortcuts, and numbers that end them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyfmt import reference
from pyfmt.formats import FORMATS, get_format
from tests.grids import DTYPES
from tests.rooms import Room, same_everywhere, same_quantized

COLUMNS = 4096  # as many as a tile has


def _normal(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, COLUMNS), np.float32)


def _wide(rng: np.random.Generator) -> np.ndarray:
    exponents = rng.integers(-140, 126, (3, COLUMNS // 16)).repeat(16, 1)
    return _normal(rng) * np.exp2(exponents.astype(np.float32))


def _ties(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-64, 65, (3, COLUMNS)).astype(np.float32) / 32


def _tiny(rng: np.random.Generator) -> np.ndarray:
    return _normal(rng) * np.float32(2.0**-128)


def _huge(rng: np.random.Generator) -> np.ndarray:
    return _normal(rng) * np.float32(3e38)


def _wild(rng: np.random.Generator) -> np.ndarray:
    x = _normal(rng)
    for value in (np.nan, np.inf, -np.inf, 0.0, -0.0):
        x[rng.random(x.shape) < 0.004] = value
    x[:, 512:1024] = -0.0
    return x


KINDS = [_normal, _wide, _ties, _tiny, _huge, _wild]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", list(FORMATS))
def test_whole_tiles(every_room: list[Room], name: str, kind: Any) -> None:
    """quantize, dequantize and fake_quantize of bfloat16, by every level."""
    x, fmt = kind(np.random.default_rng(7)).astype(DTYPES["bf16"]), get_format(name)
    parts = same_quantized(every_room, x, fmt)
    for dtype in ("bfloat16", "float32"):
        want = reference.dequantize(*parts, fmt, x.shape, dtype=dtype)
        same_everywhere(every_room, want, "dequantize", *parts, fmt, x.shape, dtype=dtype)
    same_everywhere(every_room, reference.fake_quantize(x, fmt), "fake_quantize", x, fmt)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "mxfp6_e2m3", "mxfp8_e5m2", "nvfp4"])
def test_whole_tiles_rotated(every_room: list[Room], name: str, kind: Any) -> None:
    """Rotations that sixteen groups of 128 take side by side, and one beyond, some with signs."""
    rng = np.random.default_rng(8)
    data = kind(rng)
    for dtype, size, signed in [("bf16", 16, True), ("bf16", 32, False), ("fp32", 32, True),
                                ("bf16", 64, False), ("fp32", 128, False), ("bf16", 128, True),
                                ("bf16", 256, False)]:  # fmt: skip
        x = data.astype(DTYPES[dtype])
        signs = rng.choice(np.float32([-1, 1]), size) if signed else None
        same_quantized(every_room, x, get_format(name), rotation=size, signs=signs)


@pytest.mark.parametrize("exponent", [-40, 0, 50])
@pytest.mark.parametrize("size", [4, 16, 32, 64, 128])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_rotated_near_thresholds(
    every_room: list[Room], name: str, size: int, exponent: int
) -> None:
    """The numbers around each of E2M1's thresholds, after a rotation, with both signs.

    A rotation of (a, a, r, 0, 0, ...) gives a + r, a - r, r and -r, over and over, times 2^(-k/2).
    """
    factor = np.float32(2.0 ** (-np.log2(size) / 2))
    thresholds = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    near = (thresholds / factor).view(np.int32)[:, None] + np.arange(-6, 7, dtype=np.int32)
    r = np.resize(near.view(np.float32), 3 * COLUMNS // size)
    x = np.zeros((3, COLUMNS // size, size), np.float32)
    x[..., 2] = r.reshape(3, -1)
    x[..., :2] = ((np.float32(5.9) / factor - x[..., 2]) / 2)[..., None]
    x = np.ldexp(x.reshape(3, COLUMNS), exponent)
    scale = {"tensor_scale": np.float32(2.0**exponent)} if name == "nvfp4" else {}
    same_quantized(every_room, x, get_format(name), rotation=size, **scale)


@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_rotated_zeros(every_room: list[Room], name: str, size: int) -> None:
    """Zeros of both signs and numbers that vanish beside large ones keep their sign."""
    rng = np.random.default_rng(9)
    x = rng.choice(np.array([0, -0.0, 1, 1e-38, -1e-38, 3e-41], np.float32), (3, COLUMNS // 32, 32))
    x *= rng.choice(np.float32([0, 1]), (3, COLUMNS // 32, 1))
    x = x.reshape(3, COLUMNS)
    for dtype in ("bf16", "fp32"):
        signs = rng.choice(np.float32([-1, 1]), size)
        for given in (None, signs):
            same_quantized(
                every_room, x.astype(DTYPES[dtype]), get_format(name), rotation=size, signs=given
            )


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3"])
def test_codes_past_the_caches(every_room: list[Room], name: str) -> None:
    """16 MB of codes, from where on they are stored past the caches: one part, repeated."""
    fmt = get_format(name)
    part = np.random.default_rng(10).standard_normal((32, COLUMNS), np.float32)
    x = np.tile(part.astype(DTYPES["bf16"]), ((16 << 20) * 8 // fmt.bits // part.size, 1))
    want = reference.quantize(x[:32], fmt, rotation=32)
    for room in every_room:
        got = room.quantize(x, fmt, rotation=32)
        for parts, wanted in zip(got[:2], want[:2], strict=True):
            parts = np.asarray(parts).reshape(-1, *wanted.shape)
            assert (parts == wanted).all(), room.name
