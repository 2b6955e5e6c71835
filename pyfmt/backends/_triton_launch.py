# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels on torch tensors.

Importing this module imports torch and triton. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyfmt.backends._triton_plan import (
    AMAX_TILE,
    AMAX_WARPS,
    GROUPS_TILE,
    Plan,
    amax_programs,
    constants,
    dequantize_plan,
    grid_tile,
    hadamard_plan,
    is_grid,
    loose_tile,
    plan,
    power_of_two,
    sign_rows,
)
from pyfmt.formats import Format
from pyfmt.triton_kernels import layout as k_layout
from pyfmt.triton_kernels import quantize as k_quantize
from pyfmt.triton_kernels import quantize_rotated as k_rotated
from pyfmt.triton_kernels import rotate as k_rotate
from pyfmt.triton_kernels.facts import facts

__all__ = [
    "Options",
    "amax_blocks",
    "amax_tensor",
    "dequantize",
    "dequantize_plan",
    "fake_quantize",
    "hadamard",
    "pack",
    "plan",
    "quantize",
    "unpack",
]
_HERE = nullcontext()


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` current: Triton launches on the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE


def launch(kernel: Any, grid: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launch a kernel over a one-dimensional grid."""
    kernel.run(*args, grid=(grid,), warmup=False, **constants)


@dataclass(slots=True)
class Options:
    """The run-time options of one call, as the kernels take them."""

    key_low: int = 0
    key_high: int = 0
    rotation: int = 1
    signs: Tensor | None = None
    source: Any = None  # the tensor scale, or None for one from the tensor's amax
    stored: Tensor | None = None  # where it goes


# ---- how tensors lie --------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A tensor as `lead` matrices of `rows` by `columns`, with their strides in elements."""

    tensor: Tensor
    lead: int
    rows: int
    columns: int
    strides: tuple[int, int, int]


def _collapse(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Return (size, stride) of dimensions taken as one, or None where they do not lie so."""
    size, stride = 1, 0
    for n, s in zip(reversed(sizes), reversed(strides), strict=True):
        if n == 1:
            continue
        if size == 1:
            size, stride = n, s
        elif s == size * stride:
            size *= n
        else:
            return None
    return size, stride


def matrices(square: bool, *tensors: Tensor) -> list[Rows] | None:
    """See tensors of one shape (*lead, columns) as matrices, or None where strides forbid it."""
    *sizes, columns = tensors[0].shape
    n = len(sizes)
    for split in [n - 1] if square and n else range(n + 1):
        found = []
        for tensor in tensors:
            *strides, s_column = tensor.stride()
            lead = _collapse(sizes[:split], strides[:split])
            row = _collapse(sizes[split:], strides[split:])
            if lead and row:
                steps = (lead[1], row[1], s_column)
                found.append(Rows(tensor, lead[0], row[0], columns, steps))
        if len(found) == len(tensors):
            return found
    return None


# ---- quantize and fake_quantize ---------------------------------------------------------------


def quantize(
    moved: Tensor, codes: Tensor, scales: Tensor, fmt: Format, plan: Plan, options: Options
) -> None:
    """Quantize `moved` (quantized axis last) into codes and scales."""
    with on(moved):
        run = plan.run if moved.is_contiguous() else None
        if run is not None and plan.paired is not None:
            grid, names = plan.paired
            launch(k_rotated.quantize_rotated_kernel, grid, (moved, codes, scales), names)
            return
        if options.rotation > 1 and run is None:
            rotated = torch.empty(moved.shape, dtype=torch.float32, device=moved.device)
            _hadamard(moved.contiguous(), rotated, options.rotation, options.signs)
            moved, options = rotated, replace(options, rotation=1, signs=None)
        parts = _tensor_scale(moved, plan, options)
        if run is not None:
            _run(moved, codes, scales, run, options, parts)
            return
        square = fmt.block_rows > 1
        x, *_ = matrices(square, moved) or matrices(square, moved.contiguous()) or (None,)
        assert x is not None, "a contiguous tensor always falls into matrices"
        width = codes.shape[-1]
        y = Rows(codes, x.lead, x.rows, width, (x.rows * width, width, 1))
        _tiles(x, y, scales, fmt, plan, options, parts)


def fake_quantize(moved: Tensor, out: Tensor, fmt: Format, plan: Plan, options: Options) -> None:
    """Quantize and decode `moved` (quantized axis last) into `out`, of any strides."""
    with on(moved):
        parts = _tensor_scale(moved, plan, options)
        if plan.run is not None and moved.is_contiguous() and out.is_contiguous():
            _run(moved, out, None, plan.run, options, parts)
            return
        square = fmt.block_rows > 1
        found = matrices(square, moved, out)
        if found is None:
            # In the output's order both fall into the same matrices, where they do at all.
            moved = torch.empty_like(out).copy_(moved)
            found = matrices(square, moved, out)
        if found is not None:
            _tiles(found[0], found[1], None, fmt, plan, options, parts)
            return
        dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        x, y = matrices(square, moved.contiguous(), dense) or (None, None)
        assert x is not None and y is not None, "a contiguous tensor always falls into matrices"
        _tiles(x, y, None, fmt, plan, options, parts)
        out.copy_(dense)


def _tensor_scale(moved: Tensor, plan: Plan, options: Options) -> int:
    """Launch amax where the tensor scale comes from it; return the number of its parts."""
    if plan.tensor != "amax":
        return 0
    options.source = _amax_parts(moved, options.rotation, options.signs)
    return options.source.numel()


def _run(
    x: Tensor, out: Tensor, scales: Tensor | None, run: tuple[int, int, dict[str, Any]],
    options: Options, parts: int,
) -> None:  # fmt: skip
    blocks, grid, names = run
    signs = options.signs
    args = (
        x, out, scales, options.stored, options.source, parts, signs,
        1 if signs is None else signs.numel(), blocks, options.key_low, options.key_high,
    )  # fmt: skip
    launch(k_quantize.quantize_run_kernel, grid, args, names)


def _tiles(
    x: Rows, y: Rows, scales: Tensor | None, fmt: Format, plan: Plan, options: Options, parts: int
) -> None:
    fake, columns = scales is None, x.columns
    block, blocks = fmt.block_columns(columns), fmt.blocks(columns)
    square = fmt.block_rows > 1
    across = x.strides[1] == 1 and x.strides[2] != 1 and not square
    common = {"F": plan.facts, "FAKE": fake, "TENSOR": plan.tensor, "P": power_of_two(parts)}
    if is_grid(fmt, columns, fake):
        tile_rows, count, padded, warps = grid_tile(fmt, x.rows, columns, across)
        step = fmt.block_rows if square else tile_rows
        row_tiles, column_tiles = -(-x.rows // step), -(-blocks // count)
        args: tuple[Any, ...] = (
            x.tensor, y.tensor, scales, options.stored, options.source, parts, options.key_low,
            options.key_high, *x.strides, *y.strides, x.rows, columns, step, block, blocks,
            row_tiles, column_tiles,
        )  # fmt: skip
        names = constants(
            warps, **common, SQUARE=square, ACROSS=across, WORDS=fmt.bits == 4 and block % 8 == 0,
            TR=tile_rows, NB=count, BP=padded,
        )  # fmt: skip
        grid = x.lead * row_tiles * column_tiles
        launch(k_quantize.quantize_grid_kernel, grid, args, names)
        return
    grid_rows = -(-x.rows // fmt.block_rows)
    amax = torch.empty((x.lead, grid_rows, blocks), dtype=torch.float32, device=x.tensor.device)
    _amax_blocks(x, amax, fmt.block_rows, block)
    tile_rows, tile_columns, warps = loose_tile(x.rows, fmt.padded(columns), across)
    row_tiles = -(-x.rows // tile_rows)
    column_tiles = -(-fmt.padded(columns) // tile_columns)
    args = (
        x.tensor, y.tensor, amax, scales, options.stored, options.source, parts, options.key_low,
        options.key_high, *x.strides, *y.strides, x.rows, columns, fmt.row_bytes(columns),
        fmt.block_rows, block, grid_rows, blocks, row_tiles, column_tiles,
    )  # fmt: skip
    names = constants(warps, **common, TR=tile_rows, TC=tile_columns)
    launch(k_quantize.quantize_loose_kernel, x.lead * row_tiles * column_tiles, args, names)


# ---- dequantize -------------------------------------------------------------------------------


def dequantize(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, out: Tensor, fmt: Format,
    run: tuple[int, int, dict[str, Any]] | None,
) -> None:  # fmt: skip
    """Decode contiguous codes and scales into `out` (quantized axis last, any strides)."""
    with on(codes):
        if run is not None and out.is_contiguous() and codes.data_ptr() % 4 == 0:
            blocks, grid, names = run
            args: tuple[Any, ...] = (codes, scales, tensor_scale, out, blocks)
            launch(k_quantize.dequantize_run_kernel, grid, args, names)
            return
        columns = out.shape[-1]
        square = fmt.block_rows > 1
        found = matrices(square, out)
        dense = out if found else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        y, *_ = found or matrices(square, dense) or (None,)
        assert y is not None, "a contiguous tensor always falls into matrices"
        across = y.strides[1] == 1 and y.strides[2] != 1
        tile_rows, tile_columns, warps = loose_tile(y.rows, columns, across)
        row_tiles, column_tiles = -(-y.rows // tile_rows), -(-columns // tile_columns)
        block, row_bytes = fmt.block_columns(columns), fmt.row_bytes(columns)
        words = fmt.bits == 4 and row_bytes % 4 == 0 and codes.data_ptr() % 4 == 0
        args = (
            codes, scales, tensor_scale, dense, *y.strides, y.rows, columns, row_bytes,
            fmt.block_rows, block, -(-y.rows // fmt.block_rows), fmt.blocks(columns), row_tiles,
            column_tiles,
        )  # fmt: skip
        names = constants(
            warps, F=facts(fmt), TENSOR=tensor_scale is not None, ACROSS=across, WORDS=words,
            BLOCK=0 if tile_columns % block else block, TR=tile_rows, TC=tile_columns,
        )  # fmt: skip
        launch(k_quantize.dequantize_loose_kernel, y.lead * row_tiles * column_tiles, args, names)
        if dense is not out:
            out.copy_(dense)


# ---- hadamard, amax, pack, unpack -------------------------------------------------------------


def hadamard(x: Tensor, out: Tensor, size: int, signs: Tensor | None) -> None:
    """Rotate blocks of `size` of a contiguous tensor along its last axis."""
    with on(x):
        _hadamard(x, out, size, signs)


def _hadamard(x: Tensor, out: Tensor, size: int, signs: Tensor | None) -> None:
    elements, length = x.numel(), 0 if signs is None else signs.numel()
    grid, names = hadamard_plan(elements, size, length, x.element_size())
    launch(k_rotate.hadamard_kernel, grid, (x, out, signs, length or 1, elements), names)


def _dense(x: Tensor) -> Tensor:
    """Return the elements as one run in any order, without a copy where they lie densely."""
    if x.is_contiguous():
        return x
    strides = x.stride()
    permuted = x.permute(sorted(range(x.ndim), key=lambda i: (-strides[i], i)))
    return permuted if permuted.is_contiguous() else x.contiguous()


def _amax_parts(x: Tensor, rotation: int = 1, signs: Tensor | None = None) -> Tensor:
    """Return the largest finite |x| of each program's share, rotated where asked."""
    x = x if rotation > 1 else _dense(x)
    elements, length = x.numel(), 0 if signs is None else signs.numel()
    programs = amax_programs(elements)
    parts = torch.empty((programs,), dtype=torch.float32, device=x.device)
    args = (x, parts, elements, signs, length or 1, programs * AMAX_TILE)
    names = constants(
        AMAX_WARPS, SIGNS=sign_rows(length, rotation), SIZE=rotation, N=AMAX_TILE,
        W=16 // x.element_size(),
    )  # fmt: skip
    launch(k_quantize.amax_kernel, programs, args, names)
    return parts


def amax_tensor(x: Tensor, out: Tensor) -> None:
    """Store the largest finite |x| of the tensor."""
    with on(x):
        parts = _amax_parts(x)
        args = (parts, out, parts.numel())
        names = constants(4, P=power_of_two(parts.numel()))
        launch(k_quantize.amax_last_kernel, 1, args, names)


def amax_blocks(moved: Tensor, out: Tensor, block: int) -> None:
    """Store the largest |x| of each block along the last axis, NaN where not all is finite."""
    with on(moved):
        x, *_ = matrices(False, moved) or matrices(False, moved.contiguous()) or (None,)
        assert x is not None, "a contiguous tensor always falls into matrices"
        _amax_blocks(x, out, 1, block)


def _amax_blocks(x: Rows, out: Tensor, block_rows: int, block: int) -> None:
    tile_columns = min(power_of_two(block), 1024)
    grid_rows, grid_columns = -(-x.rows // block_rows), -(-x.columns // block)
    count = max(min(power_of_two(grid_columns), 2048 // tile_columns), 1)
    tiles = -(-grid_columns // count)
    args = (
        x.tensor, out, *x.strides, x.rows, x.columns, block_rows, block, grid_rows, grid_columns,
        tiles,
    )  # fmt: skip
    names = constants(4, NB=count, TC=tile_columns)
    launch(k_quantize.amax_blocks_kernel, x.lead * grid_rows * tiles, args, names)


def pack(codes: Tensor, packed: Tensor, bits: int) -> None:
    """Pack contiguous codes along the last axis."""
    _repack(k_layout.pack_kernel, codes, packed, codes.shape[-1], packed.shape[-1], bits)


def unpack(packed: Tensor, codes: Tensor, bits: int) -> None:
    """Unpack contiguous rows into `codes`."""
    _repack(k_layout.unpack_kernel, packed, codes, codes.shape[-1], packed.shape[-1], bits)


def _repack(kernel: Any, x: Tensor, y: Tensor, n: int, row_bytes: int, bits: int) -> None:
    rows, groups = math.prod(x.shape[:-1]), -(-n // 8)
    # One run: rows of whole groups without rest, of words that begin and end where it does.
    aligned = x.data_ptr() % 4 == 0 and rows * row_bytes % 4 == 0
    run = n % 8 == 0 and row_bytes == groups * bits and aligned
    even = rows * groups % GROUPS_TILE == 0
    names = constants(4, BITS=bits, G=GROUPS_TILE, RUN=run, EVEN=even)
    with on(x):
        args = (x, y, rows * groups, n, groups, row_bytes)
        launch(kernel, -(-rows * groups // GROUPS_TILE), args, names)
