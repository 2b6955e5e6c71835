# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel for middle-sized M: its text run on the CPU, and itself where a GPU is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyfmt import reference  # noqa: E402
from pyfmt.formats import FORMATS, Format, get_format  # noqa: E402
from tests.cuda_rooms import emulated_ops  # noqa: E402
from tests.grids import BF16  # noqa: E402
from tests.rooms import to_torch  # noqa: E402

GROUPS = ["int4-b256-fp16", "int8-brow-fp32", "int4-brow-bf16", "int4-b32-bf16", "int8-b64-fp16"]
GROUPS += ["int8-b96-fp32", "int4-b384-fp32", "int8-b128-fp16"]
SERVED = [*FORMATS, *GROUPS]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Plans for groups with both operands in shared memory: codes decoded there, or written out before.
SHARED = ((192, 1, 1), (192, 1, 1, True), (256, 1, 1, True))


def bound(columns: int) -> float:
    """The constant c of |err| <= c * sum |a||b|: a step of 16 columns truncates its sum once."""
    return float(2.0**-21 + columns * 2.0**-28)


class Weights:
    """Quantized random weights and what they decode to, the tensor scale kept apart."""

    def __init__(self, name: str, rows: int, columns: int, seed: int = 0) -> None:
        self.name, self.fmt = name, get_format(name)
        w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
        self.codes, self.scales, tensor_scale = reference.quantize(w, self.fmt)
        self.tensor_scale = None if tensor_scale is None else float(tensor_scale)
        self.columns = columns

    @property
    def decoded(self) -> np.ndarray:
        shape = (len(self.codes), self.columns)
        w = reference.dequantize(self.codes, self.scales, None, self.fmt, shape, dtype=np.float32)
        return np.asarray(w, np.float64)

    def times(
        self,
        ops: Any,
        x: np.ndarray,
        bias: np.ndarray | None = None,
        dtype: str = "fp32",
        plan: tuple[Any, ...] = (0, 0, 0),
        device: str = "cpu",
    ) -> np.ndarray:
        def there(a: np.ndarray) -> Any:
            return to_torch(np.ascontiguousarray(a)).to(device)

        scale = None
        if self.tensor_scale is not None:
            scale = torch.tensor(self.tensor_scale, device=device)
        parts = there(x.astype(BF16)), there(self.codes), there(self.scales), scale, self.name
        b = None if bias is None else there(bias)
        y = ops._matmul_wide(*parts, self.columns, b, DTYPES[dtype], *plan)
        assert y.dtype == DTYPES[dtype] and y.shape == (len(x), len(self.codes))
        return np.asarray(y.float().cpu().numpy())


def check_single_columns(ops: Any, w: Weights, rows: int, **options: Any) -> None:
    """Rows of x with one 1 each show the decoded weights, bit for bit."""
    columns = np.random.default_rng(1).integers(0, w.columns, rows)
    x = np.zeros((rows, w.columns), np.float32)
    x[np.arange(rows), columns] = 1
    want = w.decoded.T[columns].astype(np.float32) * np.float32(w.tensor_scale or 1)
    got = w.times(ops, x, **options)
    wrong = np.argwhere(~((got == want) | (np.isnan(got) & np.isnan(want))))
    assert not len(wrong), f"{w.name}: first of {len(wrong)} at (m, n) = {wrong[0]}"


def check_sums(ops: Any, w: Weights, rows: int, dtype: str = "fp32", **options: Any) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((rows, w.columns)).astype(BF16).astype(np.float64)
    bias = rng.standard_normal(len(w.codes)).astype(np.float32)
    scale = w.tensor_scale or 1
    want = x @ w.decoded.T * scale + bias
    most = bound(w.columns) * (np.abs(x) @ np.abs(w.decoded).T * scale + np.abs(bias))
    ulp = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-23}[dtype]
    got = w.times(ops, x, bias, dtype, **options)
    wrong = np.argwhere(~(np.abs(got - want) <= most + ulp * np.abs(want) + 2.0**-24))
    assert not len(wrong), f"{w.name}: first of {len(wrong)} at (m, n) = {wrong[0]}"
    assert np.array_equal(got, w.times(ops, x, bias, dtype, **options))


def check_same_bits(ops: Any, w: Weights, rows: int, **options: Any) -> None:
    """Of groups in shared memory: the order of sums is the same in all plans."""
    x = np.random.default_rng(3).standard_normal((rows, w.columns))
    first, *others = (w.times(ops, x, plan=plan, **options) for plan in SHARED)
    for other in others:
        assert np.array_equal(first, other), w.name


# ---- the kernel's text on the CPU ------------------------------------------------------------


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


