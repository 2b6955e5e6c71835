# SPDX-License-Identifier: Apache-2.0
"""Quantize, dequantize, fake-quantize and amax: the reference is the oracle, a room is both."""

from __future__ import annotations

import math
import zlib
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pyfmt import backends, reference
from pyfmt.formats import FLT_MAX, FORMATS, SCALES, Format, get_element, get_format
from pyfmt.reference.layout import pack, unpack
from tests import grids, mismatch, oracle
from tests.grids import ALL_FORMATS, BF16, DTYPES, FP16, FP32
from tests.rooms import Room, native, same_everywhere, same_quantized

SOME_FORMATS = [
    *FORMATS.values(),
    *map(
        get_format,
        ["e2m1-b16x16-e4m3-ts", "int8-brow-bf16", "e3m1-b5-e8m0", "int5q3-b24-fp16"]
        + ["ue4m3-b32-e8m0", "int4-b32-fp32", "e4m3fn-b2x3-e8m0"],
    ),
]


def as_integers(scales: np.ndarray) -> np.ndarray:
    return mismatch.raw(scales).astype(np.uint32)


def same_as_oracle(x: np.ndarray, fmt: Format, **options: Any) -> None:
    """Assert that the reference gives the oracle's bits for a matrix."""
    codes, scales, tensor_scale = reference.quantize(x, fmt, **options)
    want = oracle.quantize(x, fmt, **options)
    what = f"{fmt.name} {x.dtype} {options}"
    stored = want.scales.astype(f"uint{SCALES[fmt.scale].bits}").view(scales.dtype)
    mismatch.same_scales(f"{what} scales", scales, stored, fmt, x)
    unpacked = unpack(codes, fmt.bits, fmt.padded(x.shape[1]))
    mismatch.same_codes(f"{what} codes", unpacked, want.codes, fmt.element, x)
    if want.tensor_scale is None:
        assert tensor_scale is None
    else:
        assert tensor_scale.shape == () and tensor_scale.dtype == np.float32
        assert float(tensor_scale) == want.tensor_scale


# ---- the reference is the oracle --------------------------------------------------------------


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_reference_is_the_oracle(fmt: Format, dtype: str, near: bool) -> None:
    blocks = {1: 60, 2: 30}.get(fmt.block_rows, 90 if fmt.block_columns(24) <= 32 else 24)
    x = grids.matrix(fmt, DTYPES[dtype], blocks, near)
    # Every option in turn, a different one for each format, dtype and range.
    options = grids.options_of(fmt)
    turn = zlib.crc32(f"{fmt.spec} {dtype} {near}".encode())
    for i in range(2):
        same_as_oracle(x, fmt, **options[(turn + i) % len(options)])


def around(points: np.ndarray, ulps: int) -> np.ndarray:
    """Each point in float32 with its neighbours up to `ulps` away."""
    bits = points.astype(np.float32).view(np.uint32).astype(np.int64)
    near = bits[:, None] + np.arange(-ulps, ulps + 1)
    return near.astype(np.uint32).view(np.float32).ravel()


def scale_ties(fmt: Format, largest: float) -> np.ndarray:
    """Blocks of two (a maximum; a number beside it) where the scale, then the code, is a tie."""
    q, top = fmt.max, 448.0 if fmt.scale == "e4m3" else 1.0
    grid = get_element("e4m3fn") if fmt.scale == "e4m3" else get_element("e4m3ieee")
    spread = np.array(grid.midpoints if fmt.scale == "e4m3" else grid.midpoints[8:]) / top
    maxima = around(spread * largest, 4)
    blocks = [np.stack([maxima, np.zeros_like(maxima)], axis=1)]
    # A code is a tie next to midpoint * scale * tensor scale, the scale being what it rounds to.
    for share in (1.0, 0.37, 0.0113, 0.93 * 2.0**-9):
        amax = np.float32(largest * share)
        s = amax / q / (largest / q / top) if fmt.scale == "e4m3" else amax / q
        s = float(oracle.round_float(Fraction(float(s)), fmt.scale))
        unit = s * (largest / q / top) if fmt.scale == "e4m3" else s
        beside = around(np.array(fmt.element.midpoints)[:40] * unit, 3)
        beside = beside[np.abs(beside) <= amax]
        blocks.append(np.stack([np.full_like(beside, amax), beside], axis=1))
    last = np.float32([[largest, -largest]])
    x = np.concatenate([*blocks, last])
    return x[np.abs(x[:, 0]) <= np.float32(largest)]


