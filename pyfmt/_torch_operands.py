# SPDX-License-Identifier: Apache-2.0
"""What the GEMM paths of CUDA tensors take: the two operands, and the left one in every form.

A Left stands on the left, quantized or to be, a Right is the quantized weight, an Out says how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfmt._matmul_paths import Facts

# The bytes that an expanded weight may take; a larger one is expanded in panels of rows.
PANEL_BYTES = 1 << 29


@dataclass(slots=True)
class Left:
    """The left operand, M rows: dense (`x` alone), codes and scales, or x still to be quantized.

    format: of the codes, or what x is to be quantized to; None for a dense x.
    """

    rows: int
    k: int
    format: Facts | None = None
    x: Tensor | None = None
    codes: Tensor | None = None
    scales: Tensor | None = None
    tensor_scale: Tensor | None = None
    scale_rule: str | None = None
    recipe: str | None = None
    clip: str = "symmetric"
    rotation: int = 0
    signs: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.x is None else self.x.dtype


@dataclass(slots=True)
class Right:
    """The weight (N, K); kept: what _expand_weight returned, or None."""

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    format: Facts
    n: int
    kept: list[Tensor] | None = None

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        if first == 0 and last >= self.n:
            return self.codes, self.scales
        step = self.format.block_rows
        return self.codes[first:last], self.scales[first // step : -(-last // step)]


@dataclass(slots=True)
class Out:
    bias: Tensor | None
    dtype: torch.dtype
    fast: bool = False
    batch_invariant: bool = False


class Parts:
    """The operators that the paths stand on; tests put emulated ones in their place."""

    ops: Any = torch.ops.pyfmt


def panels(right: Right, row_bytes: int) -> list[tuple[int, int]]:
    step = max(PANEL_BYTES // max(row_bytes, 1) // 128, 1) * 128
    step = -(-step // right.format.block_rows) * right.format.block_rows
    return [(i, min(i + step, right.n)) for i in range(0, max(right.n, 1), step)]


# ---- rows that did not fold are counted -------------------------------------------------------

_totals: dict[int, Tensor] = {}


def total_of(device: torch.device) -> Tensor | None:
    """The device's count of rows that did not fold; None where a graph captures its first use."""
    index = device.index or 0
    total = _totals.get(index)
    if total is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        total = _totals[index] = torch.zeros((), dtype=torch.int64, device=device)
    return total


# ---- the left operand -------------------------------------------------------------------------


def quantized(left: Left) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and tensor scale of a left operand with a format."""
    if left.codes is not None:
        assert left.scales is not None
        return left.codes, left.scales, left.tensor_scale
    assert left.format is not None and left.x is not None
    codes, scales, stored = Parts.ops.quantize.default(
        left.x, left.format.key, -1, left.scale_rule, left.recipe, "nearest", None, left.clip,
        None, left.rotation, left.signs,
    )  # fmt: skip
    return codes, scales, stored if stored.numel() else None


def whole_rows(left: Left) -> bool:
    """Whether the kernels that read x take it: bfloat16 in whole blocks."""
    x = left.x
    assert left.format is not None
    whole = left.format.whole
    return (
        x is not None
        and x.dtype == torch.bfloat16
        and whole > 0
        and left.k % whole == 0
        and left.k > 0
        and left.rows > 0
        and x.data_ptr() % 16 == 0
    )


def rotated(left: Left) -> Tensor:
    """A dense left operand, rotated if asked."""
    assert left.x is not None
    if not left.rotation:
        return left.x
    y: Tensor = Parts.ops.hadamard.default(left.x, left.rotation, left.signs)
    return y


def bf16(left: Left, factor: Tensor | None = None, order: int = 0) -> tuple[Tensor, Tensor | None]:
    """Exact bfloat16 of element * scale, and the tensor scale (times `factor`) left out of it.

    order: of an x still to be quantized, columns in the order of codes of so many bits.
    """
    if left.format is None:
        return rotated(left), factor
    if left.codes is None and whole_rows(left):
        y, stored = Parts.ops._round_values.default(
            left.x, left.format.key, left.scale_rule, left.recipe, left.clip, left.rotation,
            left.signs, factor, order,
        )  # fmt: skip
        return y, stored if two_level(left) else factor
    codes, scales, stored = quantized(left)
    y = Parts.ops.dequantize.default(
        codes, scales, None, left.format.key, (left.rows, left.k), -1, torch.bfloat16
    )
    if stored is None or factor is None:
        return y, factor if stored is None else stored
    return y, stored * factor


def fp32(left: Left) -> Tensor:
    """The decoded left operand in float32."""
    if left.format is None:
        return rotated(left).float()
    if left.codes is None:
        # In float32 fake_quantize is quantize and dequantize bit for bit, in one pass.
        assert left.x is not None
        x = left.x.float()
        if left.rotation:
            x = Parts.ops.hadamard.default(x, left.rotation, left.signs)
        rest = (left.scale_rule, left.recipe, "nearest", None, left.clip)
        y: Tensor = Parts.ops.fake_quantize.default(x, left.format.key, -1, *rest)
        return y
    y = Parts.ops.dequantize.default(
        left.codes, left.scales, left.tensor_scale, left.format.key, (left.rows, left.k)
    )
    return y


def chunks(left: Left, right: Right, out: Out, rows: int, kernel: Callable[..., Tensor]) -> Tensor:
    """Call a kernel on M rows at once, or on chunks of always the same number, padded by zeros."""
    if not out.batch_invariant:
        return kernel(left, right, out)
    if left.format is not None and left.codes is None:
        codes, scales, stored = quantized(left)
        left = Left(left.rows, left.k, left.format, None, codes, scales, stored)
    parts = []
    for first in range(0, left.rows, rows):
        last = min(first + rows, left.rows)
        part = Left(rows, left.k, left.format)
        part.tensor_scale, part.rotation, part.signs = left.tensor_scale, left.rotation, left.signs
        for name in ("x", "codes", "scales"):
            whole = getattr(left, name)
            if whole is not None:
                piece = whole[first:last]
                if last - first < rows:
                    padding = piece.new_zeros((rows - (last - first), piece.shape[1]))
                    piece = torch.cat([piece, padding])
                setattr(part, name, piece)
        parts.append(kernel(part, right, out)[: last - first])
    if not parts:
        return left_device(left).new_empty((0, right.n), dtype=out.dtype)
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def left_device(left: Left) -> Tensor:
    """A tensor on the left operand's device."""
    tensor = left.codes if left.x is None else left.x
    assert tensor is not None
    return tensor


def two_level(left: Left) -> bool:
    """Whether the left operand has, or will have, a tensor scale."""
    if left.codes is not None:
        return left.tensor_scale is not None
    return (
        left.format is not None
        and left.format.format.tensor_scale
        and left.recipe != "single_level"
    )
