# SPDX-License-Identifier: Apache-2.0
"""The GEMM paths of CUDA tensors, one function each; which one serves is _matmul_paths' choice.

Every function takes a Left, a Right and an Out (`_torch_operands.py`), and returns (M, N).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyfmt import _matmul_paths as paths
from pyfmt._torch_operands import (
    Left,
    Out,
    Parts,
    Right,
    bf16,
    chunks,
    fp32,
    panels,
    quantized,
    rotated,
    total_of,
    two_level,
    whole_rows,
)
from pyfmt.formats import get_format

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def skinny(left: Left, right: Right, out: Out) -> Tensor:
    if out.batch_invariant and left.rows > 64:
        return chunks(left, right, out, 64, _skinny)
    return _skinny(left, right, out)


@lru_cache(maxsize=64)
def _codes_kernel(ops: Any, device: torch.device) -> bool:
    """Whether the library has the kernel that multiplies codes, and the device its instructions."""
    if not hasattr(ops, "_matmul_codes"):
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


# The longest rotation that the kernel for few rows of codes does itself, and the longest block of x
# that the launch for few rows rounds.
_LONGEST_TURN = _LONGEST_BLOCK = 256


def _multiplies_codes(left: Left, right: Right, out: Out) -> bool:
    """Whether both sides stay codes; their sums have an order of their own."""
    if left.format is None or out.batch_invariant:
        return False
    a, w = left.format.format, right.format.format
    if not paths.multiplies_codes(a, w, left.rows, right.n, left.k):
        return False
    if left.codes is None:
        ready = whole_rows(left) and left.rotation <= _LONGEST_TURN
    else:
        ready = left.codes.data_ptr() % 4 == 0
    together = 16 if w.scale == "e4m3" else 8
    lies = right.codes.data_ptr() % 16 == 0 and right.scales.data_ptr() % together == 0
    return ready and lies and _codes_kernel(Parts.ops, right.codes.device)


# Elements that are rounded by blocks which find their largest together.
_MOST_TOGETHER = 1 << 17


def _rounds_together(left: Left, out: Out) -> bool:
    """Whether one launch beside products rounds the left operand to two levels of scales."""
    if left.format is None or left.codes is not None or out.batch_invariant or left.rows > 8:
        return False
    return (
        left.format.format.name in ("nvfp4", "nvint4")
        and left.rotation <= _LONGEST_TURN
        and left.rows * left.k <= _MOST_TOGETHER
        and whole_rows(left)
        and hasattr(Parts.ops, "_matmul_rounded")
    )


def _skinny(left: Left, right: Right, out: Out) -> Tensor:
    if _multiplies_codes(left, right, out):
        assert left.format is not None
        x = left.x if left.codes is None else None
        y: Tensor = Parts.ops._matmul_codes.default(
            x, left.codes, left.scales, left.tensor_scale, left.format.key, left.scale_rule,
            left.recipe, left.clip, left.rotation, left.signs, right.codes, right.scales,
            right.tensor_scale, right.format.key, out.bias, out.dtype,
        )  # fmt: skip
        return y
    scale = right.tensor_scale
    if _rounds_together(left, out):
        assert left.format is not None
        y = Parts.ops._matmul_rounded.default(
            left.x, left.format.key, left.recipe, left.clip, left.rotation, left.signs,
            right.codes, right.scales, scale, right.format.key, out.bias, out.dtype,
        )  # fmt: skip
        return y
    if left.format is None:
        x = rotated(left)
    elif left.format.exact and not (two_level(left) and scale is None):
        x, scale = bf16(left, scale)
    else:
        x = fp32(left)
    y = Parts.ops._matmul_skinny.default(
        x, right.codes, right.scales, scale, right.format.key, left.k, out.bias, out.dtype,
        out.batch_invariant,
    )  # fmt: skip
    return y


def _ordered(left: Left, right: Right) -> bool:
    """Whether x, still to be quantized, is written in the order of the weight's codes."""
    if left.format is None or left.codes is not None or left.rows > paths.ORDERED_ROWS:
        return False
    if left.format.whole > _LONGEST_BLOCK or not whole_rows(left):
        return False
    return paths.takes_ordered(right.format.format, left.rows, left.k)


