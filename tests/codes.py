# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernel for few rows of codes by codes, for the emulated and the device tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyfmt import reference
from pyfmt.formats import get_format
from tests.rooms import to_torch
from tests.skinny import decoded, mismatch, random_codes
from tests.skinny import worst_error as worst_error_of

# |error| <= C * sum |x| |w|: a block of 32 is exact, and a result is a sum of at most 32 of them in
# a warp and of 16 warps, each rounded once.
C = 2.0**-18


class Codes:
    """The op on one device, its operands in NumPy."""

    def __init__(self, ops: Any, device: str) -> None:
        self.ops, self.device = ops, device

    def there(self, t: Any) -> torch.Tensor:
        return (t if isinstance(t, torch.Tensor) else to_torch(t)).to(self.device)

    def __call__(
        self,
        left: Any,
        right: Any,
        *,
        rule: str | None = None,
        clip: str = "symmetric",
        rotation: int = 0,
        signs: Any = None,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        plan: list[int] | None = None,
    ) -> torch.Tensor:
        """left: (codes, scales, name), or (x, name) with x still to be rounded."""
        x = self.there(left[0]) if len(left) == 2 else None
        codes, scales = (None, None) if len(left) == 2 else map(self.there, left[:2])
        signs = None if signs is None else signs.to(self.device)
        bias = None if bias is None else bias.to(self.device)
        y: torch.Tensor = self.ops._matmul_codes(
            x, codes, scales, left[-1], rule, clip, rotation, signs, self.there(right[0]),
            self.there(right[1]), right[2], bias, dtype, plan,
        )  # fmt: skip
        return y


def operand(name: str, rows: int, k: int, seed: int, low: int = 124, high: int = 131) -> Any:
    """Codes of every value, scales from 2^(low - 127) to below 2^(high - 127)."""
    fmt = get_format(name)
    scales = np.random.default_rng(seed).integers(low, high, (rows, fmt.blocks(k)), np.uint8)
    return random_codes(fmt, rows, k, seed), scales, name


def value(part: Any, k: int) -> np.ndarray:
    """Decoded in float64, which holds what float32 does not."""
    codes, scales, name = part
    plain = np.full_like(scales, 127)
    elements = decoded(codes, plain, None, get_format(name), (codes.shape[0], k))
    return elements * (2.0 ** (scales.astype(np.float64) - 127)).repeat(32, 1)


def exact_sums(op: Codes, names: tuple[str, str], m: int, n: int, k: int, **given: Any) -> None:
    """Scales within a few octaves: every partial sum is exact, so every bit is known."""
    left, right = operand(names[0], m, k, 3), operand(names[1], n, k, 4)
    bias = torch.from_numpy(np.random.default_rng(7).integers(-64, 65, n).astype(np.float32))
    got = op(left, right, bias=bias, **given).double().cpu().numpy()
    want = value(left, k) @ value(right, k).T + bias.double().numpy()
    same = got == want
    assert same.all(), mismatch(f"{names} {m}x{n}x{k} {given}", got, want.T, 0, same)


def extreme_sums(op: Codes, names: tuple[str, str]) -> None:
    """Blocks of the largest codes, of one sign and of both; scales 2^-127 to 2^127; NaN."""
    m, n, k = 3, 32, 256
    for signs in (0, 1, 2):
        parts = []
        for name, rows, seed in ((names[0], m, 1), (names[1], n, 2)):
            most, sign = (7, 8) if name == "mxfp4" else (8, 15)
            codes = np.full((rows, k), most, np.uint8)
            turn = np.random.default_rng(seed).integers(0, 2, (rows, k)) * (signs == 2)
            codes ^= np.where(turn + (signs == 1), sign, 0).astype(np.uint8)
            packed = np.asarray(reference.pack(codes, 4))
            parts.append((packed, np.full((rows, k // 32), 127, np.uint8), name))
        got = op(*parts).double().cpu().numpy()
        assert np.array_equal(got, value(parts[0], k) @ value(parts[1], k).T), f"{names}, {signs}"
    left, right = operand(names[0], m, k, 5, 127, 128), operand(names[1], n, k, 6, 127, 128)
    for x_scale, w_scale in ((0, 254), (254, 0), (40, 214), (200, 60), (127, 100), (30, 127)):
        left[1][:], right[1][:] = x_scale, w_scale
        got = op(left, right).double().cpu().numpy()
        if w_scale:
            assert np.array_equal(got, value(left, k) @ value(right, k).T), (x_scale, w_scale)
        else:
            # Of weights times 2^-127 a float32 product keeps all but the last bits.
            a, b = value(left, k), value(right, k)
            assert (np.abs(got - a @ b.T) <= 2.0**-9 * (np.abs(a) @ np.abs(b.T))).all()
    left[1][:], right[1][:] = 127, 127
    left[1][1, 3], right[1][7, 5] = 255, 255
    got = op(left, right).cpu().numpy()
    want = np.zeros((m, n), bool)
    want[1], want[:, 7] = True, True
    assert np.array_equal(np.isnan(got), want), f"{names}: NaN scales"


def rounds_like_quantize(op: Codes, name: str, quantize: Any) -> None:
    """x that the op rounds itself: the bits of codes that quantize makes of it."""
    rng = np.random.default_rng(8)
    for m, k, rotation, signed in (
        (1, 256, 0, 0), (3, 256, 2, 2), (9, 512, 8, 0), (2, 256, 16, 256), (11, 256, 32, 32),
        (5, 768, 32, 0), (2, 512, 64, 64), (1, 512, 128, 512), (3, 256, 256, 0),
    ):  # fmt: skip
        x = rng.standard_normal((m, k)) * 2.0 ** rng.integers(-60, 60, (m, k // 32)).repeat(32, 1)
        x[0, :32] = 0
        if m > 2:
            x[2, 40], x[2, 70] = np.nan, np.inf
        x = torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)
        signs = None
        if signed:
            signs = torch.from_numpy(rng.choice([-1.0, 1.0], signed).astype(np.float32))
        right = operand("mxfp4", 32, k, 9)
        for rule, clip in ((None, "symmetric"), ("floor", "full")):
            left = quantize(x.to(op.device), name, rule, clip, rotation, signs)
            want = op((*left, name), right)
            got = op((x, name), right, rule=rule, clip=clip, rotation=rotation, signs=signs)
            same = torch.equal(got.view(torch.int32), want.view(torch.int32))
            assert same, f"{name} {m}x{k}, rotation {rotation}, {rule}"


def within_bound(op: Codes, names: tuple[str, str], m: int, n: int, k: int) -> None:
    left, right = operand(names[0], m, k, 10, 100, 140), operand(names[1], n, k, 11, 100, 140)
    y = op(left, right)
    x = torch.from_numpy(value(left, k))
    error = worst_error_of(y, x, value(right, k))
    assert error <= C, f"{names} {m}x{n}x{k}: {error:.3g} of sum |x||w|, allowed {C:.3g}"
    for _ in range(3):
        assert torch.equal(y, op(left, right)), "two runs differ"


def same_for_any_rows(op: Codes, n: int, k: int, sizes: tuple[int, ...]) -> None:
    """Up to 8192 columns a row's bits do not depend on how many there are."""
    codes, scales, name = operand("mxfp4", 16, k, 12, 100, 140)
    right = operand("mxfp4", n, k, 13, 100, 140)
    whole = op((codes, scales, name), right)
    for m in sizes:
        got = op((codes[:m], scales[:m], name), right)
        assert torch.equal(got, whole[:m]), f"{m} rows differ"
