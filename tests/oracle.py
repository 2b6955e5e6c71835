# SPDX-License-Identifier: Apache-2.0
"""The slow oracle: every rule of the formats in exact rational arithmetic, one number at a time.

It shares nothing with the package but the format table. There are no bit tricks: a scale rule is
its definition over fractions, rounding is a search for the nearest point of a grid, and a float32
operation is the exact result rounded once. Far too slow for anything but a test.

    y = x / 2^E,  code = the grid point nearest to y, a tie to the even code
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np

from pyfmt.formats import FLT_MAX, Element, Format

ONE = Fraction(1)
# Exponent range and fraction bits: (smallest normal exponent, fraction bits, largest value).
FLOATS = {
    "float32": (-126, 23, Fraction(FLT_MAX)),
    "bfloat16": (-126, 7, (2 - Fraction(1, 2**7)) * 2**127),
    "float16": (-14, 10, Fraction(65504)),
    "e4m3": (-6, 3, Fraction(448)),
}
FLOATS |= {"fp32": FLOATS["float32"], "bf16": FLOATS["bfloat16"], "fp16": FLOATS["float16"]}


@cache
def pow2(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def floor_log2(q: Fraction) -> int:
    """The largest e with 2^e <= q, for q > 0."""
    e = q.numerator.bit_length() - q.denominator.bit_length()
    while pow2(e) > q:
        e -= 1
    while pow2(e + 1) <= q:
        e += 1
    return e


def round_float(q: Fraction, kind: str, saturate: bool = False) -> Fraction | float:
    """Round to nearest even into a float type; overflow gives inf, or the largest value."""
    emin, man, largest = FLOATS[kind]
    if q == 0:
        return q
    step = pow2(max(floor_log2(abs(q)), emin) - man)
    rounded = round(q / step) * step  # round() of a Fraction breaks ties to even
    if abs(rounded) > largest:
        sign = 1 if q > 0 else -1
        return sign * largest if saturate else sign * math.inf
    return rounded


def f32(q: Fraction) -> Fraction:
    """One float32 operation's rounding; the callers keep away from overflow."""
    rounded = round_float(q, "float32")
    assert isinstance(rounded, Fraction), "overflow must be handled by the caller"
    return rounded


def f32_capped(q: Fraction) -> Fraction:
    """min(the float32 nearest to q, FLT_MAX)."""
    rounded = round_float(q, "float32")
    return rounded if isinstance(rounded, Fraction) else Fraction(FLT_MAX)


@cache
def exact_grid(element: Element) -> tuple[Fraction, ...]:
    """The non-negative finite values by their definition, sorted; index = code."""
    values = []
    for magnitude in range(2 ** (element.exp + element.man)):
        e, m = divmod(magnitude, 2**element.man)
        if element.kind == "int":
            value = magnitude * pow2(-element.frac)
        elif e == 0:
            value = Fraction(m, 2**element.man) * pow2(1 - element.bias)
        else:
            value = (1 + Fraction(m, 2**element.man)) * pow2(e - element.bias)
        values.append(value)
    if element.special == "fn":
        values = values[:-1]
    if element.special == "ieee":
        values = values[: -(2**element.man)]
    return tuple(values)


def nearest_magnitude(y: Fraction, element: Element) -> int:
    """The code of the grid value nearest to y >= 0; a tie goes to the even code; saturating."""
    grid = exact_grid(element)
    above = bisect_left(grid, y)
    if above == len(grid):
        return len(grid) - 1
    if above == 0:
        return 0
    below = above - 1
    to_below, to_above = y - grid[below], grid[above] - y
    if to_below == to_above:
        return below if below % 2 == 0 else above
    return below if to_below < to_above else above


def stochastic_magnitude(y: Fraction, element: Element, r: int) -> int:
    """The neighbour away from zero iff r < (y - lo) / (hi - lo) * 2^24, for y >= 0."""
    grid = exact_grid(element)
    above = bisect_left(grid, y)
    if above == len(grid):
        return len(grid) - 1
    if grid[above] == y:
        return above
    lo, hi = grid[above - 1], grid[above]
    return above if r < (y - lo) / (hi - lo) * 2**24 else above - 1


