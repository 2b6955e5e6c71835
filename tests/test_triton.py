# SPDX-License-Identifier: Apache-2.0
"""The Triton room equals the reference bit for bit.

The same checks run in Triton's interpreter on the CPU and, marked `gpu`, on a CUDA device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import pyfmt
from pyfmt import reference
from pyfmt.formats import FORMATS, Format, get_format
from tests import grids
from tests.grids import BF16, CUSTOM_ELEMENTS, CUSTOM_FORMATS, DTYPES, FP16, FP32
from tests.mismatch import same_floats
from tests.rooms import Room, same_everywhere, same_quantized
from tests.triton_room import Interpreted, OnDevice, poisoned_empty

SEED = {"rounding": "stochastic", "seed": 0x9E3779B97F4A7C15}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Room]:
    module = Interpreted()
    yield Room("triton-interpreter", module)  # type: ignore[arg-type]
    module.close()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Room:
    """The room in the interpreter, then on a device with poisoned outputs."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreted")
    monkeypatch.setattr("torch.empty", poisoned_empty())
    return Room("triton-cuda", OnDevice("cuda"))  # type: ignore[arg-type]


def same(room: Room, x: np.ndarray, fmt: Format, **options: Any) -> None:
    """Assert that quantize, dequantize and fake_quantize give the reference's bits."""
    want = same_quantized([room], x, fmt, **options)
    axis = options.get("axis", -1)
    if options.get("rotation"):
        return
    values = reference.dequantize(*want, fmt, x.shape, axis=axis, dtype=x.dtype)
    same_everywhere(
        [room], values, "dequantize", *want, fmt, x.shape, axis=axis, dtype=x.dtype.name
    )
    same_everywhere([room], values, "fake_quantize", x, fmt, **options)


# ---- every format and option ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_named_formats(room: Room, fmt: Format, dtype: str) -> None:
    """Blocks that walk the scales' turning points and the special cases, ragged at the end."""
    for near in (False, True):
        same(room, grids.matrix(fmt, DTYPES[dtype], 24, near), fmt)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_every_combination_of_options(room: Room, fmt: Format) -> None:
    x = grids.matrix(fmt, BF16, 10)[:, : 2 * fmt.block_columns(24)]
    for rule, recipe in itertools.product(fmt.scale_rules or (None,), fmt.recipes or (None,)):
        for rounding, clip in itertools.product(({}, SEED), ("symmetric", "full")):
            options = {"scale_rule": rule, "recipe": recipe, "clip": clip, **rounding}
            same_quantized([room], x, fmt, **options)
            want = reference.fake_quantize(x, fmt, **options)
            same_everywhere([room], want, "fake_quantize", x, fmt, **options)


@pytest.mark.parametrize("fmt", CUSTOM_FORMATS, ids=str)
def test_made_formats(room: Room, fmt: Format) -> None:
    """Odd widths and blocks, squares, whole rows, every kind of scale."""
    x = grids.matrix(fmt, FP32, 16)[:, :80]
    turn = len(fmt.spec)
    options = grids.options_of(fmt)
    same(room, x, fmt)
    same(room, x, fmt, **options[turn % len(options)])


