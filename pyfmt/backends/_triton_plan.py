# SPDX-License-Identifier: Apache-2.0
"""How the Triton kernels are launched: tiles, warps and compile-time arguments, worked out once.

Sizes only, no tensors. The numbers were chosen for a Hopper GPU by counting bytes and instructions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from pyfmt import _check
from pyfmt.formats import SCALES, Format
from pyfmt.triton_kernels.facts import Facts, facts

# Elements of a tile: a thread takes 64 bytes of input, in 4 warps. Shuffles reach the 512 bytes of
# 32 lanes, so larger rotations get one warp, whose registers hold the rest.
TILE = {2: 4096, 4: 2048}
WARP_TILE = 1024
WARP_BYTES = 512
# 16-byte loads that make a thread's chunk, so that its codes are 16 bytes too: 4 but for these.
PIECES = {8: 2}
# Fewer tiles than this leave multiprocessors idle: take smaller ones.
FEW_TILES = 528
# Tiles of rows with strides; where rows lie next to each other a thread takes 64 elements.
GRID_TILE, ACROSS_TILE, LOOSE_TILE = 4096, 8192, 2048
# The largest block (padded to a power of two) that one program holds in registers.
LARGEST_BLOCK = 16384
AMAX_TILE, AMAX_WARPS, AMAX_PROGRAMS = 8192, 8, 512
# Rotations whose last stride a thread keeps to itself: two blocks of 32 a thread, one warp a tile.
PAIRED, PAIRED_TILE = (128, 256), 2048
GROUPS_TILE = 512  # groups of eight codes that a program packs or unpacks


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def constants(num_warps: int, **names: Any) -> dict[str, Any]:
    """Return compile-time arguments; the compiler must keep products and sums apart."""
    return {**names, "num_warps": num_warps, "enable_fp_fusion": False}


# ---- tiles ------------------------------------------------------------------------------------


def is_run(fmt: Format, columns: int) -> bool:
    """Whether blocks of contiguous rows follow each other without padding, in whole words."""
    block = fmt.block_columns(columns)
    return (
        fmt.block_rows == 1
        and block % 8 == 0
        and block == power_of_two(block)
        and block <= LARGEST_BLOCK
        and columns % block == 0
        and block * fmt.bits % 32 == 0
    )


def run_tile(blocks: int, block: int, itemsize: int, rotation: int = 1) -> tuple[int, int, bool]:
    """Return (blocks a tile, warps, whether tiles are whole) for a run of blocks."""
    least = max(WARP_TILE, block, rotation)
    elements = max(TILE[itemsize], least)
    if rotation * itemsize > WARP_BYTES:
        elements = least
    while elements > least and blocks * block < FEW_TILES * elements:
        elements //= 2
    warps = min(max(elements // WARP_TILE, 1), 16)
    if elements == TILE[itemsize]:
        warps = 4
    return elements // block, warps, blocks * block % elements == 0


@lru_cache(maxsize=4096)
def is_grid(fmt: Format, columns: int, fake: bool) -> bool:
    """Whether blocks fit in registers and begin at whole groups of eight codes."""
    block = fmt.block_columns(columns)
    small = power_of_two(fmt.block_rows) * max(power_of_two(block), 8) <= LARGEST_BLOCK
    return small and (fake or block % 8 == 0 or block >= columns)


@lru_cache(maxsize=4096)
def grid_tile(fmt: Format, rows: int, columns: int, across: bool) -> tuple[int, int, int, int]:
    """Return (rows, blocks, padded block, warps) of a tile; across: rows lie next to each other."""
    padded = max(power_of_two(fmt.block_columns(columns)), 8)
    blocks = power_of_two(fmt.blocks(columns))
    if across:
        # Two rows a thread, 64 a warp: a line of 128 bytes of bfloat16 for each load.
        count = max(32 // padded, 1)
        tile_rows = min(max(ACROSS_TILE // (padded * count), 64), LARGEST_BLOCK // padded)
        tile_rows = min(tile_rows, max(power_of_two(rows), 64))
        return tile_rows, count, padded, max(tile_rows * count * padded // 2048, 1)
    tile_rows = power_of_two(fmt.block_rows)
    count = max(min(GRID_TILE // (tile_rows * padded), blocks), 1)
    if fmt.block_rows == 1:
        tile_rows = max(min(GRID_TILE // (count * padded), power_of_two(rows)), 1)
    warps = min(max(tile_rows * count * padded // 1024, 1), 16)
    return tile_rows, count, padded, warps


@lru_cache(maxsize=4096)
def loose_tile(rows: int, columns: int, across: bool) -> tuple[int, int, int]:
    """Return (rows, columns, warps) of a tile of single elements."""
    if across:
        tile_columns = max(min(32, power_of_two(columns)), 8)
        tile_rows = max(min(ACROSS_TILE // 32, power_of_two(rows)), 64)
        return tile_rows, tile_columns, tile_rows // 64
    tile_columns = max(min(LOOSE_TILE, power_of_two(columns)), 8)
    return min(LOOSE_TILE // tile_columns, power_of_two(rows)), tile_columns, 4


def sign_rows(signs: int, rotation: int) -> str:
    """Return SIGNS of the kernels: whether signs repeat with each block or with each row."""
    return "" if not signs else "block" if signs == rotation else "row"


def amax_programs(elements: int) -> int:
    """Return how many programs share the search for a tensor's amax."""
    return min(-(-elements // AMAX_TILE), AMAX_PROGRAMS)


def is_paired(known: Facts, block: int, itemsize: int, rotation: int, elements: int) -> bool:
    """Whether the kernel of large rotations serves a run without signs of its own."""
    return (
        known.HALVES
        and known.SCALE == "e8m0"
        and block == 32
        and itemsize == 2
        and rotation in PAIRED
        and elements % PAIRED_TILE == 0
    )


# ---- plans ------------------------------------------------------------------------------------


def scales_shape(fmt: Format, lead: Sequence[int], columns: int) -> tuple[int, ...]:
    """The shape of the scales of a moved tensor of shape (*lead, columns)."""
    if not lead:
        return (fmt.blocks(columns),)
    return (*lead[:-1], -(-lead[-1] // fmt.block_rows), fmt.blocks(columns))


@dataclass(frozen=True, eq=False)
class Plan:
    """What one kind of call needs, worked out once: shapes, constants and the launch of a run."""

    facts: Facts
    axis: int
    codes: tuple[int, ...]
    scales: tuple[int, ...]
    scale_dtype: torch.dtype
    tensor: str  # TENSOR of the kernels: where the tensor scale comes from
    run: tuple[int, int, dict[str, Any]] | None  # blocks, grid, constants
    paired: tuple[int, dict[str, Any]] | None  # grid, constants of the kernel of large rotations


@lru_cache(maxsize=4096)
def plan(
    fmt: Format, shape: tuple[int, ...], dtype: torch.dtype, axis: int, rule: str | None,
    recipe: str | None, rounding: str, seed: Any, clip: str, given: str = "", rotation: int = 1,
    signs: int = 0, fake: bool = False,
) -> Plan:  # fmt: skip
    """Check the options and plan one kind of call.

    seed: 0 for any that is right; given: "value" or "given" for a caller's tensor scale; signs:
    how many there are.
    """
    _check.float_dtype(dtype)
    axis = _check.axis(axis, shape)
    rule, recipe = _check.options(fmt, rule, recipe, rounding, seed, clip)
    *lead, columns = (*shape[:axis], *shape[axis + 1 :], shape[axis])
    known = facts(fmt, rule, recipe, clip, rounding == "stochastic")
    tensor = ""
    if fmt.tensor_scale and recipe != "single_level":
        tensor = given or "amax"
    run, paired, elements = None, None, math.prod(shape)
    if elements and is_run(fmt, columns):
        block, itemsize = fmt.block_columns(columns), dtype.itemsize
        blocks = elements // block
        if not fake and not signs and is_paired(known, block, itemsize, rotation, elements):
            count = PAIRED_TILE // block
            paired = (
                blocks // count,
                constants(1, F=known, SIZE=rotation, NB=count, BLOCK=block, W=16 // itemsize),
            )
        count, warps, even = run_tile(blocks, block, itemsize, rotation)
        # Whole chunks pay where codes are packed; values are stored as wide as they are loaded.
        pieces = 1 if fake else PIECES.get(fmt.bits, 4)
        run_constants = constants(
            warps, F=known, FAKE=fake, TENSOR=tensor, P=power_of_two(amax_programs(elements)),
            SIGNS=sign_rows(signs, rotation), SIZE=rotation, BLOCK=block, NB=count,
            W=16 // itemsize, J=pieces, EVEN=even,
        )  # fmt: skip
        if tensor != "amax":
            run_constants["P"] = 1
        run = (blocks, -(-blocks // count), run_constants)
    return Plan(
        known,
        axis,
        (*lead, fmt.row_bytes(columns)),
        scales_shape(fmt, lead, columns),
        getattr(torch, SCALES[fmt.scale].dtype),
        tensor,
        run,
        paired,
    )


@lru_cache(maxsize=4096)
def dequantize_plan(
    fmt: Format, shape: tuple[int, ...], axis: int, dtype: torch.dtype, has_scale: bool
) -> tuple[int, tuple[int, ...], int, tuple[int, ...], tuple[int, int, dict[str, Any]] | None]:
    """Return (axis, lead, columns, shape of the scales, blocks and grid and constants of a run)."""
    axis = _check.axis(axis, shape)
    lead, columns = (*shape[:axis], *shape[axis + 1 :]), shape[axis]
    run, elements = None, math.prod(shape)
    if elements and is_run(fmt, columns):
        block = fmt.block_columns(columns)
        blocks = elements // block
        count, warps, even = run_tile(blocks, block, dtype.itemsize)
        names = constants(
            warps, F=facts(fmt), TENSOR=has_scale, BLOCK=block, NB=count, W=16 // dtype.itemsize,
            EVEN=even,
        )  # fmt: skip
        run = (blocks, -(-blocks // count), names)
    return axis, lead, columns, scales_shape(fmt, lead, columns), run


@lru_cache(maxsize=4096)
def hadamard_plan(
    elements: int, size: int, signs: int, itemsize: int
) -> tuple[int, dict[str, Any]]:
    count, warps, even = run_tile(elements // size, size, itemsize, size)
    names = constants(
        warps, SIGNS=sign_rows(signs, size), SIZE=size, N=count * size, W=16 // itemsize, EVEN=even
    )
    return -(-elements // (count * size)), names
