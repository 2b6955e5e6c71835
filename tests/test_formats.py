# SPDX-License-Identifier: Apache-2.0
"""The format table against facts typed by hand from the specifications, and against ml_dtypes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle

import ml_dtypes
import numpy as np
import pytest

from pyfmt.formats import (
    FLT_MAX,
    FORMATS,
    RECIPES,
    SCALE_RULES,
    SCALES,
    Element,
    Format,
    get_element,
    get_format,
)
from tests.grids import CUSTOM_ELEMENTS, CUSTOM_FORMATS, ELEMENTS

# Typed from OCP MX v1.0 (tables 1 to 5), OCP OFP8 v1.0 (table 1), NVIDIA's NVFP4 note and the
# paper on integer formats. Never computed.
# ruff: noqa: E501
# fmt: off
GOLDEN = [
    # name          bits max          emax block scale   ts     bytes bits  max_code step       spec
    ("mxfp8_e4m3",  8,   448.0,       8,   32,   "e8m0", False, 33,   8.25, 0x7E,    2.0**-9,  "e4m3fn-b32-e8m0"),
    ("mxfp8_e5m2",  8,   57344.0,     15,  32,   "e8m0", False, 33,   8.25, 0x7B,    2.0**-16, "e5m2ieee-b32-e8m0"),
    ("mxfp6_e2m3",  6,   7.5,         2,   32,   "e8m0", False, 25,   6.25, 0x1F,    0.125,    "e2m3-b32-e8m0"),
    ("mxfp6_e3m2",  6,   28.0,        4,   32,   "e8m0", False, 25,   6.25, 0x1F,    0.0625,   "e3m2-b32-e8m0"),
    ("mxfp4",       4,   6.0,         2,   32,   "e8m0", False, 17,   4.25, 0x7,     0.5,      "e2m1-b32-e8m0"),
    ("mxint8",      8,   1.984375,    0,   32,   "e8m0", False, 33,   8.25, 127,     0.015625, "int8q6-b32-e8m0"),
    ("mxint6",      6,   1.9375,      0,   32,   "e8m0", False, 25,   6.25, 31,      0.0625,   "int6q4-b32-e8m0"),
    ("mxint4",      4,   1.75,        0,   32,   "e8m0", False, 17,   4.25, 7,       0.25,     "int4q2-b32-e8m0"),
    ("nvfp4",       4,   6.0,         2,   16,   "e4m3", True,  9,    4.5,  0x7,     0.5,      "e2m1-b16-e4m3-ts"),
    ("nvint4",      4,   7.0,         2,   16,   "e4m3", True,  9,    4.5,  7,       1.0,      "int4-b16-e4m3-ts"),
    ("int4",        4,   7.0,         2,   128,  "bf16", False, 66,   4.125, 7,      1.0,      "int4-b128-bf16"),
    ("int8",        8,   127.0,       6,   128,  "bf16", False, 130,  8.125, 127,    1.0,      "int8-b128-bf16"),
]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# (element, code, value): zero, the smallest and largest subnormal, the smallest and largest
# normal, and every code that is not a number.
SPOTS = [
    ("e4m3fn", 0b0_0000_001, 2.0**-9), ("e4m3fn", 0b0_0000_111, 7 * 2.0**-9),
    ("e4m3fn", 0b0_0001_000, 2.0**-6), ("e4m3fn", 0b0_1111_110, 448.0),
    ("e4m3fn", 0b1_1111_110, -448.0), ("e4m3fn", 0b0_1111_111, math.nan),
    ("e4m3fn", 0b1_1111_111, math.nan), ("e4m3fn", 0b1_0000_000, -0.0),
    ("e5m2ieee", 0b0_00000_01, 2.0**-16), ("e5m2ieee", 0b0_00000_11, 3 * 2.0**-16),
    ("e5m2ieee", 0b0_00001_00, 2.0**-14), ("e5m2ieee", 0b0_11110_11, 57344.0),
    ("e5m2ieee", 0b0_11111_00, math.inf), ("e5m2ieee", 0b1_11111_00, -math.inf),
    ("e5m2ieee", 0b0_11111_01, math.nan), ("e5m2ieee", 0b0_11111_11, math.nan),
    ("e2m3", 0b0_00_001, 0.125), ("e2m3", 0b0_00_111, 0.875), ("e2m3", 0b0_01_000, 1.0),
    ("e2m3", 0b0_11_111, 7.5), ("e2m3", 0b1_11_111, -7.5),
    ("e3m2", 0b0_000_01, 0.0625), ("e3m2", 0b0_000_11, 0.1875), ("e3m2", 0b0_001_00, 0.25),
    ("e3m2", 0b0_111_11, 28.0), ("e3m2", 0b1_111_11, -28.0),
    ("int8q6", 64, 1.0), ("int8q6", 127, 127 / 64), ("int8q6", 0x81, -127 / 64),
    ("int8q6", 0x80, -2.0), ("int8q6", 0xFF, -1 / 64),
    ("int6q4", 31, 31 / 16), ("int6q4", 0x21, -31 / 16), ("int6q4", 0x20, -2.0),
    ("int4q2", 7, 1.75), ("int4q2", 9, -1.75), ("int4q2", 8, -2.0),
    ("int4", 7, 7.0), ("int4", 9, -7.0), ("int4", 8, -8.0), ("int8", 0x80, -128.0),
    ("uint4", 15, 15.0), ("ue4m3", 0xFF & 0x7F, 480.0), ("e0m3", 0b0_111, 1.75),
    # With no mantissa, every exponent but zero is a power of two; E4M0 has no room for it signed.
    ("e3m0", 0b0_001, 2.0**-2), ("e3m0", 0b0_111, 16.0), ("e3m0", 0b1_000, -0.0),
]
# fmt: on


def same_value(a: float, b: float) -> bool:
    """Equal as bits, but every NaN is the same NaN."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b and math.copysign(1, a) == math.copysign(1, b)


