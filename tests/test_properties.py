# SPDX-License-Identifier: Apache-2.0
"""Laws that quantization obeys for every input, searched by hypothesis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyfmt import reference
from pyfmt.formats import FORMATS, SCALE_RULES, SCALES, Element, Format, get_format
from pyfmt.reference import codec
from pyfmt.reference.layout import unpack
from tests import grids, mismatch, rooms
from tests.grids import BF16, FP16, FP32
from tests.rooms import same_everywhere, same_quantized

# Whole-tensor scales couple all blocks, so laws about single blocks leave those formats out.
LOCAL = [f for f in grids.ALL_FORMATS if not f.tensor_scale]
E8M0 = [f for f in LOCAL if f.scale == "e8m0"]


@pytest.fixture(scope="module")
def fixed_rooms() -> Iterator[list[rooms.Room]]:
    """Every room, opened once for all examples of a test."""
    yield rooms.every_room()
    rooms.native().set_level("best")


float32s = st.integers(0, 2**32 - 1).map(lambda bits: np.array(bits, np.uint32).view(np.float32))
ordinary = st.floats(-1e4, 1e4, width=32).map(np.float32)
finite32 = st.floats(allow_nan=False, allow_infinity=False, width=32).map(np.float32)


@st.composite
def matrices(draw: Any, numbers: Any = finite32, rows: int = 5, columns: int = 70) -> np.ndarray:
    shape = (draw(st.integers(1, rows)), draw(st.integers(1, columns)))
    x = draw(arrays(np.float32, shape, elements=st.floats(-8, 8, width=32)))
    # A few arbitrary numbers among ordinary ones, and rows of different sizes.
    for _ in range(draw(st.integers(0, 4))):
        at = (draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1)))
        x[at] = draw(numbers)
    return x


def codes_of(x: np.ndarray, fmt: Format, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    codes, scales, _ = reference.quantize(x, fmt, **options)
    return unpack(codes, fmt.bits, fmt.padded(x.shape[options.get("axis", -1)])), scales


def same_parts(what: str, got: Any, want: Any) -> None:
    for part, expected in zip(got, want, strict=True):
        if expected is None:
            assert part is None, what
        else:
            mismatch.same_floats(what, np.asarray(part), np.asarray(expected))


@given(st.sampled_from(grids.ELEMENTS), st.lists(finite32, min_size=2, max_size=40))
def test_rounding_is_monotone(element: Element, numbers: list[np.float32]) -> None:
    y = np.sort(np.array(numbers, np.float32))
    for clip in ("symmetric", "full"):
        values = codec.decode(codec.encode(y, element, clip=clip), element)
        assert (np.diff(values) >= 0).all(), (y, values)


@given(st.sampled_from(grids.ELEMENTS), finite32)
def test_rounding_goes_to_a_nearest_value(element: Element, y: np.float32) -> None:
    value = float(codec.decode(codec.encode(np.array([y]), element), element)[0])
    grid = np.array(element.grid)
    grid = np.concatenate([-grid, grid]) if element.signed else grid
    assert abs(value - float(y)) == np.abs(grid - float(y)).min()


@given(st.sampled_from(grids.ELEMENTS), finite32, st.integers(0, 2**24 - 1))
def test_stochastic_rounding_goes_to_a_neighbour(element: Element, y: np.float32, r: int) -> None:
    y64 = min(abs(float(y)), element.max) * (1 if y >= 0 or element.signed else 0)
    code = codec.encode(np.array([y]), element, random=np.array([r]))
    value = abs(float(codec.decode(code, element)[0]))
    grid = np.array(element.grid)
    below, above = grid[grid <= y64].max(), grid[grid >= y64].min()
    assert value in (below, above)
    assert r or value == above  # the least random number always rounds away from zero


@given(matrices(), st.sampled_from(LOCAL), st.data())
def test_quantize_is_sign_symmetric(x: np.ndarray, fmt: Format, data: st.DataObject) -> None:
    assume(fmt.element.signed)
    options = data.draw(st.sampled_from(grids.options_of(fmt)))
    assume(options.get("clip") != "full")
    y = reference.fake_quantize(x, fmt, **options)
    negated = reference.fake_quantize(-x, fmt, **options)
    if fmt.element.kind == "float":
        # The sign of zero turns too.
        mismatch.same_floats(fmt.name, negated, np.where(np.isnan(y), y, -y), x)
    else:
        assert np.array_equal(negated, -y, equal_nan=True)


@given(
    matrices(ordinary), st.sampled_from(E8M0), st.sampled_from(SCALE_RULES), st.integers(-60, 60)
)
def test_powers_of_two_move_only_the_scale(x: np.ndarray, fmt: Format, rule: str, k: int) -> None:
    x = np.where(np.abs(x) < 2.0**-20, np.float32(0), x)
    y = np.ldexp(x, k)
    codes, scales = codes_of(x, fmt, scale_rule=rule)
    moved_codes, moved = codes_of(y, fmt, scale_rule=rule)
    inside = (scales.astype(int) + k > 0) & (scales.astype(int) + k < 255)
    assume(inside[scales > 0].all())
    mismatch.same_codes(fmt.name, moved_codes, codes, fmt.element)
    shifted = np.where(scales > 0, scales.astype(int) + k, 0)
    assert np.array_equal(moved, shifted)


@given(matrices(float32s), st.sampled_from(LOCAL), st.data())
def test_blocks_do_not_know_of_each_other(x: np.ndarray, fmt: Format, data: st.DataObject) -> None:
    """Changing one number changes the codes and the scale of its own block only."""
    options = data.draw(st.sampled_from(grids.options_of(fmt)))
    i = data.draw(st.integers(0, x.shape[0] - 1))
    j = data.draw(st.integers(0, x.shape[1] - 1))
    y = x.copy()
    y[i, j] = data.draw(float32s)
    height, width = fmt.block_rows, fmt.block_columns(x.shape[1])
    before, after = codes_of(x, fmt, **options), codes_of(y, fmt, **options)
    scales = mismatch.raw(before[1]) != mismatch.raw(after[1])
    scales[i // height, j // width] = False
    assert not scales.any()
    codes = before[0] != after[0]
    top, left = i // height * height, j // width * width
    codes[top : top + height, left : left + width] = False
    assert not codes.any()


@given(matrices(float32s), st.sampled_from(grids.ALL_FORMATS), st.data())
def test_padding_is_invisible(x: np.ndarray, fmt: Format, data: st.DataObject) -> None:
    """Zeros appended up to the block's end change no code, no scale and no tensor scale."""
    assume(fmt.block != "row")
    options = data.draw(st.sampled_from(grids.options_of(fmt)))
    assume("seed" not in options)  # the index of an element depends on the row's length
    padded = np.zeros((x.shape[0], fmt.padded(x.shape[1])), np.float32)
    padded[:, : x.shape[1]] = x
    got = reference.quantize(padded, fmt, **options)
    same_parts(fmt.name, got, reference.quantize(x, fmt, **options))
    codes = unpack(got[0], fmt.bits, padded.shape[1])
    assert not codes[:, x.shape[1] :].any()


