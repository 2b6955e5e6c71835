# SPDX-License-Identifier: Apache-2.0
"""QSNR against crest factor, in closed form, for every format: where integers beat floats.

A block of Gaussian values has the crest factor kappa = max |x| / rms. Its scale is rho times what
would put the largest value on Qmax, so elements lie on a grid for rho * kappa / Qmax units of rms.

Source: arXiv 2510.25602, section 4 (theorems on integer and floating-point QSNR, under scales that
are powers of two and under E4M3 scales); derivations in its appendix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from pyfmt.formats import Format

# How much larger than needed a scale is. A power of two: 1 to 2, 1.5 in the paper. E4M3: the
# theorem takes 1, the paper's curves and its crossover of 2.39 are those of 1.05.
RHO = {"e8m0": 1.5, "e4m3": 1.05}

_erf = np.vectorize(math.erf, otypes=[np.float64])


def default_rho(format: Format) -> float:
    """Return the scale overhead taken for a format: 1.5 (E8M0), 1.05 (E4M3), 1 (float scales)."""
    return RHO.get(format.scale, 1.0)


def qsnr(format: Format, kappa: Any, *, rho: float | None = None, exact: bool = False) -> Any:
    """Return the theoretical QSNR in dB of Gaussian blocks with crest factor `kappa`.

    integers, E8M0:  4.78 + 6.02 b - 20 log10(rho) - 20 log10(kappa)
    integers, else:  the same + 10 log10(g / (g - 1)): the largest of g elements has no error
    floats, E8M0:    -10 log10(alpha w_norm + beta (rho kappa)^2 p_sub)
    floats, else:    the same with w_norm - kappa^2 / g
    alpha = 1 / (24 * 2^(2M)),  beta = 2^(2 (1 - B - M)) / (12 Qmax^2)

    w_norm is the energy in, p_sub the probability of, values that are normal and subnormal numbers
    of ExMy with M fraction bits and bias B. rho: the overhead of the scale, `default_rho` unless
    given. exact: take an integer's largest code, 2^(b-1) - 1, for the theorem's 2^(b-1) (1.16 dB
    at 4 bits). kappa: a number or an array, 1 or more; returns the same.

    Raises ValueError for kappa or rho below 1 and for unsigned elements.
    Source: arXiv 2510.25602, section 4.
    """
    rho = default_rho(format) if rho is None else rho
    peak = np.asarray(kappa, dtype=np.float64)
    if not (peak >= 1).all():
        raise ValueError(f"kappa: expected crest factors of 1 or more, got {kappa!r}")
    if not rho >= 1:
        raise ValueError(f"rho: expected a scale overhead of 1 or more, got {rho!r}")
    if not format.element.signed:
        raise ValueError(f"{format.name}: expected signed elements; the theory is of Gaussians")
    noise = (_int_noise if format.element.kind == "int" else _float_noise)(format, peak, rho, exact)
    decibels = -10 * np.log10(noise)
    return float(decibels) if np.ndim(kappa) == 0 else decibels


def _sure_elements(format: Format) -> float:
    """1 / g where the scale is fine enough to leave a block's largest element without error."""
    if format.scale == "e8m0" or format.block == "row":
        return 0.0
    return 1 / (format.block_rows * format.block_columns(1))


def _int_noise(format: Format, kappa: np.ndarray, rho: float, exact: bool) -> np.ndarray:
    """Uniform errors: step^2 / 12 with step = rho * kappa / 2^(b-1), as the theorem rounds it."""
    if exact:
        flat = 1 / (12 * (2.0 ** (format.bits - 1) - 1) ** 2)
    else:
        flat = 10 ** (-(4.78 + 6.02 * format.bits) / 10)
    return flat * (rho * kappa) ** 2 * (1 - _sure_elements(format))


def _float_noise(format: Format, kappa: np.ndarray, rho: float, exact: bool) -> np.ndarray:
    element = format.element
    alpha = 1 / (24 * 4.0**element.man)
    beta = 4.0 ** (1 - element.bias - element.man) / (12 * element.max**2)
    # The smallest normal number in units of rms; without an exponent field none is normal.
    t = 2.0 ** (1 - element.bias) * rho * kappa / element.max
    if element.exp == 0:
        t = np.full(kappa.shape, math.inf)
    p_sub = _erf(t / math.sqrt(2))
    tail = np.where(np.isinf(t), 0.0, np.exp(-np.square(t) / 2) * np.where(np.isinf(t), 0.0, t))
    w_norm = 1 - p_sub + math.sqrt(2 / math.pi) * tail
    w_norm = np.maximum(w_norm - kappa**2 * _sure_elements(format), 0.0)
    return alpha * w_norm + beta * (rho * kappa) ** 2 * p_sub


def largest_kappa(format: Format) -> float:
    """Return the largest crest factor that a block can have: sqrt(g), one element alone."""
    if format.block == "row":
        return math.inf
    return math.sqrt(format.block_rows * format.block_columns(1))


def crossover(
    integer: Format, floating: Format, *, rho: float | None = None, exact: bool = False
) -> float | None:
    """Return the crest factor where the float format overtakes the integer one, None if nowhere.

    The root of qsnr(integer, kappa) - qsnr(floating, kappa) for kappa from 1 to 64, and no further
    than a block reaches where the theory counts its largest element; by bisection. It may lie
    beyond `largest_kappa`: then the integer wins in every block.
    """

    def lead(kappa: float) -> float:
        return float(qsnr(integer, kappa, rho=rho, exact=exact) - qsnr(floating, kappa, rho=rho))

    fine = any(_sure_elements(format) for format in (integer, floating))
    reach = min(64.0, largest_kappa(integer), largest_kappa(floating)) if fine else 64.0
    grid = np.geomspace(1, reach, 400).tolist()
    for low, high in itertools.pairwise(grid):
        if lead(low) > 0 >= lead(high):
            while high - low > 1e-9:
                middle = (low + high) / 2
                low, high = (middle, high) if lead(middle) > 0 else (low, middle)
            return (low + high) / 2
    return None


def rivals(formats: Iterable[Format]) -> list[tuple[Format, Format]]:
    """Return every (integer, float) pair of equal width, block and scale, in the formats' order."""
    formats = list(formats)

    def frame(format: Format) -> tuple[object, ...]:
        return (format.bits, format.block, format.scale, format.tensor_scale)

    return [
        (integer, floating)
        for integer in formats
        for floating in formats
        if (integer.element.kind, floating.element.kind) == ("int", "float")
        and frame(integer) == frame(floating)
    ]
