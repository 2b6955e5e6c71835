# SPDX-License-Identifier: Apache-2.0
"""What the dense GEMM paths do around the library's products, by their kernels on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pyfmt import reference
from pyfmt.formats import get_format
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