@given(
    arrays(np.float32, st.tuples(*[st.integers(0, 6)] * 3), elements=st.floats(-9, 9, width=32)),
    st.sampled_from(grids.ALL_FORMATS),
    st.integers(-3, 2),
    st.data(),
)
def test_any_axis_is_the_moved_axis(
    x: np.ndarray, fmt: Format, axis: int, data: st.DataObject
) -> None:
    options = data.draw(st.sampled_from(grids.options_of(fmt)))
    moved = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    got = reference.quantize(x, fmt, axis=axis, **options)
    same_parts(fmt.name, got, reference.quantize(moved, fmt, **options))
    y = reference.dequantize(*got, fmt, x.shape, axis=axis)
    want = reference.dequantize(*got, fmt, moved.shape)
    mismatch.same_floats(fmt.name, np.moveaxis(y, axis, -1), want)


@given(matrices(ordinary), st.sampled_from(E8M0), st.sampled_from(["rceil", "floor", "even"]))
def test_quantizing_twice_changes_nothing(x: np.ndarray, fmt: Format, rule: str) -> None:
    """Values on the grid stay: where the maximum's exponent survives, so does every bit.

    (ceil is left out: a maximum rounded down to a power of two lowers the scale.)
    """
    once = reference.fake_quantize(x, fmt, scale_rule=rule)
    twice = reference.fake_quantize(once, fmt, scale_rule=rule)
    assert np.array_equal(once, twice, equal_nan=True)


@given(matrices(float32s), st.sampled_from(grids.ALL_FORMATS), st.data())
def test_fake_quantize_is_dequantize_of_quantize(
    x: np.ndarray, fmt: Format, data: st.DataObject
) -> None:
    options = data.draw(st.sampled_from(grids.options_of(fmt)))
    dtype = data.draw(st.sampled_from([FP32, BF16, FP16]))
    x = codec.from_float32(x, dtype)
    parts = reference.quantize(x, fmt, **options)
    want = reference.dequantize(*parts, fmt, x.shape, dtype=dtype)
    mismatch.same_floats(fmt.name, reference.fake_quantize(x, fmt, **options), want, x)
    spoilt = np.isnan(want.astype(np.float32))
    nan_codes = SCALES[fmt.scale].nan_code
    assert spoilt.any() == (mismatch.raw(parts[1]) == nan_codes).any()


