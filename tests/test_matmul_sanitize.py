# SPDX-License-Identifier: Apache-2.0
"""Small calls of every GPU kernel of the products: what compute-sanitizer has the time for.

    compute-sanitizer --tool memcheck python -m pytest tests -m gpu -k sanitizers

takes these and those of the codecs; initcheck with -k "sanitizers and not slots", for slots of
largest numbers are read until they have been written; racecheck with -k "sanitizers and not
rings". It does not follow barriers of shared memory whose readers hand places back: a textbook ring
of two places, all of whose reading lanes arrive, is reported as ours are (bench/notes/products.md,
step 52). What those kernels do beside other work is in tests/test_matmul_beside.py. The library's
GEMMs are left out: their kernels are not ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyfmt import reference  # noqa: E402
from pyfmt.formats import get_format  # noqa: E402
from tests import codes as by_codes  # noqa: E402
from tests import grids, skinny  # noqa: E402
from tests import test_matmul_fold as fold  # noqa: E402
from tests import test_matmul_wide as wide  # noqa: E402
from tests.cuda_rooms import device_ops  # noqa: E402
from tests.grids import BF16  # noqa: E402
from tests.rooms import to_torch  # noqa: E402
from tests.test_matmul_codes import quantize as quantize_codes  # noqa: E402

pytestmark = pytest.mark.gpu

# One of each kind of element and of scale.
KINDS = [
    "mxfp4", "nvfp4", "mxint4", "nvint4", "int4", "mxfp6_e2m3", "mxfp6_e3m2", "mxint6",
    "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "int8", "int4-b32-fp16", "int8-brow-fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def few() -> skinny.Skinny:
    return skinny.Skinny(device_ops(), "cuda")


@pytest.fixture(scope="module")
def ops(few: skinny.Skinny) -> Any:
    reason = few.ops._matmul_wide_serves(torch.empty(1, device="cuda"), "mxfp4", 64, 64, 64)
    if reason:
        pytest.skip(reason)
    return few.ops


@pytest.mark.parametrize("name", KINDS)
def test_few_tokens_for_the_sanitizers(few: skinny.Skinny, name: str) -> None:
    for m, n, k in ((1, 40, 256), (12, 70, 320)):
        skinny.exact_integers(few, name, m, n, k)
    for dtype in (torch.float16, torch.float32):
        skinny.within_bound(few, name, 5, 19, 100, dtype)
    if name != "mxfp8_e5m2":  # whose sums of 768 do not stay exact
        skinny.exact_integers(few, name, 3, 100, 768, plan=[2, 1])


@pytest.mark.parametrize("name", [name for name in KINDS if name != "mxfp8_e5m2"])
def test_few_tokens_by_rings_for_the_sanitizers(few: skinny.Skinny, name: str) -> None:
    for split in (1, 2):  # activations in registers, where that serves
        skinny.exact_integers(few, name, 2, 128, 768, plan=[2, 1, split])


def few_codes(few: skinny.Skinny, name: str, rows: int) -> None:
    op = by_codes.Codes(few.ops, "cuda")
    for m, n, k in ((1, 32, 256), (rows, 112, 768), (3, 32, 8448)):
        by_codes.exact_sums(op, (name, name), m, n, k, plan=[2, 1, 0])
    by_codes.rounds_like_quantize(op, name, quantize_codes)


@pytest.mark.parametrize("name", ["mxfp4", "mxint4"])
def test_few_codes_by_rings_for_the_sanitizers(few: skinny.Skinny, name: str) -> None:
    few_codes(few, name, 16)


@pytest.mark.parametrize("name", ["nvfp4", "nvint4"])
def test_few_codes_by_rings_and_slots_for_the_sanitizers(few: skinny.Skinny, name: str) -> None:
    few_codes(few, name, 4)


@pytest.mark.parametrize("name", KINDS)
def test_middle_sizes_by_rings_for_the_sanitizers(ops: Any, name: str) -> None:
    shapes = {16: (5, 40, 264), 32: (20, 40, 520), 64: (5, 40, 264), 128: (100, 130, 128)}
    shapes[256] = (200, 40, 129)
    if get_format(name).scale not in ("e8m0", "e4m3"):
        del shapes[256]
        for plan in wide.SHARED:
            wide.check_sums(ops, wide.Weights(name, 140, 264), 70, "bf16", plan=plan, device="cuda")
    for tile, (m, n, k) in shapes.items():
        w = wide.Weights(name, n, k)
        wide.check_single_columns(ops, w, m, plan=(tile, 1 + (tile == 64), 1), device="cuda")


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxint8", "int4", "int8"])
def test_clusters_by_rings_for_the_sanitizers(ops: Any, name: str) -> None:
    w = wide.Weights(name, 200, 512)
    for plan in ((16, 2, 2), (32, 4, 2), (64, 2, 2), (64, 4, 4), (128, 2, 1), (256, 1, 2)):
        rows = 60 if plan[0] == 64 else 70
        wide.check_sums(ops, w, rows, "bf16", plan=plan, device="cuda")
    if name == "mxfp4":
        a, b = fold.noise(name, 70, 256, 1), fold.noise(name, 200, 256, 2)
        for plan in ((128, 1, 2), (64, 2, 1)):
            fold.check(ops, a, b, fold.FP8_STEP, device="cuda", plan=plan)


@pytest.mark.parametrize("name", fold.FOLDING)
def test_packed_fp8_by_rings_for_the_sanitizers(ops: Any, name: str) -> None:
    a, w = grids.noise(70, 256, seed=1), grids.noise(40, 256, seed=2)
    a[3, 64:96] *= np.float32(2.0**-45)
    w[7, :32] *= np.float32(2.0**40)
    left, right = fold.Operand(a, "mxfp4"), fold.Operand(w, name)
    bias = torch.linspace(-1, 1, 40)
    for plan in ((64, 1, 1), (128, 1, 1)):
        fold.check(ops, left, right, fold.FP8_STEP, device="cuda", plan=plan, bias=bias)
    parts = right.parts("cuda")
    kept, plan = ops._fold(*parts, False, False, None)[1:3], (64, 1, 1)
    fold.check(ops, left, right, fold.FP8_STEP, device="cuda", kept=kept, plan=plan)
    x = torch.from_numpy(a).bfloat16().cuda()
    how = (None, "symmetric", 32, None, True)
    y = ops._matmul_fold(
        x, None, None, "mxfp4", *how, *parts, None, None, None, torch.bfloat16, None, *plan
    )
    assert y.shape == (70, 40)


def codes_of(x: np.ndarray, name: str) -> tuple[Any, Any, np.ndarray]:
    fmt = get_format(name)
    codes, scales, _ = reference.quantize(x, fmt)
    want = reference.dequantize(codes, scales, None, fmt, x.shape, dtype=np.dtype(np.float32))
    return to_torch(codes).cuda(), to_torch(scales).cuda(), want


@pytest.mark.parametrize("name", fold.FOLDING)
def test_folding_for_the_sanitizers(ops: Any, name: str) -> None:
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    for rows, columns in ((5, 96), (2, 8224), (2, 16416)):
        x = grids.noise(rows, columns, BF16)
        x[1, :32] *= BF16.type(2.0**-40)
        codes, scales, _ = codes_of(x, name)
        want = ops._fold(codes, scales, name, False, True, total)
        y = to_torch(x).cuda()
        got = ops._fold_values(y, name, None, "symmetric", 0, None, False, total)
        two = ops._fold_two(codes, scales, name, False, codes, scales, name, None)
        online = ops._fold_online(
            y, name, None, "symmetric", 0, None, False, codes, scales, name, None
        )
        for i in (1, 2):
            assert torch.equal(got[i], want[i]) and torch.equal(two[i], want[i])
            assert torch.equal(online[i], want[i])
        ops._fold_values(y, name, None, "symmetric", 32, None, False, None)
    w_codes, w_scales, _ = codes_of(grids.noise(21, 96), "mxfp4")
    x = grids.noise(5, 96)
    x[1, :32] *= np.float32(2.0**-40)
    a = ops._fold(*codes_of(x, name)[:2], name, False, True, None)
    w = ops._fold(w_codes, w_scales, "mxfp4", False, False, None)
    y = torch.zeros(5, 21, device="cuda")
    ops._repair(y, *a, False, *w[:3], False, w_codes, w_scales, "mxfp4", None)
    assert y[1].any() and not y[0].any()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nvint4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8"])
def test_rounded_values_for_the_sanitizers(ops: Any, name: str) -> None:
    # Few rows, by short rotations and long ones, a cluster of blocks, more than a cluster holds.
    for rows, columns, rotation in (
        (6, 256, 0), (5, 256, 32), (3, 1024, 1024), (75, 256, 32), (130, 1024, 32),
    ):  # fmt: skip
        x = grids.noise(rows, columns, BF16)
        got, _ = ops._round_values(
            to_torch(x).cuda(), name, None, None, "symmetric", rotation, None, None
        )
        if not rotation:
            assert np.array_equal(got.float().cpu().numpy(), codes_of(x, name)[2])
    ones = torch.ones(3, 16, device="cuda")
    y = ops._finish(ones, 13, ones[0, 0], None, None, None, ones[0, :13], torch.bfloat16)
    assert (y == 2).all()
