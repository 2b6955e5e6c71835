# SPDX-License-Identifier: Apache-2.0
"""Activations rotated and quantized to exact bfloat16 values: on the CPU by the emulation, and on a
GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyfmt import _matmul_paths as paths  # noqa: E402
from pyfmt import _torch_dense as dense  # noqa: E402
from pyfmt import reference  # noqa: E402
from pyfmt._torch_operands import Left, Out, Parts, Right  # noqa: E402
from pyfmt.formats import FORMATS, get_format  # noqa: E402
from tests import grids  # noqa: E402
from tests.cuda_rooms import bits_of, emulated_and_on_device, emulated_ops  # noqa: E402
from tests.grids import BF16  # noqa: E402
from tests.rooms import to_numpy, to_torch  # noqa: E402

NAMES = [f for f in FORMATS if f not in ("int4", "int8")]
NAMES += ["e2m1-b64-e8m0", "int4q2-b16-e8m0", "e2m1-b256-e8m0", "e2m1-b512-e8m0", "int4-b128-e4m3"]


class Rounding:
    """_round_values and quantize of one device, by NumPy arrays."""

    def __init__(self, ops: Any, device: str) -> None:
        self.ops, self.device = ops, device

    def there(self, x: Any) -> Any:
        return None if x is None else to_torch(np.asarray(x)).to(self.device)

    def __call__(self, x: Any, name: str, factor: float | None = None, **given: Any) -> Any:
        """Values, and the tensor scale or None."""
        times = None if factor is None else torch.tensor(factor, device=self.device)
        y, stored = self.ops._round_values(
            self.there(x), name, given.get("scale_rule"), given.get("recipe"),
            given.get("clip", "symmetric"), given.get("rotation", 0),
            self.there(given.get("signs")), times,
        )  # fmt: skip
        return to_numpy(y.cpu()), stored.cpu().numpy() if stored.numel() else None


rounding = emulated_and_on_device(Rounding)


def same_as_reference(rounding: Rounding, x: np.ndarray, name: str, **given: Any) -> None:
    fmt = get_format(name)
    codes, scales, stored = reference.quantize(x, fmt, **given)
    with np.errstate(invalid="ignore"):
        want = reference.dequantize(codes, scales, None, fmt, x.shape, dtype=np.dtype(np.float32))
    for factor in (None, 3.0):
        got, scale = rounding(x, name, factor, **given)
        what = f"{name} {x.shape} {given}"
        mine = got.astype(np.float32)
        bad = np.argwhere((bits_of(mine) != bits_of(want)) & ~(np.isnan(mine) & np.isnan(want)))
        assert not len(bad), (
            f"{what}: {len(bad)} differ, first at {bad[0]}: {mine[tuple(bad[0])]!r}, expected "
            f"{want[tuple(bad[0])]!r}"
        )
        assert (scale is None) == (fmt.scale != "e4m3"), what
        if scale is not None:
            once = np.float32(1) if stored is None else np.float32(stored)
            assert scale == once * np.float32(factor or 1), what


def wild(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Numbers of many octaves; blocks of zeros, and some that hold no number."""
    rng = np.random.default_rng(seed)
    x = grids.noise(rows, columns, BF16, seed=seed).astype(np.float32)
    x *= np.exp2(rng.integers(-30, 30, (rows, columns // 32)).astype(np.float32)).repeat(32, 1)
    x[0, :32] = 0
    x[-1, -20:] = -0.0
    if rows > 2:
        x[2, 40], x[2, 70], x[1, columns - 1] = np.nan, np.inf, -np.inf
    return x.astype(BF16)


@pytest.mark.parametrize("name", NAMES)
def test_rotations(rounding: Rounding, name: str) -> None:
    """All lengths of a rotation, within a warp's numbers and beyond, by few rows and by many."""
    rng = np.random.default_rng(5)
    for rows, columns, rotation, signs in (
        (1, 512, 0, 0), (3, 512, 2, 0), (5, 512, 4, 512), (2, 512, 8, 0), (16, 512, 16, 16),
        (9, 1536, 32, 0), (12, 512, 32, 32), (3, 512, 64, 64), (3, 512, 128, 512),
        (4, 1536, 256, 0), (3, 1536, 512, 512), (2, 1024, 1024, 0), (3, 2048, 1024, 1024),
        (32, 512, 32, 0), (33, 512, 32, 32), (70, 1024, 1024, 0), (130, 1024, 32, 0),
    ):  # fmt: skip
        given: dict[str, Any] = {"rotation": rotation} if rotation else {}
        if signs:
            given["signs"] = rng.choice([-1.0, 1.0], signs).astype(np.float32)
        same_as_reference(rounding, wild(rows, columns, rotation), name, **given)


@pytest.mark.parametrize("name", NAMES)
def test_rules_recipes_and_clips(rounding: Rounding, name: str) -> None:
    fmt = get_format(name)
    rules = [{"scale_rule": r} for r in fmt.scale_rules] + [{"recipe": r} for r in fmt.recipes]
    for rule in rules:
        for clip in ("symmetric", "full"):
            for rotation in ({}, {"rotation": 32}):
                given: dict[str, Any] = {**rule, **rotation, "clip": clip}
                same_as_reference(rounding, wild(7, 512, 3), name, **given)
    # Largest numbers that float32 has not the factor of, and no number but zero.
    for x in (np.full((2, 512), 2.0**-133), np.full((2, 512), 3e38), np.zeros((2, 512))):
        same_as_reference(rounding, x.astype(BF16), name, rotation=16)
        same_as_reference(rounding, x.astype(BF16), name)


@pytest.mark.parametrize("name", ["mxfp4", "mxint4", "mxfp6_e2m3", "nvfp4", "nvint4"])
def test_halves_go_to_even(rounding: Rounding, name: str) -> None:
    """Every bfloat16 number beside one that fixes the scale, by few rows and by many."""
    fmt = get_format(name)
    every = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    for rule in fmt.scale_rules or fmt.recipes:
        for largest in (6.0, 1.0, 5.3):
            x = np.full((1 << 16, 2), largest, np.float32)
            x[:, 0] = np.where(np.abs(every) <= largest, every, 0)
            given: dict[str, Any] = {"scale_rule" if fmt.scale_rules else "recipe": rule}
            for rows in (32, 4096):
                same_as_reference(rounding, x.reshape(rows, -1).astype(BF16), name, **given)


def order_of(bits: int) -> np.ndarray:
    """Which of 128 columns lies where, for codes of so many bits."""
    order = np.empty(128, int)
    for lane, pair, half in np.ndindex(4, 16, 2):
        if bits == 6:
            element = pair // 8 * 16 + pair % 8 + 8 * half
        elif bits == 8:
            element = pair // 2 * 4 + pair % 2 + 2 * half
        else:
            element = pair // 4 * 8 + pair % 4 + 4 * half
        order[8 * pair + 2 * lane + half] = 32 * lane + element
    return order


@pytest.mark.parametrize("weight", ["mxfp4", "mxint4", "nvfp4", "mxfp6_e2m3", "mxfp8_e4m3"])
def test_columns_in_the_order_of_codes(rounding: Rounding, weight: str) -> None:
    """The same values elsewhere, and the same products of them."""
    ops, fmt = rounding.ops, get_format(weight)
    for rows, n, k, rotation in ((1, 64, 128, 0), (9, 130, 1024, 512), (16, 128, 4224, 32),
                                 (17, 64, 768, 64), (30, 70, 512, 512)):  # fmt: skip
        x = rounding.there(wild(rows, k, 1))
        w = [rounding.there(p) for p in reference.quantize(grids.noise(n, k, BF16), fmt)[:2]]
        for name in ("mxfp4", "mxfp6_e3m2", "nvint4"):
            given = (x, name, None, None, "symmetric", rotation, None, None)
            plain = ops._round_values(*given)[0]
            ordered = ops._round_values(*given, fmt.bits)[0]
            turned = ordered.view(rows, -1, 128)[..., np.argsort(order_of(fmt.bits))]
            same = turned.reshape(rows, k).view(torch.int16) == plain.view(torch.int16)
            assert same.all(), f"{name} by {weight} {rows}x{k}: {(~same).sum()} elsewhere"
            rest = (None, weight, k, None, torch.float32)
            want = ops._matmul_wide(plain, *w, *rest)
            got = ops._matmul_wide(ordered, *w, *rest, ordered=True)
            assert torch.equal(got.view(torch.int32), want.view(torch.int32)), (name, rows, n, k)


@pytest.mark.parametrize("right", ["mxfp4", "nvfp4", "int4"])
def test_the_path_takes_rows_as_the_launch_leaves_them(
    monkeypatch: pytest.MonkeyPatch, right: str
) -> None:
    """Few rows by `wide`: in order where the weight has one, tensor scales of either side."""
    ops = emulated_ops()
    called: dict[str, Any] = {}

    class Ops:
        def __getattr__(self, name: str) -> Any:
            def call(*given: Any, **named: Any) -> Any:
                called[name] = (given, named)
                return getattr(ops, name).default(*given, **named)

            return type("Op", (), {"default": staticmethod(call)})

    monkeypatch.setattr(Parts, "ops", Ops())
    fmt, n = get_format(right), 70
    for name in ("mxfp4", "nvfp4"):
        for m, k, ordered in ((9, 256, True), (33, 256, False), (9, 160, False)):
            w = [to_torch(p) for p in reference.quantize(grids.noise(n, k), fmt) if p is not None]
            scale = torch.tensor(float(w[2])) if len(w) > 2 else None
            x = to_torch(wild(2, k, 9)[:1].repeat(m, 0))
            facts = paths.facts(right)
            y = dense.wide(
                Left(m, k, paths.facts(name), x, rotation=32),
                Right(w[0], w[1], scale, facts, n),
                Out(None, torch.float32),
            )
            assert called["_matmul_wide"][1] == {"ordered": ordered and right != "int4"}
            plain, stored = ops._round_values(x, name, None, None, "symmetric", 32, None, None)
            sums = ops._matmul_wide(plain, w[0], w[1], None, right, k, None, torch.float32)
            factors = [stored if stored.numel() else None, scale]
            if None not in factors:
                factors = [stored * scale, None]
            want = ops._finish(sums, n, *factors, None, None, None, torch.float32)
            assert torch.equal(y, want), (name, m, k)


def test_rows_that_have_no_order(rounding: Rounding) -> None:
    ops = rounding.ops
    for rows, k in ((33, 256), (3, 160)):
        x = rounding.there(wild(rows, k))
        with pytest.raises(RuntimeError, match="order: expected up to 32 rows"):
            ops._round_values(x, "mxfp4", None, None, "symmetric", 0, None, None, 4)
    for name, rows, k in (("mxfp4", 3, 160), ("int4", 3, 256), ("mxfp4", 33, 256)):
        x = rounding.there(wild(rows, k))
        parts = reference.quantize(grids.noise(64, k, BF16), get_format(name))[:2]
        w = [rounding.there(p) for p in parts]
        with pytest.raises(RuntimeError, match="ordered: expected up to 32"):
            ops._matmul_wide(x, *w, None, name, k, None, torch.float32, ordered=True)