@given(matrices(ordinary), st.sampled_from(E8M0))
def test_rceil_never_clips(x: np.ndarray, fmt: Format) -> None:
    """The largest magnitude of a block lies within Qmax * 2^E, and Qmax * 2^(E-1) is too small."""
    _, scales = codes_of(x, fmt, scale_rule="rceil")
    height, width = fmt.block_rows, fmt.block_columns(x.shape[1])
    for (i, j), byte in np.ndenumerate(scales):
        block = x[i * height : (i + 1) * height, j * width : (j + 1) * width]
        amax, limit = float(np.abs(block).max()), fmt.max * 2.0 ** (int(byte) - 127)
        assert amax <= limit
        assert byte == 0 or amax > limit / 2


@pytest.mark.parametrize("size", [2, 8, 64])
@given(data=st.data())
def test_hadamard_is_its_own_transpose_and_inverse(size: int, data: st.DataObject) -> None:
    """H H = size on integers, exactly; signs applied before are undone by signs after."""
    x = data.draw(arrays(np.float32, (2, size), elements=st.integers(-1000, 1000).map(float)))
    signs = np.where(np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))),
                     np.float32(1), np.float32(-1))  # fmt: skip
    twice = reference.hadamard(reference.hadamard(x, size, signs), size) * signs
    if size == 64:  # 2^(-6/2) is exact
        assert np.array_equal(twice, x)
    assert np.allclose(twice, x, rtol=1e-5, atol=1e-3)


@given(matrices(float32s, 4, 64), st.sampled_from(grids.ALL_FORMATS), st.data())
def test_rotation_inside_quantize_is_rotation_before(
    x: np.ndarray, fmt: Format, data: st.DataObject
) -> None:
    size = data.draw(st.sampled_from([2, 8, 32]))
    x = np.resize(x, (x.shape[0], 64))
    dtype = data.draw(st.sampled_from([FP32, BF16]))
    x = codec.from_float32(x, dtype)
    rotated = reference.hadamard(x.astype(np.float32), size)
    got = reference.quantize(x, fmt, rotation=size)
    same_parts(fmt.name, got, reference.quantize(rotated, fmt))


@given(data=st.data(), x=matrices(float32s), fmt=st.sampled_from(grids.ALL_FORMATS))
def test_every_room_gives_the_reference_bits(
    fixed_rooms: Any, x: np.ndarray, fmt: Format, data: st.DataObject
) -> None:
    options = data.draw(st.sampled_from(grids.options_of(fmt)))
    dtype = data.draw(st.sampled_from([FP32, BF16, FP16]))
    x = codec.from_float32(x, dtype)
    axis = data.draw(st.sampled_from([0, 1]))
    same_quantized(fixed_rooms, x, fmt, axis=axis, **options)
    want = reference.fake_quantize(x, fmt, axis=axis, **options)
    same_everywhere(fixed_rooms, want, "fake_quantize", x, fmt, axis=axis, **options)


@given(data=st.data(), bits=st.integers(2, 8))
def test_unpack_undoes_pack(fixed_rooms: Any, data: st.DataObject, bits: int) -> None:
    shape = st.tuples(st.integers(0, 3), st.integers(0, 80))
    codes = data.draw(arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = reference.pack(codes, bits)
    same_everywhere(fixed_rooms, packed, "pack", codes, bits)
    same_everywhere(fixed_rooms, codes, "unpack", packed, bits, codes.shape[1])


def test_symmetric_integers_leave_the_lowest_code_alone() -> None:
    for fmt in (FORMATS["mxint8"], FORMATS["nvint4"], FORMATS["int4"], get_format("int3-b8-e8m0")):
        x = -np.abs(grids.matrix(fmt, blocks=90))
        codes, _ = codes_of(x, fmt)
        lowest = 2 ** (fmt.bits - 1)
        assert not (codes == lowest).any()
        full, _ = codes_of(x, fmt, clip="full")
        if fmt.scale == "e8m0":
            floor, _ = codes_of(x, fmt, clip="full", scale_rule="floor")
            assert (floor == lowest).any()
        assert full.shape == codes.shape
