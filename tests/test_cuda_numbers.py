# SPDX-License-Identifier: Apache-2.0
"""The CUDA room on a GPU: every number, by every scale, and large random tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyfmt import reference  # noqa: E402
from pyfmt.formats import FORMATS, get_element  # noqa: E402
from tests import grids, test_rotate  # noqa: E402
from tests.cuda_rooms import bits_of, device_room, same_parts  # noqa: E402
from tests.grids import DTYPES  # noqa: E402
from tests.rooms import Room, to_numpy, to_torch  # noqa: E402

pytestmark = pytest.mark.gpu

ELEMENTS = [f.element for f in FORMATS.values()]


@pytest.fixture(scope="module")
def room() -> Room:
    return device_room()


@pytest.fixture
def ops(room: Room) -> Any:
    import pyfmt.ops  # noqa: F401

    return torch.ops.pyfmt


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    """Options as raw ops take them: a tensor scale is a tensor on the device."""
    options = dict(options)
    if "tensor_scale" in options:
        options["tensor_scale"] = torch.tensor(float(options["tensor_scale"]), device="cuda")
    return options


def explain(x: Any, fmt: Any, got: Any, want: Any, options: dict[str, Any]) -> str:
    """The first block that differs: its inputs, both codes, scales, and NumPy's codes for it."""
    codes, scales = (to_numpy(t.cpu()) for t in got[:2])
    wanted, wanted_scales = want[0].get(), want[1].get()
    rows, columns = np.nonzero(codes != wanted)
    if not len(rows):
        rows, columns = np.nonzero(bits_of(scales) != bits_of(wanted_scales))
        columns = columns * (fmt.block_columns(0) * fmt.bits // 8)
    row, block = int(rows[0]), int(columns[0]) * 8 // fmt.bits // fmt.block_columns(0)
    width = fmt.block_columns(0)
    part = x[row, block * width : (block + 1) * width]
    plain = to_numpy(part.cpu())
    where = f"{fmt.name} {x.dtype} {options}, row {row} block {block}"
    lines = [f"{where}: {len(rows)} places differ"]
    lines += [f"scale {scales[row, block]}, expected {wanted_scales[row, block]}"]
    if options.get("rounding") != "stochastic":
        alone = {k: v for k, v in options.items() if k != "tensor_scale"}
        if fmt.tensor_scale:
            alone["tensor_scale"] = np.float32(options.get("tensor_scale", got[2].item()))
        numpy_codes, numpy_scales, _ = reference.quantize(plain, fmt, **alone)
        lines += [f"NumPy: scale {numpy_scales[0]}"]
        third = reference.unpack(numpy_codes, fmt.bits, width)
    else:
        third = np.zeros(width, np.uint8)
    ours, theirs = (
        reference.unpack(c[row], fmt.bits, x.shape[1])[block * width : (block + 1) * width]
        for c in (codes, wanted)
    )
    for i, (value, a, b, c) in enumerate(zip(plain, ours, theirs, third, strict=True)):
        if a != b or a != c or i == 0:
            where = f"{float(value)!r} (bits {int(bits_of(plain)[i]):#x})"
            lines.append(f"  {i}: {where} gives {a:#04x}, CuPy {b:#04x}, NumPy {c:#04x}")
    return "\n".join(lines)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_every_half_by_every_scale(ops: Any, element: Any, dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    x = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    x = np.where(np.isfinite(x.astype(np.float32)), x, x.dtype.type(0))
    halves = to_torch(x).cuda()
    exact = cupy.asarray(x.astype(np.float64))
    for byte in range(255):
        codes = cupy.from_dlpack(ops._encode(halves, element.name, byte))
        want = reference.encode(cupy.ldexp(exact, 127 - byte), element)
        assert bool((codes == want).all()), f"{element.name} at scale {byte}"


@pytest.mark.parametrize("clip", ["symmetric", "full"])
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_every_float32(ops: Any, element: Any, clip: str) -> None:
    if clip == "full" and element.kind == "float":
        pytest.skip("it means nothing for floats")
    cupy = pytest.importorskip("cupy")
    chunk = 1 << 26
    for start in range(0, 1 << 32, chunk):
        bits = cupy.arange(start, start + chunk, dtype=cupy.uint32)
        x = bits.view(cupy.float32)
        x[cupy.isnan(x)] = 0
        codes = cupy.from_dlpack(ops._encode(torch.from_dlpack(x), element.name, 127, clip))
        want = reference.encode(x, element, clip=clip)
        if not bool((codes == want).all()):
            at = int(cupy.argmax(codes != want))
            pytest.fail(
                f"{element.name}: {float(x[at])!r} (bits {start + at:#010x}) gives "
                f"{int(codes[at]):#04x}, expected {int(want[at]):#04x}"
            )
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.mark.parametrize("size", [16, 32, 128])
def test_every_float32_that_a_rotation_gives_e2m1(ops: Any, size: int) -> None:
    """The factor, the scale and the rounding in two multiplications, from 2^-5 to the largest."""
    cupy = pytest.importorskip("cupy")
    factor = test_rotate.norm(size)
    low, high = (bits_of(np.float32(y / factor)).item() for y in (2.0**-5, 6.0))
    for start in range(low, high + 1, 1 << 25):
        bits = cupy.arange(start, min(start + (1 << 25), high + 1), dtype=cupy.uint32)
        for sign in (0, 1 << 31):
            x = (bits | cupy.uint32(sign)).view(cupy.float32)
            codes = cupy.from_dlpack(ops._encode(torch.from_dlpack(x), "e2m1", rotation=size))
            want = reference.encode(x * factor, get_element("e2m1"))
            if not bool((codes == want).all()):
                at = int(cupy.argmax(codes != want))
                pytest.fail(
                    f"rotation {size}: {float(x[at])!r} gives {int(codes[at]):#04x}, "
                    f"expected {int(want[at]):#04x}"
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_by_every_scale(ops: Any, name: str, dtype: str) -> None:
    fmt = FORMATS[name]
    rng = np.random.default_rng(0)
    if fmt.scale in ("e8m0", "e4m3"):
        scales = np.arange(256, dtype=np.uint8)
    else:
        scales = np.arange(2**16, dtype=np.uint16).view(reference.codec.FLOAT_DTYPES["bfloat16"])
        scales = scales[rng.permutation(2**16)[:4096]]
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    columns = math.lcm(fmt.block_columns(0), len(codes))
    row = np.tile(codes, columns // len(codes))
    packed = reference.pack(np.tile(row, (len(scales), 1)), fmt.bits)
    grid = np.repeat(scales[:, None], columns // fmt.block_columns(0), axis=1)
    shape = (len(scales), columns)
    for ts in [None] if not fmt.tensor_scale else [1.0, 1e-3, 2.0**-120, 2.0**100]:
        stored = None if ts is None else np.asarray(ts, np.float32)
        want = reference.dequantize(packed, grid, stored, fmt, shape, dtype=DTYPES[dtype])
        got = ops.dequantize(
            to_torch(packed).cuda(),
            to_torch(grid).cuda(),
            None if ts is None else torch.tensor(ts).cuda(),
            name,
            shape,
            -1,
            {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype],
        )
        same_parts(f"{name} {dtype} {ts}", [got], [want])


@pytest.mark.parametrize("name", FORMATS)
def test_large_random_blocks(ops: Any, name: str) -> None:
    # The reference on the device: millions of blocks of every size of number.
    cupy = pytest.importorskip("cupy")
    fmt = FORMATS[name]
    generator = torch.Generator("cuda").manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bits = torch.randint(
            -(2**31), 2**31, (4096, 2048), generator=generator, device="cuda", dtype=torch.int64
        )
        x = bits.to(torch.int32).view(torch.float32)
        # Blocks of one magnitude each, so that codes are not all zero.
        spread = torch.randn(4096, 2048, generator=generator, device="cuda")
        block = (bits[:, ::16] % 250 - 125).float().repeat_interleave(16, dim=1)
        half = torch.arange(4096, device="cuda")[:, None] % 2 == 0
        x = torch.where(half, spread * torch.exp2(block / (8 if dtype == torch.float16 else 1)), x)
        # CuPy compiles with flush-to-zero, so the oracle on the device knows no subnormals; they
        # are compared with NumPy's in the tests above.
        x = torch.where(x.abs() < 2.0**-126, torch.zeros_like(x), x)
        x = x.to(dtype)
        for options in grids.options_of(fmt):
            if options.get("rounding") == "stochastic" and dtype == torch.float16:
                continue
            if fmt.scale == "bf16":  # CuPy knows no bfloat16 arithmetic
                few = x[::64].contiguous()
                plain = to_numpy(few.cpu())
                got = ops.quantize(few, name, -1, **on_device(options))
                same_parts(f"{name} {options}", got, reference.quantize(plain, fmt, **options))
                continue
            want = reference.quantize(cupy.from_dlpack(x.float()), fmt, **options)
            got = ops.quantize(x, name, -1, **on_device(options))
            same = bool((cupy.from_dlpack(got[0]) == want[0]).all())
            same = same and bool((cupy.from_dlpack(got[1]) == want[1]).all())
            if not same:
                pytest.fail(explain(x, fmt, got, want, options))
    cupy.get_default_memory_pool().free_all_blocks()