@pytest.mark.parametrize("element", ["e2m1", "int4", "e4m3fn", "int8q6"])
@pytest.mark.parametrize("scale", ["e4m3", "e4m3-ts", "bf16", "fp16", "fp32"])
def test_scale_arithmetic_where_the_order_of_operations_shows(element: str, scale: str) -> None:
    # Random blocks meet a wrong order of operations once in a million; these do at once.
    fmt = get_format(f"{element}-b2-{scale}")
    for recipe in fmt.recipes or (None,):
        for largest in (1.0, 77.7, 1e-3):
            options = {"recipe": recipe} if recipe else {}
            same_as_oracle(scale_ties(fmt, largest), fmt, **options)


def test_a_tensor_scale_too_small_for_its_reciprocal() -> None:
    x = np.float32([[0, 1.0], [-0.0, 0.0], [FLT_MAX, -1e-30]])
    for spec in ("e2m1-b2-e4m3-ts", "int4-b2-e4m3-ts"):
        for tiny in (2.0**-149, 2.0**-128, 2.0**-126):
            for recipe in ("nvidia", "torchao"):
                options = {"tensor_scale": np.float32(tiny), "recipe": recipe}
                same_as_oracle(x, get_format(spec), **options)


@pytest.mark.parametrize("recipe", ["nvidia", "torchao"])
@pytest.mark.parametrize("largest", [0.0, 2.0**-149, 2.0**-140, 2.0**-126, 1e-30, 1.0, FLT_MAX])
@pytest.mark.parametrize("name", ["nvfp4", "nvint4"])
def test_tensor_scale_at_the_ends_of_the_range(name: str, largest: float, recipe: str) -> None:
    x = np.zeros((3, 16), np.float32)
    x[0, 3], x[1, 2], x[2, :] = largest, -largest / 3, -0.0
    same_as_oracle(x, FORMATS[name], recipe=recipe)


def test_tensor_scale_ignores_blocks_that_are_not_finite() -> None:
    x = grids.noise(4, 64)
    clean = reference.quantize(x, FORMATS["nvfp4"])
    for bad in (np.nan, np.inf, -np.inf):
        y = x.copy()
        y[1, 20] = bad  # spoils block (1, 1); the maximum lies elsewhere
        assert np.abs(x[1, 16:32]).max() < np.abs(x).max()
        codes, scales, tensor_scale = reference.quantize(y, FORMATS["nvfp4"])
        assert tensor_scale == clean[2]
        assert scales[1, 1] == 0x7F and not codes[1, 8:16].any()
        keep = np.ones((4, 4), bool)
        keep[1, 1] = False
        assert np.array_equal(scales[keep], clean[1][keep])
        assert np.array_equal(codes.reshape(4, 4, 8)[keep], clean[0].reshape(4, 4, 8)[keep])


# ---- golden vectors ---------------------------------------------------------------------------


# Bytes worked out by hand. fmt, block (padded with zeros), options, first bytes, scale bits.
# fmt: off
BY_HAND = [
    # 6 * 2^0: byte 127. 1 -> code 2 in the low nibble, -3 -> code 13 in the high one.
    ("mxfp4", [1, -3, 6, -0.0], {}, [0xD2, 0x87, 0x00], 127),
    # Ties: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4.
    ("mxfp4", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], {}, [0x20, 0x42, 0x64, 0x76], 127),
    ("mxint8", [1.0, -1.0, 127 / 64, -1 / 64], {}, [0x40, 0xC0, 0x7F, 0xFF], 127),
    # Floor leaves 2 - 2^-7 at E = 0; 127.5 is a tie to 128, which saturates.
    ("mxint8", [1.9921875, -1.9921875], {"scale_rule": "floor"}, [0x7F, 0x81, 0], 127),
    ("mxint8", [1.9921875, -1.9921875], {"scale_rule": "floor", "clip": "full"},
     [0x7F, 0x80, 0], 127),
    # 6-bit codes 1, 2, 3, 4 as a little-endian stream: 1 | 2 << 6 | 3 << 12 | 4 << 18.
    ("mxfp6_e2m3", [0.125, 0.25, 0.375, 0.5, 7.5], {}, [0x81, 0x30, 0x10, 0x1F], 127),
    ("mxfp8_e4m3", [448, -448, 2**-9, -(2**-10), 464], {"scale_rule": "floor"},
     [0x7E, 0xFE, 0x01, 0x80, 0x7E], 127),
    ("int4", [7, -7, 3.5, -2.5, 0], {}, [0x97, 0xE4, 0x00], 0x3F80),
    ("int8", [127, -127, 63.5], {}, [0x7F, 0x81, 0x40], 0x3F80),
    # amax 2688: S = 1, s = 448 for a block of 2688.
    ("nvfp4", [2688, -1344], {}, [0xD7, 0x00], 0x7E),
    ("nvint4", [3136, -1344], {}, [0xD7, 0x00], 0x7E),
]
# fmt: on


