# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernel for few tokens, shared by the emulated and the device tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyfmt import reference
from pyfmt.formats import Format, get_format
from tests.rooms import to_numpy, to_torch

# |error| <= C * sum |x| |w| + half a step of the output: 2^-23 a tensor-core step, of which a
# result adds one for sixteen elements of k, truncated and not rounded.
C = 2.0**-16


class Skinny:
    """The op on one device, its operands in NumPy."""

    def __init__(self, ops: Any, device: str) -> None:
        self.ops, self.device = ops, device

    def tensor(self, x: np.ndarray) -> torch.Tensor:
        return to_torch(x).to(self.device)

    def __call__(
        self,
        x: torch.Tensor,
        *weight: Any,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        plan: list[int] | None = None,
        invariant: bool = False,
    ) -> torch.Tensor:
        codes, scales, tensor_scale, fmt = weight

        def there(t: Any) -> torch.Tensor:
            return t if isinstance(t, torch.Tensor) else self.tensor(t)

        one = None if tensor_scale is None else self.tensor(np.array(tensor_scale, np.float32))
        bias = None if bias is None else bias.to(self.device)
        return self.ops._matmul_skinny(
            x.to(self.device), there(codes), there(scales), one, fmt.key, x.shape[1], bias, dtype,
            invariant, plan,
        )  # fmt: skip


