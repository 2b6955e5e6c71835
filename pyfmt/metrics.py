# SPDX-License-Identifier: Apache-2.0
"""How well a format holds a tensor: signal to noise (QSNR) and the blocks' crest factor.

Both take NumPy arrays (bfloat16 by ml_dtypes) or torch tensors and sum in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PIECE = 1 << 15


def _float32(x: Any) -> np.ndarray:
    """View a NumPy array or a torch tensor as float32 NumPy (every 16-bit float is exact)."""
    if hasattr(x, "detach"):
        x = x.detach().float().cpu().numpy()
    return np.asarray(x, dtype=np.float32)


@dataclass
class Noise:
    """Running sums of signal and noise energy, so that a tensor may come in pieces.

    qsnr = -10 log10( sum (x - xq)^2 / sum x^2 )   dB
    """

    signal: float = 0.0
    noise: float = 0.0

    def add(self, x: Any, xq: Any) -> None:
        """Add one piece: the values `x` and what the format made of them, same shape.

        Raises ValueError where the shapes differ.
        """
        x, xq = _float32(x), _float32(xq)
        if x.shape != xq.shape:
            raise ValueError(f"qsnr: expected two equal shapes, got {x.shape} and {xq.shape}")
        x, xq = x.ravel(), xq.ravel()
        # Pieces that stay in the cache; float64 before the subtraction, or small errors are lost.
        for start in range(0, x.size, PIECE):
            wide = x[start : start + PIECE].astype(np.float64)
            self.signal += float(np.square(wide).sum())
            wide -= xq[start : start + PIECE]
            self.noise += float(np.square(wide, out=wide).sum())

    @property
    def qsnr(self) -> float:
        """Decibels; +inf where nothing was lost, NaN where the noise is not a number."""
        if self.noise == 0:
            return float("inf")
        if self.signal == 0:
            return float("-inf")
        return float(-10 * np.log10(self.noise / self.signal))


def qsnr(x: Any, xq: Any) -> float:
    """Return the quantization signal-to-noise ratio of `xq` against `x`.

    qsnr = -10 log10( ||x - xq||^2 / ||x||^2 )   dB, +inf where both are equal

    Source: arXiv 2510.25602, section 3. Raises ValueError where the shapes differ.
    """
    total = Noise()
    total.add(x, xq)
    return total.qsnr


def crest_factor(x: Any, block: int) -> np.ndarray:
    """Return the crest factor of every block of `block` elements along the last axis.

    kappa = max |x| / sqrt(mean x^2), between 1 and sqrt(block); NaN for an all-zero block

    A ragged last block is measured over the elements it has. Shape (*lead, ceil(K / block)),
    float64. Source: arXiv 2510.25602, section 3. Raises ValueError for a block below 1.
    """
    if block < 1:
        raise ValueError(f"block: expected a positive int, got {block!r}")
    x = np.abs(np.atleast_1d(_float32(x)))
    length = x.shape[-1]
    blocks = -(-length // block)
    padded = np.zeros((*x.shape[:-1], blocks * block), np.float32)
    padded[..., :length] = x
    padded = padded.reshape(*x.shape[:-1], blocks, block)
    count = np.minimum(block, length - block * np.arange(blocks))
    energy = np.square(padded, dtype=np.float64).sum(axis=-1) / count
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(padded.max(axis=-1, initial=0) / np.sqrt(energy))
