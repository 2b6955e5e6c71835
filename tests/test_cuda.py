# SPDX-License-Identifier: Apache-2.0
"""The CUDA room on a GPU: the rooms' own tests again, then what only a device can show."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pyfmt  # noqa: E402
import pyfmt.nn  # noqa: E402
from pyfmt import _arrays, reference  # noqa: E402
from pyfmt.formats import FORMATS, get_format  # noqa: E402
from tests import grids  # noqa: E402
from tests.cuda_rooms import (  # noqa: E402
    SQUARES,
    device_room,
    dual_equals_two_calls,
    fake_across_equals_reference,
    poison_device,
    random_bytes_decode_like_the_reference,
    same_parts,
    squares_equal_reference,
    turned_equals_two_calls,
)
from tests.grids import BF16, DTYPES  # noqa: E402
from tests.rooms import Room, same_quantized, to_numpy, to_torch  # noqa: E402
from tests.test_layout import (  # noqa: E402, F401
    test_pack_is_a_little_endian_bit_stream,
    test_pack_of_any_shape_and_stride,
    test_unpack_takes_the_first_codes_of_longer_rows,
)
from tests.test_quantize import (  # noqa: E402, F401
    test_amax,
    test_every_bf16_number_in_every_room,
    test_rooms_dequantize_like_the_reference,
    test_rooms_dequantize_strided_codes,
    test_rooms_equal_the_reference,
    test_rooms_on_every_shape_and_axis,
    test_rooms_take_every_seed,
    test_rooms_where_threads_share_the_work,
    test_scales_cut_at_the_largest_power,
)
from tests.test_rotate import (  # noqa: E402, F401
    test_fused_rotation_of_every_size,
    test_nan_spoils_its_block_only_and_is_canonical,
    test_rooms_on_axes_strides_and_empty_arrays,
    test_rotation_fused_into_quantize,
    test_signs_of_any_float_dtype_count_the_same,
    test_the_order_of_additions,
)
from tests.test_rotate import (  # noqa: E402, F401
    test_rooms_equal_the_reference as test_hadamard_equals_the_reference,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def room() -> Room:
    return device_room()


@pytest.fixture
def every_room(room: Room) -> list[Room]:
    return [room]


@pytest.fixture
def implementations(room: Room) -> list[Room]:
    return [room]


@pytest.fixture
def ops(room: Room) -> Any:
    import pyfmt.ops  # noqa: F401

    return torch.ops.pyfmt


# ---- where tensors lie -------------------------------------------------------------------------

VIEWS = {
    "transposed": lambda x: x.T,
    "every other column": lambda x: x[:, ::2],
    "every third row": lambda x: x[::3],
    "offset by one": lambda x: x.reshape(-1)[1 : 1 + 95 * 128].reshape(95, 128),
    "offset by eight": lambda x: x.reshape(-1)[8 : 8 + 95 * 128].reshape(95, 128),
    "left half": lambda x: x[:, :64],
    "inner window": lambda x: x[3:-5, 7:-1],
    "one row for all": lambda x: x[:1].expand(96, 128),
    "one column for all": lambda x: x[:, :1].expand(96, 128),
    "moved axes": lambda x: x.reshape(8, 12, 128).permute(2, 0, 1),
}
STRIDED = [
    "mxfp4",
    "mxfp6_e2m3",
    "mxint8",
    "nvfp4",
    "int4",
    "e2m1-b16x16-e4m3-ts",
    "int8-brow-bf16",
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", STRIDED)
def test_strides_and_offsets(ops: Any, name: str, view: str) -> None:
    fmt = get_format(name)
    for dtype in ("fp32", "bf16"):
        base = grids.noise(96, 128, DTYPES[dtype])
        x = VIEWS[view](to_torch(base).cuda())
        plain = to_numpy(x.cpu().contiguous())
        for axis in range(x.dim()):
            poison_device()
            got = ops.quantize(x, name, axis)
            want = reference.quantize(plain, fmt, axis=axis)
            same_parts(f"{name} {dtype} {view} axis {axis}", got, want)
        fake = ops.fake_quantize(x, name, 0)
        same_parts("fake", [fake], [reference.fake_quantize(plain, fmt, axis=0)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*FORMATS, "int4-b32-bf16", "e2m1-b16x16-e4m3"])
def test_dual_is_both_directions(ops: Any, name: str, dtype: str) -> None:
    poison_device()
    dual_equals_two_calls(ops, lambda x: to_torch(x).cuda(), name, DTYPES[dtype])


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nvint4", "mxint8"])
def test_turned(ops: Any, name: str) -> None:
    poison_device()
    turned_equals_two_calls(ops, lambda x: to_torch(x).cuda(), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*FORMATS, "int8-b64-fp16"])
def test_fake_quantize_down_the_columns(ops: Any, name: str, dtype: str) -> None:
    poison_device()
    fake_across_equals_reference(ops, lambda x: to_torch(x).cuda(), name, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SQUARES)
def test_square_blocks(room: Room, name: str, dtype: str) -> None:
    squares_equal_reference(room, name, DTYPES[dtype])


@pytest.mark.parametrize("element", sorted({f.element.name for f in FORMATS.values()}))
def test_random_bytes_decode(room: Room, element: str) -> None:
    random_bytes_decode_like_the_reference(room, element, (37, 384))
    random_bytes_decode_like_the_reference(room, element, (1200, 4096))


@pytest.mark.parametrize("size", [16, 32, 64, 128, 1024])
def test_rotations_of_a_large_tensor_are_those_of_its_parts(ops: Any, size: int) -> None:
    """Warps that take tile after tile, against tensors too small for that."""
    rows, columns = 3001, 3072
    x = torch.randn(4 * rows, columns, dtype=torch.bfloat16, device="cuda")
    scale = torch.tensor(0.002, device="cuda")
    for length in (0, size, columns):
        random = torch.randint(2, (length,), device="cuda", dtype=torch.int8) * 2 - 1
        signs = random if length else None
        for name in ("mxfp4", "mxint8", "mxfp6_e2m3", "nvfp4"):
            given = scale if FORMATS[name].tensor_scale else None
            poison_device()
            whole = ops.quantize(x, name, rotation=size, signs=signs, tensor_scale=given)
            for i, part in enumerate(x.split(rows // 4)):
                codes, scales, _ = ops.quantize(
                    part, name, rotation=size, signs=signs, tensor_scale=given
                )
                at = slice(i * (rows // 4), i * (rows // 4) + len(part))
                assert torch.equal(whole[0][at], codes), f"{name} signs {length} part {i}"
                assert torch.equal(whole[1][at], scales), f"{name} signs {length} part {i}"
        whole = ops.hadamard(x, size, signs)
        parts = [ops.hadamard(part, size, signs) for part in x.split(rows // 4)]
        assert torch.equal(whole, torch.cat(parts)), f"signs {length}"


@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "nvfp4", "int4"])
def test_more_than_two_to_the_31_elements(ops: Any, name: str) -> None:
    rows, columns = 2**16 + 3, 2**15
    x = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
    for part in x.split(4096):
        part.normal_()
    x[-1, -1], x[rows // 2, 7] = 100.0, -90.0
    ts = torch.tensor(100 / 2688, device="cuda") if FORMATS[name].tensor_scale else None
    codes, scales, _ = ops.quantize(x, name, tensor_scale=ts)
    values = ops.dequantize(codes, scales, ts, name, x.shape, -1, torch.bfloat16)
    fake = ops.fake_quantize(x, name, tensor_scale=ts)
    # Both ends, the middle and where 32-bit indices would wrap, against the same rows alone.
    for start in (0, 2**15 - 2, 2**16 - 2, rows - 4):
        rows_ = slice(start, start + 4)
        few = ops.quantize(x[rows_].clone(), name, tensor_scale=ts)
        assert torch.equal(codes[rows_], few[0]) and torch.equal(scales[rows_], few[1])
        alone = ops.dequantize(few[0], few[1], ts, name, (4, columns), -1, torch.bfloat16)
        assert torch.equal(values[rows_], alone) and torch.equal(fake[rows_], alone)
    for start in range(0, rows, 8192):
        assert torch.equal(values[start : start + 8192], fake[start : start + 8192])
    if name == "mxfp4":
        rotated = ops.hadamard(x, 64)
        assert torch.equal(rotated[-4:], ops.hadamard(x[-4:].clone(), 64))
        assert ops.amax(x).item() == 100.0
        across = ops.quantize(x, name, 0)
        few = ops.quantize(x[:, -32:].clone(), name, 0)
        assert torch.equal(across[0][-32:], few[0]) and torch.equal(across[1][-32:], few[1])
    del x, codes, scales, values, fake
    gc.collect()
    torch.cuda.empty_cache()


# ---- streams, graphs, CuPy ---------------------------------------------------------------------


def test_on_a_side_stream(ops: Any) -> None:
    x = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)
    want = {name: ops.quantize(x, name) for name in FORMATS}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for name in FORMATS:
        later = torch.zeros_like(x)
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            torch.cuda._sleep(20_000_000)
            later.copy_(x)
            # Wrong unless the kernels queue behind the copy.
            got = ops.quantize(later, name)
        stream.synchronize()
        for g, w in zip(got, want[name], strict=True):
            assert torch.equal(g, w), name


def test_inside_a_graph(ops: Any) -> None:
    signs = torch.randn(128, device="cuda").sign()
    x = torch.zeros(256, 4096, device="cuda", dtype=torch.bfloat16)
    calls = {name: lambda name=name: ops.quantize(x, name) for name in FORMATS}
    calls |= {f"rotated {n}": lambda n=n: ops.quantize(x, n, rotation=128, signs=signs)
              for n in ("mxfp4", "nvfp4", "int8-brow-bf16")}  # fmt: skip
    calls["dual"] = lambda: ops.quantize_dual(x, "nvfp4")
    calls["across"] = lambda: ops.quantize(x, "mxfp4", 0)
    calls["fake"] = lambda: (ops.fake_quantize(x, "nvfp4"),)
    calls["hadamard"] = lambda: (ops.hadamard(x, 64, signs[:64]),)
    calls["amax"] = lambda: (ops.amax(x), ops.amax(x, 32))
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        for call in calls.values():
            call()
    torch.cuda.synchronize()
    for what, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for seed in range(3):
            torch.manual_seed(seed)
            x.copy_(torch.randn(256, 4096, device="cuda") * 10**seed)
            graph.replay()
            torch.cuda.synchronize()
            for g, w in zip(captured, call(), strict=True):
                assert torch.equal(g, w), f"{what}, replay {seed}"


def test_two_streams_at_once(ops: Any) -> None:
    # Dynamic tensor scales of different tensors must not meet.
    streams = [torch.cuda.Stream() for _ in range(4)]
    xs = [torch.randn(512, 4096, device="cuda") * 10.0**i for i in range(4)]
    want = [ops.quantize(x, "nvfp4") for x in xs]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(ops.quantize(x, "nvfp4"))
        torch.cuda.synchronize()
        for g, w in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(g, w, strict=True))


def test_matmul_and_linear_expand_and_multiply(ops: Any) -> None:
    # Small integers: every partial sum is exact in float32 and, by the setting, not in TF32.
    generator = torch.Generator("cuda").manual_seed(0)
    x, w = (torch.randint(-4, 5, (n, 128), generator=generator, device="cuda") for n in (33, 48))
    x, w = x.float() * 1.5, w.float()
    saved = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    for name in ("mxfp4", "mxint8", "nvfp4", "int8"):
        a, b = pyfmt.quantize(x, name), pyfmt.quantize(w, name)
        want = a.dequantize().double() @ b.dequantize().double().T
        got = pyfmt.matmul(a, b, backend="cuda")
        raw = ops.matmul(a.codes, a.scales, a.tensor_scale, name,
                         b.codes, b.scales, b.tensor_scale, name, 128)  # fmt: skip
        assert torch.equal(got, raw)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        y = ops.linear(x, b.codes, b.scales, b.tensor_scale, name, activation=name)
        assert torch.equal(y, got)
        on_cpu = pyfmt.nn.QuantLinear(128, 48, weight=name, bias=False)
        assert on_cpu.cuda()(x).shape == (33, 48)
    torch.backends.cuda.matmul.allow_tf32 = saved


def test_same_inputs_same_bits(ops: Any) -> None:
    x = torch.randn(2048, 4096, device="cuda")
    for name in ("mxfp4", "nvfp4", "int4"):
        first = ops.quantize(x, name, rotation=64)
        for _ in range(5):
            again = ops.quantize(x, name, rotation=64)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "nvfp4", "int4", "int8-brow-fp16"])
def test_cupy_arrays_go_in_and_out_without_a_copy(room: Room, name: str) -> None:
    cupy = pytest.importorskip("cupy")
    fmt = get_format(name)
    x = grids.noise(64, 256)
    on_device = cupy.asarray(x)
    assert _arrays.from_cupy(on_device).data_ptr() == on_device.data.ptr
    tensor = torch.ones(8, device="cuda", dtype=torch.bfloat16)
    assert _arrays.back_to(tensor, on_device).data.ptr == tensor.data_ptr()
    q = pyfmt.quantize(on_device, fmt, backend="cuda")
    want = reference.quantize(x, fmt)
    assert isinstance(q.codes, cupy.ndarray)
    assert np.array_equal(q.codes.get(), want[0])
    back = q.dequantize("float32", backend="cuda")
    assert np.array_equal(back.get(), reference.dequantize(*want, fmt, x.shape))
    half = pyfmt.fake_quantize(on_device.astype(cupy.float16), fmt, backend="cuda")
    expected = reference.fake_quantize(x.astype(np.float16), fmt)
    assert np.array_equal(half.get(), expected)


def test_bfloat16_of_cupy(room: Room) -> None:
    cupy = pytest.importorskip("cupy")
    x = grids.noise(8, 64, BF16)
    try:
        on_device = cupy.asarray(x.view(np.uint16)).view(BF16)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this CuPy has no bfloat16: {error}")
    y = room.module.fake_quantize(on_device, FORMATS["mxfp4"])
    want = reference.fake_quantize(x, FORMATS["mxfp4"])
    assert np.array_equal(y.view(np.uint16).get(), want.view(np.uint16))


def test_the_room_says_what_it_serves(room: Room) -> None:
    module: Any = room.module
    assert module.supports("quantize", FORMATS["mxfp4"], torch.ones(2, device="cuda")) is None
    assert "NumPy" in module.supports("quantize", None, np.ones(2))
    assert "cpu" in module.supports("quantize", None, torch.ones(2))


@pytest.mark.parametrize("name", ["int8-brow-bf16", "int4-brow-fp16", "int8-brow-fp32"])
def test_whole_rows_of_every_length(room: Room, name: str) -> None:
    for columns in (32, 96, 1024, 8192, 8224, 16384, 16416):
        for dtype in DTYPES.values():
            x = grids.noise(37, columns, dtype)
            x[1, columns - 1], x[2] = np.inf, 0
            same_quantized([room], x, get_format(name))
            same_quantized([room], x, get_format(name), clip="full")


def test_misuse_gets_a_sentence(ops: Any) -> None:
    x = torch.ones(4, 64, device="cuda")
    for call, words in (
        (lambda: ops.quantize(x.double(), "mxfp4"), "expected dtype bfloat16, float16 or float32"),
        (lambda: ops.quantize(x, "mxfp5"), "unknown 'mxfp5'"),
        (lambda: ops.quantize(x, "mxfp4", rotation=48), "expected a power of two"),
        (lambda: ops.quantize(x, "mxfp4", rotation=128), "not a multiple of 128"),
        (lambda: ops.quantize(x, "mxfp4", rounding="stochastic"), "seed"),
        (lambda: ops.quantize(x, "mxfp4", tensor_scale=x[0, 0]), "has none"),
        (lambda: ops.quantize(x, "nvfp4", tensor_scale=torch.ones(())), "on the device"),
        (lambda: ops.hadamard(x, 32, torch.ones(32)), "on the device"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_random_rounding_is_drawn_by_index(room: Room) -> None:
    x = grids.noise(130, 96, BF16)
    for name in ("mxfp4", "nvint4", "mxint8", "e3m2-b20-e8m0"):
        same_quantized([room], x, get_format(name), axis=0, rounding="stochastic", seed=2**40 + 1)


@pytest.mark.parametrize("name", [*FORMATS, "e2m1-b16x16-e4m3-ts", "int8-brow-bf16"])
def test_every_path_for_the_sanitizers(room: Room, name: str) -> None:
    """One small call of each kernel: what compute-sanitizer has the time for (-k sanitizers)."""
    fmt = get_format(name)
    for dtype, columns in ((DTYPES["bf16"], 512), (DTYPES["fp32"], 330)):
        x = grids.noise(37, columns, dtype)
        parts = same_quantized([room], x, fmt)
        room.dequantize(*parts, fmt, x.shape, dtype=dtype)
        room.fake_quantize(x, fmt)
        same_quantized([room], x, fmt, axis=0)
        same_quantized([room], x, fmt, rounding="stochastic", seed=3)
        room.amax(x)
        room.amax(x, 32)
    # Whole tiles and parts of them, along both axes.
    tiles: Any = to_torch(grids.noise(160, 96, BF16)).cuda()
    module: Any = room.module
    for options in ({}, {"rotation": 16}, {"rounding": "stochastic", "seed": 3}):
        module._ops().quantize_dual(tiles, fmt.key, **options)
    module._ops().fake_quantize(tiles, fmt.key, -2)
    same_quantized([room], grids.noise(64, 96, BF16), fmt, axis=0)
    for size in (2, 32, 64, 128, 256):
        same_quantized([room], grids.noise(3, 512, BF16), fmt, rotation=size)
        room.hadamard(grids.noise(3, 512, BF16), size)
    if fmt.bits < 8:
        room.unpack(room.pack(np.zeros((3, 41), np.uint8), fmt.bits), fmt.bits, 41)