@pytest.mark.parametrize("name", SERVED)
def test_every_format(ops: Any, name: str) -> None:
    for m, n, k in ((5, 40, 128), (70, 17, 416)):
        w = Weights(name, n, k)
        check_single_columns(ops, w, m)
        check_sums(ops, w, m)


RAGGED = ["mxfp4", "mxfp6_e3m2", "mxint8", "nvfp4", "int4", "int8-b64-fp16", "int4-b32-bf16"]


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_shapes(ops: Any, name: str) -> None:
    for m, n, k in ((1, 1, 1), (3, 5, 33), (9, 131, 200), (65, 2, 1000), (2, 64, 2100)):
        check_sums(ops, Weights(name, n, k), m)


@pytest.mark.parametrize("tile", [16, 32, 64, 96, 128, 192, 256])
def test_every_tile(ops: Any, tile: int) -> None:
    for name in ("mxfp8_e4m3", "int8"):
        if tile != 96 or name == "int8":
            check_sums(ops, Weights(name, 30, 300), tile + 3, plan=(tile, 1 + (tile == 64), 1))


@pytest.mark.parametrize("name", [n for n in SERVED if get_format(n).scale in ("e8m0", "e4m3")])
def test_one_tile_of_256(ops: Any, name: str) -> None:
    for m, n, k in ((5, 40, 128), (70, 17, 1000)):
        w = Weights(name, n, k)
        check_single_columns(ops, w, m, plan=(256, 1, 1))
        check_sums(ops, w, m, plan=(256, 1, 2))