def wide(left: Left, right: Right, out: Out) -> Tensor:
    ordered = _ordered(left, right)
    x, scale = bf16(left, right.tensor_scale, right.format.format.bits if ordered else 0)
    y: Tensor = Parts.ops._matmul_wide.default(
        x, right.codes, right.scales, scale, right.format.key, left.k, out.bias, out.dtype,
        ordered=ordered,
    )  # fmt: skip
    return y


def _fold_both(
    left: Left, e5m2: bool, codes: Tensor | None, scales: Tensor | None, fmt: str, total: Any
) -> tuple[Any, Any]:
    """The left operand folded, and where codes are given those of the weight, in one launch.

    One kernel that rotates, quantizes and folds serves a kept weight and few rows; elsewhere codes
    that are packed between are the faster way, for all loads of a row are then under way at once.
    """
    assert left.format is not None
    alone = codes is None and left.codes is None and left.rows <= 1024
    if alone and left.k <= paths.LONGEST_FOLD and whole_rows(left):
        given = (left.x, left.format.key, left.scale_rule, left.clip, left.rotation, left.signs)
        return Parts.ops._fold_values.default(*given, e5m2, total), None
    if (
        codes is not None
        and left.codes is None
        and left.k <= paths.LONGEST_FOLD
        and (whole_rows(left))
    ):
        given = (left.x, left.format.key, left.scale_rule, left.clip, left.rotation, left.signs)
        found = Parts.ops._fold_online.default(*given, e5m2, codes, scales, fmt, total)
        return found[:4], found[4:]
    own = (*quantized(left)[:2], left.format.key, e5m2)
    if codes is None:
        return Parts.ops._fold.default(*own, True, total), None
    found = Parts.ops._fold_two.default(*own, codes, scales, fmt, total)
    return found[:4], found[4:]


@lru_cache(maxsize=64)
def _packed_kernel(ops: Any, device: torch.device, key: str) -> bool:
    """Whether the library has a kernel that multiplies a folded a by packed weights there."""
    if not hasattr(ops, "_matmul_fold"):
        return False
    return not ops._matmul_fold_serves(torch.empty(0, device=device), key, 1, 1, 32)


def _fold_packed(left: Left, right: Right, out: Out) -> Tensor:
    """The weight stays packed, and becomes fp8 beside the products."""
    assert left.format is not None
    x, codes, scales = left.x, left.codes, left.scales
    as_it_is = codes is None and left.rows <= 1024 and left.k <= paths.LONGEST_FOLD
    if not (as_it_is and whole_rows(left)):
        x, (codes, scales, _) = None, quantized(left)
    w_scale, w_marks = right.kept[1:3] if right.kept else (None, None)
    y: Tensor = Parts.ops._matmul_fold.default(
        x, codes, scales, left.format.key, left.scale_rule, left.clip, left.rotation, left.signs,
        left.format.e5m2, right.codes, right.scales, right.format.key, w_scale, w_marks, out.bias,
        out.dtype, total_of(right.codes.device),
    )  # fmt: skip
    return y


def fold(left: Left, right: Right, out: Out) -> Tensor:
    assert left.format is not None
    if paths.stays_packed(right.format.format.bits, bool(right.kept), right.n, left.rows) and (
        _packed_kernel(Parts.ops, right.codes.device, right.format.key)
    ):
        return _fold_packed(left, right, out)
    e5m2 = left.format.e5m2
    total = total_of(right.codes.device)
    key = right.format.key
    spans = panels(right, right.format.format.padded(left.k)) if not right.kept else [(0, right.n)]
    mine: Any = None
    parts = []
    for first, last in spans:
        codes, scales = right.rows(first, last)
        if mine is None and right.kept:
            mine, _ = _fold_both(left, e5m2, None, None, key, total)
        elif mine is None:
            mine, weight = _fold_both(left, e5m2, codes, scales, key, total)
        else:
            weight = Parts.ops._fold.default(codes, scales, key, False, False, total)[:3]
        a8, a_scale, a_marks, a_spare = mine
        w8, w_scale, w_marks = right.kept or weight
        bias = None if out.bias is None else out.bias[first:last]
        a = a8[: left.rows]
        y = _fp8_gemm(a, e5m2, a_scale[: left.rows], w8, w_scale, bias, last - first, out)
        Parts.ops._repair.default(
            y, a8, a_scale, a_marks, a_spare, e5m2, w8, w_scale, w_marks, False, codes, scales,
            key, bias,
        )  # fmt: skip
        parts.append(y)
    y = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return y.contiguous()


