# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a GPU: the same source run on the CPU, bit for bit the reference.

What only a device shows (its conversions, races, strides of device tensors) is in test_cuda.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pyfmt import reference
from pyfmt.backends import cuda
from pyfmt.formats import FORMATS, ROTATION_SIZES, Format, get_element, get_format
from tests import grids, test_layout, test_quantize, test_rotate
from tests.cuda_rooms import (
    ROOT,
    SQUARES,
    dual_equals_two_calls,
    emulated_ops,
    emulated_room,
    fake_across_equals_reference,
    random_bytes_decode_like_the_reference,
    squares_equal_reference,
    turned_equals_two_calls,
)
from tests.grids import BF16, DTYPES
from tests.rooms import Room, same_everywhere, same_quantized, to_numpy, to_torch

# One of each path: flat units, ragged rows, square blocks, and what only the general kernels take.
PATHS = [
    "e2m1-b16-e8m0",
    "int8q6-b32x32-e8m0",
    "e2m1-b16x16-e4m3-ts",
    "int4-b64-fp16",
    "int8-b256-bf16",
    "int4-brow-fp32",
    "e3m2-b20-e4m3-ts",
    "ue4m3-b32-e8m0",
    "int8-b3x5-fp16",
]
SOME = (*FORMATS.values(), *map(get_format, PATHS))


@pytest.fixture(scope="module")
def room() -> Room:
    return emulated_room()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", SOME, ids=str)
