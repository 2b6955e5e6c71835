# SPDX-License-Identifier: Apache-2.0
"""fp8 products by packed weights: the kernel's text run on the CPU, and itself where a GPU is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyfmt import reference  # noqa: E402
from pyfmt.formats import get_format  # noqa: E402
from tests import grids  # noqa: E402
from tests.cuda_rooms import emulated_ops  # noqa: E402
from tests.rooms import to_torch  # noqa: E402

FOLDING = ["mxfp4", "mxint4", "mxfp6_e3m2", "mxfp6_e2m3"]
PAIRS = [(a, w) for w in FOLDING for a in ("mxfp4", "mxfp6_e2m3")] + [("mxint4", "mxfp6_e3m2")]
# How many neighbouring exponents a row of a weight may have.
WINDOWS = {"mxfp4": 15, "mxint4": 15, "mxfp6_e3m2": 10, "mxfp6_e2m3": 12}
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FP8_STEP = 2.0**-6  # c of |err| <= c * sum|a||b| + half an ulp


class Operand:
    """Codes, scales and the values that they stand for."""

    def __init__(self, x: np.ndarray, name: str) -> None:
        self.name, fmt = name, get_format(name)
        self.codes, self.scales, _ = reference.quantize(x, fmt)
        self.shape = x.shape
        self.decode()

    def decode(self) -> None:
        y = reference.dequantize(
            self.codes, self.scales, None, get_format(self.name), self.shape, dtype=np.float32
        )
        self.values = np.asarray(y, np.float64)

    def parts(self, device: str) -> list[Any]:
        return [to_torch(self.codes).to(device), to_torch(self.scales).to(device), self.name]


def times(
    ops: Any,
    a: Operand,
    w: Operand,
    bias: Any = None,
    dtype: Any = torch.float32,
    plan: tuple[int, int, int] = (0, 0, 0),
    device: str = "cpu",
    kept: tuple[Any, Any] = (None, None),
) -> tuple[np.ndarray, int]:
    """The product, and how many rows did not fold."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    e5m2 = a.name != "mxfp6_e2m3"
    added = None if bias is None else bias.to(device)
    y = ops._matmul_fold(
        None, *a.parts(device), None, "symmetric", 0, None, e5m2, *w.parts(device), *kept, added,
        dtype, total, *plan,
    )  # fmt: skip
    assert y.shape == (a.shape[0], w.shape[0]) and y.dtype == dtype
    return y.double().cpu().numpy(), int(total)


def check(ops: Any, a: Operand, w: Operand, c: float, **options: Any) -> int:
    """Assert the bound and that the bits come again; returns how many rows did not fold."""
    got, folded_not = times(ops, a, w, **options)
    bias, dtype = options.get("bias"), options.get("dtype", torch.float32)
    added = 0.0 if bias is None else bias.double().numpy()
    want = a.values @ w.values.T + added
    most = c * (np.abs(a.values) @ np.abs(w.values).T + np.abs(added))
    wrong = np.argwhere(~(np.abs(got - want) <= most + 1.01 * HALF_ULP[dtype] * np.abs(want)))
    assert not len(wrong), (
        f"{a.name} x {w.name} {a.shape} {w.shape} {options}: first of {len(wrong)} at {wrong[0]}: "
        f"{got[tuple(wrong[0])]}, expected {want[tuple(wrong[0])]}"
    )
    assert np.array_equal(got, times(ops, a, w, **options)[0])
    return folded_not


def noise(name: str, rows: int, columns: int, seed: int) -> Operand:
    return Operand(grids.noise(rows, columns, seed=seed), name)


