# SPDX-License-Identifier: Apache-2.0
"""Numbers and codes: elements, block scales, float conversions, and the random source.

Element arithmetic here is float64, where every product of a float32 and a power of two, every
step count and every fraction below is exact; what rounds is written as a rounding.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import array_api_compat
import ml_dtypes
import numpy as np

from pyfmt.formats import SCALES, Element, get_element

Array = Any  # numpy.ndarray or cupy.ndarray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_DTYPES = {
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
E4M3 = get_element("e4m3fn")


def namespace(x: Array) -> ModuleType:
    """Return the array namespace of `x`: NumPy's or CuPy's."""
    return array_api_compat.array_namespace(x)


# ---- float32, bfloat16, float16 ---------------------------------------------------------------


def to_float32(x: Array) -> Array:
    """Widen bfloat16, float16 or float32 to float32, exactly."""
    return x.astype(np.float32)


def from_float32(x: Array, dtype: Any) -> Array:
    """Round float32 to nearest even in `dtype`; NaN becomes the canonical quiet NaN.

    x: any shape, float32; returns the same shape in bfloat16, float16 or float32.
    """
    xp, dtype = namespace(x), np.dtype(dtype)
    nan = xp.isnan(x)
    if dtype == BFLOAT16:
        bits = x.view(np.uint32)
        # Adding just under half an ulp, plus the last kept bit, carries exactly when RNE does.
        bits = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        return xp.where(nan, np.uint16(0x7FC0), bits.astype(np.uint16)).view(BFLOAT16)
    with np.errstate(over="ignore"):
        rounded = x.astype(dtype)
    return xp.where(nan, xp.asarray(np.nan, dtype=dtype), rounded)


# ---- elements ---------------------------------------------------------------------------------


def encode(
    y: Array, element: Element, *, clip: str = "symmetric", random: Array | None = None
) -> Array:
    """Round scaled values to the element's grid and return their codes.

    t = |y|'s place between the codes of its neighbours on the grid (in steps of 2^-frac for
        integers, of 2^(max(floor(log2 |y|), emin) - man) for floats)
    nearest:    code = t rounded to nearest, ties to even
    stochastic: code = floor(t) + [random < (t - floor(t)) * 2^24]
    Magnitudes beyond the largest saturate to it; the sign is added last.

    y: any shape, finite or infinite, taken as exact (float64 or float32); `random`: None for
    nearest, else integers in [0, 2^24) of y's shape. Returns uint8 codes of the same shape. The
    sign of zero survives in float elements; unsigned elements saturate negative values to 0.

    Source: OCP MX v1.0, sections 5.3 and 6.3; design decision on symmetric integers (clip).
    """
    xp = namespace(y)
    y = y.astype(np.float64)
    negative = xp.signbit(y)
    limit = xp.full(y.shape, element.max)
    if element.kind == "int" and element.signed and clip == "full":
        limit = xp.where(negative, element.max + 2.0**element.step_exp, limit)
    if not element.signed:
        limit = xp.where(negative, 0.0, limit)
    magnitude = xp.minimum(xp.abs(y), limit)

    if element.kind == "float":
        emin = 1 - element.bias
        binade = xp.maximum(xp.frexp(magnitude)[1] - 1, emin) - emin
        binade = xp.where(magnitude == 0, 0, binade)
    else:
        binade = xp.zeros(y.shape, dtype=np.int32)
    # One binade holds 2^man steps, so this is |y|'s place on the grid, counted in codes. Ties go
    # to the even code, with no fraction bits (ExM0) too.
    t = binade * 2**element.man + xp.ldexp(magnitude, -(binade + element.step_exp))
    if random is None:
        code = xp.rint(t).astype(np.int64)
    else:
        code = xp.floor(t).astype(np.int64)
        code = code + (random < (t - code) * 2.0**24)

    if element.kind == "int":
        code = xp.where(negative, -code, code) & (2**element.bits - 1)
    elif element.signed:
        code = code + negative * 2 ** (element.bits - 1)
    return code.astype(np.uint8)


def decode(codes: Array, element: Element) -> Array:
    """Return the float32 value of each code (every code decodes, unused ones included)."""
    xp = namespace(codes)
    return xp.asarray(np.array(element.values, dtype=np.float32))[codes]


# ---- block scales -----------------------------------------------------------------------------


def e8m0_exponent(amax: Array, element: Element, rule: str) -> Array:
    """Return the exponent E of the power-of-two scale for blocks with largest magnitude `amax`.

    With amax = m * 2^e and Qmax = q * 2^emax, 1 <= m, q < 2:
    floor: e - emax                 rceil: e - emax + [m > q]  (smallest E: amax <= Qmax * 2^E)
    ceil:  e - emax + [m > 1]       even:  e - emax + [m + half an ulp of the element >= 2]

    E is clamped to [-127, 127]; zero blocks get -127. amax: float32, finite; returns int32.
    Source: OCP MX v1.0, section 6.3 (floor); torchao's names for the others.
    """
    xp = namespace(amax)
    half, e = xp.frexp(amax.astype(np.float64))
    m, e = half * 2, e - 1
    up = {
        "floor": xp.zeros(m.shape, dtype=bool),
        "ceil": m > 1,
        "rceil": m > element.max / 2.0**element.emax,
        "even": m + 2.0 ** -(element.significand + 1) >= 2,
    }[rule]
    exponent = xp.clip(e + up - element.emax, -127, 127)
    return xp.where(amax == 0, -127, exponent).astype(np.int32)


def round_scale(value: Array, scale: str) -> Array:
    """Round non-negative float32 scales to the scale's type, saturating; returns stored codes.

    Codes are uint8 for E4M3 and the float dtype itself for bf16, fp16 and fp32.
    """
    xp, kind = namespace(value), SCALES[scale]
    if scale == "e4m3":
        return encode(value, E4M3)
    rounded = from_float32(value, FLOAT_DTYPES[kind.dtype])
    largest = from_float32(xp.asarray(np.float32(kind.max)), rounded.dtype)
    return xp.where(xp.isinf(to_float32(rounded)), largest, rounded)


def decode_scale(scales: Array, scale: str) -> Array:
    """Return the float32 value of stored scale codes (E8M0 byte b is 2^(b-127), 0xFF is NaN)."""
    xp = namespace(scales)
    if scale == "e8m0":
        exponent = xp.minimum(scales.astype(np.int32), 254) - 127
        value = xp.ldexp(xp.ones(scales.shape, dtype=np.float32), exponent)
        return xp.where(scales == 0xFF, np.float32(np.nan), value)
    return decode(scales, E4M3) if scale == "e4m3" else to_float32(scales)


def nan_scales(scales: Array, where: Array, scale: str) -> Array:
    """Return `scales` with the scale type's NaN at `where`."""
    xp = namespace(scales)
    kind = SCALES[scale]
    nan = np.array(kind.nan_code, dtype=f"uint{kind.bits}").view(scales.dtype)
    return xp.where(where, xp.asarray(nan), scales)


# ---- random source ----------------------------------------------------------------------------


def philox(seed: int, counter: Array) -> Array:
    """Return the four 32-bit words of Philox4x32-10 for each 64-bit counter.

    key = (low, high word of seed), counter = (low, high word, 0, 0); counter: any shape, integer;
    returns uint32 of shape (*counter.shape, 4).
    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    xp = namespace(counter)
    counter = counter.astype(np.uint64)
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1 = counter & low, counter >> shift
    c2, c3 = xp.zeros_like(counter), xp.zeros_like(counter)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return xp.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random24(seed: int, index: Array) -> Array:
    """Return the 24-bit random integer of each flat element index (lane index % 4, top bits)."""
    xp = namespace(index)
    words = philox(seed, index // 4)
    lane = (index % 4).astype(np.int64)[..., None]
    return (xp.take_along_axis(words, lane, axis=-1)[..., 0] >> np.uint32(8)).astype(np.int64)
