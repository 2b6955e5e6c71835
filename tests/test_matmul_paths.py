# SPDX-License-Identifier: Apache-2.0
"""The dense GEMM paths without a GPU: their kernels run on the CPU, torch's GEMMs do too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pyfmt.ops
from pyfmt import _matmul_paths as paths
from pyfmt import _torch_dense, _torch_matmul, _torch_operands, reference
from pyfmt.formats import FORMATS, get_format
from tests import grids
from tests.cuda_rooms import emulated_ops
from tests.grids import BF16
from tests.rooms import to_torch

E5M2, E4M3 = torch.float8_e5m2, torch.float8_e4m3fn
# Exact windows: how many neighbouring exponents a row may have.
WINDOWS = {
    ("mxfp4", True): 29, ("mxfp4", False): 15, ("mxint4", True): 29, ("mxint4", False): 15,
    ("mxfp6_e3m2", True): 24, ("mxfp6_e3m2", False): 10, ("mxfp6_e2m3", False): 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


def decoded(parts: Any, e5m2: bool, rows: int) -> np.ndarray:
    """The float64 values of folded rows."""
    fp8 = parts[0].view(E5M2 if e5m2 else E4M3)[:rows].double()
    return (fp8 * parts[1][:rows, None].double()).numpy()


def values(x: np.ndarray, name: str, **options: Any) -> tuple[Any, Any, np.ndarray]:
    """Codes and scales of x, and the exact values that they stand for."""
    fmt = get_format(name)
    codes, scales, _ = reference.quantize(x, fmt, **options)
    y = reference.dequantize(codes, scales, None, fmt, x.shape, dtype=np.dtype(np.float32))
    return to_torch(codes), to_torch(scales), y.astype(np.float64)


def every_code(name: str, spread: int) -> np.ndarray:
    """Two rows of blocks that hold all codes, with `spread` neighbouring scales."""
    fmt = get_format(name)
    rng = np.random.default_rng(3)
    grid = reference.decode(np.arange(2**fmt.bits, dtype=np.uint8), fmt.element)
    grid = grid[np.isfinite(grid)]
    blocks = rng.choice(grid, (2, spread + 1, 32)).astype(np.float32)
    blocks[:, :, 0], blocks[:, 0] = np.abs(grid).max() * 0.999, 0.0
    blocks[:, 1:] *= np.exp2(np.arange(spread, dtype=np.float32))[:, None]
    return blocks.reshape(2, -1)


@pytest.mark.parametrize(("name", "e5m2"), WINDOWS)
def test_folding_is_exact_within_the_window_and_listed_beyond(
    ops: Any, name: str, e5m2: bool
) -> None:
    window = WINDOWS[name, e5m2]
    for spread, fits in ((1, True), (window, True), (window + 1, False)):
        for offset in (-30.0, 0.0, 20.0):
            x = every_code(name, spread) * np.float32(2.0 ** (offset - spread / 2))
            codes, scales, want = values(x, name)
            total = torch.zeros((), dtype=torch.int64)
            parts = ops._fold(codes, scales, name, e5m2, True, total)
            assert parts[0].shape == (16, want.shape[1]) and not parts[0][2:].any()
            marks = parts[2]
            assert marks.sum() == total == (0 if fits else 2)
            if fits:
                assert np.array_equal(decoded(parts, e5m2, 2), want)
            else:
                assert marks[:2].all()
                assert not parts[1][:2].any()
                assert np.array_equal(parts[3].double().numpy(), want)


@pytest.mark.parametrize("columns", [32, 96, 8224, 16416, 33024])
def test_folding_rows_of_every_length(ops: Any, columns: int) -> None:
    x = grids.noise(3, columns)
    x[1, columns // 2] = np.nan
    x[2] = -0.0
    codes, scales, want = values(x, "mxfp4")
    parts = ops._fold(codes, scales, "mxfp4", False, False, None)
    assert np.array_equal(decoded(parts, False, 3), want, equal_nan=True)
    assert parts[3].numel() == 0


def test_rows_far_from_one_are_left_to_the_exact_path(ops: Any) -> None:
    x = np.stack([np.full(64, 2.0**e, np.float32) for e in (-126, -70, 0, 70, 125)])
    codes, scales, want = values(x, "mxfp4")
    parts = ops._fold(codes, scales, "mxfp4", True, True, None)
    assert parts[1][:5].ne(0).tolist() == [False, False, True, False, False]
    for i in (0, 1, 3, 4):
        assert np.array_equal(parts[3][i].double().numpy(), want[i])


@pytest.mark.parametrize("rotation", [0, 16, 128])
@pytest.mark.parametrize("name", ["mxfp4", "mxint4", "mxfp6_e3m2", "mxfp6_e2m3"])
def test_fold_values_is_quantize_then_fold(ops: Any, name: str, rotation: int) -> None:
    for rows, columns in ((5, 256), (2, 8320), (2050, 64)):
        x = grids.noise(rows, columns, BF16)
        x[0, 3], x[1, :64] = np.inf, 0
        x[1, columns // 2 :] *= BF16.type(2.0**-40)
        if columns % max(rotation, 1):
            continue
        signs = np.where(np.arange(columns) % 3, 1, -1).astype(np.float32) if rotation else None
        options = {"rotation": rotation, "signs": signs} if rotation else {}
        codes, scales, _ = reference.quantize(x, get_format(name), **options)
        e5m2 = name != "mxfp6_e2m3"
        want = ops._fold(to_torch(codes), to_torch(scales), name, e5m2, True, None)
        got = ops._fold_values(
            to_torch(x), name, None, "symmetric", rotation, to_torch(signs), e5m2, None
        )
        assert torch.equal(got[0][:rows], want[0][:rows])
        assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])
        for row in want[2].nonzero().flatten().tolist():
            assert torch.equal(got[3][row], want[3][row])
        # Both operands at once, whatever their sizes.
        w = grids.noise(37, columns, BF16, seed=4)
        other = "mxfp4" if rotation == 16 else name
        w_parts = [to_torch(p) for p in reference.quantize(w, get_format(other))[:2]]
        weight = ops._fold(*w_parts, other, False, False, None)[:3]
        found = ops._fold_two(to_torch(codes), to_torch(scales), name, e5m2, *w_parts, other, None)
        online = ops._fold_online(
            to_torch(x), name, None, "symmetric", rotation, to_torch(signs), e5m2, *w_parts, other,
            None,
        )  # fmt: skip
        for both in (found, online):
            assert torch.equal(both[0][:rows], want[0][:rows])
            for i, part in ((1, want[1]), (2, want[2]), (4, weight[0]), (5, weight[1])):
                assert torch.equal(both[i], part)
            assert torch.equal(both[6], weight[2])


ROUNDED = [f for f in FORMATS if f not in ("int4", "int8")] + ["e2m1-b64-e8m0", "int4-b128-e4m3"]


@pytest.mark.parametrize("name", ROUNDED)
def test_round_values_is_element_times_scale(ops: Any, name: str) -> None:
    fmt = get_format(name)
    # One block of threads, a cluster of them, and more than a cluster holds.
    shapes = [(6, 256, 0), (6, 256, 32), (6, 256, 256)]
    if fmt.scale == "e4m3":
        shapes += [(75, 256, 16), (130, 1024, 32)]
    for rows, columns, rotation in shapes:
        x = grids.noise(rows, columns, BF16)
        x[0, 3], x[1, :64], x[2, 5], x[3, :48] = np.inf, 0, np.nan, -0.0
        options: dict[str, Any] = {"rotation": rotation} if rotation else {}
        codes, scales, stored = reference.quantize(x, fmt, **options)
        want = reference.dequantize(codes, scales, None, fmt, x.shape, dtype=np.dtype(np.float32))
        for factor in (None, torch.tensor(3.0)):
            got, ts = ops._round_values(
                to_torch(x), name, None, None, "symmetric", rotation, None, factor
            )
            mine = got.float().numpy()
            assert np.array_equal(mine, want, equal_nan=True)
            assert np.array_equal(np.signbit(mine), np.signbit(want))
            if stored is not None:
                assert ts.numpy() == np.float32(stored) * np.float32(1 if factor is None else 3)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nvint4"])
def test_round_values_rounds_halves_to_even(ops: Any, name: str) -> None:
    # Every bfloat16 number beside a number that fixes the scale, by each rule and recipe.
    fmt = get_format(name)
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    every = bits.view(np.float32)
    for rule in fmt.scale_rules or fmt.recipes:
        for largest in (6.0, 1.0, 5.3):
            x = np.full((1 << 16, 2), largest, np.float32)
            x[:, 0] = np.where(np.abs(every) <= largest, every, 0)
            x = x.reshape(-1, 32).astype(BF16)
            given: dict[str, Any] = {"scale_rule" if fmt.scale_rules else "recipe": rule}
            codes, scales, _ = reference.quantize(x, fmt, **given)
            want = reference.dequantize(
                codes, scales, None, fmt, x.shape, dtype=np.dtype(np.float32)
            )
            rest = (given.get("scale_rule"), given.get("recipe"), "symmetric", 0, None, None)
            got = ops._round_values(to_torch(x), name, *rest)[0].float().numpy()
            assert np.array_equal(got, want) and np.array_equal(np.signbit(got), np.signbit(want))


def operands(ops: Any, m: int, n: int, k: int, wild: bool) -> tuple[Any, ...]:
    a, w = grids.noise(m, k, seed=1), grids.noise(n, k, seed=2)
    if wild:
        a[1, 32:64] *= np.float32(2.0**-40)
        a[m - 1, :32] *= np.float32(2.0**60)
        w[3, :32] *= np.float32(2.0**-20)
        w[n - 1, :32] *= np.float32(2.0**30)
    a_codes, a_scales, a_values = values(a, "mxfp4")
    w_codes, w_scales, w_values = values(w, "mxfp6_e3m2")
    left = ops._fold(a_codes, a_scales, "mxfp4", True, True, None)
    right = ops._fold(w_codes, w_scales, "mxfp6_e3m2", False, False, None)
    return left, right, w_codes, w_scales, a_values, w_values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n"), [(9, 21), (2, 16), (17, 5)])
def test_repair_computes_what_does_not_fold(ops: Any, m: int, n: int, dtype: Any) -> None:
    left, right, codes, scales, a, w = operands(ops, m, n, 160, True)
    bias = torch.linspace(-1, 1, n)
    y = torch.full((m, n + 3), 776.0, dtype=dtype)[:, :n]
    ops._repair(y, *left, True, *right[:3], False, codes, scales, "mxfp6_e3m2", bias)
    exact = a @ w.T + bias.double().numpy()
    bound = 160 * 2.0**-24 * (np.abs(a) @ np.abs(w).T + 1)
    half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
    touched = np.zeros((m, n), bool)
    touched[[1, m - 1]], touched[:, [3, n - 1]] = True, True
    got = y.double().numpy()
    assert (got[~touched] == 776).all()
    finite = np.isfinite(got) & touched
    assert dtype is torch.float16 or finite[touched].all()
    excess = np.abs(got - exact)[finite] - bound[finite] - half_ulp * np.abs(exact[finite])
    assert excess.max() <= 2.0**-25


def test_repair_leaves_folded_rows_alone(ops: Any) -> None:
    left, right, codes, scales, _, _ = operands(ops, 6, 7, 64, False)
    y = torch.full((6, 7), 5.0)
    ops._repair(y, *left, True, *right[:3], False, codes, scales, "mxfp6_e3m2", None)
    assert (y == 5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_finish_scales_adds_and_rounds_once(ops: Any, dtype: Any) -> None:
    for rows, columns, stride in ((3, 16, 16), (4, 13, 16), (1, 8, 9), (0, 8, 8)):
        y = torch.from_numpy(grids.noise(rows, stride))
        bias, s = torch.linspace(-1, 1, columns), torch.tensor(0.3)
        row, column = torch.linspace(1, 2, rows), torch.linspace(3, 4, columns)
        got = ops._finish(y, columns, s, None, None, None, bias, dtype)
        assert torch.equal(got, (y[:, :columns] * s + bias).to(dtype))
        got = ops._finish(y, columns, s, s, row, column, None, dtype)
        assert torch.equal(got, (y[:, :columns] * row[:, None] * column * s * s).to(dtype))


# ---- whole paths ------------------------------------------------------------------------------

HOPPER = paths.Machine((9, 0), skinny=False, wide=False, native=False)
FOLDING = ["mxfp4", "mxint4", "mxfp6_e3m2", "mxfp6_e2m3"]
EXACT = ["mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "mxint6", "nvfp4", "nvint4", "e2m1-b16x16-e4m3-ts"]
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, ops: Any) -> None:
    """CPU tensors take the paths of a GPU, with emulated kernels and torch's GEMMs for the CPU."""
    monkeypatch.setattr(_torch_operands.Parts, "ops", ops)
    monkeypatch.setattr(_torch_matmul, "machine_of", lambda device: HOPPER)
    monkeypatch.setattr(paths, "PACKED", {})  # test_matmul_fold.py has the packed form
    _torch_matmul._choices.clear()
    yield  # type: ignore[misc]
    _torch_matmul._choices.clear()