def test_the_rows_are_the_rows_of_the_specification() -> None:
    assert list(FORMATS) == [row[0] for row in GOLDEN]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row[0])
def test_facts_of_a_row(row: tuple) -> None:
    name, bits, largest, emax, block, scale, ts, block_bytes, bits_each, max_code, step, spec = row
    fmt = FORMATS[name]
    assert (fmt.name, fmt.spec, str(fmt)) == (name, spec, name)
    assert (fmt.bits, fmt.block, fmt.scale, fmt.tensor_scale) == (bits, block, scale, ts)
    assert (fmt.max, fmt.element.emax, fmt.element.max_code) == (largest, emax, max_code)
    assert 2.0**fmt.element.step_exp == step == fmt.element.decode(1)
    assert (fmt.bytes_per_block, fmt.bits_per_element) == (block_bytes, bits_each)
    assert fmt.scale_rules == (("rceil", "floor", "ceil", "even") if scale == "e8m0" else ())
    assert fmt.recipes == (("nvidia", "torchao", "single_level") if ts else ())


def test_every_value_of_e2m1() -> None:
    values = FORMATS["mxfp4"].element.values
    assert len(values) == 16
    assert all(map(same_value, values, E2M1))
    assert FORMATS["mxfp4"].element.midpoints == (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@pytest.mark.parametrize("name, code, value", SPOTS)
def test_spot_values(name: str, code: int, value: float) -> None:
    assert same_value(get_element(name).decode(code), value)


@pytest.mark.parametrize(
    "name, peer",
    [
        ("e4m3fn", ml_dtypes.float8_e4m3fn),
        ("e5m2ieee", ml_dtypes.float8_e5m2),
        ("e3m4ieee", ml_dtypes.float8_e3m4),
        ("e4m3ieee", ml_dtypes.float8_e4m3),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e2m1", ml_dtypes.float4_e2m1fn),
    ],
)
def test_every_code_against_ml_dtypes(name: str, peer: type) -> None:
    element = get_element(name)
    codes = np.arange(2**element.bits, dtype=np.uint8)
    theirs = codes.view(peer).astype(np.float64)
    bad = [c for c in codes if not same_value(element.decode(int(c)), float(theirs[c]))]
    assert bad == []
    assert element.max == float(ml_dtypes.finfo(peer).max)


@pytest.mark.parametrize("bits, peer", [(4, ml_dtypes.int4), (2, ml_dtypes.int2), (8, np.int8)])
def test_every_integer_code_against_numpy(bits: int, peer: type) -> None:
    codes = np.arange(2**bits, dtype=np.uint8)
    assert Element.integer(bits).values == tuple(codes.view(np.int8).astype(peer).astype(float))


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_derived_facts_agree_with_the_values(element: Element) -> None:
    values = element.values
    assert len(values) == 2**element.bits
    finite = [v for v in values if math.isfinite(v)]
    assert element.max == max(finite)
    assert element.emax == math.floor(math.log2(max(finite)))
    # The grid is strictly ascending from +0, code i is grid[i], and nothing finite is left out.
    assert element.grid[0] == 0.0 and math.copysign(1, element.grid[0]) == 1
    assert all(a < b for a, b in itertools.pairwise(element.grid))
    assert all(values[i] == v for i, v in enumerate(element.grid))
    assert set(element.grid) == {v for v in finite if v >= 0}
    # A midpoint is equally far from both neighbours, exactly, and float32 can hold it.
    for mid, (a, b) in zip(element.midpoints, itertools.pairwise(element.grid), strict=True):
        assert mid - a == b - mid and float(np.float32(mid)) == mid


@pytest.mark.parametrize(
    "name, width",
    [("e4m3fn", 3), ("e5m2ieee", 2), ("e2m3", 3), ("e3m2", 2), ("e2m1", 1)]
    + [("int8q6", 6), ("int6q4", 4), ("int4q2", 2), ("uint4", 3), ("e3m0", 0), ("e0m3", 2)],
)
def test_fraction_bits_that_the_even_rule_keeps(name: str, width: int) -> None:
    assert get_element(name).significand == width


def test_signed_values_mirror() -> None:
    for element in ELEMENTS:
        if element.kind == "float" and element.signed:
            half = 2 ** (element.bits - 1)
            for code in range(half):
                assert same_value(-element.decode(code), element.decode(code + half))
        if not element.signed:
            assert min(v for v in element.values if not math.isnan(v)) >= 0


@pytest.mark.parametrize("fmt", CUSTOM_FORMATS + tuple(FORMATS.values()), ids=str)
def test_names_and_specs_come_back(fmt: Format) -> None:
    assert get_format(fmt.name) == fmt
    assert get_format(fmt.spec) == fmt
    assert get_format(fmt) is fmt
    assert get_element(fmt.element.name) == fmt.element
    assert get_format(fmt.spec).name == fmt.name
    assert pickle.loads(pickle.dumps(fmt)) == fmt
    assert hash(get_format(fmt.spec)) == hash(fmt)


@pytest.mark.parametrize("exp, man", [(e, m) for e in range(8) for m in range(8)])
def test_any_exmy_of_two_to_eight_bits(exp: int, man: int) -> None:
    for signed in (True, False):
        if not 2 <= exp + man + signed <= 8:
            with pytest.raises(ValueError, match="2 to 8 bits"):
                Element.fp(exp, man, bias=0, signed=signed)
        else:
            element = Element.fp(exp, man, signed=signed)
            assert get_element(element.name) == element
            if exp:
                assert element.max == (2 - 2.0**-man) * 2.0 ** (2**exp - 1 - element.bias)


def test_formats_with_facts_changed() -> None:
    assert get_format("int4", block=64).spec == "int4-b64-bf16"
    assert get_format("int4", block=128) is FORMATS["int4"]
    assert get_format("int4", block="row").spec == "int4-brow-bf16"
    assert get_format("int8", scale="fp16", block=32).spec == "int8-b32-fp16"
    assert get_format("mxfp4", block=(16, 16)).spec == "e2m1-b16x16-e8m0"
    assert get_format("nvfp4", scale="e8m0", block=32) is FORMATS["mxfp4"]
    assert get_format("nvfp4", tensor_scale=False).recipes == ("single_level",)
    nvfp4 = get_format(FORMATS["mxfp4"], scale="e4m3", block=16, tensor_scale=True)
    assert nvfp4 is FORMATS["nvfp4"]


@pytest.mark.parametrize(
    "spec, length, blocks, padded, row_bytes",
    [
        ("mxfp4", 0, 0, 0, 0),
        ("mxfp4", 1, 1, 32, 16),
        ("mxfp4", 32, 1, 32, 16),
        ("mxfp4", 33, 2, 64, 32),
        ("mxfp6_e2m3", 33, 2, 64, 48),
        ("mxint8", 31, 1, 32, 32),
        ("int4-brow-bf16", 5, 1, 5, 3),
        ("int4-brow-bf16", 0, 0, 0, 0),
        ("e2m1-b16x16-e4m3-ts", 17, 2, 32, 16),
        ("e1m1-b3-e8m0", 4, 2, 6, 3),
        ("int7-b5-fp32", 6, 2, 10, 9),
    ],
)
def test_sizes(spec: str, length: int, blocks: int, padded: int, row_bytes: int) -> None:
    fmt = get_format(spec)
    assert (fmt.blocks(length), fmt.padded(length)) == (blocks, padded)
    assert fmt.row_bytes(length) == row_bytes


def test_whole_rows_and_squares_count_their_bytes() -> None:
    assert math.isnan(get_format("int8-brow-bf16").bytes_per_block)
    assert get_format("int8-brow-bf16").bits_per_element == 8
    square = get_format("e2m1-b16x16-e4m3-ts")
    assert square.bytes_per_block == 129 and square.bits_per_element == 4 + 8 / 256
    assert (square.block_rows, square.block_columns(99)) == (16, 16)


def test_scales() -> None:
    assert {s.name: (s.bits, s.dtype, s.nan_code) for s in SCALES.values()} == {
        "e8m0": (8, "uint8", 0xFF),
        "e4m3": (8, "uint8", 0x7F),
        "bf16": (16, "bfloat16", 0x7FC0),
        "fp16": (16, "float16", 0x7E00),
        "fp32": (32, "float32", 0x7FC00000),
    }
    assert SCALES["e8m0"].max == float(ml_dtypes.finfo(ml_dtypes.float8_e8m0fnu).max)
    assert SCALES["e4m3"].max == float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    assert SCALES["bf16"].max == float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    assert SCALES["fp16"].max == float(np.finfo(np.float16).max)
    assert SCALES["fp32"].max == FLT_MAX == float(np.finfo(np.float32).max)
    e8m0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert all(e8m0[b] == 2.0 ** (b - 127) for b in range(255)) and math.isnan(e8m0[255])


def test_names_of_choices() -> None:
    assert SCALE_RULES == ("rceil", "floor", "ceil", "even")
    assert RECIPES == ("nvidia", "torchao", "single_level")


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: get_format("mxfp5"), ValueError, ["'mxfp5'", "mxfp4"]),
        (lambda: get_format("MXFP4"), ValueError, ["did you mean", "'mxfp4'"]),
        (lambda: get_format("nvf4"), ValueError, ["'nvfp4'"]),
        (lambda: get_format("zzz"), ValueError, ["known are", "mxint8", "nvint4"]),
        (lambda: get_format(""), ValueError, ["known are"]),
        (lambda: get_format(4), TypeError, ["int", "pyfmt.FORMATS"]),
        (lambda: get_format(None), TypeError, ["NoneType"]),
        (lambda: get_format("int4", block=0), ValueError, ["positive int", "0"]),
        (lambda: get_format("int4", block=-1), ValueError, ["positive int", "-1"]),
        (lambda: get_format("int4", block=True), ValueError, ["positive int"]),
        (lambda: get_format("int4", block=1.5), ValueError, ["positive int", "1.5"]),
        (lambda: get_format("int4", block="rows"), ValueError, ["'row'", "'rows'"]),
        (lambda: get_format("int4", block=(16,)), ValueError, ["pair"]),
        (lambda: get_format("int4", block=(16, 0)), ValueError, ["pair"]),
        (lambda: get_format("int4", block=(1, 2, 3)), ValueError, ["pair"]),
        (lambda: get_format("int4", scale="bf61"), ValueError, ["'bf61'", "'bf16'"]),
        (lambda: get_format("int4-b0-bf16"), ValueError, ["positive int"]),
        (lambda: get_format("e9m9-b32-e8m0"), ValueError, ["2 to 8 bits", "got 19"]),
        (lambda: get_format("e2m1-b32-e8m0-ts"), ValueError, ["e4m3", "'e8m0'"]),
        (lambda: get_format("e2m1-b32-e8m0x"), ValueError, ["'e8m0x'"]),
        (lambda: get_format("int4", tensor_scale=True), ValueError, ["e4m3"]),
        (lambda: get_element("q4"), ValueError, ["'q4'", "int8q6"]),
        (lambda: Format("e2m1", 32, "e8m0"), TypeError, ["pyfmt.Element", "str"]),
        (lambda: Element("fixed", 1, 1), ValueError, ["'float' or 'int'", "'fixed'"]),
        (lambda: Element.fp(2, 1, special="inf"), ValueError, ["'ieee'", "'inf'"]),
        (lambda: Element.fp(1, 2, special="ieee"), ValueError, ["exp >= 2"]),
        (lambda: Element.fp(4, 0, special="ieee"), ValueError, ["man >= 1"]),
        (lambda: Element.fp(2.0, 1), TypeError, ["an int", "2.0"]),
        (lambda: Element.fp(-1, 4), ValueError, ["negative"]),
        (lambda: Element.fp(0, 0), ValueError, ["2 to 8 bits", "got 1"]),
        (lambda: Element.fp(2, 1, bias=1000), ValueError, ["another bias"]),
        (lambda: Element.integer(9), ValueError, ["2 to 8 bits", "got 9"]),
        (lambda: Element.integer(1), ValueError, ["2 to 8 bits", "got 1"]),
        (lambda: Element.integer(4, frac=1000), ValueError, ["-100 to 100"]),
        (lambda: Element("int", 1, 3), ValueError, ["integer element"]),
        (lambda: Element("float", 2, 1, bias=1, frac=2), ValueError, ["binary point"]),
        (lambda: FORMATS["mxfp4"].element.decode(16), ValueError, ["0 to 15", "16"]),
        (lambda: FORMATS["mxfp4"].element.decode(-1), ValueError, ["0 to 15", "-1"]),
    ],
)
def test_errors_say_what_was_expected(call, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FORMATS["x"] = FORMATS["mxfp4"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["mxfp4"].block = 16  # type: ignore[misc]


def test_custom_elements_are_many_kinds() -> None:
    # The sweep below the named rows is worth little if it does not hold every kind.
    kinds = {(e.kind, e.signed, e.special) for e in CUSTOM_ELEMENTS}
    assert kinds == {
        ("float", True, "none"),
        ("float", True, "fn"),
        ("float", True, "ieee"),
        ("float", False, "none"),
        ("float", False, "fn"),
        ("float", False, "ieee"),
        ("int", True, "none"),
        ("int", False, "none"),
    }
    assert {e.bits for e in CUSTOM_ELEMENTS} == set(range(2, 9))
