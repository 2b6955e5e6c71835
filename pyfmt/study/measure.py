# SPDX-License-Identifier: Apache-2.0
"""What is measured on one tensor: QSNR in every format and choice, crest factors, single blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pyfmt import api
from pyfmt.formats import Format
from pyfmt.metrics import Noise, crest_factor

ROTATIONS = (0, 16, 32, 128)
CREST_BLOCKS = (16, 32, 64, 128)  # and "row", all of it
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Ranges of crest factors that blocks are gathered in, for points beside the theory's curves.
EDGES = np.arange(1.0, 6.01, 0.2)

Table = dict[str, dict[str, float]]  # format -> choice -> dB


def choices(format: Format) -> tuple[str, ...]:
    """Return a format's scale rules or recipes, the default first; ("amax",) where it has none."""
    return format.scale_rules or format.recipes or ("amax",)


def options(format: Format, choice: str) -> dict[str, Any]:
    """Return the argument of `quantize` that stands for a choice."""
    if format.scale_rules:
        return {"scale_rule": choice}
    return {"recipe": choice} if format.recipes else {}


def rotated(x: np.ndarray, rotation: int) -> np.ndarray:
    """Return x after a block Hadamard rotation of that size; 0 is none."""
    return api.hadamard(x, rotation) if rotation else x


def table(formats: Sequence[Format], value: Any) -> dict[str, dict[str, Any]]:
    """Return value(format, choice) of every format and choice, in the JSON's nesting."""
    return {
        format.key: {choice: value(format, choice) for choice in choices(format)}
        for format in formats
    }


def noise(x: np.ndarray, format: Format, choice: str) -> Noise:
    """Return signal and noise energy of float32 `x` in a format, blocks along the last axis."""
    total = Noise()
    total.add(x, api.fake_quantize(x, format, **options(format, choice)))
    return total


def qsnr_table(x: np.ndarray, formats: Sequence[Format]) -> Table:
    """Return the QSNR of `x` in dB for every format and choice."""
    return table(formats, lambda format, choice: noise(x, format, choice).qsnr)


def crest_summary(kappas: Sequence[np.ndarray]) -> list[float]:
    """Return [mean, 5, 25, 50, 75, 95 %, largest] of crest factors without all-zero blocks."""
    every = np.concatenate([kappa.ravel() for kappa in kappas])
    every = every[np.isfinite(every)]
    if not every.size:
        return [float("nan")] * (len(QUANTILES) + 2)
    middle = np.quantile(every, QUANTILES)
    return [float(value) for value in (every.mean(), *middle, every.max())]


def crest_table(x: np.ndarray) -> dict[str, list[float]]:
    """Return the summary of crest factors for every block size, and of whole rows."""
    return {name: crest_summary([kappa]) for name, kappa in crest_factors(x).items()}


def crest_factors(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return the crest factors of `x` for every block size that fits in a row, and of rows."""
    width = x.shape[-1]
    sizes = {str(block): block for block in CREST_BLOCKS if block <= width} | {"row": width}
    return {name: crest_factor(x, block).astype(np.float32) for name, block in sizes.items()}


class Blocks:
    """Noise of single blocks, gathered by crest factor: points to put beside theory's curves.

    A point is the mean crest factor of its blocks and -10 log10 of the mean of their noise over
    their energy, as the theory has it for one block. Formats without a plain block size are left.
    """

    def __init__(self, formats: Sequence[Format]) -> None:
        self.formats = [format for format in formats if isinstance(format.block, int)]
        self.sums = {format.key: np.zeros((3, len(EDGES) - 1)) for format in self.formats}

    def add(self, x: np.ndarray) -> None:
        """Add the blocks of float32 rows; a ragged last block is left out."""
        for format in self.formats:
            block = format.block_columns(0)
            whole = x[:, : x.shape[1] // block * block]
            kappa = crest_factor(whole, block).ravel()
            error = api.fake_quantize(whole, format).astype(np.float64) - whole
            lost, energy = (
                np.square(part, dtype=np.float64).reshape(-1, block).sum(axis=1)
                for part in (error, whole)
            )
            good = np.isfinite(kappa)
            bins = np.digitize(kappa[good], EDGES) - 1
            values = (np.ones(good.sum()), kappa[good], lost[good] / energy[good])
            inside = (bins >= 0) & (bins < len(EDGES) - 1)
            for row, value in zip(self.sums[format.key], values, strict=True):
                row += np.bincount(bins[inside], value[inside], len(EDGES) - 1)

    def points(self, least: int) -> dict[str, list[list[float]]]:
        """Return [crest factor, QSNR, blocks] for each range that holds `least` blocks or more."""
        return {name: list(_points(sums, least)) for name, sums in self.sums.items()}


def _points(sums: np.ndarray, least: int) -> Iterator[list[float]]:
    for count, kappa, ratio in sums.T:
        if count >= least and ratio > 0:
            yield [float(kappa / count), float(-10 * np.log10(ratio / count)), int(count)]
