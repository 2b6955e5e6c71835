# SPDX-License-Identifier: Apache-2.0
"""Inputs that hurt: ties and their neighbours, powers of two, subnormals, edges of every range.

Random numbers almost never hit a tie or the one mantissa where a scale rule turns, so the tests
walk these grids instead. Everything is deterministic.
"""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np

from pyfmt.formats import FORMATS, Element, Format, get_element, get_format

BF16 = np.dtype(ml_dtypes.bfloat16)
FP16 = np.dtype(np.float16)
FP32 = np.dtype(np.float32)
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
FLT_MIN = 2.0**-126
FLT_TRUE_MIN = 2.0**-149

# Elements nobody ships: every kind, sign, special rule and width, odd biases and binary points.
_ELEMENTS = """
e1m0 e2m0 ue2m0 e0m2 e0m3 ue0m4 e1m1 e1m2 e1m6 e2m2 e2m4 e2m5 e3m0 e3m1 e3m3 e3m4 e4m0 e4m1 e4m2
e4m3 e5m0 e5m1 e5m2 e6m1 e7m0 ue4m3 ue4m4 ue5m2 ue5m3 ue3m3 ue7m1 e3m2bias7 e2m1bias-3 e2m1bias20
e3m1fn e2m3fn ue4m3fn e4m3ieee e3m4ieee e3m2ieee e2m1ieee ue5m2ieee
int2 int3 int5 int6 int7 int8 int3q1 int5q3 int7q5 int4q-2 int8q20 uint2 uint3 uint4 uint7 uint8
uint8q8
"""
# Formats that are not rows: other blocks, scales, squares, whole rows, and made elements.
_FORMATS = """
e2m1-b16-e8m0 e4m3fn-b128-e8m0 int8q6-b16-e8m0 e2m1-b5-e8m0 e3m2-b7-e8m0 e3m1-b32-e8m0
e5m2ieee-brow-e8m0 e2m1-b16x16-e8m0 int8q6-b32x32-e8m0 e4m3fn-b2x3-e8m0 e1m1-b3-e8m0
int5q3-b24-e8m0 int7q5-b9-e8m0 uint4-b16-e8m0 ue4m3-b32-e8m0 e4m3ieee-b32-e8m0 int8q20-b32-e8m0
e2m1bias20-b32-e8m0 e0m3-b32-e8m0 int2-b32-e8m0 e2m0-b1-e8m0
e2m1-b16-e4m3 int4-b16-e4m3 e2m1-b16x16-e4m3-ts int4-b32-e4m3-ts e4m3fn-b16-e4m3-ts
e3m2-b20-e4m3-ts e2m1-brow-e4m3-ts uint4-b16-e4m3-ts
int4-b32-bf16 int4-b64-fp16 int4-brow-fp32 int8-b256-bf16 int8-brow-bf16 int8-b64-fp32
int8-b3x5-fp16 e4m3fn-b128-fp32 e2m1-b32-bf16 int3-b10-fp16 int6-b16x16-bf16 uint8-b64-bf16
"""
CUSTOM_ELEMENTS: tuple[Element, ...] = tuple(map(get_element, _ELEMENTS.split()))
CUSTOM_FORMATS: tuple[Format, ...] = tuple(map(get_format, _FORMATS.split()))
# The named rows come first, each element once.
ELEMENTS = tuple(dict.fromkeys([f.element for f in FORMATS.values()] + list(CUSTOM_ELEMENTS)))
ALL_FORMATS: tuple[Format, ...] = (*FORMATS.values(), *CUSTOM_FORMATS)


def neighbours(values: np.ndarray, dtype: np.dtype = FP32) -> np.ndarray:
    """Each value with the next representable number on either side, both signs, in `dtype`."""
    near = np.asarray(values).astype(dtype)
    near = near[np.isfinite(near.astype(np.float32))]
    with np.errstate(over="ignore"):
        ends = [np.nextafter(near, dtype.type(end)) for end in (-np.inf, np.inf)]
    every = np.concatenate([near, *ends])
    every = every[np.isfinite(every.astype(np.float32))]
    return np.concatenate([every, -every])


def edges(dtype: np.dtype = FP32) -> np.ndarray:
    """Zeros, the subnormal range's ends, the largest numbers, in `dtype`, both signs."""
    info = ml_dtypes.finfo(dtype)
    points = [0.0, float(info.smallest_subnormal), float(info.tiny), float(info.max), 1.0]
    return neighbours(np.array(points, np.float64), dtype)


@cache
def element_grid(element: Element) -> np.ndarray:
    """Every value, midpoint and neighbour of an element's grid, and far beyond it, in float32."""
    points = list(element.grid) + list(element.midpoints)
    points += [element.max * k for k in (1 + 2.0**-20, 1.5, 2, 3, 2.0**20)]
    points += [element.grid[1] * k for k in (0.25, 0.75, 2.0**-20)]
    return np.unique(neighbours(np.array(points)).view(np.uint32)).view(np.float32)