def every_code(name: str, rows: int, count: int, offset: int) -> Operand:
    """Rows of blocks that hold all codes, under `count` neighbouring scales from `offset` on.

    Blocks of zeros lie between them, whose scales mean nothing.
    """
    fmt = get_format(name)
    rng = np.random.default_rng(4)
    w = Operand(np.ones((rows, 64 * count), np.float32), name)
    codes = rng.integers(0, 2**fmt.bits, (rows, w.shape[1]))
    codes.reshape(rows, -1, 2, 32)[:, :, 1] = 0
    codes.reshape(rows, -1, 64)[:, :, 0] = 2 ** (fmt.bits - 1) - 1
    stream = (codes[..., None] >> np.arange(fmt.bits)) & 1
    packed = np.packbits(stream.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little")
    w.codes = packed
    w.scales = np.zeros((rows, 2 * count), np.uint8)
    w.scales[:, ::2] = 127 + offset + rng.permutation(count)
    w.scales[:, 1::2] = rng.integers(0, 255, (rows, count))
    w.decode()
    return w


def ones_at(columns: int) -> Operand:
    """Rows with a single 1: a product shows the weight's values, bit for bit."""
    return Operand(np.eye(columns, dtype=np.float32), "mxfp4")


# ---- the kernel's text on the CPU ------------------------------------------------------------


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_every_pair(ops: Any, left: str, right: str) -> None:
    assert check(ops, noise(left, 5, 160, 1), noise(right, 40, 160, 2), 160 * 2.0**-24) == 0


@pytest.mark.parametrize("name", FOLDING)
def test_weights_are_decoded_exactly_within_their_window(ops: Any, name: str) -> None:
    window = WINDOWS[name]
    for count, offset in ((1, 3), (window, -20), (window, 12), (window + 1, -5)):
        w = every_code(name, 3, count, offset)
        got, folded_not = times(ops, ones_at(w.shape[1]), w)
        assert np.array_equal(got, w.values.T)
        assert folded_not == (0 if count <= window else 3)


def test_ragged_shapes_and_plans(ops: Any) -> None:
    for m, n, k in ((1, 1, 32), (66, 131, 352)):
        for plan in (
            (64, 1, 1),
            (128, 1, 1),
            (64, 2, 1),
            (96, 1, 2),
            (128, 2, 2),
            (144, 1, 2),
            (144, 2, 1),
            (160, 1, 2),
            (192, 1, 2),
            (192, 1, 1),
            (256, 1, 2),
        ):
            if plan[2] == 1 or k > 128:
                a, w = noise("mxfp4", m, k, 1), noise("mxfp4", n, k, 2)
                check(ops, a, w, k * 2.0**-24, plan=plan)


@pytest.mark.parametrize("dtype", HALF_ULP)
def test_output_dtypes_and_bias(ops: Any, dtype: Any) -> None:
    for n in (131, 136):
        a, w = noise("mxint4", 4, 96, 1), noise("mxfp4", n, 96, 2)
        w.scales -= 4  # float16 holds the sums
        w.decode()
        for bias_dtype in (torch.float32, torch.bfloat16):
            bias = torch.linspace(-2, 2, n, dtype=bias_dtype)
            for plan in ((0, 0, 0), (160, 1, 1)):
                check(ops, a, w, 96 * 2.0**-24, bias=bias, dtype=dtype, plan=plan)


@pytest.mark.parametrize("name", FOLDING)
def test_rows_that_do_not_fold(ops: Any, name: str) -> None:
    a, w = grids.noise(20, 256, seed=1), grids.noise(35, 256, seed=2)
    a[3, 64:96] *= np.float32(2.0**-45)
    a[9] *= np.float32(2.0**75)
    w[7, :32] *= np.float32(2.0**40)
    w[34, 100:] *= np.float32(2.0**-60)
    w[11, 32:64] = 0.0
    bias = torch.linspace(-1, 1, 35)
    assert check(ops, Operand(a, name), Operand(w, name), 256 * 2.0**-24, bias=bias) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [(96, 1, 2), (144, 1, 2), (192, 2, 1), (256, 1, 1)])
def test_rows_that_do_not_fold_by_plan(ops: Any, plan: tuple[int, int, int], dtype: Any) -> None:
    # Marked rows lie beside others in pieces of 4 and 8 columns, whole and not, of several blocks.
    for n in (136, 134, 131):
        a, w = grids.noise(75, 160, seed=1), grids.noise(n, 160, seed=2)
        for row in (0, 73):
            a[row, 64:96] *= np.float32(2.0**-45)
        for row in (3, 4, 127, n - 1):
            w[row, :32] *= np.float32(2.0**40)
        left, right = Operand(a, "mxfp4"), Operand(w, "mxfp6_e3m2")
        assert check(ops, left, right, 160 * 2.0**-24, plan=plan, dtype=dtype) == 6


@pytest.mark.parametrize("columns", [96, 512, 1536])
def test_scales_found_before(ops: Any, columns: int) -> None:
    values = grids.noise(40, columns, seed=2)
    values[5, :32] = 0
    values[17] = 0
    a, w = noise("mxfp4", 4, columns, 1), Operand(values, "mxfp4")
    w.scales[3, 0] += 40
    w.scales[39, -1] = 1
    w.decode()
    kept = ops._fold(*w.parts("cpu"), False, False, None)[1:3]
    assert list(np.flatnonzero(kept[1].numpy()[:40])) == [3, 39]
    # Counted when they were found, or found again: blocks of zeros may have any scale.
    assert check(ops, a, w, columns * 2.0**-24, kept=kept) == 0
    assert check(ops, a, w, columns * 2.0**-24) == 2
    assert np.array_equal(times(ops, a, w)[0], times(ops, a, w, kept=kept)[0])


