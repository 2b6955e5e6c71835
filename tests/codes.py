# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernel for few rows of codes by codes, for the emulated and the device tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import pyfmt.ops  # noqa: F401
from pyfmt import reference
from pyfmt.formats import get_format
from tests.rooms import to_torch
from tests.skinny import decoded, mismatch, random_codes
from tests.skinny import worst_error as worst_error_of

# |error| <= C * sum |x| |w|: a block is exact, and a result is a sum of at most 32 of them in a
# warp and of 16 warps (twice as many, of blocks of 16), each rounded once.
C = 2.0**-18


OPS: Any = torch.ops.pyfmt


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
        recipe: str | None = None,
        clip: str = "symmetric",
        rotation: int = 0,
        signs: Any = None,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        plan: list[int] | None = None,
        tensor_scales: tuple[Any, Any] = (None, None),
    ) -> torch.Tensor:
        """left: (codes, scales, name), or (x, name) with x still to be rounded."""
        x = self.there(left[0]) if len(left) == 2 else None
        codes, scales = (None, None) if len(left) == 2 else map(self.there, left[:2])
        signs = None if signs is None else signs.to(self.device)
        bias = None if bias is None else bias.to(self.device)
        whole = [
            t if t is None else torch.as_tensor(t, dtype=torch.float32).to(self.device)
            for t in tensor_scales
        ]
        y: torch.Tensor = self.ops._matmul_codes(
            x, codes, scales, whole[0], left[-1], rule, recipe, clip, rotation, signs,
            self.there(right[0]), self.there(right[1]), whole[1], right[2], bias, dtype, plan,
        )  # fmt: skip
        return y


# E4M3 scales of two significant bits, with which sums are exact: 0.5 to 3.
FEW_BITS = np.array([0x30, 0x34, 0x38, 0x3C, 0x40, 0x44], np.uint8)


def operand(name: str, rows: int, k: int, seed: int, low: int = 124, high: int = 131) -> Any:
    """Codes of every value, scales from 2^(low - 127) to below 2^(high - 127).

    E4M3 scales: FEW_BITS, or of every value where a range is given.
    """
    fmt = get_format(name)
    rng, shape = np.random.default_rng(seed), (rows, fmt.blocks(k))
    if fmt.scale == "e8m0":
        scales = rng.integers(low, high, shape, np.uint8)
    elif (low, high) == (124, 131):
        scales = rng.choice(FEW_BITS, shape)
    else:
        scales = rng.integers(0, 0x7F, shape, np.uint8)
    return random_codes(fmt, rows, k, seed), scales, name


def value(part: Any, k: int) -> np.ndarray:
    """Decoded in float64, which holds what float32 does not."""
    codes, scales, name = part
    if get_format(name).scale == "e4m3":
        return decoded(codes, scales, None, get_format(name), (codes.shape[0], k))
    plain = np.full_like(scales, 127)
    elements = decoded(codes, plain, None, get_format(name), (codes.shape[0], k))
    return elements * (2.0 ** (scales.astype(np.float64) - 127)).repeat(32, 1)


def exact_sums(op: Codes, names: tuple[str, str], m: int, n: int, k: int, **given: Any) -> None:
    """Scales within a few octaves: every partial sum is exact, so every bit is known."""
    left, right = operand(names[0], m, k, 3), operand(names[1], n, k, 4)
    more = 1.0
    if get_format(names[0]).tensor_scale:
        given["tensor_scales"], more = (0.5, 4.0), 2.0
    bias = torch.from_numpy(np.random.default_rng(7).integers(-64, 65, n).astype(np.float32))
    got = op(left, right, bias=bias, **given).double().cpu().numpy()
    want = value(left, k) @ value(right, k).T * more + bias.double().numpy()
    same = got == want
    assert same.all(), mismatch(f"{names} {m}x{n}x{k} {given}", got, want.T, 0, same)