def amax_grid(fmt: Format, dtype: np.dtype = FP32) -> np.ndarray:
    """Block maxima where a scale rule may turn: every mantissa of interest at many exponents."""
    element = fmt.element
    turning = {1.0, 2.0 - 2.0**-8, 1.0 + 2.0**-8, element.max / 2.0**element.emax}
    # Where `even` turns: half an ulp of the element's mantissa below the next power of two.
    turning |= {2.0 - 2.0 ** -(bits + 1) for bits in range(8)}
    turning |= {127 / 64, 31 / 16, 7 / 4, 1.5, 5 / 4, 460 / 256, 500 / 256}
    exponents = [-149, -148, -140, -130, -128, -127, -126, -125, -120, -64, -10, -9, -8, -7, -6]
    exponents += [-5, -3, -2, -1, 0, 1, 2, 3, 4, 6, 7, 8, 9, 11, 14, 15, 16, 64, 120, 126, 127]
    points = np.array([[m * 2.0**e for m in sorted(turning)] for e in exponents]).ravel()
    info = ml_dtypes.finfo(dtype)
    points = points[(points <= float(info.max)) & (points >= float(info.smallest_subnormal))]
    near = np.abs(neighbours(points, dtype))
    return np.unique(near.astype(np.float32)).astype(dtype)


def blocks_of(fmt: Format, maxima: np.ndarray, columns: int | None = None) -> np.ndarray:
    """One block per maximum: the maximum in turning position and sign, fractions of it beside."""
    width = columns or fmt.block_columns(24)
    rng = np.random.default_rng(len(maxima) * 1000 + width)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        share = rng.uniform(-1, 1, (len(maxima), width)).astype(np.float32)
        # Round fractions of the maximum: ties on the element's grid more often than not.
        ties = np.round(share * 48) / 48
        share = np.where(rng.random(share.shape) < 0.5, share, ties).astype(np.float32)
        share[rng.random(share.shape) < 0.05] = 0.0
        share[rng.random(share.shape) < 0.03] = -0.0
        x = (share * maxima.astype(np.float32)[:, None]).astype(maxima.dtype)
    place = rng.integers(0, width, len(maxima))
    sign = np.where(rng.random(len(maxima)) < 0.5, -1, 1).astype(maxima.dtype)
    x[np.arange(len(maxima)), place] = maxima * sign
    return x


def special_blocks(fmt: Format, dtype: np.dtype = FP32) -> np.ndarray:
    """Blocks of zeros, negative zeros, NaN, infinities, subnormals and the largest numbers."""
    width = fmt.block_columns(24)
    info = ml_dtypes.finfo(dtype)
    top, low = float(info.max), float(info.smallest_subnormal)
    rows = np.zeros((12, width), np.float64)
    rows[1] = -0.0
    rows[2, 0] = np.nan
    rows[3, -1] = np.inf
    rows[4, width // 2] = -np.inf
    rows[5, :] = np.where(np.arange(width) % 2, top, -top)
    rows[6, :] = np.where(np.arange(width) % 2, low, -low)
    rows[7, :] = np.where(np.arange(width) % 3, -0.0, low)
    rows[8, :] = [(-1) ** i * low * i for i in range(width)]
    rows[9, :] = [(-1) ** i * float(info.tiny) * (i / width) for i in range(width)]
    rows[10, :] = [top * (i % 7) / 6 * (-1) ** i for i in range(width)]
    rows[11, 0], rows[11, -1] = -np.inf, np.nan
    return rows.astype(dtype)


def noise(rows: int, columns: int, dtype: np.dtype = FP32, seed: int = 0):
    """Ordinary numbers of a wide range of sizes."""
    rng = np.random.default_rng([seed, rows, columns])
    x = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-8, 8, (rows, 1)))
    return x.astype(np.float32).astype(dtype)


def matrix(fmt: Format, dtype: np.dtype = FP32, blocks: int = 300, near: bool = False):
    """A matrix whose blocks walk the grid of maxima and the special cases; last blocks ragged.

    near: maxima within 2^-24 to 2^10 only, where E4M3 scales under one tensor scale differ.
    """
    maxima = amax_grid(fmt, dtype)
    if near:
        wide = maxima.astype(np.float32)
        maxima = maxima[(wide >= 2.0**-24) & (wide <= 2.0**10)]
    # A stride prime to the grid's periods visits every kind of mantissa and exponent.
    if len(maxima) > blocks:
        maxima = maxima[np.arange(blocks) * (len(maxima) // blocks | 1) % len(maxima)]
    x = blocks_of(fmt, maxima)
    if not near:
        x = np.concatenate([x, special_blocks(fmt, dtype)])
    if fmt.block == "row":
        return x
    x = x[: len(x) // 3 * 3].reshape(-1, 3 * x.shape[1])
    return np.ascontiguousarray(x[:, : x.shape[1] - fmt.block_columns(24) // 3])


def options_of(fmt: Format) -> list[dict[str, object]]:
    """Every rule or recipe of a format, then each other option once."""
    rules = [{"scale_rule": rule} for rule in fmt.scale_rules]
    recipes = [{"recipe": recipe} for recipe in fmt.recipes]
    every = [{}, *rules, *recipes, {"rounding": "stochastic", "seed": 2**40 + 7}]
    if fmt.tensor_scale:
        every += [{"tensor_scale": np.float32(t)} for t in (0.0123, 1.0, 3e-7)]
        every += [{"tensor_scale": np.float32(0.37), "recipe": "torchao"}]
    if fmt.element.kind == "int":
        every += [{"clip": "full"}, {"clip": "full", "rounding": "stochastic", "seed": -1}]
    return every