def test_quantize_and_back(room: Room, fmt: Format, dtype: str) -> None:
    x = grids.matrix(fmt, DTYPES[dtype], 60)
    width = fmt.block_columns(24)
    whole = np.ascontiguousarray(x[:, : max(x.shape[1] // width, 1) * width])
    for options in grids.options_of(fmt):
        parts = same_quantized([room], x, fmt, **options)
        want = reference.dequantize(*parts, fmt, x.shape, dtype=x.dtype)
        same_everywhere([room], want, "fake_quantize", x, fmt, **options)
    parts = same_quantized([room], whole, fmt)
    for out in DTYPES.values():
        want = reference.dequantize(*parts, fmt, whole.shape, dtype=out)
        same_everywhere([room], want, "dequantize", *parts, fmt, whole.shape, dtype=out)


@pytest.mark.parametrize("name", ["mxint8", "mxint4", "int8q6-b32x32-e8m0"])
def test_scales_cut_at_the_largest_power(room: Room, name: str) -> None:
    test_quantize.test_scales_cut_at_the_largest_power([room], name, "bf16")


@pytest.mark.parametrize("fmt", SOME, ids=str)
def test_shapes_axes_and_views(room: Room, fmt: Format) -> None:
    for shape in ((1,), (33,), (3, 16), (2, 31), (4, 0), (0, 4), (2, 3, 130), (40, 64)):
        x = grids.noise(1, int(np.prod(shape)), BF16).reshape(shape)
        for axis in range(len(shape)):
            same_quantized([room], x, fmt, axis=axis)
    big = grids.noise(96, 64, BF16)
    for view, of in test_quantize.VIEWS.items():
        same_quantized([room], of(big), fmt, view)


@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "nvfp4", "int4", *PATHS[:3]])
def test_rotation_of_every_kind(room: Room, name: str) -> None:
    x = grids.noise(2, 2048, BF16)
    x[1, 5] = np.inf
    for size in (2, 16, 32, 64, 1024):
        signs = np.where(np.random.default_rng(size).random(size) < 0.5, -1, 1).astype(np.float32)
        same_quantized([room], x, get_format(name), rotation=size, signs=signs)
        want = reference.hadamard(x, size, signs)
        same_everywhere([room], want, "hadamard", x, size, signs)


def test_the_other_verbs(room: Room) -> None:
    test_rotate.test_rooms_on_axes_strides_and_empty_arrays([room])
    test_rotate.test_signs_of_any_float_dtype_count_the_same([room])
    for bits in (2, 3, 6, 8):
        test_layout.test_pack_is_a_little_endian_bit_stream([room], bits)
    for dtype in DTYPES:
        for block in (None, 7, 32):
            test_quantize.test_amax([room], dtype, block)


@pytest.mark.parametrize("element", [f.element.name for f in FORMATS.values()])
def test_every_bf16_number_by_every_scale(element: str) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(BF16)
    x = np.where(np.isfinite(x.astype(np.float32)), x, BF16.type(0))
    for byte in (0, 1, 2, 100, 126, 127, 128, 180, 253, 254):
        codes = emulated_ops()._encode(to_torch(x), element, byte).numpy()
        want = reference.encode(np.ldexp(x.astype(np.float64), 127 - byte), get_element(element))
        assert np.array_equal(codes, want), f"{element} at scale {byte}"


@pytest.mark.parametrize("element", sorted({f.element.name for f in FORMATS.values()}))
def test_random_bytes_decode(room: Room, element: str) -> None:
    random_bytes_decode_like_the_reference(room, element, (11, 384))


DUAL = ["mxfp4", "mxfp6_e2m3", "mxfp8_e5m2", "mxint8", "nvfp4", "nvint4", "int4-b32-bf16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*DUAL, "int4", "e2m1-b16x16-e4m3"])
def test_dual_is_both_directions(name: str, dtype: str) -> None:
    dual_equals_two_calls(emulated_ops(), to_torch, name, DTYPES[dtype])


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nvint4", "mxint8"])
def test_turned(name: str) -> None:
    turned_equals_two_calls(emulated_ops(), to_torch, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["mxfp4", "mxfp6_e3m2", "mxint8", "nvfp4", "int4", "int8-b64-fp16"]
)
def test_fake_quantize_down_the_columns(name: str, dtype: str) -> None:
    fake_across_equals_reference(emulated_ops(), to_torch, name, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SQUARES)
def test_square_blocks(room: Room, name: str, dtype: str) -> None:
    squares_equal_reference(room, name, DTYPES[dtype])


@pytest.mark.parametrize("name", ["int8-brow-bf16", "int4-brow-fp16", "int8-brow-fp32"])
def test_whole_rows_of_every_length(room: Room, name: str) -> None:
    for columns in (32, 96, 1024, 8192, 8224, 16384, 16416):
        for dtype in DTYPES.values() if columns < 8192 else (BF16,):
            x = grids.noise(5, columns, dtype)
            x[1, columns - 1], x[2] = np.inf, 0
            for clip in ("symmetric", "full"):
                same_quantized([room], x, get_format(name), clip=clip)


@pytest.mark.parametrize("name", ["mxint8", "mxfp4"])
def test_random_bits_that_the_short_way_cannot_tell(room: Room, name: str) -> None:
    # Two or three sixteens go the long way.
    x = grids.noise(128, 1024, BF16)
    same_quantized([room], x, FORMATS[name], rounding="stochastic", seed=11)


@pytest.mark.parametrize("rule", ["rceil", "floor", "ceil", "even"])
def test_rotated_blocks_of_every_size_of_number(room: Room, rule: str) -> None:
    # Powers of two beyond what the scale's exponent may stand for at once, on both sides.
    x = (
        grids.noise(64, 128)
        * np.exp2(np.arange(-126, 126, 4, dtype=np.float32)[:63].repeat(1))[
            np.minimum(np.arange(64), 62), None
        ]
    )
    x[5, :32], x[6, 40] = -0.0, np.nan
    for size in (4, 16, 32, 64, 128):
        for dtype in DTYPES.values():
            with np.errstate(over="ignore"):
                narrow = x.astype(np.float32).astype(dtype)
            same_quantized([room], narrow, FORMATS["mxfp4"], rotation=size, scale_rule=rule)


@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "nvfp4", "mxfp6_e2m3"])
def test_warps_that_take_tile_after_tile(room: Room, name: str) -> None:
    # Halves and zeros of both signs among the rotated numbers, and a last tile in part.
    rng = np.random.default_rng(0)
    for columns, size, length in (
        (2048, 16, 16),
        (3072, 32, 3072),
        (2048, 64, 64),
        (3072, 128, 3072),
        (2048, 128, 128),
        (1024, 256, 0),
        (3072, 1024, 1024),
    ):
        x = rng.integers(-9, 10, (163, columns)).astype(np.float32).astype(BF16)
        x[rng.random(x.shape) < 0.3] = -0.0
        x[5, 70], x[80], x[90, :512] = np.nan, -0.0, -0.0
        signs = np.where(rng.random(length) < 0.5, -1.0, 1.0).astype(np.float32)
        given = signs if length else None
        same_quantized([room], x, FORMATS[name], rotation=size, signs=given)
        if name == "mxfp4":
            want = reference.hadamard(x, size, given)
            same_everywhere([room], want, "hadamard", x, size, given)