@pytest.mark.parametrize("kind", ["float", "int"])
def test_every_element(room: Room, kind: str) -> None:
    """Ties, neighbours and saturation of elements nobody ships, then every code decodes."""
    for element in CUSTOM_ELEMENTS:
        if element.kind != kind:
            continue
        fmt = Format(element, 32, "fp32")
        # The largest value first: its block's scale is 1, so that the grid meets its ties.
        points = grids.element_grid(element)
        points = points[np.abs(points) <= element.max]
        points = np.resize(points, (-(-len(points) // 31), 31))
        x = np.concatenate([np.full((len(points), 1), element.max, np.float32), points], axis=1)
        for options in ({}, SEED):
            same_quantized([room], x, fmt, **options)
        codes = np.resize(np.arange(2**element.bits, dtype=np.uint8), (8, 32))
        packed = reference.pack(codes, element.bits)
        scales = np.array([[0.0, 1.0, 2.0**-140, 3e38, np.inf, np.nan, -1.5, 0.1]], FP32).T
        for dtype in DTYPES.values():
            want = reference.dequantize(packed, scales, None, fmt, (8, 32), dtype=dtype)
            same_everywhere(
                [room], want, "dequantize", packed, scales, None, fmt, (8, 32), dtype=dtype.name
            )


@pytest.mark.parametrize("scale", ["e8m0", "e4m3"])
def test_every_scale_byte(room: Room, scale: str) -> None:
    scales = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for element, dtype in itertools.product(("e2m1", "int8q6"), DTYPES.values()):
        fmt = get_format(f"{element}-b8-{scale}")
        codes = np.resize(np.arange(256, dtype=np.uint8), (16, fmt.row_bytes(128)))
        want = reference.dequantize(codes, scales, None, fmt, (16, 128), dtype=dtype)
        same_everywhere(
            [room], want, "dequantize", codes, scales, None, fmt, (16, 128), dtype=dtype.name
        )


# ---- shapes -----------------------------------------------------------------------------------

SHAPES = ["mxfp4", "nvfp4", "mxfp6_e2m3", "int8", "e2m1-b16x16-e8m0", "e2m1-b5-e8m0"]
SHAPES += ["int4-brow-bf16", "int5q3-b24-e8m0"]


@pytest.mark.parametrize("spec", SHAPES)
def test_axes_strides_and_empty_tensors(room: Room, spec: str) -> None:
    fmt = get_format(spec)
    x = grids.noise(40, 72, BF16)
    y = grids.noise(6, 34, FP16).reshape(2, 3, 17, 2)
    for part, options in [
        (x, {"axis": 0}),
        (x.T, {}),
        (x[:, ::3], {}),
        (x[1:34, 5:70], {"axis": 1, **SEED}),
        (y, {"axis": 2}),
        (y.transpose(2, 0, 3, 1), {"axis": 1, **SEED}),
        (x.ravel()[:45], {}),
        (x[:, 0], {}),
    ]:
        same(room, part, fmt, **options)
    for part, axis in [(x[:0], 1), (x[:, :0], 1), (x[:, :0], 0), (x[:3, :1], 1)]:
        same(room, part, fmt, axis=axis)


def test_large_rows_and_blocks(room: Room) -> None:
    """Blocks beyond a program's registers: amax first, then element by element."""
    for spec, columns in [
        ("int4-brow-bf16", 16384 + 40),
        ("int8-brow-fp32", 4096),
        ("e2m1-b20000-e8m0", 24000),
        ("e3m2-b192x192-e8m0", 200),
    ]:
        same(room, grids.noise(2, columns, BF16), get_format(spec))


# ---- tensor scales ----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [FORMATS["nvfp4"], FORMATS["nvint4"]], ids=str)
@pytest.mark.parametrize("recipe", ["nvidia", "torchao"])
def test_tensor_scales(room: Room, fmt: Format, recipe: str) -> None:
    x = grids.noise(12, 160, BF16)
    for given in (1.0, 0.0123, 2.0**-120, 3e38, np.array(0.25, FP32)):
        same(room, x, fmt, recipe=recipe, tensor_scale=given)
    for amax in (0.0, 2.0**-149, 2.0**-126, 3.4e38, np.nan, np.inf):
        same(room, np.full((3, 40), amax, FP32), fmt, recipe=recipe)
    same(room, x[:0], fmt, recipe=recipe)
    same(room, x[:0], fmt, recipe=recipe, tensor_scale=0.5)


# ---- rotation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**k for k in range(1, 11)])
def test_hadamard(room: Room, size: int) -> None:
    for dtype in DTYPES.values():
        x = grids.matrix(get_format(f"e2m1-b{size}-e8m0"), dtype, 9)
        x = np.ascontiguousarray(x[:, : x.shape[1] // size * size])
        rng = np.random.default_rng(size)
        for length in (0, size, x.shape[1]):
            signs = np.where(rng.random(length) < 0.5, -1, 1).astype(np.int8) if length else None
            want = reference.hadamard(x, size, signs)
            same_everywhere([room], want, "hadamard", x, size, signs)


def test_hadamard_on_axes(room: Room) -> None:
    x = grids.noise(64, 48, BF16)
    for part, axis in [(x, 0), (x.T, 1), (x[:, ::3], 1), (x.reshape(8, 8, 48), 1), (x[:0], 1)]:
        want = reference.hadamard(part, 8, axis=axis)
        same_everywhere([room], np.ascontiguousarray(want), "hadamard", part, 8, axis=axis)


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "mxint8", "int4-b256-bf16", "e2m1-b5-e8m0"])
def test_rotation_fused_into_quantize(room: Room, spec: str) -> None:
    fmt = get_format(spec)
    rng = np.random.default_rng(7)
    for size, dtype in itertools.product((2, 16, 128, 512), (BF16, FP32)):
        x = grids.noise(3, 2 * max(size, 128), dtype)
        x[0, 3], x[1, -1] = np.nan, np.inf
        for length in (0, size, x.shape[1]):
            signs = np.where(rng.random(length) < 0.5, -1, 1).astype(FP32) if length else None
            same_quantized([room], x, fmt, rotation=size, signs=signs, **(SEED if length else {}))
    same_quantized([room], grids.noise(64, 40, BF16), fmt, rotation=32, axis=0)


@pytest.mark.parametrize("spec", ["mxfp4", "e1m2-b32-e8m0"])
def test_large_rotations_in_one_kernel(room: Room, spec: str) -> None:
    """Whole tiles; rows from the smallest numbers, whose products are subnormal, to the largest."""
    fmt = get_format(spec)
    rng = np.random.default_rng(11)
    for dtype, size in ((BF16, 128), (BF16, 256), (FP16, 128)):
        x = rng.standard_normal((24, 512)).astype(FP32)
        powers = np.linspace(-140, 110, 24) if dtype == BF16 else np.linspace(-24, 11, 24)
        if dtype == BF16:
            powers[16:] = 120.5  # the factor times these blocks' 2^-E is subnormal
        x = (x * np.exp2(powers)[:, None].astype(FP32)).astype(dtype)
        # Few bits: sums of equal numbers meet ties.
        x[::3] = np.sign(x[::3].astype(FP32)) * np.exp2(powers[::3])[:, None].astype(dtype)
        x[5, 40], x[9, 500], x[13, :64], x[14] = np.nan, -np.inf, 0, -0.0
        for rule in fmt.scale_rules:
            same_quantized([room], x, fmt, rotation=size, scale_rule=rule)


# ---- amax, pack, unpack, matmul ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_amax(room: Room, dtype: str) -> None:
    x = grids.matrix(get_format("e2m1-b24-e8m0"), DTYPES[dtype], 40)
    for part in (x, x.T, x[:, 5:9], x[:0], x[3:4, :24] * np.float32(0).astype(x.dtype)):
        same_everywhere([room], np.asarray(reference.amax(part)), "amax", part)
        for block, axis in ((1, 0), (7, 1), (32, 0), (5000, 1)):
            want = reference.amax(part, block, axis=axis)
            same_everywhere([room], want, "amax", part, block, axis=axis)


@pytest.mark.parametrize("bits", range(2, 9))
def test_pack_and_unpack(room: Room, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for shape in ((3, 64), (2, 5, 24), (7, 13), (1,), (0, 8), (3, 0), (2, 4104)):
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        packed = reference.pack(codes, bits)
        same_everywhere([room], packed, "pack", codes, bits)
        same_everywhere([room], packed, "pack", np.asfortranarray(codes), bits)
        for length in {shape[-1], max(shape[-1] - 3, 0)}:
            want = reference.unpack(packed, bits, length)
            same_everywhere([room], want, "unpack", packed, bits, length)


def test_matmul(room: Room) -> None:
    """Sums of small integers are exact: the matrix product itself."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-7, 8, shape).astype(FP32) for shape in ((3, 64), (5, 64)))
    a, b = (pyfmt.quantize(t, "int4-b32-fp32", backend="reference") for t in (x, w))
    bias = np.arange(5, dtype=FP32)
    for left in (a, x):
        want = pyfmt.matmul(left, b, bias, dtype="float32", backend="reference")
        got = room.module.matmul(left, b, bias, dtype="float32")
        same_floats("matmul", np.asarray(got), want)


def test_errors_are_the_reference_s(room: Room) -> None:
    x, fmt = grids.noise(2, 64), FORMATS["mxfp4"]
    for bad in (
        {"rotation": 3},
        {"recipe": "nvidia"},
        {"rounding": "stochastic"},
        {"rounding": "stochastic", "seed": 2**70},
        {"tensor_scale": 1.0},
        {"axis": 2},
    ):
        with pytest.raises((TypeError, ValueError)) as want:
            reference.quantize(x, fmt, **bad)
        with pytest.raises(want.type) as got:
            room.quantize(x, fmt, **dict(bad)) if "axis" not in bad else room.module.quantize(
                x, fmt, **bad
            )
        assert str(got.value) == str(want.value)


# ---- on a device only -------------------------------------------------------------------------


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    """Offsets beyond 32 bits, at the far end of every tensor, along and across rows."""
    import torch

    from pyfmt.backends import triton
    from tests.rooms import to_numpy

    rows, columns = 2**31 // 4096 + 3, 4096
    x = torch.randn((rows, columns), dtype=torch.bfloat16, device="cuda")
    tail = to_numpy(x[-4:].cpu())
    for spec in ("mxfp4", "mxfp6_e2m3", "mxint8", "int4"):
        fmt = get_format(spec)
        codes, scales, _ = triton.quantize(x, fmt)
        want = reference.quantize(tail, fmt)
        assert np.array_equal(to_numpy(codes[-4:].cpu()), want[0])
        assert np.array_equal(to_numpy(scales[-4:].cpu()), want[1])
        values = triton.dequantize(codes, scales, None, fmt, x.shape, dtype="bfloat16")
        same_floats(spec, to_numpy(values[-4:].cpu()), reference.fake_quantize(tail, fmt))
        del values
        assert torch.equal(codes[:4], triton.quantize(x[:4], fmt)[0])
    rotated = to_numpy(triton.hadamard(x, 64)[-4:].cpu())
    same_floats("hadamard", rotated, reference.hadamard(tail, 64))
    codes, scales, _ = triton.quantize(x, FORMATS["mxfp4"], axis=0)
    part, part_scales, _ = triton.quantize(x[-35:, -4:].contiguous(), FORMATS["mxfp4"], axis=0)
    # The last 35 rows are the last whole block (2^31 / 4096 is a multiple of 32) and its rest.
    assert torch.equal(codes[-4:, -16:], part[:, -16:]) and codes.shape[0] == columns
    assert torch.equal(scales[-4:, -1:], part_scales[:, -1:])


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "e2m1-b5-e8m0"])
def test_streams_and_graphs(spec: str) -> None:
    import torch

    from pyfmt.backends import triton

    fmt = get_format(spec)
    x = torch.randn((64, 256), dtype=torch.bfloat16, device="cuda")
    triton.quantize(x, fmt)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton.quantize(x, fmt)
    x.copy_(torch.randn_like(x) * 3)
    graph.replay()
    want = triton.quantize(x, fmt)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other = triton.quantize(x, fmt)
    torch.cuda.synchronize()
    for got in (captured, other):
        for part, expected in zip(got, want, strict=True):
            assert (part is None) == (expected is None)
            assert part is None or torch.equal(part, expected)
