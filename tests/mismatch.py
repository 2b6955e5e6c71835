# SPDX-License-Identifier: Apache-2.0
"""Compare bits, and on a difference show the input, both codes and their fields."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pyfmt.formats import Element, Format, get_element

SHOWN = 8
_FIELDS = {"float32": (8, 23), "bfloat16": (8, 7), "float16": (5, 10)}


def raw(x: np.ndarray) -> np.ndarray:
    """The bits of an array as unsigned integers."""
    return np.asarray(x, order="C").view(f"uint{8 * x.dtype.itemsize}")


def fields(bits: int, exp: int, man: int, signed: bool = True) -> str:
    """sign'exponent'mantissa in binary, for example 0b1'1111'110."""
    parts = [f"{bits >> (exp + man) & 1:b}"] if signed else []
    parts += [f"{bits >> man & (2**exp - 1):0{exp}b}"] if exp else []
    parts += [f"{bits & (2**man - 1):0{man}b}"] if man else []
    return "0b" + "'".join(parts)


def show_float(bits: int, dtype: np.dtype) -> str:
    """A float as a decimal, a hexadecimal and its fields."""
    value = float(np.array(bits, f"uint{8 * dtype.itemsize}").view(dtype))
    return f"{value!r:<24} {value.hex():<22} {fields(bits, *_FIELDS[dtype.name])}"


def show_code(code: int, element: Element) -> str:
    """An element's code with its value and fields."""
    value = element.decode(code) if code < 2**element.bits else "not a code"
    if element.kind == "int":
        return f"{code:#04x} = {value!r:<10} 0b{code:0{element.bits}b}"
    return f"{code:#04x} = {value!r:<10} {fields(code, element.exp, element.man, element.signed)}"


def _report(
    what: str,
    got: np.ndarray,
    want: np.ndarray,
    show: Callable[[int], str],
    given: Callable[[tuple[int, ...]], str],
) -> None:
    bad = np.argwhere(got != want)
    lines = [f"{what}: {len(bad)} of {want.size} differ"]
    for index in map(tuple, bad[:SHOWN].tolist()):
        lines.append(f"  at {index}: {given(index)}")
        lines.append(f"    got      {show(int(got[index]))}")
        lines.append(f"    expected {show(int(want[index]))}")
    raise AssertionError("\n".join(lines))


def same_shape(what: str, got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"


def same_floats(what: str, got: np.ndarray, want: np.ndarray, x: np.ndarray | None = None) -> None:
    """Assert equal shape, dtype and bits; NaN payloads and the sign of zero count."""
    same_shape(what, got, want)
    if np.array_equal(raw(got), raw(want)):
        return

    def given(index: tuple[int, ...]) -> str:
        if x is None or x.shape != want.shape:
            return ""
        return "input    " + show_float(int(raw(x)[index]), x.dtype)

    _report(what, raw(got), raw(want), lambda bits: show_float(bits, want.dtype), given)


def same_codes(
    what: str,
    got: np.ndarray,
    want: np.ndarray,
    element: Element,
    x: np.ndarray | None = None,
    axis: int = -1,
) -> None:
    """Assert that unpacked codes (..., padded length) are equal; `x` is what was quantized."""
    same_shape(what, got, want)
    if np.array_equal(got, want):
        return
    moved = None if x is None else np.ascontiguousarray(np.moveaxis(x, axis, -1))

    def given(index: tuple[int, ...]) -> str:
        if moved is None:
            return ""
        if index[-1] >= moved.shape[-1]:
            return "padding"
        return "input    " + show_float(int(raw(moved)[index]), moved.dtype)

    _report(what, got, want, lambda code: show_code(code, element), given)


def same_scales(
    what: str, got: np.ndarray, want: np.ndarray, fmt: Format, x: np.ndarray | None = None
) -> None:
    """Assert that stored scales are equal; `x` may be a matrix quantized along its last axis."""
    same_shape(what, got, want)
    if np.array_equal(raw(got), raw(want)):
        return

    def given(index: tuple[int, ...]) -> str:
        if x is None or x.ndim != 2 or len(index) != 2:
            return ""
        height, width = fmt.block_rows, fmt.block_columns(x.shape[-1])
        i, j = index
        block = x[i * height : (i + 1) * height, j * width : (j + 1) * width]
        amax = np.abs(block).max()
        return "amax     " + show_float(int(raw(np.asarray(amax))), x.dtype)

    def show(bits: int) -> str:
        if fmt.scale == "e8m0":
            return f"{bits} = 2^{bits - 127}" if bits != 255 else "255 = NaN"
        if fmt.scale == "e4m3":
            return show_code(bits, get_element("e4m3fn"))
        return show_float(bits, want.dtype)

    _report(what, raw(got), raw(want), show, given)