def extreme_sums(op: Codes, names: tuple[str, str]) -> None:
    """Blocks of the largest codes, of one sign and of both; extreme scales; NaN."""
    m, n, k = 3, 32, 256
    small = get_format(names[0]).scale == "e4m3"  # blocks of 16
    one, block = (0x38, 16) if small else (127, 32)
    for signs in (0, 1, 2):
        parts = []
        for name, rows, seed in ((names[0], m, 1), (names[1], n, 2)):
            most, sign = (7, 8) if name in ("mxfp4", "nvfp4") else (8, 15)
            codes = np.full((rows, k), most, np.uint8)
            turn = np.random.default_rng(seed).integers(0, 2, (rows, k)) * (signs == 2)
            codes ^= np.where(turn + (signs == 1), sign, 0).astype(np.uint8)
            packed = np.asarray(reference.pack(codes, 4))
            parts.append((packed, np.full((rows, k // block), one, np.uint8), name))
        got = op(*parts).double().cpu().numpy()
        assert np.array_equal(got, value(parts[0], k) @ value(parts[1], k).T), f"{names}, {signs}"
    left, right = operand(names[0], m, k, 5, 127, 128), operand(names[1], n, k, 6, 127, 128)
    pairs = ((0, 254), (254, 0), (40, 214), (200, 60), (127, 100), (30, 127))
    if small:  # nothing, the smallest, subnormal, 1.875, the largest
        pairs = ((0, 0x7E), (1, 1), (7, 0x3F), (0x7E, 0x7E), (0x3F, 3), (0x7E, 1))
    for x_scale, w_scale in pairs:
        left[1][:], right[1][:] = x_scale, w_scale
        got = op(left, right).double().cpu().numpy()
        if w_scale or small:
            assert np.array_equal(got, value(left, k) @ value(right, k).T), (x_scale, w_scale)
        else:
            # Of weights times 2^-127 a float32 product keeps all but the last bits.
            a, b = value(left, k), value(right, k)
            assert (np.abs(got - a @ b.T) <= 2.0**-9 * (np.abs(a) @ np.abs(b.T))).all()
    left[1][:], right[1][:] = one, one
    left[1][1, 3], right[1][7, 5] = (0x7F, 0x7F) if small else (255, 255)
    got = op(left, right).cpu().numpy()
    want = np.zeros((m, n), bool)
    want[1], want[:, 7] = True, True
    assert np.array_equal(np.isnan(got), want), f"{names}: NaN scales"


# What x is rounded by: scale rule, recipe, clip.
_BY = ((None, None, "symmetric"), ("floor", None, "full"))
_BY_TWO_LEVELS = (
    (None, None, "symmetric"), (None, "nvidia", "full"), (None, "torchao", "symmetric"),
    (None, "single_level", "full"),
)  # fmt: skip


def rounds_like_quantize(op: Codes, name: str, quantize: Any) -> None:
    """x that the op rounds itself: the bits of codes that quantize makes of it."""
    two = get_format(name).tensor_scale
    spread = 6 if two else 60
    rng = np.random.default_rng(8)
    for m, k, rotation, signed in (
        (1, 256, 0, 0), (3, 256, 2, 2), (9, 512, 8, 0), (2, 256, 16, 256), (11, 256, 32, 32),
        (5, 768, 32, 0), (2, 512, 64, 64), (1, 512, 128, 512), (3, 256, 256, 0),
    ):  # fmt: skip
        m = min(m, 4) if two else m
        by_block = rng.integers(-spread, spread, (m, k // 32)).repeat(32, 1)
        values = rng.standard_normal((m, k)) * 2.0**by_block
        values[0, :32] = 0
        if two:
            values *= (1.0, 0.0, 1e30, 1e-36)[rotation // 2 % 4]
        if m > 2:
            values[2, 40], values[2, 70] = np.nan, np.inf
        x = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)
        signs = None
        if signed:
            signs = torch.from_numpy(rng.choice([-1.0, 1.0], signed).astype(np.float32))
        right = operand("nvfp4" if two else "mxfp4", 32, k, 9)
        for rule, recipe, clip in _BY_TWO_LEVELS if two else _BY:
            *left, scale = quantize(x.to(op.device), name, rule, recipe, clip, rotation, signs)
            want = op((*left, name), right, tensor_scales=(scale, None))
            got = op(
                (x, name), right, rule=rule, recipe=recipe, clip=clip, rotation=rotation,
                signs=signs,
            )  # fmt: skip
            same = torch.equal(got.view(torch.int32), want.view(torch.int32))
            assert same, f"{name} {m}x{k}, rotation {rotation}, {rule}, {recipe}"


def rounded_like_two_calls(op: Codes, name: str) -> None:
    """_matmul_rounded: the bits of _round_values and _matmul_skinny."""
    rng = np.random.default_rng(14)
    for m, n, k, rotation in ((1, 32, 256, 0), (8, 64, 768, 32), (5, 24, 512, 128), (7, 16, 96, 2)):
        x = rng.standard_normal((m, k)).astype(np.float32)
        x[0, 3] = 100.0
        if m > 5:
            x[2, 40], x[2, 70] = np.nan, np.inf
        there = torch.from_numpy(x).to(torch.bfloat16).to(op.device)
        codes, scales, w_name = operand("nvfp4", n, k, 15)
        weight = [op.there(codes), op.there(scales)]
        factor, bias = torch.tensor(3.0).to(op.device), torch.arange(n).float().to(op.device)
        for recipe, clip in ((None, "symmetric"), ("torchao", "full"), ("single_level", "full")):
            y, scale = op.ops._round_values(there, name, None, recipe, clip, rotation, None, factor)
            want = op.ops._matmul_skinny(y, *weight, scale, w_name, k, bias, torch.float32)
            how = (there, name, recipe, clip, rotation, None)
            for _ in range(2):
                got = op.ops._matmul_rounded(*how, *weight, factor, w_name, bias, torch.float32)
                same = torch.equal(got.view(torch.int32), want.view(torch.int32))
                assert same, f"{name} {m}x{n}x{k}, rotation {rotation}, {recipe}"


def replays_see_new_values(name: str, m: int) -> None:
    """A graph whose x changes between replays: nothing that its blocks left is taken for new."""
    n, k = 2112, 2048
    weight = OPS.quantize(torch.randn(n, k, device="cuda"), name)
    x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda")
    given = [torch.randn(m, k, device="cuda").bfloat16() * 4.0**-i for i in range(6)]

    def call() -> torch.Tensor:
        return OPS.linear(x, *weight, name, None, name, 32, path="skinny")

    x.copy_(given[0])
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parts = [call() for _ in range(3)]
    for _ in range(20):
        for one in given:
            x.copy_(one)
            graph.replay()
            want = call()
            assert all(torch.equal(part, want) for part in parts), f"{name}, {m} rows"


def within_bound(op: Codes, names: tuple[str, str], m: int, n: int, k: int) -> None:
    left, right = operand(names[0], m, k, 10, 100, 140), operand(names[1], n, k, 11, 100, 140)
    y = op(left, right)
    x = torch.from_numpy(value(left, k))
    error = worst_error_of(y, x, value(right, k))
    assert error <= C, f"{names} {m}x{n}x{k}: {error:.3g} of sum |x||w|, allowed {C:.3g}"
    for _ in range(3):
        assert torch.equal(y, op(left, right)), "two runs differ"


def same_for_any_rows(op: Codes, name: str, n: int, k: int, sizes: tuple[int, ...]) -> None:
    """Up to 8192 columns a row's bits do not depend on how many there are, sizes[-1] at most."""
    codes, scales, name = operand(name, sizes[-1], k, 12, 100, 140)
    right = operand(name, n, k, 13, 100, 140)
    whole = op((codes, scales, name), right)
    for m in sizes:
        got = op((codes[:m], scales[:m], name), right)
        assert torch.equal(got, whole[:m]), f"{m} rows differ"