@pytest.mark.parametrize("name, block, options, first, scale", BY_HAND)
def test_vectors_by_hand(
    name: str, block: list[float], options: dict[str, Any], first: list[int], scale: int
) -> None:
    x = np.zeros((1, FORMATS[name].block), np.float32)
    x[0, : len(block)] = block
    codes, scales, tensor_scale = reference.quantize(x, FORMATS[name], **options)
    assert codes[0, : len(first)].tolist() == first
    assert not codes[0, len(first) :].any()
    assert as_integers(scales).tolist() == [[scale]]
    assert tensor_scale is None or tensor_scale == 1


def test_shapes_and_dtypes_of_the_parts() -> None:
    x = np.zeros((2, 3, 40), np.float32)
    for spec, codes_shape, scales_shape, dtype in [
        ("mxfp4", (2, 3, 32), (2, 3, 2), np.uint8),
        ("mxfp6_e3m2", (2, 3, 48), (2, 3, 2), np.uint8),
        ("nvfp4", (2, 3, 24), (2, 3, 3), np.uint8),
        ("int4", (2, 3, 64), (2, 3, 1), BF16),
        ("int8-brow-fp16", (2, 3, 40), (2, 3, 1), FP16),
        ("int8-b32-fp32", (2, 3, 64), (2, 3, 2), FP32),
        ("e2m1-b2x16-e8m0", (2, 3, 24), (2, 2, 3), np.uint8),
        ("e2m1-b16x16-e8m0", (2, 3, 24), (2, 1, 3), np.uint8),
    ]:
        codes, scales, _ = reference.quantize(x, get_format(spec))
        assert (codes.shape, scales.shape) == (codes_shape, scales_shape), spec
        assert (codes.dtype, scales.dtype) == (np.uint8, dtype), spec


# ---- dequantize -------------------------------------------------------------------------------