def test_a_poisoned_block_spoils_its_row(ops: Any) -> None:
    a, w = noise("mxfp4", 3, 96, 1), noise("mxint4", 20, 96, 2)
    w.scales[7, 1], a.scales[1, 2] = 255, 255
    got, _ = times(ops, a, w)
    assert np.isnan(got[1]).all() and np.isnan(got[:, 7]).all()
    assert np.isfinite(np.delete(np.delete(got, 7, 1), 1, 0)).all()


@pytest.mark.parametrize("rotation", [0, 32])
def test_x_is_rotated_and_quantized_on_the_way(ops: Any, rotation: int) -> None:
    x = torch.from_numpy(grids.noise(9, 256, seed=1)).bfloat16()
    w = noise("mxfp4", 20, 256, 2)
    signs = torch.where(torch.arange(256) % 3 == 0, -1.0, 1.0) if rotation else None
    how = (None, "symmetric", rotation, signs, True)
    rest = (*w.parts("cpu"), None, None, None, torch.float32, None)
    y = ops._matmul_fold(x, None, None, "mxfp4", *how, *rest)
    options = {"rotation": rotation, "signs": signs.numpy()} if signs is not None else {}
    codes, scales, _ = reference.quantize(x.float().numpy(), get_format("mxfp4"), **options)
    want = ops._matmul_fold(None, to_torch(codes), to_torch(scales), "mxfp4", *how, *rest)
    assert torch.equal(y, want)


def test_what_it_refuses(ops: Any) -> None:
    like = torch.empty(1)
    for name in FOLDING:
        assert ops._matmul_fold_serves(like, name, 64, 64, 64) == ""
    for name in ("nvfp4", "mxint8", "mxfp8_e4m3", "int4", "e2m1-b16-e8m0"):
        assert ops._matmul_fold_serves(like, name, 64, 64, 64)
    a, w = noise("mxfp4", 3, 64, 1), noise("mxfp4", 3, 96, 1)
    with pytest.raises(RuntimeError, match="expected rows of 64 elements"):
        times(ops, a, w)


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device_ops() -> Any:
    import pyfmt.ops  # noqa: F401

    ops = torch.ops.pyfmt
    reason = ops._matmul_fold_serves(torch.empty(1, device="cuda"), "mxfp4", 64, 64, 64)
    if reason:
        pytest.skip(reason)
    return ops


@pytest.mark.gpu
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_on_the_device(device_ops: Any, left: str, right: str) -> None:
    for m, n, k in ((5, 40, 128), (70, 300, 1056), (300, 130, 2048)):
        a, w = noise(left, m, k, 1), noise(right, n, k, 2)
        check(device_ops, a, w, FP8_STEP, device="cuda", bias=torch.linspace(-2, 2, n))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOLDING)
def test_decoding_on_the_device(device_ops: Any, name: str) -> None:
    for count, offset in ((WINDOWS[name], -20), (WINDOWS[name] + 1, -5)):
        w = every_code(name, 140, count, offset)
        got, _ = times(device_ops, ones_at(w.shape[1]), w, device="cuda")
        assert np.array_equal(got, w.values.T)


@pytest.mark.gpu
def test_plans_on_the_device(device_ops: Any) -> None:
    a, w = noise("mxfp4", 200, 2048, 1), noise("mxfp4", 700, 2048, 2)
    for tile in (64, 96, 128, 144, 160, 192, 256):
        for share, split in ((1, 1), (1, 2), (2, 1), (4, 1), (2, 2)):
            plan = (tile, share, split)
            check(device_ops, a, w, FP8_STEP, device="cuda", plan=plan, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOLDING)
def test_rows_that_do_not_fold_on_the_device(device_ops: Any, name: str) -> None:
    for n in (700, 696):
        a, w = grids.noise(300, 1024, seed=1), grids.noise(n, 1024, seed=2)
        a[[0, 9, 299], 64:96] *= np.float32(2.0**-45)
        w[[7, 8, 130, n - 1], :32] *= np.float32(2.0**40)
        left, right = Operand(a, name), Operand(w, name)
        for plan in ((0, 0, 0), (128, 1, 2), (144, 1, 1), (160, 2, 1), (192, 1, 2), (256, 1, 2)):
            for dtype in (torch.float32, torch.bfloat16):
                options = {"device": "cuda", "plan": plan, "dtype": dtype}
                assert check(device_ops, left, right, FP8_STEP, **options) == 7