def random_codes(fmt: Format, n: int, k: int, seed: int) -> np.ndarray:
    """Codes of every value, infinities and NaN among them but in the first half of the rows.

    What pads a row is zeros.
    """
    codes = np.random.default_rng(seed).integers(0, 1 << fmt.bits, (n, fmt.padded(k)), np.uint8)
    if fmt.element.special != "none":
        usual = codes[: n // 2]
        usual[(usual & 0x7F) > (0x7E if fmt.element.special == "fn" else 0x7B)] = 0x55
    codes[:, k:] = 0
    return np.asarray(reference.pack(codes, fmt.bits))


def weights(fmt: Format, n: int, k: int, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """A quantized Gaussian weight, and its decoded values in float64."""
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    codes, scales, tensor_scale = reference.quantize(w, fmt)
    return codes, scales, tensor_scale, decoded(codes, scales, tensor_scale, fmt, (n, k))


def decoded(codes: Any, scales: Any, tensor_scale: Any, fmt: Format, shape: Any) -> np.ndarray:
    plain = reference.dequantize(codes, scales, None, fmt, shape, dtype=np.dtype(np.float32))
    whole = np.asarray(plain).astype(np.float64)
    return whole if tensor_scale is None else whole * np.float64(tensor_scale)


def tokens(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    x = np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)
    return torch.from_numpy(x).to(dtype)


def worst_error(y: torch.Tensor, x: torch.Tensor, w: np.ndarray) -> float:
    """The largest |y - x w^T| over sum |x| |w|, less half a step of y's dtype."""
    a = x.double().cpu().numpy()
    exact, size = a @ w.T, np.abs(a) @ np.abs(w.T)
    half = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[y.dtype]
    error = np.abs(y.double().cpu().numpy() - exact) - half * np.abs(exact) - 1e-40
    return float((error / np.maximum(size, 1e-300)).max(initial=0.0))


def within_bound(op: Skinny, name: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    fmt = get_format(name)
    *parts, w = weights(fmt, n, k)
    x = tokens(m, k, dtype)
    y = op(x, *parts, fmt)
    assert y.shape == (m, n) and y.dtype == torch.float32
    error = worst_error(y, x, w)
    assert error <= C, f"{name} {m}x{n}x{k} {dtype}: {error:.3g} of sum |x||w|, allowed {C:.3g}"


def decodes_like_the_reference(
    op: Skinny, name: str, n: int, k: int, device_dtype: Any, among: Any = None, at_once: int = 64,
    plan: list[int] | None = None,
) -> None:  # fmt: skip
    """One-hot tokens read the weight back: every code, every kind of scale, bit for bit.

    among: E8M0 bytes that scales are drawn from; at_once: tokens of a call.
    """
    fmt = get_format(name)
    codes = random_codes(fmt, n, k, 3)
    rng = np.random.default_rng(5)
    shape = (n, fmt.blocks(k))
    scales: np.ndarray
    if among is not None:
        scales = rng.choice(np.array(among, np.uint8), shape)
    elif fmt.scale == "e8m0":
        # fp8 elements at the smallest scales reach below the smallest bfloat16.
        scales = rng.integers(10, 256, shape, np.uint8)
        scales[::3] = rng.integers(118, 130, scales[::3].shape, np.uint8)
    elif fmt.scale == "e4m3":
        scales = rng.integers(0, 128, shape, np.uint8)
    else:
        import ml_dtypes

        kind = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}[fmt.scale]
        scales = rng.standard_normal(shape).astype(np.float32).astype(kind)
    tensor_scale = 0.25 if fmt.tensor_scale else None
    with np.errstate(over="ignore", invalid="ignore"):
        want = decoded(codes, scales, tensor_scale, fmt, (n, k)).astype(np.float32)
    for first in range(0, k, at_once):
        count = min(at_once, k - first)
        x = torch.zeros(count, k, dtype=device_dtype)
        x[torch.arange(count), first + torch.arange(count)] = 1.0
        got = to_numpy(op(x, codes, scales, tensor_scale, fmt, plan=plan).cpu())
        with np.errstate(invalid="ignore"):
            # An infinity or NaN anywhere in a row meets the zeros of x.
            rest = np.where(np.isfinite(want), 0, np.nan)
            spoilt = np.isnan(np.nansum(rest * 0, axis=1) + rest.sum(axis=1))
        same = (got == want[:, first : first + count].T) | spoilt[None, :]
        assert same.all(), mismatch(name, got, want, first, same)
        assert np.isnan(got[:, spoilt]).sum() >= np.isnan(want[spoilt]).any(1).sum() * count
        if spoilt.any():
            nans = np.isnan(want).any(axis=1)
            assert np.isnan(got[:, nans]).all(), f"{name}: a NaN weight must spoil its row"


def mismatch(name: str, got: np.ndarray, want: np.ndarray, first: int, same: np.ndarray) -> str:
    token, row = np.argwhere(~same)[0]
    return (
        f"{name}: {(~same).sum()} differ; first at row {row}, element {first + token}: "
        f"got {got[token, row]!r}, expected {want[row, first + token]!r}"
    )


def exact_integers(op: Skinny, name: str, m: int, n: int, k: int, **given: Any) -> None:
    """Small integers: every partial sum is exact, so every bit is known."""
    fmt = get_format(name)
    rng = np.random.default_rng(7)
    *parts, w = weights(fmt, n, k, 11)
    if fmt.tensor_scale:
        codes, scales, _ = parts
        scales = rng.choice(np.array([0x30, 0x38, 0x40], np.uint8), scales.shape)  # 0.5, 1, 2
        parts = [codes, scales, 2.0]
        w = decoded(codes, scales, 2.0, fmt, (n, k))
    elif fmt.scale == "e8m0":
        parts[1] = (rng.integers(125, 129, parts[1].shape)).astype(np.uint8)
        w = decoded(parts[0], parts[1], parts[2], fmt, (n, k))
    else:
        parts[1] = (2.0 ** rng.integers(-1, 3, parts[1].shape)).astype(parts[1].dtype)
        w = decoded(parts[0], parts[1], parts[2], fmt, (n, k))
    x = torch.from_numpy(rng.integers(-2, 3, (m, k)).astype(np.float32)).to(torch.bfloat16)
    bias = torch.from_numpy(rng.integers(-64, 65, n).astype(np.float32))
    got = op(x, *parts, fmt, bias=bias, **given).double().cpu().numpy()
    want = x.double().numpy() @ w.T + bias.double().numpy()
    same = got == want
    assert same.all(), mismatch(f"{name} {m}x{n}x{k} {given}", got, want.T, 0, same)


def splits_exactly(op: Skinny, dtype: torch.dtype) -> None:
    """fp16 and fp32 activations lose no bit: one weight of 1 at a time."""
    fmt = get_format("mxint8")
    k = 64
    codes = np.zeros((k, k), np.uint8)
    np.fill_diagonal(codes, 64)
    scales = np.full((k, 2), 127, np.uint8)
    bits = torch.from_numpy(
        np.random.default_rng(3).integers(0, 2**32, (9, k), np.uint32).view(np.int32)
    )
    x = bits.view(torch.float32) if dtype == torch.float32 else bits.view(dtype)[:, :k].contiguous()
    x = torch.where(
        torch.isfinite(x.float()) & (x.float().abs() > 2.0**-100), x, torch.ones_like(x)
    )
    got = op(x, codes, scales, None, fmt).cpu()
    assert torch.equal(got, x.float()), "a split activation lost bits"


def non_finite_activations(op: Skinny, dtype: torch.dtype) -> None:
    fmt = get_format("mxfp4")
    *parts, w = weights(fmt, 40, 128)
    x = tokens(5, 128, dtype)
    x[1, 3], x[2, 70], x[3, 4], x[3, 9] = np.nan, np.inf, np.inf, -np.inf
    got = op(x, *parts, fmt).double().cpu().numpy()
    with np.errstate(invalid="ignore"):
        want = x.double().numpy() @ w.T
        if dtype != torch.bfloat16:
            want[2] = np.where(w[:, 70] == 0, np.nan, np.sign(w[:, 70]) * np.inf)
    assert np.isnan(got[1]).all() and np.isfinite(got[[0, 4]]).all()
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert np.array_equal(got[2][~np.isnan(got[2])], want[2][~np.isnan(want[2])])


def same_in_every_batch(op: Skinny, name: str, n: int, k: int, sizes: tuple[int, ...]) -> None:
    """A token's bits do not depend on how many others there are."""
    fmt = get_format(name)
    *parts, _ = weights(fmt, n, k)
    x = tokens(max(sizes), k, torch.bfloat16)
    whole = op(x, *parts, fmt, invariant=True)
    assert torch.equal(whole, op(x, *parts, fmt, invariant=True)), "two runs differ"
    for m in sizes:
        got = op(x[:m], *parts, fmt, invariant=True)
        assert torch.equal(got, whole[:m]), f"{name}: batch of {m} differs"


def same_by_few_blocks(op: Skinny, name: str, n: int, k: int, sizes: tuple[int, ...]) -> None:
    """Blocks with many rows, which another kernel may serve, give the same bits."""
    fmt = get_format(name)
    *parts, _ = weights(fmt, n, k)
    x = tokens(max(sizes), k, torch.bfloat16)
    whole = op(x, *parts, fmt, plan=[1 << 20, 0, -1])
    for m in sizes:
        for blocks in (1, 2):
            got = op(x[:m], *parts, fmt, plan=[blocks, 0, -1])
            assert torch.equal(got, whole[:m]), f"{name}: {m} tokens by {blocks} blocks differ"


def activations_in_registers(op: Skinny, name: str) -> None:
    """Shapes that the kernel of matmul_skinny_still.cuh serves: parts of k, rounds, two blocks."""
    fmt = get_format(name)
    for m, n, k, plan in (
        (1, 128, 256, [0, 1, 0]),
        (8, 208, 1536, [1, 1, 0]),
        (6, 128, 768, [3, 0, 1]),
        (3, 272, 2816, [2, 1, 2]),
        (7, 256, 7168, [4, 1, 2]),
        (4, 160, 4352, [2, 1, 2]),
        (5, 128, 8448, [2, 1, 0]),
        # Six, ten and fourteen parts of a block: the last two are two warps' each where codes have
        # four bits. Odd and even numbers of tiles, one, and fewer warps that add up than tokens.
        (1, 80, 7168, [2, 1, 0]),
        (8, 80, 2816, [1, 1, 0]),
        (3, 16, 5120, [1, 1, 1]),
        (4, 48, 10240, [2, 0, 2]),
        (1, 80, 14336, [2, 1, 0]),
    ):
        if fmt.element.special != "none":  # whose sums do not stay exact
            *parts, w = weights(fmt, n, k)
            x = tokens(m, k, torch.bfloat16)
            error = worst_error(op(x, *parts, fmt, plan=plan), x, w)
            assert error <= C, f"{name}: {m} tokens, {k} columns, {plan}"
        else:
            exact_integers(op, name, m, n, k, plan=plan)
    *parts, w = weights(fmt, 176, 1280)
    for m, plan in ((6, [1, 1, 0]), (2, [2, 1, 2]), (5, [2, 1, 1]), (3, [2, 0, 2])):
        x = tokens(m, 1280, torch.bfloat16)
        first = op(x, *parts, fmt, plan=plan)
        assert worst_error(first, x, w) <= C, f"{name}: {m} tokens, {plan}"
        for _ in range(3):
            assert torch.equal(first, op(x, *parts, fmt, plan=plan)), f"{name}: two runs differ"