def any_codes(fmt: Format, rows: int, columns: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Codes and scales nobody quantized: every code, unused ones included, under every scale."""
    rng = np.random.default_rng(seed)
    padded = fmt.padded(columns)
    codes = rng.permutation(rows * padded).reshape(rows, padded) % 2**fmt.bits
    shape = (-(-rows // fmt.block_rows), fmt.blocks(columns))
    scale = SCALES[fmt.scale]
    n = math.prod(shape)
    if scale.bits == 8:
        scales = rng.permutation(max(n, 256))[:n].astype(np.uint8).reshape(shape)
    else:
        scales = rng.integers(0, 2**scale.bits, shape, dtype=f"uint{scale.bits}")
        scales = scales.view(DTYPES[fmt.scale])
    tensor_scale = np.asarray(np.float32(0.0371)) if fmt.tensor_scale else None
    return codes.astype(np.uint8), scales, tensor_scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_reference_dequantizes_like_the_oracle(fmt: Format, dtype: str) -> None:
    rows, columns = 12, max(3 * fmt.block_columns(24) - 1, 1)
    codes, scales, tensor_scale = any_codes(fmt, rows, columns, len(fmt.spec))
    packed = pack(codes, fmt.bits)
    got = reference.dequantize(
        packed, scales, tensor_scale, fmt, (rows, columns), dtype=DTYPES[dtype]
    )
    ts = None if tensor_scale is None else float(tensor_scale)
    wide = oracle.dequantize(codes, as_integers(scales), ts, fmt, columns, dtype)
    with np.errstate(over="ignore"):
        want = wide.astype(DTYPES[dtype])
    canonical = {"fp32": 0x7FC00000, "bf16": 0x7FC0, "fp16": 0x7E00}[dtype]
    mismatch.raw(want)[np.isnan(wide)] = canonical
    mismatch.same_floats(f"{fmt.name} dequantize", got, want)


# ---- rooms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_rooms_equal_the_reference(
    every_room: list[Room], fmt: Format, dtype: str, near: bool
) -> None:
    x = grids.matrix(fmt, DTYPES[dtype], 300, near)
    for options in grids.options_of(fmt):
        parts = same_quantized(every_room, x, fmt, **options)
        want = reference.dequantize(*parts, fmt, x.shape, dtype=x.dtype)
        same_everywhere(every_room, want, "fake_quantize", x, fmt, **options)


@pytest.mark.parametrize("fmt", [f for f in ALL_FORMATS if f.scale != "e8m0"], ids=str)
def test_rooms_where_the_order_of_operations_shows(every_room: list[Room], fmt: Format) -> None:
    height, width = fmt.block_rows, fmt.block_columns(24)
    for largest in (1.0, 77.7, 1e-3):
        pairs = scale_ties(fmt, largest)
        x = np.zeros((len(pairs) * height, width), np.float32)
        x[::height, :2] = pairs
        for recipe in fmt.recipes or (None,):
            same_quantized(every_room, x, fmt, **({"recipe": recipe} if recipe else {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_rooms_dequantize_like_the_reference(
    every_room: list[Room], fmt: Format, dtype: str
) -> None:
    rows, columns = 37, 5 * fmt.block_columns(24) - fmt.block_columns(24) // 3
    codes, scales, tensor_scale = any_codes(fmt, rows, columns)
    arguments = (pack(codes, fmt.bits), scales, tensor_scale, fmt, (rows, columns))
    want = reference.dequantize(*arguments, dtype=DTYPES[dtype])
    same_everywhere(every_room, want, "dequantize", *arguments, dtype=DTYPES[dtype])


SHAPES = [
    (1,), (5,), (32,), (33,), (1, 1), (3, 16), (2, 31), (7, 33), (4, 0), (0, 4), (0,), (2, 3, 130),
    (3, 0, 5), (2, 1, 3, 47), (300, 17), (1, 1000),
]  # fmt: skip


@pytest.mark.parametrize("fmt", SOME_FORMATS, ids=str)
def test_rooms_on_every_shape_and_axis(every_room: list[Room], fmt: Format) -> None:
    for shape in SHAPES:
        x = grids.noise(1, math.prod(shape), BF16 if len(shape) % 2 else FP32).reshape(shape)
        for axis in (-1, *range(len(shape) - 1)):
            options: dict[str, Any] = {"axis": axis}
            parts = same_quantized(every_room, x, fmt, **options)
            arguments = (*parts, fmt, shape)
            want = reference.dequantize(*arguments, axis=axis, dtype=FP16)
            same_everywhere(every_room, want, "dequantize", *arguments, axis=axis, dtype=FP16)
            # Random bits are drawn by the index in the moved tensor.
            options |= {"rounding": "stochastic", "seed": 5}
            want = reference.fake_quantize(x, fmt, **options)
            same_everywhere(every_room, want, "fake_quantize", x, fmt, **options)


VIEWS = {
    "transposed": lambda x: x.T,
    "every other column": lambda x: x[:, ::2],
    "every third row": lambda x: x[::3],
    "offset by one": lambda x: x.reshape(-1)[1 : 1 + 95 * 64].reshape(95, 64),
    "inner window": lambda x: x[3:-5, 7:-1],
    "broadcast row": lambda x: np.broadcast_to(x[:1], x.shape),
    "broadcast column": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "moved axes": lambda x: x.reshape(8, 12, 64).transpose(2, 0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("fmt", SOME_FORMATS, ids=str)
def test_rooms_on_strides_and_offsets(every_room: list[Room], fmt: Format, view: str) -> None:
    for dtype in (FP32, BF16):
        x = VIEWS[view](grids.noise(96, 64, dtype))
        for axis in (-1, 0):
            same_quantized(every_room, x, fmt, view, axis=axis)
        same_everywhere(every_room, reference.fake_quantize(x, fmt), "fake_quantize", x, fmt)


def test_rooms_dequantize_strided_codes(every_room: list[Room]) -> None:
    fmt = FORMATS["mxfp4"]
    codes, scales, _ = reference.quantize(grids.noise(16, 128), fmt)
    wide = np.zeros((16, 2, codes.shape[1]), np.uint8)
    wide[:, 1] = codes
    want = reference.dequantize(codes, scales, None, fmt, (16, 128))
    arguments = (wide[:, 1], np.asfortranarray(scales), None, fmt, (16, 128))
    same_everywhere(every_room, want, "dequantize", *arguments)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_rooms_where_threads_share_the_work(every_room: list[Room], fmt: Format) -> None:
    # Large enough that every room splits it, ragged so that the split is uneven.
    x = grids.noise(257, 1500, BF16)
    x[100, 200], x[256, 1499] = np.nan, np.inf
    parts = same_quantized(every_room, x, fmt)
    want = reference.dequantize(*parts, fmt, x.shape, dtype=BF16)
    same_everywhere(every_room, want, "dequantize", *parts, fmt, x.shape, dtype=BF16)
    same_everywhere(every_room, want, "fake_quantize", x, fmt)
    same_quantized(every_room, x, fmt, rounding="stochastic", seed=11)


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_the_number_of_threads_changes_no_bit(every_room: list[Room], threads: int) -> None:
    import torch

    x = grids.noise(301, 1100)
    before = torch.get_num_threads()
    try:
        native().set_threads(threads)
        torch.set_num_threads(threads)
        for spec in ("mxfp4", "nvfp4", "int8", "e2m1-b16x16-e8m0", "int8-brow-bf16"):
            fmt = get_format(spec)
            parts = same_quantized(every_room, x, fmt, rounding="stochastic", seed=2)
            want = reference.dequantize(*parts, fmt, x.shape)
            same_everywhere(every_room, want, "dequantize", *parts, fmt, x.shape)
    finally:
        native().set_threads(0)
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)])
def test_rooms_take_every_seed(every_room: list[Room], seed: int) -> None:
    x = grids.noise(3, 130)
    for name in ("mxfp4", "mxint8", "nvfp4"):
        same_quantized(every_room, x, FORMATS[name], rounding="stochastic", seed=seed)


@pytest.mark.parametrize("name", [*FORMATS, "int8q6-b32x32-e8m0", "int4q2-b16x16-e8m0"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_scales_cut_at_the_largest_power(every_room: list[Room], name: str, dtype: str) -> None:
    # Integers' largest number is below 2: no scale byte covers what is next to 2^128.
    fmt = get_format(name)
    largest = np.float32(FLT_MAX if dtype == "fp32" else 2.0**128 - 2.0**120)
    x = np.full((32, 256), largest) * np.linspace(-1, 1, 256, dtype=np.float32)
    x[:, 5], x[:, 40] = largest, -largest
    x = x.astype(DTYPES[dtype])
    for options in grids.options_of(fmt):
        same_quantized(every_room, x, fmt, **options)
        same_quantized(every_room, x, fmt, axis=0, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_every_bf16_number_in_every_room(every_room: list[Room], name: str) -> None:
    # All 65536 of them: blocks of numbers of one size, then blocks of every size.
    every = np.arange(2**16, dtype=np.uint16).view(BF16)
    same_quantized(every_room, every.reshape(512, 128), FORMATS[name])
    same_quantized(every_room, np.ascontiguousarray(every.reshape(128, 512).T), FORMATS[name])


def test_the_reference_room_serves_tensors() -> None:
    room = Room("torch-reference", backends.get("reference"), torch=True)
    x = grids.noise(5, 70, BF16)
    for name in ("mxint8", "nvfp4", "int4"):
        parts = same_quantized([room], x, FORMATS[name], rounding="stochastic", seed=1)
        want = reference.dequantize(*parts, FORMATS[name], x.shape, dtype=BF16)
        arguments = (*parts, FORMATS[name], x.shape)
        same_everywhere([room], want, "dequantize", *arguments, dtype=BF16)


@pytest.mark.parametrize("block", [None, 1, 7, 16, 32, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_amax(implementations: list[Room], dtype: str, block: int | None) -> None:
    x = grids.matrix(FORMATS["mxfp4"], DTYPES[dtype], 60)
    for y in (x, x.T, x[:0], x[:, :0], x[3:4, :1], np.full((2, 3), -np.inf, x.dtype)):
        for axis in (-1, 0):
            rows = np.moveaxis(y, axis, -1).astype(np.float32)
            if block is None:
                finite = np.abs(rows[np.isfinite(rows)])
                want = np.asarray(finite.max(initial=0), np.float32)
            else:
                starts = range(0, rows.shape[-1], block)
                parts = [np.abs(rows[..., i : i + block]).max(axis=-1) for i in starts]
                want = np.array(parts, np.float32).reshape(len(parts), len(rows)).T
                want = np.where(np.isfinite(want), want, np.float32(np.nan))
            same_everywhere(implementations, want, "amax", y, block, axis=axis)