def product(
    a: np.ndarray, w: np.ndarray, formats: tuple[str | None, str], **options: Any
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The product by torch.ops.pyfmt.matmul, the exact one, and sum|a||b|."""
    left: list[Any] = [to_torch(a), None, None, None]
    a_values = a.astype(np.float64)
    if formats[0] is not None:
        fmt = get_format(formats[0])
        parts = reference.quantize(a, fmt)
        left = [to_torch(None if p is None else np.asarray(p)) for p in parts] + [formats[0]]
        a_values = reference.dequantize(*parts, fmt, a.shape).astype(np.float64)
    fmt = get_format(formats[1])
    parts = reference.quantize(w, fmt)
    right = [to_torch(None if p is None else np.asarray(p)) for p in parts]
    w_values = reference.dequantize(*parts, fmt, w.shape).astype(np.float64)
    y = torch.ops.pyfmt.matmul(*left, *right, formats[1], a.shape[-1], **options)
    bias = options.get("bias")
    exact = a_values @ w_values.T + (0 if bias is None else bias.double().numpy())
    weight = np.abs(a_values) @ np.abs(w_values).T + (
        0 if bias is None else bias.double().abs().numpy()
    )
    return y, exact, weight


def within(y: torch.Tensor, exact: np.ndarray, weight: np.ndarray, k: int, c: float = 0.0) -> None:
    bound = (c or k * 2.0**-24) * weight + HALF_ULP[y.dtype] * 1.01 * np.abs(exact) + TINY[y.dtype]
    excess = np.abs(y.double().numpy() - exact) / bound
    assert excess.max() <= 1, f"{excess.max()} of the bound"


PAIRS = [(p, n, n) for p, names in (("fold", FOLDING), ("exact", FOLDING + EXACT)) for n in names]
PAIRS += [("fold", "mxfp4", "mxfp6_e2m3"), ("fold", "mxfp6_e2m3", "mxint4")]
PAIRS += [("exact", None, n) for n in ("mxfp4", "nvfp4", "mxint8")]
PAIRS += [
    ("exact", "nvfp4", "mxfp8_e4m3"),
    ("portable", "int4", "int8"),
    ("portable", None, "int4"),
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("path", "left", "right"), PAIRS)
def test_a_path_keeps_its_bound(path: str, left: str | None, right: str) -> None:
    for m, n, k in ((7, 32, 128), (33, 21, 100), (1, 16, 416)):
        a, w = grids.noise(m, k, BF16, seed=1), grids.noise(n, k, seed=2)
        for dtype, bias_dtype in (
            (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
            (torch.float32, None), (torch.float16, torch.float32),
        ):  # fmt: skip
            bias = None if bias_dtype is None else torch.linspace(-2, 2, n, dtype=bias_dtype)
            if dtype == torch.float16:
                w = (w / 64).astype(np.float32)  # float16 holds the sums
            y, exact, weight = product(a, w, (left, right), bias=bias, dtype=dtype, path=path)
            assert y.shape == (m, n) and y.dtype == dtype and y.is_contiguous()
            within(y, exact, weight, k)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", FOLDING)
def test_fold_never_rounds_wild_rows(name: str) -> None:
    a, w = grids.noise(20, 256, seed=1), grids.noise(35, 256, seed=2)
    a[3, 64:96] *= np.float32(2.0**-45)
    a[9] *= np.float32(2.0**75)
    w[7, :32] *= np.float32(2.0**40)
    w[34, 100:] *= np.float32(2.0**-60)
    before = int(_torch_operands.total_of(torch.device("cpu")) or 0)
    bias = torch.linspace(-1, 1, 35)
    y, exact, weight = product(a, w, (name, name), bias=bias, dtype=torch.bfloat16, path="fold")
    within(y, exact, weight, 256)
    after = int(_torch_operands.total_of(torch.device("cpu")) or 0)
    assert after - before == 4


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kept", [False, True])
def test_fold_by_packed_weights(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a, w = torch.from_numpy(grids.noise(9, 128)), torch.from_numpy(grids.noise(40, 128))
    codes, scales, _ = torch.ops.pyfmt.quantize(w, "mxfp4")
    expanded = _torch_dense.expand_weight(codes, scales, "mxfp4", 128, "fold") if kept else None
    bias = torch.linspace(-1, 1, 40)
    for x, rotation in ((a.bfloat16(), 32), (a, 0)):
        args = (x, codes, scales, None, "mxfp4", bias, "mxfp4", rotation)
        monkeypatch.setattr(paths, "PACKED", {})
        want = torch.ops.pyfmt.linear(*args, expanded=expanded, path="fold")
        monkeypatch.setattr(paths, "PACKED", {"fold-4": (9, 9, 9), "fold-4 kept": (9, 9, 9)})
        got = torch.ops.pyfmt.linear(*args, expanded=expanded, path="fold")
        assert torch.equal(got, want)
        monkeypatch.setattr(paths, "PACKED", {"fold-4": (8, 8, 8), "fold-4 kept": (8, 8, 8)})
        assert torch.equal(torch.ops.pyfmt.linear(*args, expanded=expanded, path="fold"), want)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("path", ["fold", "exact", "portable"])
def test_weights_in_panels_and_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, w = torch.from_numpy(grids.noise(9, 128)), torch.from_numpy(grids.noise(300, 128))
    codes, scales, _ = torch.ops.pyfmt.quantize(w, "mxfp4")
    options = {"activation": "mxfp4", "rotation": 32}
    args = (a.bfloat16(), codes, scales, None, "mxfp4", torch.linspace(-1, 1, 300))
    want = torch.ops.pyfmt.linear(*args, **options, path=path)
    monkeypatch.setattr(_torch_operands, "PANEL_BYTES", 128 * 128)
    monkeypatch.setattr(_torch_matmul, "PANEL_ELEMENTS", 128 * 128)
    assert torch.equal(torch.ops.pyfmt.linear(*args, **options, path=path), want)
    if path != "portable":
        kept = _torch_dense.expand_weight(codes, scales, "mxfp4", 128, path)
        y = torch.ops.pyfmt.linear(*args, **options, expanded=kept, path=path)
        assert torch.equal(y, want)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("path", ["fold", "exact", "portable"])
@pytest.mark.parametrize("activation", ["mxfp4", "nvfp4", None])
def test_linear_is_matmul_of_quantized_rows(path: str, activation: str | None) -> None:
    if path == "fold" and activation != "mxfp4":
        pytest.skip("does not fold")
    for dtype in (torch.bfloat16, torch.float32):
        if path == "exact" and activation is None and dtype == torch.float32:
            continue
        x = torch.from_numpy(grids.noise(6, 96)).view(2, 3, 96).to(dtype)
        codes, scales, stored = torch.ops.pyfmt.quantize(
            torch.from_numpy(grids.noise(17, 96, seed=5)), "mxfp4"
        )
        signs = torch.where(torch.arange(96) % 5 == 0, -1, 1)
        rotation = {"rotation": 32, "signs": signs}
        y = torch.ops.pyfmt.linear(
            x, codes, scales, stored, "mxfp4", None, activation, **rotation, path=path
        )
        if activation is None:
            left = [torch.ops.pyfmt.hadamard(x, 32, signs), None, None, None]
        else:
            left = [*torch.ops.pyfmt.quantize(x, activation, **rotation), activation]
        want = torch.ops.pyfmt.matmul(
            *left, codes, scales, stored, "mxfp4", 96, dtype=dtype, path=path
        )
        assert y.shape == (2, 3, 17) and torch.equal(y, want)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("activation", [None, "mxfp4", "mxint8"])
def test_batch_invariant_rows_do_not_see_each_other(activation: str | None) -> None:
    x = torch.from_numpy(grids.noise(300, 128)).bfloat16()
    codes, scales, stored = torch.ops.pyfmt.quantize(
        torch.from_numpy(grids.noise(40, 128, seed=5)), "nvfp4"
    )
    args = (codes, scales, stored, "nvfp4", None, activation)
    whole = torch.ops.pyfmt.linear(x, *args, batch_invariant=True)
    for first, last in ((0, 1), (17, 50), (299, 300), (0, 0)):
        part = torch.ops.pyfmt.linear(x[first:last], *args, batch_invariant=True)
        assert torch.equal(part, whole[first:last])
    with pytest.raises(RuntimeError, match="single_level"):
        torch.ops.pyfmt.linear(x, *args[:5], "nvfp4", batch_invariant=True)


# ---- the choice -------------------------------------------------------------------------------

FULL = paths.Machine((9, 0))


def call(a: str | None, w: str, m: int, **rest: Any) -> paths.Call:
    left = None if a is None else get_format(a)
    return paths.Call(left, "bfloat16", get_format(w), m, 4096, 4096, **rest)


def test_which_formats_fold_and_which_are_exact_in_bf16() -> None:
    assert [f for f in FORMATS if paths.folds(FORMATS[f])] == [
        "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint4",
    ]  # fmt: skip
    assert [f for f in FORMATS if not paths.exact_in_bf16(FORMATS[f])] == ["int4", "int8"]


@pytest.mark.parametrize("name", [*FORMATS, "e4m3-b32-e4m3", "int6-b32-e4m3", "int8-b32-e8m0"])
def test_exact_in_bf16_is_what_it_says(name: str) -> None:
    fmt = get_format(name)
    element = reference.decode(np.arange(2**fmt.bits, dtype=np.uint8), fmt.element)
    scales = {
        "e4m3": reference.decode(np.arange(256, dtype=np.uint8), get_format("mxfp8_e4m3").element)
    }
    scale = scales.get(fmt.scale, np.array([1.0]) if fmt.scale == "e8m0" else np.array([1 + 2**-7]))
    values = np.outer(element[np.isfinite(element)], scale[np.isfinite(scale)]).astype(np.float32)
    exact = bool((values.astype(BF16).astype(np.float32) == values).all())
    assert paths.exact_in_bf16(fmt) == exact


def test_the_table_chooses_by_rows_and_says_why() -> None:
    assert paths.choose(call(None, "mxfp4", 1), FULL) == "skinny"
    assert paths.choose(call(None, "mxfp4", 128), FULL) == "wide"
    assert paths.choose(call(None, "mxfp4", 8192), FULL) == "exact"
    both = get_format("mxfp4")
    for m, want in ((100, "fold"), (8192, "fold")):
        assert paths.choose(paths.Call(both, "bfloat16", both, m, 8192, 8192), FULL) == want
    assert paths.choose(call("mxfp4", "mxfp4", 128, kept="fold"), FULL) == "fold"
    assert paths.choose(call("mxfp4", "mxfp4", 8192), paths.Machine((10, 0))) == "native"
    assert paths.choose(call("mxfp4", "mxfp4", 8192), paths.Machine((8, 0))) == "exact"
    assert paths.choose(call("mxfp4", "mxfp4", 8192), paths.Machine((7, 5), False)) == "portable"
    assert paths.choose(call(None, "int4", 1), HOPPER) == "portable"
    assert paths.choose(call("mxfp4", "mxfp4", 8192, batch_invariant=True), FULL) == "skinny"
    why = paths.explain(call("mxint8", "mxfp4", 8192), FULL)
    assert why["exact"] == "chosen: table row 'bf16-4', any number of rows, 8192 here"
    assert why["skinny"] == "it takes up to 64 rows of a, got 8192"
    assert why["fold"].startswith("an operand does not fold") and why["portable"] == "able"
    assert paths.explain(call(None, "int4", 9), HOPPER)["exact"] == "int4 is not exact in bfloat16"


@pytest.mark.usefixtures("hopper")
def test_a_path_by_name_never_falls_back() -> None:
    codes, scales, _ = torch.ops.pyfmt.quantize(torch.randn(4, 64), "mxint8")
    x = torch.randn(3, 64)
    for options, words in (
        ({"path": "fold"}, "does not fold"),
        ({"path": "skinny"}, "no such kernel"),
        ({"path": "quick"}, "path: unknown 'quick'"),
        ({"precision": "half"}, "precision: unknown 'half'"),
        ({"path": "fold", "batch_invariant": True}, "how many rows"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.pyfmt.linear(x, codes, scales, None, "mxint8", **options)


def test_cpu_tensors_have_the_packed_and_the_portable_path() -> None:
    codes, scales, _ = torch.ops.pyfmt.quantize(torch.randn(4, 64), "mxfp4")
    x = torch.randint(-9, 10, (3, 64)).float()  # all sums are exact, in whatever order
    want = torch.ops.pyfmt.linear(x, codes, scales, None, "mxfp4")
    for path in ("packed", "portable"):
        got = torch.ops.pyfmt.linear(x, codes, scales, None, "mxfp4", path=path)
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="packed and the portable path"):
        torch.ops.pyfmt.linear(x, codes, scales, None, "mxfp4", path="exact")
    with pytest.raises(RuntimeError, match="how many rows"):
        torch.ops.pyfmt.linear(x, codes, scales, None, "mxfp4", path="packed", batch_invariant=True)


def test_the_cpu_says_which_kernels_serve() -> None:
    for x in (torch.randn(4, 64), np.ones((4, 64), np.float32)):
        q = pyfmt.quantize(x, "mxfp4")
        found = pyfmt.backends.explain_matmul(x, q)
        best = pyfmt.backends.cpu.matmul_levels(torch.ops.pyfmt)[1][-1]
        assert found["packed"].startswith(f"chosen: kernels for {best} of baseline")
        assert "none for AMX" in found["packed"] and found["portable"] == "able"
        found = pyfmt.backends.explain_matmul(x, q, batch_invariant=True)
        assert found["portable"].startswith("chosen") and "how many rows" in found["packed"]


# ---- the public functions ---------------------------------------------------------------------


def test_paths_belong_to_the_cuda_room() -> None:
    q = pyfmt.quantize(np.ones((4, 32), np.float32), "mxfp4")
    for options in ({"path": "exact"}, {"precision": "fast"}, {"batch_invariant": True}):
        with pytest.raises(ValueError, match="belong to the cuda room"):
            pyfmt.matmul(q, q, **options)
    with pytest.raises(ValueError, match="path: unknown"):
        pyfmt.matmul(q, q, path="exakt")
    with pytest.raises(ValueError, match="precision: unknown"):
        pyfmt.matmul(q, q, precision="quick")


def linear_layer() -> torch.nn.Linear:
    return torch.nn.Linear(64, 48)


def test_layers_say_what_they_keep_and_how() -> None:
    from pyfmt.nn import QuantLinear

    kept = QuantLinear.from_linear(linear_layer(), "mxfp4", "mxfp4", expanded="keep")
    assert kept.keeps == "fold" and kept.expanded_weight is None  # on a GPU alone
    assert not [name for name in kept.state_dict() if "expanded" in name]
    assert QuantLinear.from_linear(linear_layer(), "mxint8", expanded="keep").keeps == "exact"
    with pytest.raises(ValueError, match="int4 is not exact in bfloat16"):
        QuantLinear.from_linear(linear_layer(), "int4", expanded="keep")
    with pytest.raises(ValueError, match="expected None or 'keep'"):
        QuantLinear.from_linear(linear_layer(), "mxfp4", expanded="yes")
    with pytest.raises(ValueError, match="path: unknown"):
        QuantLinear.from_linear(linear_layer(), "mxfp4", path="none")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("weight", "kind"), [("mxfp6_e2m3", "fold"), ("mxint8", "exact")])
def test_a_layer_with_an_expanded_weight_gives_the_same(weight: str, kind: str) -> None:
    from pyfmt.nn import QuantLinear
    from pyfmt.nn_linear import KEPT

    layer = QuantLinear.from_linear(linear_layer(), weight, weight, rotation=32, path=kind)
    x = torch.from_numpy(grids.noise(5, 64)).bfloat16()
    with torch.no_grad():
        want = layer(x)
        parts = _torch_dense.expand_weight(
            layer.weight_codes, layer.weight_scales, weight, 64, kind
        )
        for name, part in zip(KEPT, parts, strict=False):
            setattr(layer, name, part)
        assert torch.equal(layer(x), want)
    assert "expanded_weight" not in layer.state_dict()
    layer.to(torch.float64)  # codes stay, what is expanded is made anew on a GPU alone
    assert layer.expanded_weight is None and layer.weight_codes.dtype == torch.uint8