def philox(counter: int, seed: int) -> list[int]:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit words for a 64-bit counter and key."""
    c = [counter % 2**32, counter >> 32, 0, 0]
    k = [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c[0], 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def random24(index: int, seed: int) -> int:
    """The 24 random bits of a flat logical index."""
    return philox(index // 4, seed)[index % 4] >> 8


def e8m0_exponent(amax: Fraction, element: Element, rule: str) -> int:
    """The exponent E of the block scale 2^E, clamped to [-127, 127]; zero blocks get -127."""
    if amax == 0:
        return -127
    largest = exact_grid(element)[-1]
    emax = floor_log2(largest)
    if rule == "rceil":
        e = floor_log2(amax / largest)
        e += pow2(e) * largest < amax
    elif rule == "floor":
        e = floor_log2(amax) - emax
    elif rule == "ceil":
        e = floor_log2(amax)
        e += (pow2(e) != amax) - emax
    elif rule == "even":
        e = floor_log2(even_rounded(amax, element.significand)) - emax
    else:
        raise AssertionError(rule)
    return max(-127, min(127, e))


def even_rounded(amax: Fraction, width: int) -> Fraction:
    """amax rounded, half away from zero, to `width` fraction bits."""
    step = pow2(floor_log2(amax) - width)
    return math.floor(amax / step + Fraction(1, 2)) * step


def fraction(x: np.ndarray) -> list[Fraction | None]:
    """The exact value of each number; None for NaN and infinities."""
    wide = x.astype(np.float64).ravel()
    return [Fraction(float(v)) if math.isfinite(v) else None for v in wide]


@dataclass
class Result:
    """Codes (one a cell, unpacked), scale codes as integers, the tensor scale, decoded values."""

    codes: np.ndarray
    scales: np.ndarray
    tensor_scale: float | None


def scale_code(value: Fraction, kind: str) -> int:
    """The stored bits of an already rounded scale value."""
    if kind == "e4m3":
        return int(np.float32(float(value)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    dtype = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}[kind]
    stored = np.array(float(value), np.float64).astype(dtype)
    assert float(stored) == float(value)
    return int(stored.view(np.uint32 if kind == "fp32" else np.uint16))


def quantize(
    x: np.ndarray,
    fmt: Format,
    *,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    clip: str = "symmetric",
    tensor_scale: float | None = None,
) -> Result:
    """Quantize a matrix along its last axis, number by number."""
    rows, columns = x.shape
    height, width = fmt.block_rows, fmt.block_columns(columns)
    values = np.array(fraction(x), object).reshape(rows, columns)
    negative = np.signbit(x.astype(np.float32))
    element, largest = fmt.element, exact_grid(fmt.element)[-1]
    block_rows, blocks = -(-rows // height), fmt.blocks(columns)
    codes = np.zeros((rows, fmt.padded(columns)), np.uint8)
    scales = np.zeros((block_rows, blocks), np.uint32)
    rule = scale_rule or "rceil"
    recipe = recipe or ("nvidia" if fmt.tensor_scale else "single_level")

    finite = [abs(v) for v in values.ravel() if v is not None]
    amax_tensor = max(finite, default=Fraction(0))
    S, ts = ONE, ONE
    if fmt.scale == "e4m3" and recipe == "nvidia":
        if tensor_scale is not None:
            ts = Fraction(float(tensor_scale))
            S = f32_capped(1 / ts)
        elif amax_tensor:
            S = f32_capped(f32(448 * largest) / amax_tensor)
            ts = f32(1 / S)
    elif fmt.scale == "e4m3" and recipe == "torchao":
        if tensor_scale is not None:
            ts = Fraction(float(tensor_scale))
        elif amax_tensor:
            # A tensor so small that the quotient underflows counts as one of zeros.
            ts = f32(amax_tensor / f32(448 * largest)) or ONE

    for i_row in range(block_rows):
        for i_block in range(blocks):
            area = np.s_[
                i_row * height : (i_row + 1) * height, i_block * width : (i_block + 1) * width
            ]
            block = values[area]
            if any(v is None for v in block.ravel()):
                scales[i_row, i_block] = {
                    "e8m0": 0xFF,
                    "e4m3": 0x7F,
                    "bf16": 0x7FC0,
                    "fp16": 0x7E00,
                    "fp32": 0x7FC00000,
                }[fmt.scale]
                continue
            amax = max((abs(v) for v in block.ravel()), default=Fraction(0))
            if fmt.scale == "e8m0":
                e = e8m0_exponent(amax, element, rule)
                scales[i_row, i_block] = e + 127
                multiply = exactly(pow2(-e))
            else:
                s, multiplier = scale_and_multiplier(amax, fmt, recipe, S, ts)
                scales[i_row, i_block] = scale_code(s, fmt.scale)
                multiply = in_float32(multiplier)
            r0, c0 = i_row * height, i_block * width
            for (i, j), v in np.ndenumerate(block):
                y = multiply(abs(v))
                index = (r0 + i) * columns + c0 + j
                codes[r0 + i, c0 + j] = encode(
                    y,
                    bool(negative[r0 + i, c0 + j]),
                    element,
                    clip,
                    random24(index, seed) if rounding == "stochastic" else None,
                )
    if not fmt.tensor_scale or recipe == "single_level":
        return Result(codes, scales, None)
    return Result(codes, scales, float(ts))


def exactly(multiplier: Fraction):
    return lambda v: v * multiplier


def in_float32(multiplier: Fraction):
    # An overflowing product saturates like any other value beyond the grid.
    return lambda v: f32_capped(v * multiplier)


def scale_and_multiplier(
    amax: Fraction, fmt: Format, recipe: str, S: Fraction, ts: Fraction
) -> tuple[Fraction, Fraction]:
    """(the stored block scale, what elements are multiplied by); every step rounds to float32."""
    largest = exact_grid(fmt.element)[-1]
    if fmt.scale != "e4m3":
        s = round_float(f32(amax / largest), fmt.scale, saturate=True)
        return s, f32_capped(1 / s) if s else Fraction(0)
    if recipe == "torchao":
        wanted = round_float(f32(amax / largest) / ts, "float32")
        s = round_float(max(pow2(-6), min(Fraction(448), wanted)), "e4m3")
        reciprocal = round_float(1 / ts, "float32")
        return s, f32_capped(reciprocal / s) if reciprocal != math.inf else Fraction(FLT_MAX)
    share = f32(S * f32(1 / largest))
    s = round_float(f32_capped(amax * share), "e4m3", saturate=True)
    if not s:
        return s, Fraction(0)
    whole = f32(s * ts)
    return s, f32_capped(1 / whole) if whole else Fraction(FLT_MAX)


def encode(y: Fraction, negative: bool, element: Element, clip: str, r: int | None) -> int:
    """The code of a number given as magnitude and sign."""
    if element.kind == "int" and negative and element.signed and clip == "full":
        # The extra code below -max widens the negative side by one step.
        step = pow2(-element.frac)
        widest = 2 ** (element.bits - 1)
        t = y / step
        if r is None:
            n = round(t)
        else:
            n = math.floor(t)
            n += r < (t - n) * 2**24
        return -min(n, widest) % 2**element.bits
    if negative and not element.signed:
        return 0
    pick = nearest_magnitude(y, element) if r is None else stochastic_magnitude(y, element, r)
    if not negative:
        return pick
    return -pick % 2**element.bits if element.kind == "int" else pick + 2 ** (element.bits - 1)


def element_value(code: int, element: Element) -> float:
    """The value of a code by definition (float keeps the sign of zero)."""
    grid = exact_grid(element)
    if element.kind == "int":
        signed = code - 2**element.bits if element.signed and code >= len(grid) else code
        return float(signed * pow2(-element.frac))
    half = 2 ** (element.exp + element.man)
    magnitude, negative = code % half, code >= half
    if magnitude < len(grid):
        value = float(grid[magnitude])
    elif element.special == "ieee" and magnitude == half - 2**element.man:
        value = math.inf
    else:
        value = math.nan
    return -value if negative else value


def scale_value(code: int, kind: str) -> float:
    """The value of a stored scale."""
    if kind == "e8m0":
        return math.nan if code == 0xFF else 2.0 ** (code - 127)
    if kind == "e4m3":
        return float(np.uint8(code).view(ml_dtypes.float8_e4m3fn))
    if kind == "fp32":
        return float(np.uint32(code).view(np.float32))
    return float(np.uint16(code).view(np.float16 if kind == "fp16" else ml_dtypes.bfloat16))


def multiply(a: float, b: float, kind: str = "float32") -> float:
    """The product of two floats, exact and then rounded once, with IEEE's special cases."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    sign = math.copysign(1, a) * math.copysign(1, b)
    rounded = round_float(abs(Fraction(a) * Fraction(b)), kind)
    return sign * float(rounded)


def dequantize(
    codes: np.ndarray,
    scales: np.ndarray,
    tensor_scale: float | None,
    fmt: Format,
    columns: int,
    kind: str,
) -> np.ndarray:
    """Decode unpacked codes of a matrix: element * scale (* tensor_scale), then one rounding."""
    height, width = fmt.block_rows, fmt.block_columns(columns)
    out = np.zeros((codes.shape[0], columns), np.float64)
    for (i, j), _ in np.ndenumerate(out):
        s = scale_value(int(scales[i // height, j // width]), fmt.scale)
        value = multiply(element_value(int(codes[i, j]), fmt.element), s)
        if tensor_scale is not None:
            value = multiply(value, tensor_scale)
        out[i, j] = multiply(value, 1.0, kind)
    return out


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """One row of codes as a little-endian bit stream, through one big integer."""
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return np.frombuffer(stream.to_bytes(-(-len(codes) * bits // 8), "little"), np.uint8)