@pytest.mark.parametrize("share,split", [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_clusters(ops: Any, share: int, split: int) -> None:
    for name, tile in (
        ("int4", 64),
        ("nvfp4", 128),
        ("mxint8", 128),
        ("int8", 96),
        ("nvint4", 192),
        ("mxfp4", 256),
    ):
        check_sums(ops, Weights(name, 300, 1000), 70, plan=(tile, share, split))


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("split", [1, 2, 4, 8])
def test_few_tokens(ops: Any, share: int, split: int) -> None:
    for name, tile, m, n, k in (
        ("mxfp4", 16, 9, 300, 2200),
        ("nvfp4", 32, 40, 257, 1100),
        ("mxint8", 32, 32, 40, 1001),
        ("mxfp6_e3m2", 32, 17, 70, 1304),
        ("nvint4", 64, 70, 130, 1200),
        ("mxfp8_e5m2", 64, 64, 64, 1000),
        ("int4", 16, 9, 300, 2200),
        ("int4-b384-fp32", 32, 40, 130, 1304),
        ("int4-b256-fp16", 64, 60, 130, 1300),
        ("int8", 16, 3, 70, 1001),
        ("int8-brow-fp32", 32, 32, 40, 1100),
        ("int8-b128-fp16", 64, 64, 64, 1000),
        ("int4-b64-bf16", 16, 9, 70, 1300),
        ("int4-b32-fp16", 32, 40, 130, 1304),
        ("int4-b96-bf16", 64, 60, 130, 1300),
        ("int8-b32-fp32", 16, 16, 70, 1001),
        ("int8-b64-bf16", 64, 64, 64, 1000),
    ):
        if tile == 64 and share == 1:
            continue
        w = Weights(name, n, k)
        check_single_columns(ops, w, m, plan=(tile, share, split))
        check_sums(ops, w, m, plan=(tile, share, split))


@pytest.mark.parametrize("share,split", [(1, 1), (1, 2), (2, 2), (4, 2), (2, 4)])
def test_few_tokens_by_whole_slots(ops: Any, share: int, split: int) -> None:
    """Scales are aligned and no slot ends beyond k; warpgroups do not share them out evenly."""
    for name, tile, m, n, k in (
        ("mxfp4", 16, 9, 130, 2304),
        ("nvfp4", 16, 16, 70, 2304),
        ("mxint8", 16, 16, 300, 1152),
        ("mxfp6_e2m3", 32, 20, 70, 1152),
        ("int4", 16, 9, 130, 2304),
        ("int8", 32, 20, 70, 1152),
        ("int4-b32-fp32", 16, 9, 70, 2304),
        ("int8-b32-bf16", 16, 9, 70, 1152),
        ("int4-b64-bf16", 32, 20, 70, 2304),
        ("int8-b64-fp16", 32, 20, 70, 1152),
    ):
        w = Weights(name, n, k)
        check_single_columns(ops, w, m, plan=(tile, share, split))
        check_sums(ops, w, m, plan=(tile, share, split))


@pytest.mark.parametrize("name", ["int4", "int8", "int4-b64-fp16", "int8-b32-bf16"])
def test_groups_by_both_tiles_and_parts(ops: Any, name: str) -> None:
    w = Weights(name, 140, 900)
    for plan in ((64, 1, 1), (96, 1, 2), (128, 2, 1), (256, 1, 1), (256, 1, 2)):
        if plan[0] == 256 and name == "int8-b32-bf16":
            continue
        check_single_columns(ops, w, 131, plan=plan)
        check_sums(ops, w, 131, "bf16", plan=plan)


@pytest.mark.parametrize(
    "name", ["int4", "int8", "int4-b64-fp16", "int8-b32-bf16", "int8-brow-fp32"]
)
def test_groups_in_shared_memory(ops: Any, name: str) -> None:
    for plan in SHARED:
        for m, n, k in ((70, 300, 200), (131, 40, 520), (300, 139, 64)):
            w = Weights(name, n, k)
            check_single_columns(ops, w, m, plan=plan)
            check_sums(ops, w, m, "bf16" if m == 70 else "fp16" if m == 131 else "fp32", plan=plan)
    check_same_bits(ops, w, m)


def test_weights_written_out_in_parts(ops: Any) -> None:
    # The emulated device has two multiprocessors: parts of 128, 384 and 188 rows.
    for name in ("int4", "int8-b32-bf16"):
        check_sums(ops, Weights(name, 700, 264), 500, "bf16", plan=(256, 1, 1, True))


def test_what_cannot_be_written_out(ops: Any) -> None:
    for name, tile in (("mxfp4", 256), ("int4", 128)):
        with pytest.raises(RuntimeError, match="written: expected groups of integers"):
            Weights(name, 16, 64).times(ops, np.ones((1, 64), np.float32), plan=(tile, 1, 1, True))


@pytest.mark.parametrize("plan", [(0, 0, 0), *SHARED])
def test_every_code_of_a_group(ops: Any, plan: tuple[Any, ...]) -> None:
    for name, count in (("int4-b32-bf16", 16), ("int8-b64-bf16", 256)):
        w = Weights(name, 2, 512)
        codes = np.arange(1024).reshape(2, 512) % count
        if count == 16:
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        w.codes = np.ascontiguousarray(codes.astype(np.uint8))
        x = np.eye(512, dtype=np.float32)
        assert np.array_equal(w.times(ops, x, plan=plan), w.decoded.T.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtypes(ops: Any, dtype: str) -> None:
    for n in (128, 131):
        check_sums(ops, Weights("mxfp4", n, 96), 4, dtype)


@pytest.mark.parametrize("tile", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.scale == "e8m0"])
def test_every_scale_and_code(ops: Any, name: str, tile: int) -> None:
    fmt: Format = FORMATS[name]
    bits = fmt.element.bits
    w = Weights(name, 256, 256)
    codes = (np.arange(256)[None, :] + np.arange(256)[:, None]) % 2**bits
    if fmt.element.special != "none":  # NaN and infinity are left to the next test
        codes[codes % 128 > fmt.element.max_code] = 0
    stream = (codes[..., None] >> np.arange(bits)) & 1
    w.codes = np.packbits(stream.reshape(256, -1).astype(np.uint8), axis=1, bitorder="little")
    w.scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 8)).copy()
    # A bfloat16 holds what a float32 does, but for the smallest magnitudes and NaN.
    want = w.decoded.T.astype(np.float32).astype(BF16).astype(np.float32)
    got = w.times(ops, np.eye(256, dtype=np.float32), plan=(tile, 1 + (tile == 64), 1))
    # NaN or infinity times zero is NaN: only rows of w without any can be compared.
    finite = np.isfinite(want).all(0)
    assert finite.sum() > 230
    assert np.array_equal(got[:, finite], want[:, finite])
    assert np.isnan(got[:, np.isnan(want).any(0)]).all()


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2"])
def test_codes_that_are_no_numbers(ops: Any, name: str) -> None:
    w = Weights(name, 256, 64)
    w.codes = w.codes.copy()
    w.codes[:, 40] = np.arange(256)
    x = np.zeros((1, 64), np.float32)
    x[0, 40] = 1
    want = w.decoded[:, 40].astype(np.float32)
    assert np.isnan(want).any()
    for tile in (32, 64, 128, 192, 256):
        got = w.times(ops, x, plan=(tile, 1 + (tile == 64), 1))[0]
        assert np.array_equal(got, want, equal_nan=True)


def test_a_poisoned_block_spoils_its_row(ops: Any) -> None:
    for name in ("mxfp4", "nvfp4", "int8", "mxint6"):
        w = Weights(name, 40, 256)
        w.scales = w.scales.copy()
        nan = {"e8m0": 0xFF, "e4m3": 0x7F}.get(w.fmt.scale)
        w.scales[7, 1] = np.array(np.nan, w.scales.dtype) if nan is None else nan
        got = w.times(ops, np.ones((3, 256), np.float32))
        assert np.isnan(got[:, 7]).all() and np.isfinite(np.delete(got, 7, 1)).all()


