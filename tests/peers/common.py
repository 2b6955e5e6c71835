# SPDX-License-Identifier: Apache-2.0
"""Inputs and helpers that the checks against every peer share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyfmt import reference
from pyfmt.formats import FORMATS, Format, get_element
from pyfmt.reference.layout import unpack
from tests import grids
from tests.grids import FP32

CHECKS: dict[str, Callable[[], None]] = {}


def check(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        CHECKS[name] = function
        return function

    return register


def inputs(fmt: Format, dtype: np.dtype = FP32, finite: bool = False) -> np.ndarray:
    """One block a row: the grid of maxima, and the special blocks."""
    special = grids.special_blocks(fmt, dtype)
    if finite:
        special = special[np.isfinite(special.astype(np.float32)).all(axis=1)]
    return np.concatenate([grids.blocks_of(fmt, grids.amax_grid(fmt, dtype)), special])


def ours(x: np.ndarray, fmt: Format, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Unpacked codes and the scale of each row's only block."""
    codes, scales, _ = reference.quantize(x, fmt, **options)
    return unpack(codes, fmt.bits, x.shape[1]), scales[:, 0]


def scaled(x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """x * 2^exponent, exactly."""
    return np.ldexp(x.astype(np.float64), exponent[:, None])


def float32_log2_is(amax: np.ndarray) -> np.ndarray:
    """log2 rounded to float32: what a library sees that takes it in floating point."""
    return np.log2(amax.astype(np.float64)).astype(np.float32)


def nvfp4_inputs(largest: float, dtype: np.dtype = FP32) -> np.ndarray:
    """Blocks over the range that scales under one tensor scale cover, ties of the scale, zeros."""
    rng = np.random.default_rng(5)
    spread = largest * np.exp2(-rng.uniform(0, 24, 3000))
    # Where a block's scale is a tie of E4M3, and the numbers around: order of operations shows.
    ties = np.array(get_element("e4m3fn").midpoints) / 448 * largest
    near = [ties.astype(dtype)]
    for _ in range(3):
        near += [np.nextafter(near[-1], dtype.type(np.inf))]
        near.insert(0, np.nextafter(near[0], dtype.type(-np.inf)))
    maxima = np.concatenate([spread.astype(dtype), *near, np.array([largest, 0], dtype)])
    x = grids.blocks_of(FORMATS["nvfp4"], np.abs(maxima))
    return np.where(np.abs(x.astype(np.float64)) <= largest, x, dtype.type(0))