@pytest.mark.parametrize("size", ROTATION_SIZES)
def test_e2m1_around_every_midpoint_after_a_rotation(size: int) -> None:
    """The factor, the scale and the rounding in two multiplications."""
    factor = test_rotate.norm(size)
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.99], np.float32)
    near = (middles / factor).view(np.uint32)[:, None] + np.arange(-40, 41).astype(np.uint32)
    rng = np.random.default_rng(size)
    x = np.concatenate([near.view(np.float32).ravel(), rng.uniform(-5.9, 5.9, 4096) / factor])
    x = np.concatenate([x, -x]).astype(np.float32)
    for byte in (79, 100, 127, 140, 175):
        scaled = x * np.float32(2.0 ** (byte - 127))
        codes = emulated_ops()._encode(to_torch(scaled), "e2m1", byte, "symmetric", size).numpy()
        want = reference.encode(x * factor, get_element("e2m1"))
        assert np.array_equal(codes, want), f"scale {byte}"


def test_signs_lie_anywhere_and_need_not_fill_words(room: Room) -> None:
    rng = np.random.default_rng(0)
    x = to_torch(grids.noise(6, 144, BF16))
    ops = emulated_ops()
    for size, length, step in ((16, 16, 2), (16, 144, 1), (8, 8, 3), (2, 144, 2)):
        signs = torch.from_numpy(rng.choice([-1, 1], length * step).astype(np.int32))[::step]
        want = reference.hadamard(to_numpy(x), size, signs.numpy())
        same = to_numpy(ops.hadamard(x, size, signs)).view(np.uint16) == want.view(np.uint16)
        assert same.all(), f"hadamard {size}, {length} signs {step} apart"
        got = ops.quantize(x, "mxfp4", rotation=size, signs=signs)
        rotated = reference.hadamard(to_numpy(x).astype(np.float32), size, signs.numpy())
        codes, scales, _ = reference.quantize(rotated, FORMATS["mxfp4"])
        assert np.array_equal(got[0].numpy(), codes) and np.array_equal(got[1].numpy(), scales)


def test_an_empty_tensor_has_a_tensor_scale(room: Room) -> None:
    for shape in ((0, 32), (3, 0)):
        same_quantized([room], np.zeros(shape, np.float32), FORMATS["nvfp4"])


# ---- the built library ------------------------------------------------------------------------

needs_library = pytest.mark.skipif(cuda.torch_library_path() is None, reason="there was no nvcc")


@needs_library
def test_the_library_loads_beside_any_torch() -> None:
    torch.ops.load_library(str(cuda.torch_library_path()))
    assert re.fullmatch(r"\d+[af]?-(real|virtual)(;\d+[af]?-(real|virtual))*",
                        torch.ops.pyfmt._cuda_archs())  # fmt: skip


def test_which_gpus_the_code_serves() -> None:
    archs = "90a-real;90-virtual"
    assert [cuda.serves(archs, c) for c in ((8, 9), (9, 0), (10, 0), (12, 0))] == [0, 1, 1, 1]
    assert [cuda.serves("86-real", c) for c in ((8, 0), (8, 6), (8, 9), (9, 0))] == [0, 1, 1, 0]
    assert not cuda.serves("90a-real", (10, 0))


def reports() -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of each kernel, from what nvcc said when it compiled."""
    found = {}
    for log in (ROOT / "build" / "objects").glob("*.log"):
        text = log.read_text()
        pattern = (
            r"Compiling entry function '(\S+)' for 'sm_90a'.*?(\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers"
        )
        for name, stores, loads, registers in re.findall(pattern, text, re.S):
            found[name] = (int(registers), int(stores) + int(loads))
    return found


@needs_library
@pytest.mark.skipif(not Path(ROOT / "build" / "objects").exists(), reason="built elsewhere")
def test_hot_kernels_do_not_spill() -> None:
    found = reports()
    assert found, "no resource report: was the library built with another architecture?"
    words = ("_flat", "_dual", "_square", "_across", "_wide", "_rows", "_rotated", "_tiles")
    for name, (registers, spilled) in found.items():
        if "matmul" not in name and any(word in name for word in words):
            assert spilled == 0, f"{name} spills {spilled} bytes"
        if "_flat" in name:
            most = 80 if "stochastic" in name else 72
            assert registers <= most, f"{name} takes {registers} registers"