@pytest.mark.parametrize("name", ["int4-brow-fp32", "int8-brow-fp16", "int8-b256-fp32", "int4"])
def test_groups_whose_scales_are_no_numbers(ops: Any, name: str) -> None:
    # Columns 0 to 384: an odd number of chunks, so that what lies beyond must not be multiplied.
    w = Weights(name, 8, 384)
    dtype = w.scales.dtype
    some = [np.inf, -np.inf, np.nan, 0, np.finfo(np.float32).tiny / 16, -1, 2.0**-24, 60000]
    w.scales = w.scales.copy()
    w.scales[:, 0], w.scales[:, 1:] = np.array(some, np.float64).astype(dtype), 0.25
    w.codes = np.full_like(w.codes, 0x11 if name.startswith("int4") else 1)
    x = np.ones((20, 384), np.float32)
    with np.errstate(invalid="ignore"):
        size = 384 if w.fmt.block == "row" else w.fmt.block
        want = (128 * w.scales.astype(np.float64)[:, np.arange(0, 384, 128) // size]).sum(1)
        want = want.astype(np.float32)
    for plan in ((16, 4, 1), (16, 2, 2), (32, 1, 1), (64, 4, 2), (96, 1, 1), (192, 1, 1)):
        got = w.times(ops, x, plan=plan)
        assert np.array_equal(got, np.broadcast_to(want, got.shape), equal_nan=True), plan


def test_what_it_refuses(ops: Any) -> None:
    for name, plan in (("mxfp4", (64, 1, 1)), ("mxfp4", (128, 1, 4)), ("int4", (64, 1, 4))):
        with pytest.raises(RuntimeError, match=r"expected .* with a tile of 64 rows"):
            Weights(name, 16, 32).times(ops, np.ones((1, 32), np.float32), plan=plan)
    like = torch.empty(1)
    for name in SERVED:
        assert ops._matmul_wide_serves(like, name, 64, 64, 64) == ""
    for name in ("int4-b16-bf16", "e2m1-b16-e8m0", "ue4m3-b32-e8m0", "e2m1-b16x16-e4m3-ts"):
        assert ops._matmul_wide_serves(like, name, 64, 64, 64)
        with pytest.raises(RuntimeError, match="matmul path wide"):
            Weights(name, 16, 32).times(ops, np.ones((1, 32), np.float32))


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device_ops() -> Any:
    import pyfmt.ops  # noqa: F401

    ops = torch.ops.pyfmt
    reason = ops._matmul_wide_serves(torch.empty(1, device="cuda"), "mxfp4", 64, 64, 64)
    if reason:
        pytest.skip(reason)
    return ops


@pytest.mark.gpu
@pytest.mark.parametrize("name", SERVED)
def test_on_the_device(device_ops: Any, name: str) -> None:
    for m, n, k in ((5, 40, 128), (70, 300, 1040), (300, 130, 2001)):
        w = Weights(name, n, k)
        check_single_columns(device_ops, w, m, device="cuda")
        check_sums(device_ops, w, m, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    ["mxfp4", "nvfp4", "mxint8", "int4", "int8", "int4-brow-fp32", "int4-b64-fp16"]
    + ["int8-b32-fp32", "int8-b128-fp16"],
)
def test_plans_on_the_device(device_ops: Any, name: str) -> None:
    w = Weights(name, 700, 2048)
    tiles, groups = (16, 32, 64, 128, 192, 256), name.startswith("int")
    if groups:
        tiles = (16, 32, 64, 96, 128, *([] if "b32" in name else [256]))
    for tile in tiles:
        few = tile <= 64
        more = ((4, 4), (4, 8), (2, 4)) if few else ()
        for share, split in ((1, 1), (1, 2), (2, 1), (4, 1), (2, 2), (4, 2), *more):
            if tile == 64 and few and share == 1:
                continue
            plan = (tile, share, split)
            rows = (200, 300) if tile == 256 else (200,)
            for m in (tile, 40 if groups and tile == 64 else 77) if few else rows:
                check_single_columns(device_ops, w, m, plan=plan, device="cuda")
                check_sums(device_ops, w, m, "bf16", plan=plan, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["int4", "int8", "int4-b64-fp16", "int8-b32-fp32", "int4-brow-bf16"]
)
def test_groups_in_shared_memory_on_the_device(device_ops: Any, name: str) -> None:
    w = Weights(name, 700, 2048)
    for plan in SHARED:
        for m in (200, 300):
            check_single_columns(device_ops, w, m, plan=plan, device="cuda")
            check_sums(device_ops, w, m, "bf16", plan=plan, device="cuda")
    check_same_bits(device_ops, w, 300, device="cuda")
    # The weight is written out in two parts.
    w = Weights(name, 1100, 512)
    check_single_columns(device_ops, w, 5000, plan=SHARED[2], device="cuda")
