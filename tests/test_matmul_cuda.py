# SPDX-License-Identifier: Apache-2.0
"""The kernel for few tokens: run on the CPU by the emulation, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyfmt.formats import FORMATS, get_format  # noqa: E402
from tests import skinny  # noqa: E402
from tests.cuda_rooms import emulated_and_on_device  # noqa: E402
from tests.skinny import Skinny  # noqa: E402

GROUPS = ["int4-b32-bf16", "int4-b96-fp16", "int8-b32-fp32", "int8-b64-bf16", "int4-brow-bf16"]
NAMES = [*FORMATS, *GROUPS]
WIDE = (torch.bfloat16, torch.float16, torch.float32)


op = emulated_and_on_device(Skinny)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_and_scale_decodes(op: Skinny, name: str) -> None:
    skinny.decodes_like_the_reference(op, name, 37, 192, torch.bfloat16)


# Bytes of scales that one factor serves, and the first ones that it does not.
EDGES = {"mxfp4": (0, 127), "mxint4": (11, 138), "mxint6": (5, 251), "mxint8": (15, 142)}


@pytest.mark.parametrize("name", EDGES)
def test_scales_at_the_edges_of_one_factor(op: Skinny, name: str) -> None:
    low, high = EDGES[name]
    for among in ((low, 127, high), (max(low - 1, 0), high), (low, high + 1)):
        for at_once in (4, 64):
            skinny.decodes_like_the_reference(op, name, 130, 128, torch.bfloat16, among, at_once)


@pytest.mark.parametrize("name", NAMES)
def test_exact_sums(op: Skinny, name: str) -> None:
    for m, n, k in ((1, 48, 256), (11, 70, 320), (20, 33, 512), (3, 150, 256), (12, 130, 256)):
        skinny.exact_integers(op, name, m, n, k)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp6_e3m2", "mxint8", "int4"])
def test_every_way_to_share_the_work(op: Skinny, name: str) -> None:
    for plan in ([1, 1], [2, 0], [3, 1], [7, 0], [200, 1]):
        skinny.exact_integers(op, name, 3, 200, 1536, plan=plan)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_with_many_rows(op: Skinny, name: str) -> None:
    skinny.same_by_few_blocks(op, name, 300, 2560, (1, 3, 8, 9))
    skinny.same_by_few_blocks(op, name, 133, 96, (2,))
    skinny.exact_integers(op, name, 3, 260, 256, plan=[1, 0])


@pytest.mark.parametrize("name", [*FORMATS, "int4-b128-fp16"])
def test_activations_in_registers(op: Skinny, name: str) -> None:
    skinny.activations_in_registers(op, name)
    sets: list[Any] = [None]
    if get_format(name).scale == "e8m0":
        least = 10 if get_format(name).element.special != "none" else 0  # bfloat16's smallest
        low, high = EDGES.get(name, (least, 127))
        sets += [
            (low, 127, high),
            (max(low - 1, least), high),
            (low, min(high + 1, 254)),
            (200, 255),
        ]
    for among in sets:
        skinny.decodes_like_the_reference(
            op, name, 128, 256, torch.bfloat16, among, 8, plan=[0, 1, 1]
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 33, 100, 144])
def test_any_length_of_row(op: Skinny, name: str, k: int) -> None:
    skinny.exact_integers(op, name, 2, 19, k)
    if name in ("mxfp4", "nvint4", "mxfp6_e2m3"):
        skinny.within_bound(op, name, 5, 19, k, torch.float32)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp6_e2m3", "mxfp8_e5m2", "int8"])
def test_error_is_bounded(op: Skinny, name: str, dtype: Any) -> None:
    for m, n, k in ((1, 64, 512), (13, 40, 384), (3, 160, 2304)):
        skinny.within_bound(op, name, m, n, k, dtype)


@pytest.mark.parametrize("dtype", WIDE[1:], ids=str)
def test_wide_activations_lose_nothing(op: Skinny, dtype: Any) -> None:
    skinny.splits_exactly(op, dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_non_finite_activations(op: Skinny, dtype: Any) -> None:
    skinny.non_finite_activations(op, dtype)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "int4"])
def test_a_token_is_alone(op: Skinny, name: str) -> None:
    skinny.same_in_every_batch(op, name, 96, 640, (1, 2, 9, 17, 40))
    skinny.same_in_every_batch(op, name, 160, 5376, (1, 8, 9, 16))


def test_views_and_output_dtypes(op: Skinny) -> None:
    fmt = get_format("mxint8")
    codes, scales, _, w = skinny.weights(fmt, 24, 96)
    x = skinny.tokens(6, 200, torch.bfloat16)
    shifted = np.empty(codes.size + 1, np.uint8)
    shifted[1:] = codes.ravel()
    unaligned = op.tensor(shifted)[1:].view(24, -1)
    for view in (x[:, :96], x[::2, 7:103], x[:, 100:196].t().contiguous().t()):
        for dtype in WIDE:
            for held in (codes, unaligned):
                y = op(view, held, scales, None, fmt, dtype=dtype)
                assert y.dtype == dtype and skinny.worst_error(y, view, w) <= skinny.C
    assert op(x[:0, :96], codes, scales, None, fmt).shape == (0, 24)


def test_what_is_asked_wrongly(op: Skinny) -> None:
    fmt = get_format("mxfp4")
    codes, scales, _, _ = skinny.weights(fmt, 8, 64)
    x = skinny.tokens(2, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"w_codes: expected shape \(rows, 32\)"):
        op(x, codes[:, :16], scales, None, fmt)
    with pytest.raises(RuntimeError, match="w_scales: expected shape"):
        op(x, codes, scales[:4], None, fmt)
    with pytest.raises(RuntimeError, match="does not serve e2m1-b64-e8m0"):
        op(x, codes, scales, None, get_format("e2m1-b64-e8m0"))