@lru_cache(maxsize=1024)
def _folded_gemm_serves(ops: Any, device: torch.device, *how: Any) -> bool:
    """Whether the library multiplies without torch's workspace, by shape and types."""
    return hasattr(ops, "_folded_gemm") and bool(
        ops._folded_gemm_serves(torch.empty(0, device=device), *how)
    )


def _fp8_gemm(
    a: Tensor,
    e5m2: bool,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    n: int,
    out: Out,
) -> Tensor:
    """RNE((a w^T) * a_scale * w_scale + bias); sums are moved to float32 every 128 products.

    cuBLASLt multiplies: called here where it knows row scales, else by torch._scaled_mm.
    """

    def mm(bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        shape = (a.shape[0], w.shape[0], a.shape[1])
        how = (dtype, e5m2, bias is not None, out.fast)
        if a.is_cuda and _folded_gemm_serves(Parts.ops, a.device, *shape, *how):
            added = None if bias is None else bias.contiguous()
            given = (a, e5m2, a_scale, w, w_scale, added, dtype, out.fast)
            y: Tensor = Parts.ops._folded_gemm.default(*given)
            return y
        left, right = a.view(E5M2 if e5m2 else E4M3), w.view(E4M3).t()
        scales = (a_scale[:, None], w_scale[None])
        return torch._scaled_mm(
            left, right, *scales, bias=bias, out_dtype=dtype, use_fast_accum=out.fast
        )

    whole = w.shape[0] == n
    library_bias = bias is not None and whole and bias.dtype == out.dtype == torch.bfloat16
    if bias is None or library_bias:
        y = mm(bias, out.dtype)
        return y if whole else y[:, :n]
    y = mm(None, torch.float32)
    finished: Tensor = Parts.ops._finish.default(y, n, None, None, None, None, bias, out.dtype)
    return finished


def exact(left: Left, right: Right, out: Out) -> Tensor:
    return chunks(left, right, out, paths.INVARIANT_ROWS["exact"], _exact)


def _exact(left: Left, right: Right, out: Out) -> Tensor:
    a, factor = bf16(left)
    parts = []
    for first, last in [(0, right.n)] if right.kept else panels(right, 2 * left.k):
        if right.kept:
            w = right.kept[0]
        else:
            codes, scales = right.rows(first, last)
            w = Parts.ops.dequantize.default(
                codes, scales, None, right.format.key, (last - first, left.k), -1, torch.bfloat16
            )
        bias = None if out.bias is None else out.bias[first:last]
        parts.append(_bf16_gemm(a, w, factor, right.tensor_scale, bias, out.dtype))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class _WholeReductions:
    """While anybody is inside, cuBLAS may not add partial sums in bfloat16."""

    lock = threading.Lock()
    users = 0
    saved: Any = None

    @classmethod
    def enter(cls) -> bool:
        """False where nothing is to be restored."""
        flags = torch.backends.cuda.matmul
        with cls.lock:
            if cls.users == 0:
                if not flags.allow_bf16_reduced_precision_reduction:
                    return False
                cls.saved = flags.allow_bf16_reduced_precision_reduction
                flags.allow_bf16_reduced_precision_reduction = False
            cls.users += 1
            return True

    @classmethod
    def leave(cls) -> None:
        with cls.lock:
            cls.users -= 1
            if cls.users == 0:
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = cls.saved


@lru_cache(maxsize=1)
def _has_scaled_gemm() -> bool:
    return bool(Parts.ops._has_scaled_gemm())


_numbers: dict[tuple[float, torch.device], Tensor] = {}


def _number(value: float, device: torch.device) -> Tensor:
    """A float32 number on a device; a graph that captures its first use has one of its own."""
    number = _numbers.get((value, device))
    if number is None:
        number = torch.full((), value, dtype=torch.float32, device=device)
        if not torch.cuda.is_current_stream_capturing():
            _numbers[value, device] = number
    return number


def _spread(row: Tensor, rows: int) -> Tensor:
    """A matrix of equal rows, by copies of many bytes; expanding writes them one by one."""
    some = row.expand(min(rows, 64), row.shape[0]).contiguous()
    return torch.cat([some] * (rows // 64) + [some[: rows % 64]]) if rows > 64 else some


def _bf16_gemm(
    a: Tensor,
    w: Tensor,
    factor: Tensor | None,
    factor2: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """RNE((a w^T) * factor * factor2 + bias) with float32 sums of bfloat16 products."""
    plain = factor is None and factor2 is None
    if plain and dtype == torch.bfloat16 and (bias is None or bias.dtype == dtype):
        entered = _WholeReductions.enter()
        try:
            if bias is None:
                return torch.mm(a, w.t())
            return torch.addmm(bias, a, w.t())
        finally:
            if entered:
                _WholeReductions.leave()
    factors = [f for f in (factor, factor2) if f is not None]
    even = w.shape[0] % 8 == 0 and w.shape[1] % 8 == 0
    alike = bias is None or bias.dtype == dtype
    if a.is_cuda and factors and alike and even and _has_scaled_gemm():
        whole = factors[0] if len(factors) == 1 else factors[0] * factors[1]
        if bias is None:
            zero = _number(0.0, a.device)
            y: Tensor = Parts.ops._scaled_gemm.default(a.contiguous(), w, whole, zero, dtype)
            return y
        y = _spread(bias, a.shape[0])
        Parts.ops._scaled_gemm_add.default(y, a.contiguous(), w, whole, _number(1.0, a.device))
        return y
    if a.is_cuda:
        y = torch.mm(a, w.t(), out_dtype=torch.float32)
    else:
        y = torch.mm(a.float(), w.t().float())
    if plain and bias is None and dtype == torch.float32:
        return y
    finished: Tensor = Parts.ops._finish.default(
        y, w.shape[0], factor, factor2, None, None, bias, dtype
    )
    return finished


def expand_weight(codes: Tensor, scales: Tensor, format: str, k: int, kind: str) -> list[Tensor]:
    """A weight expanded once: for "fold" bytes, row scales and the rows that do not fold; for
    "exact" the bfloat16 matrix."""
    fmt = get_format(format)
    if not hasattr(Parts.ops, "_fold"):
        raise RuntimeError(
            "expanded: keeping an expanded weight needs the compiled GPU library, which is "
            "missing; build it with `make setup`, or leave the weight packed"
        )
    if kind == "fold":
        if not paths.folds(fmt):
            raise RuntimeError(f"kind: {format} does not fold into fp8; pass 'exact'")
        total = total_of(codes.device)
        return list(Parts.ops._fold.default(codes, scales, format, False, False, total))[:3]
    if kind != "exact":
        raise RuntimeError(f"kind: expected 'fold' or 'exact', got {kind!r}")
    if not paths.exact_in_bf16(fmt):
        raise RuntimeError(f"kind: {format} is not exact in bfloat16; leave it packed")
    shape = (codes.shape[0], k)
    return [Parts.ops.dequantize.default(codes, scales, None, format, shape, -1, torch.bfloat16)]


RUN: dict[str, Callable[[Left, Right, Out], Tensor]] = {
    "skinny": skinny,
    "wide": wide,
    "fold": fold,
    "exact": exact,
}
