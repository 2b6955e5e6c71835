# SPDX-License-Identifier: Apache-2.0
"""Elements, block scales and the random source: the reference against facts and the oracle."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from pyfmt import reference
from pyfmt.formats import CLIPS, FORMATS, Element, get_element, get_format
from pyfmt.reference import codec
from tests import grids, mismatch, oracle
from tests.grids import ALL_FORMATS, BF16, ELEMENTS
from tests.rooms import Room, same_everywhere, same_quantized

CAST_PEERS = [
    ("e4m3fn", ml_dtypes.float8_e4m3fn),
    ("e5m2ieee", ml_dtypes.float8_e5m2),
    ("e3m4ieee", ml_dtypes.float8_e3m4),
    ("e4m3ieee", ml_dtypes.float8_e4m3),
    ("e2m3", ml_dtypes.float6_e2m3fn),
    ("e3m2", ml_dtypes.float6_e3m2fn),
    ("e2m1", ml_dtypes.float4_e2m1fn),
]


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_encode_undoes_decode_for_every_code(element: Element) -> None:
    codes = np.arange(2**element.bits, dtype=np.uint8)
    values = codec.decode(codes, element)
    assert values.dtype == np.float32
    for code, value in zip(codes, values, strict=True):
        assert mismatch.raw(np.float32(oracle.element_value(int(code), element))) == mismatch.raw(
            value
        ) or math.isnan(value)
    finite = np.isfinite(values)
    back = codec.encode(values[finite], element, clip="full")
    mismatch.same_codes("encode(decode(c))", back, codes[finite], element, values[finite])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_every_midpoint_and_its_neighbours(element: Element, clip: str) -> None:
    y = grids.element_grid(element)
    want = [
        oracle.encode(abs(Fraction(float(v))), bool(np.signbit(v)), element, clip, None) for v in y
    ]
    got = codec.encode(y, element, clip=clip)
    mismatch.same_codes(f"encode clip={clip}", got, np.array(want, np.uint8), element, y)
    # The grid does hold ties: at every midpoint the even code won.
    ties = np.isin(y, np.array(element.midpoints, np.float32))
    assert ties.sum() == len(element.midpoints)
    assert not (got[ties] & 1).any()


def test_infinity_saturates_and_negative_zero_survives() -> None:
    for element in ELEMENTS:
        top, negative_zero = codec.encode(np.array([np.inf, -0.0]), element)
        assert top == element.max_code
        sign = 2 ** (element.bits - 1) if element.kind == "float" and element.signed else 0
        assert negative_zero == sign


@pytest.mark.parametrize("clip, lowest", [("symmetric", -7), ("full", -8)])
def test_integers_are_symmetric_unless_asked(clip: str, lowest: int) -> None:
    y = np.array([-7.49, -7.5, -7.51, -8.0, -9.0, 7.5, 8.0])
    codes = codec.encode(y, get_element("int4"), clip=clip)
    # -7.5 is a tie, and -8 the even neighbour where it is allowed.
    assert codec.decode(codes, get_element("int4")).tolist() == [-7] + [lowest] * 4 + [7, 7]


@pytest.mark.parametrize("name, peer", CAST_PEERS)
def test_encode_is_the_cast_of_ml_dtypes(name: str, peer: type) -> None:
    element = get_element(name)
    y = grids.element_grid(element)
    every = np.arange(2**16, dtype=np.uint16).view(BF16).astype(np.float32)
    y = np.concatenate([y, every[np.isfinite(every)]])
    # The peer's casts overflow to NaN or infinity, or wrap; ours saturate. Clip, then compare.
    theirs = np.clip(y, -element.max, element.max).astype(peer).view(np.uint8)
    mismatch.same_codes(name, codec.encode(y, element), theirs, element, y)


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32], ids=str)
def test_float_conversions_round_to_nearest_even(dtype: np.dtype) -> None:
    dtype = np.dtype(dtype)
    codes = np.arange(2**16, dtype=np.uint16)
    halves = codes.view(BF16 if dtype == np.float32 else dtype).astype(np.float32)
    points = halves[np.isfinite(halves)]
    with np.errstate(over="ignore"):
        middles = (points[:-1].astype(np.float64) + points[1:]) / 2
        x = np.concatenate([points, grids.neighbours(middles), grids.edges(), [np.inf, -np.inf]])
        want = x.astype(np.float32).astype(dtype)
    mismatch.same_floats("from_float32", codec.from_float32(x.astype(np.float32), dtype), want, x)
    nan = np.array([0x7F800001, 0xFFC12345, 0x7FFFFFFF], np.uint32).view(np.float32)
    canonical = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000}[dtype.name]
    assert (mismatch.raw(codec.from_float32(nan, dtype)) == canonical).all()


# From the design: byte of the block scale for a block maximum, by rule.
# fmt: off
VECTORS = [
    ("mxfp4", "floor", {4: 127, 6: 127, 6.5: 127, 7: 127}),
    ("mxfp4", "rceil", {4: 127, 6: 127, 6.5: 128, 7: 128}),
    ("mxfp4", "ceil",  {4: 127, 6: 128, 6.5: 128, 7: 128}),
    ("mxfp4", "even",  {4: 127, 6: 127, 6.5: 127, 7: 128}),
    ("mxfp8_e4m3", "floor", {448: 127, 460: 127, 500: 127}),
    ("mxfp8_e4m3", "rceil", {448: 127, 460: 128, 500: 128}),
    ("mxfp8_e4m3", "ceil",  {448: 128, 460: 128, 500: 128}),
    ("mxfp8_e4m3", "even",  {448: 127, 460: 127, 500: 128}),
    ("mxint8", "rceil", {1.0: 127, 127 / 64: 127, 127 / 64 + 2**-22: 128, 2.0: 128}),
    ("mxint8", "floor", {1.0: 127, 1.999: 127, 2.0: 128}),
    ("mxint6", "rceil", {1.0: 127, 31 / 16: 127, 31 / 16 + 2**-22: 128}),
    ("mxint4", "rceil", {1.0: 127, 7 / 4: 127, 7 / 4 + 2**-22: 128}),
]
# fmt: on


@pytest.mark.parametrize("name, rule, vector", VECTORS)
def test_vectors_of_the_scale_rules(name: str, rule: str, vector: dict[float, int]) -> None:
    amax = np.array(list(vector), np.float32)
    exponent = codec.e8m0_exponent(amax, FORMATS[name].element, rule)
    assert (exponent + 127).tolist() == list(vector.values())


@pytest.mark.parametrize("rule", ["rceil", "floor", "ceil", "even"])
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_scale_rules_on_the_grid_of_maxima(element: Element, rule: str) -> None:
    amax = grids.amax_grid(get_format(f"{element.name}-b32-e8m0"))
    got = codec.e8m0_exponent(amax, element, rule)
    want = [oracle.e8m0_exponent(Fraction(float(a)), element, rule) for a in amax]
    assert got.dtype == np.int32
    bad = [
        f"{mismatch.show_float(int(mismatch.raw(a)), a.dtype)}: got {g}, expected {w}"
        for a, g, w in zip(amax, got, want, strict=True)
        if g != w
    ]
    assert not bad, f"{len(bad)} of {len(amax)}\n" + "\n".join(bad[:8])


@pytest.mark.parametrize("scale", ["e4m3", "bf16", "fp16", "fp32"])
def test_scales_round_to_nearest_even_and_saturate(scale: str) -> None:
    points = np.abs(np.concatenate([grids.edges(), grids.element_grid(get_element("e4m3fn"))]))
    every = np.arange(2**15, dtype=np.uint16).view(BF16 if scale == "bf16" else np.float16)
    every = every[np.isfinite(every.astype(np.float32))].astype(np.float64)[::23]
    with np.errstate(over="ignore"):
        middles = np.abs(grids.neighbours((every[:-1] + every[1:]) / 2))
    values = np.unique(np.concatenate([points, middles]))
    codes = codec.round_scale(values, scale)
    decoded = codec.decode_scale(codes, scale)
    for value, code, back in zip(values, mismatch.raw(codes), decoded, strict=True):
        want = oracle.round_float(Fraction(float(value)), scale, saturate=True)
        assert float(back) == want, mismatch.show_float(int(mismatch.raw(value)), value.dtype)
        assert int(code) == oracle.scale_code(want, scale)


def test_every_byte_of_a_scale_decodes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    e8m0 = codec.decode_scale(codes, "e8m0")
    mismatch.same_floats(
        "e8m0",
        codec.from_float32(e8m0, np.float32),
        codec.from_float32(codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), np.float32),
    )
    e4m3 = codec.decode_scale(codes, "e4m3")
    theirs = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(e4m3, theirs, equal_nan=True)


@pytest.mark.parametrize(
    "seed, counter, words",
    [
        # Known answers of Random123 (kat_vectors, philox4x32 10).
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_known_answers(seed: int, counter: int, words: tuple[int, ...]) -> None:
    assert tuple(oracle.philox(counter, seed)) == words
    assert tuple(codec.philox(seed, np.array(counter))) == words


def test_philox_is_the_oracle_everywhere() -> None:
    counters = np.array([0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**62], np.int64)
    for seed in (0, 1, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1):
        got = codec.philox(seed, counters)
        assert got.dtype == np.uint32 and got.shape == (8, 4)
        assert got.tolist() == [oracle.philox(int(c), seed) for c in counters]
        index = np.array([0, 1, 2, 3, 4, 7, 2**33 + 1])
        assert codec.random24(seed, index).tolist() == [
            oracle.random24(int(i), seed) for i in index
        ]
    # Words and lanes all differ: 64k draws show no repeated pattern of four.
    words = codec.philox(7, np.arange(2**14))
    assert len(np.unique(words)) > 2**16 - 4


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_stochastic_rounding_turns_exactly_at_the_threshold(element: Element) -> None:
    y = grids.element_grid(element).astype(np.float64)
    # A random draw at, below and above (|y| - lo) / (hi - lo) * 2^24.
    draws, wants, ys = [], [], []
    for v in y:
        magnitude = abs(Fraction(float(v)))
        grid = oracle.exact_grid(element)
        lo = max((g for g in grid if g <= magnitude), default=grid[0])
        hi = next((g for g in grid if g > magnitude), None)
        share = 0 if hi is None else (magnitude - lo) / (hi - lo) * 2**24
        for r in {0, 2**24 - 1, math.floor(share) - 1, math.floor(share), math.ceil(share)}:
            if 0 <= r < 2**24:
                draws.append(r)
                ys.append(v)
                wants.append(oracle.encode(magnitude, bool(np.signbit(v)), element, "symmetric", r))
    got = codec.encode(np.array(ys), element, random=np.array(draws))
    shown = np.array(ys).astype(np.float32)
    mismatch.same_codes("stochastic", got, np.array(wants, np.uint8), element, shown)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_every_midpoint_in_every_room(every_room: list[Room], element: Element) -> None:
    # Blocks led by the largest value, so that floor scales by 1 and codes are those of `encode`.
    fmt = get_format(f"{element.name}-b32-e8m0")
    y = grids.element_grid(element)
    y = y[np.abs(y) < 2.0 ** (element.emax + 1)]
    y = np.resize(y, (len(y) // 31 + 1, 31))
    x = np.concatenate([np.full((len(y), 1), element.max, np.float32), y], axis=1)
    for options in ({}, {"clip": "full"}, {"rounding": "stochastic", "seed": 3}):
        parts = same_quantized(every_room, x, fmt, scale_rule="floor", **options)
        assert (parts[1] == 127).all()
        want = reference.dequantize(*parts, fmt, x.shape)
        same_everywhere(every_room, want, "dequantize", *parts, fmt, x.shape)


def test_every_format_of_the_sweep_is_a_format() -> None:
    assert len({f.spec for f in ALL_FORMATS}) == len(ALL_FORMATS)


def test_a_mismatch_prints_input_codes_and_fields() -> None:
    element = FORMATS["mxfp8_e4m3"].element
    x = np.array([[448.0, -1.0]], np.float32)
    with pytest.raises(AssertionError) as caught:
        mismatch.same_codes(
            "room",
            np.array([[0x7E, 0xB9]], np.uint8),
            np.array([[0x7E, 0xB8]], np.uint8),
            element,
            x,
        )
    text = str(caught.value)
    for part in (
        "1 of 2 differ",
        "(0, 1)",
        "-1.0",
        "0b1'01111111'0",
        "0b1'0111'001",
        "0b1'0111'000",
    ):
        assert part in text
    with pytest.raises(AssertionError, match="0b0'11111111'1"):
        mismatch.same_floats("room", np.float32([np.nan]), np.float32([0]))
