# SPDX-License-Identifier: Apache-2.0
"""Drawn data: known distributions at many sigmas of one octave, the same for the same seed.

A power-of-two scale fits a tensor better or worse as its sigma moves between two powers of two, by
more than formats differ. So nothing is measured at a single sigma: sigmas are 2^((i + 1/2) / n).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

WIDTH = 1024  # elements in a row, a multiple of every block and rotation
OUTLIER_EVERY, OUTLIER_GAIN = 128, 20.0  # one channel in 128 is 20 times as loud
FREEDOM = 5  # of Student's t: the fewest with a finite fourth moment


@dataclass(frozen=True)
class Dataset:
    """One kind of drawn data: what values are distributed like, and what they are stored in."""

    name: str
    label: str
    kind: str
    dtype: str = "bfloat16"


# fmt: off
DATASETS = {one.name: one for one in (
    Dataset("gaussian",         "Gaussian",            "gaussian"),
    Dataset("laplace",          "Laplace",             "laplace"),
    Dataset("student_t",        f"Student t, {FREEDOM} d.f.", "student_t"),
    Dataset("outliers",         "outlier channels",    "outliers"),
    Dataset("gaussian_float32", "Gaussian, float32",   "gaussian", "float32"),
)}
# fmt: on


def sigmas(count: int) -> np.ndarray:
    """Return `count` standard deviations spread evenly, on a log scale, over [1, 2)."""
    return np.exp2((np.arange(count) + 0.5) / count)


def octave(dataset: Dataset, *, count: int, rows: int, seed: int) -> Iterator[np.ndarray]:
    """Yield a tensor for every sigma: float32, (rows, 1024), exact in the dataset's dtype.

    Each has its own seed, so that one tensor does not depend on which others are drawn.
    """
    place = list(DATASETS).index(dataset.name)
    for i, sigma in enumerate(sigmas(count)):
        rng = np.random.default_rng([seed, place, i])
        x = (_draw(dataset.kind, rng, (rows, WIDTH)) * sigma).astype(np.float32)
        if dataset.dtype == "bfloat16":
            x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
        yield x


def _draw(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Draw values of unit variance; outlier channels come on top of it."""
    if kind == "laplace":
        return rng.laplace(scale=math.sqrt(0.5), size=shape)
    if kind == "student_t":
        return rng.standard_t(FREEDOM, size=shape) * math.sqrt((FREEDOM - 2) / FREEDOM)
    x = rng.standard_normal(shape)
    if kind == "outliers":
        # One loud channel in every group of 128, at a random place of it, the same in every row.
        groups = shape[1] // OUTLIER_EVERY
        loud = np.arange(groups) * OUTLIER_EVERY + rng.integers(OUTLIER_EVERY, size=groups)
        x[:, loud] *= OUTLIER_GAIN
    return x
