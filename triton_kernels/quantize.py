# SPDX-License-Identifier: Apache-2.0
"""Quantize, dequantize and fake-quantize on the device, for any format.

Three shapes of work, the host chooses:

run   blocks of a power of two lie behind each other in memory: [NB, BLOCK] tiles of one run
grid  any strides, ragged rows, square blocks, whole rows: [TR, NB, BP] tiles, blocks padded to BP
loose any block at all: [TR, TC] tiles of elements, amax of the blocks computed before

Names: i_ index, o_ offset, p_ pointer, b_ tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pyfmt.triton_kernels.codec import (
    INF_BITS,
    NAN_BITS,
    bits_of,
    block_scale,
    decode,
    encode,
    largest,
    not_finite,
    random24,
    random24_run,
    round_small,
    round_to,
    round_value,
    scale_value,
    stored_as,
    tensor_multipliers,
    to_float32,
)
from pyfmt.triton_kernels.layout import (
    chunk_offsets,
    load_chunks,
    load_codes,
    load_left,
    load_run,
    packed_halves,
    store_bytes,
    store_left,
    store_run,
)
from pyfmt.triton_kernels.rotate import load_signs, rotate

# ---- amax -------------------------------------------------------------------------------------


@triton.jit
def _finite_bits(x):
    """Return the bits of |x|, 0 where x is not finite."""
    bits = bits_of(tl.abs(x)).to(tl.int32)
    return tl.where(bits < INF_BITS, bits, 0)


@triton.jit
def amax_kernel(
    p_x, p_parts, n, p_signs, length, stride,
    SIGNS: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Each program stores the largest finite |x| of its share of a run, rotated if SIZE > 1."""
    acc = tl.zeros((N // W, W), tl.int32)
    first = tl.program_id(0).to(tl.int64) * N
    while first < n:
        left = tl.minimum(n - first, N).to(tl.int32)
        b_x = to_float32(load_chunks(p_x + first, left, N, W, 1, False))
        if SIGNS != "":
            b_x = b_x * load_signs(p_signs, first, length, N, W, 1, SIGNS, SIZE)
        if SIZE > 1:
            b_x = rotate(b_x, SIZE, N)
        acc = tl.maximum(acc, _finite_bits(b_x))
        first += stride
    amax = tl.max(tl.max(acc, 1), 0)
    tl.store(p_parts + tl.program_id(0), amax.to(tl.float32, bitcast=True))


@triton.jit
def amax_last_kernel(p_parts, p_amax, n_parts, P: tl.constexpr):
    """Store the largest of the parts."""
    o = tl.arange(0, P)
    tl.store(p_amax, tl.max(tl.load(p_parts + o, mask=o < n_parts, other=0.0), 0))


@triton.jit
def amax_blocks_kernel(
    p_x, p_amax, x_lead, x_row, x_column, rows, columns, block_rows, block_columns,
    grid_rows, grid_columns, tiles, NB: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Store the largest |x| of every block, NaN for a block with NaN or infinity."""
    i_tile = tl.program_id(0) % tiles
    i_row = tl.program_id(0) // tiles % grid_rows
    i_lead = tl.program_id(0).to(tl.int64) // tiles // grid_rows
    i_block = i_tile * NB + tl.arange(0, NB)
    o = tl.arange(0, TC)[None, :]
    p = p_x + i_lead * x_lead
    acc = tl.zeros((NB,), tl.int32)
    first_row = i_row.to(tl.int64) * block_rows
    row = first_row
    while row < tl.minimum(first_row + block_rows, rows):
        start = tl.zeros((), tl.int32)
        while start < block_columns:
            column = i_block[:, None].to(tl.int64) * block_columns + start + o
            mask = (start + o < block_columns) & (column < columns)
            x = tl.load(p + row * x_row + column * x_column, mask=mask, other=0)
            acc = tl.maximum(acc, tl.max(bits_of(tl.abs(to_float32(x))).to(tl.int32), 1))
            start += TC
        row += 1
    acc = tl.where(acc >= INF_BITS, NAN_BITS, acc).to(tl.float32, bitcast=True)
    p = p_amax + (i_lead * grid_rows + i_row) * grid_columns
    tl.store(p + i_block, acc, mask=i_block < grid_columns)


# ---- what the three shapes share --------------------------------------------------------------


@triton.jit
def _tensor_level(
    p_tensor, n_parts, p_stored, TENSOR: tl.constexpr, P: tl.constexpr, F: tl.constexpr
):
    """Return the tensor-level multipliers; the first program stores the tensor scale.

    TENSOR: "" none; "value" p_tensor is the scale; "given" it points to it; "amax" it points to
    n_parts amaxes.
    """
    if TENSOR == "":
        multiplier = 1.0
        tensor_scale = 1.0
    else:
        if TENSOR == "amax":
            o = tl.arange(0, P)
            t = tl.max(tl.load(p_tensor + o, mask=o < n_parts, other=0.0), 0)
        elif TENSOR == "given":
            t = tl.load(p_tensor)
        else:
            t = tl.full((), p_tensor, tl.float32)
        multiplier, tensor_scale = tensor_multipliers(t, TENSOR == "amax", F)
        if tl.program_id(0) == 0:
            tl.store(p_stored, tensor_scale)
    return multiplier, tensor_scale


@triton.jit
def _fake(y, x, random, scale, tensor_scale, bad, DTYPE: tl.constexpr, F: tl.constexpr):
    """Return the values that the codes of y stand for."""
    value = round_value(y, x, random, F) * scale
    if F.RECIPE == "nvidia" or F.RECIPE == "torchao":
        value = value * tensor_scale
    return round_to(value, bad, DTYPE)


# ---- run --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["key_low", "key_high"])
def quantize_run_kernel(
    p_x, p_y, p_scale, p_stored, p_tensor, n_parts, p_signs, length, n_blocks, key_low, key_high,
    F: tl.constexpr, FAKE: tl.constexpr, TENSOR: tl.constexpr, P: tl.constexpr,
    SIGNS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr,
    W: tl.constexpr, J: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Quantize blocks of one run: packed codes and scales, or values with FAKE."""
    N: tl.constexpr = NB * BLOCK
    i_first = tl.program_id(0).to(tl.int64) * NB
    left = tl.minimum(n_blocks - i_first, NB).to(tl.int32)
    first = i_first * BLOCK
    b_x = load_chunks(p_x + first, left * BLOCK, N, W, J, EVEN)
    multiplier, tensor_scale = _tensor_level(p_tensor, n_parts, p_stored, TENSOR, P, F)
    b_x = to_float32(b_x)
    if SIGNS != "":
        b_x = b_x * load_signs(p_signs, first, length, N, W, J, SIGNS, SIZE)
    if SIZE > 1:
        b_x = rotate(b_x, SIZE, N)
    b_x = tl.reshape(b_x, (NB, BLOCK))

    # Scales of the blocks.
    amax = largest(b_x, 1)
    bad = not_finite(amax)
    stored, inverse, scale = block_scale(amax, multiplier, tensor_scale, F)
    HALVES: tl.constexpr = F.HALVES and not FAKE
    if HALVES and F.SCALE == "e8m0":
        inverse = inverse * F.UNIT
    b_y = b_x * inverse[:, None]
    random = 0
    if F.STOCHASTIC:
        random = tl.reshape(random24_run(first, N, key_low, key_high), (NB, BLOCK))
    source = b_y
    if F.SCALE == "e8m0":
        source = b_x

    if FAKE:
        b_v = _fake(b_y, source, random, scale[:, None], tensor_scale, bad[:, None],
                    p_y.dtype.element_ty, F)  # fmt: skip
        b_v = tl.reshape(b_v, (N // W, W))
        store_left(p_y + first, b_v, chunk_offsets(N, W, 1), left * BLOCK, EVEN)
    else:
        stored = stored_as(stored, p_scale.dtype.element_ty)
        store_left(p_scale + i_first, stored, tl.arange(0, NB), left, EVEN)
        G: tl.constexpr = BLOCK // 8
    if HALVES:
        if F.SCALE != "e8m0":
            b_y = b_y * F.UNIT
        b_y = tl.reshape(b_y, (N // 8, 8))
        word = packed_halves(round_small(b_y, F), b_y, F.MAN)
        word = tl.reshape(tl.where(bad[:, None], 0, tl.reshape(word, (NB, G))), (N // 8,))
        p_word = p_y.to(tl.pointer_type(tl.uint32)) + i_first * G
        store_left(p_word, word, tl.arange(0, N // 8), left * G, EVEN)
    elif not FAKE:
        code = encode(b_y, source, random, F)
        code = tl.reshape(tl.where(bad[:, None], 0, code), (N // 8, 8))
        store_run(p_y, i_first * G, code, left * G, N, F.BITS, EVEN)


@triton.jit
def dequantize_run_kernel(
    p_code, p_scale, p_tensor, p_y, n_blocks,
    F: tl.constexpr, TENSOR: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr,
    W: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Decode blocks of one run."""
    N: tl.constexpr = NB * BLOCK
    G: tl.constexpr = BLOCK // 8
    first = tl.program_id(0).to(tl.int64) * NB
    left = tl.minimum(n_blocks - first, NB).to(tl.int32)
    code = load_run(p_code, first * G, left * G, N, F.BITS, EVEN)
    stored = load_left(p_scale + first, tl.arange(0, NB), left, EVEN)
    value = decode(tl.reshape(code, (NB, BLOCK)), F) * scale_value(stored, F)[:, None]
    if TENSOR:
        value = value * tl.load(p_tensor)
    b_y = round_to(value, value != value, p_y.dtype.element_ty)
    b_y = tl.reshape(b_y, (N // W, W))
    store_left(p_y + first * BLOCK, b_y, chunk_offsets(N, W, 1), left * BLOCK, EVEN)


# ---- grid -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["key_low", "key_high"])
def quantize_grid_kernel(
    p_x, p_y, p_scale, p_stored, p_tensor, n_parts, key_low, key_high,
    x_lead, x_row, x_column, y_lead, y_row, y_column, rows, columns, row_step, block_columns,
    grid_columns, row_tiles, column_tiles,
    F: tl.constexpr, FAKE: tl.constexpr, TENSOR: tl.constexpr, P: tl.constexpr,
    SQUARE: tl.constexpr, ACROSS: tl.constexpr, WORDS: tl.constexpr,
    TR: tl.constexpr, NB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Quantize tiles of rows by NB blocks. SQUARE: one block row of row_step rows a tile.

    x and y (the values with FAKE, else bytes): rows of a matrix, `*_lead` apart between matrices.
    ACROSS: rows lie next to each other in x.
    WORDS: packed rows of 4-bit codes whose groups of eight are aligned words.
    """
    i_column = tl.program_id(0) % column_tiles
    i_tile = tl.program_id(0) // column_tiles % row_tiles
    i_lead = (tl.program_id(0) // column_tiles // row_tiles).to(tl.int64)
    o_row = tl.arange(0, TR)
    o_block = tl.arange(0, NB)
    o_in = tl.arange(0, BP)
    row = i_tile.to(tl.int64) * row_step + o_row
    if ACROSS:
        # Two rows a thread and all threads along rows: blocks stay within a thread's registers.
        row = tl.max_contiguous(row, 2)
    is_row = (o_row < row_step) & (row < rows)
    i_block = i_column * NB + o_block
    column = i_block.to(tl.int64)[:, None] * block_columns + o_in[None, :]  # [NB, BP]
    is_code = (o_in < block_columns)[None, :] & (i_block < grid_columns)[:, None]
    mask = is_row[:, None, None] & (is_code & (column < columns))[None, :, :]
    p = p_x + i_lead * x_lead
    p = p + (row * x_row)[:, None, None] + (column * x_column)[None, :, :]
    b_x = tl.load(p, mask=mask, other=0)  # [TR, NB, BP]
    multiplier, tensor_scale = _tensor_level(p_tensor, n_parts, p_stored, TENSOR, P, F)
    b_x = to_float32(b_x)

    amax = largest(b_x, 2)
    if SQUARE:
        amax = largest(amax, 0)[None, :]  # [1, NB]
    bad = not_finite(amax)
    stored, inverse, scale = block_scale(amax, multiplier, tensor_scale, F)
    b_y = b_x * inverse[:, :, None]
    random = 0
    if F.STOCHASTIC:
        i_row = i_lead * rows + row
        random = random24((i_row * columns)[:, None, None] + column[None, :, :], key_low, key_high)
    source = b_y
    if F.SCALE == "e8m0":
        source = b_x

    if FAKE:
        b_v = _fake(b_y, source, random, scale[:, :, None], tensor_scale, bad[:, :, None],
                    p_y.dtype.element_ty, F)  # fmt: skip
        p = p_y + i_lead * y_lead
        p = p + (row * y_row)[:, None, None] + (column * y_column)[None, :, :]
        tl.store(p, b_v, mask=mask)
    else:
        if SQUARE:
            i_scale = i_lead * row_tiles + i_tile + tl.zeros((1,), tl.int64)
            is_scale = tl.full((1,), True, tl.int1)
        else:
            i_scale = i_lead * rows + row
            is_scale = is_row
        p = p_scale + (i_scale * grid_columns)[:, None] + i_block[None, :]
        is_scale = is_scale[:, None] & (i_block < grid_columns)[None, :]
        tl.store(p, stored_as(stored, p_scale.dtype.element_ty), mask=is_scale)
        code = encode(b_y, source, random, F)
        code = tl.where(bad[:, :, None], 0, code)
        p_row = (p_y + i_lead * y_lead + row * y_row)[:, None, None]
        if F.BITS == 8:
            mask = is_row[:, None, None] & is_code[None, :, :]
            tl.store(p_row + column[None, :, :], code.to(tl.uint8), mask=mask)
        else:
            C: tl.constexpr = BP // 8
            o_group = tl.arange(0, C) * 8
            group = (i_block.to(tl.int64)[:, None] * block_columns + o_group[None, :]) // 8
            is_group = (o_group < block_columns)[None, :] & (i_block < grid_columns)[:, None]
            is_group = is_row[:, None, None] & is_group[None, :, :]
            code = tl.reshape(code, (TR, NB, C, 8))
            if WORDS:
                shift = (tl.arange(0, 8) * 4).to(tl.uint32)[None, None, None, :]
                word = tl.sum(code << shift, 3)
                p = p_row.to(tl.pointer_type(tl.uint32)) + group[None, :, :]
                tl.store(p, word, mask=is_group)
            else:
                # Only a block that ends its row may end within a group.
                rest = (block_columns - o_group)[None, None, :] * F.BITS
                left = tl.where(is_group, (rest + 7) // 8, 0)
                store_bytes(p_row, group, code, tl.minimum(left, F.BITS), F.BITS)


# ---- loose ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["key_low", "key_high"])
def quantize_loose_kernel(
    p_x, p_y, p_amax, p_scale, p_stored, p_tensor, n_parts, key_low, key_high,
    x_lead, x_row, x_column, y_lead, y_row, y_column, rows, columns, row_bytes,
    block_rows, block_columns, grid_rows, grid_columns, row_tiles, column_tiles,
    F: tl.constexpr, FAKE: tl.constexpr, TENSOR: tl.constexpr, P: tl.constexpr,
    TR: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Quantize tiles of elements with the amax of each one's block."""
    i_column = tl.program_id(0) % column_tiles
    i_tile = tl.program_id(0) // column_tiles % row_tiles
    i_lead = (tl.program_id(0) // column_tiles // row_tiles).to(tl.int64)
    row = i_tile.to(tl.int64) * TR + tl.arange(0, TR)
    column = i_column.to(tl.int64) * TC + tl.arange(0, TC)
    is_row = row < rows
    mask = is_row[:, None] & (column < columns)[None, :]
    p = p_x + i_lead * x_lead
    b_x = tl.load(p + (row * x_row)[:, None] + (column * x_column)[None, :], mask=mask, other=0)
    multiplier, tensor_scale = _tensor_level(p_tensor, n_parts, p_stored, TENSOR, P, F)
    b_x = to_float32(b_x)  # [TR, TC]

    i_row = i_lead * grid_rows + row // block_rows
    i_block = column // block_columns
    i_scale = (i_row * grid_columns)[:, None] + i_block[None, :]
    is_scale = is_row[:, None] & (i_block < grid_columns)[None, :]
    amax = tl.load(p_amax + i_scale, mask=is_scale, other=0.0)
    bad = not_finite(amax)
    stored, inverse, scale = block_scale(amax, multiplier, tensor_scale, F)
    b_y = b_x * inverse
    random = 0
    if F.STOCHASTIC:
        first = (i_lead * rows + row) * columns
        random = random24(first[:, None] + column[None, :], key_low, key_high)
    source = b_y
    if F.SCALE == "e8m0":
        source = b_x

    if FAKE:
        b_v = _fake(b_y, source, random, scale, tensor_scale, bad, p_y.dtype.element_ty, F)
        p = p_y + i_lead * y_lead + (row * y_row)[:, None] + (column * y_column)[None, :]
        tl.store(p, b_v, mask=mask)
    else:
        # The element at a block's corner stores its scale.
        corner = (row % block_rows == 0)[:, None] & (column % block_columns == 0)[None, :]
        stored = stored_as(stored, p_scale.dtype.element_ty)
        tl.store(p_scale + i_scale, stored, mask=is_scale & corner)
        code = encode(b_y, source, random, F)
        code = tl.where(bad, 0, code)
        C: tl.constexpr = TC // 8
        group = i_column.to(tl.int64) * C + tl.arange(0, C)
        left = tl.where(is_row[:, None], (row_bytes - group * F.BITS)[None, :], 0)
        p_row = (p_y + i_lead * y_lead + row * y_row)[:, None, None]
        code = tl.reshape(code, (TR, 1, C, 8))
        left = tl.minimum(left, F.BITS)[:, None, :]
        store_bytes(p_row, group[None, :], code, left, F.BITS)


@triton.jit
def dequantize_loose_kernel(
    p_code, p_scale, p_tensor, p_y, y_lead, y_row, y_column, rows, columns, row_bytes,
    block_rows, block_columns, grid_rows, grid_columns, row_tiles, column_tiles,
    F: tl.constexpr, TENSOR: tl.constexpr, ACROSS: tl.constexpr, WORDS: tl.constexpr,
    BLOCK: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Decode tiles of elements. BLOCK: columns of a block where tiles hold whole ones, else 0.

    WORDS: packed rows of 4-bit codes are aligned words; ACROSS: rows lie next to each other in y.
    """
    i_column = tl.program_id(0) % column_tiles
    i_tile = tl.program_id(0) // column_tiles % row_tiles
    i_lead = (tl.program_id(0) // column_tiles // row_tiles).to(tl.int64)
    row = i_tile.to(tl.int64) * TR + tl.arange(0, TR)
    if ACROSS:
        row = tl.max_contiguous(row, 2)
    is_row = row < rows
    first = i_column.to(tl.int64) * TC
    column = first + tl.arange(0, TC)
    mask = is_row[:, None] & (column < columns)[None, :]
    p_row = p_code + (i_lead * rows + row) * row_bytes
    code = load_codes(p_row, is_row, first, columns, F.BITS, WORDS, TR, TC)

    i_row = ((i_lead * grid_rows + row // block_rows) * grid_columns)[:, None]
    if BLOCK > 0:
        i_block = i_column.to(tl.int64) * (TC // BLOCK) + tl.arange(0, TC // BLOCK)
        is_scale = is_row[:, None] & (i_block < grid_columns)[None, :]
        stored = tl.load(p_scale + i_row + i_block[None, :], mask=is_scale, other=0)
        value = tl.reshape(decode(code, F), (TR, TC // BLOCK, BLOCK))
        value = tl.reshape(value * scale_value(stored, F)[:, :, None], (TR, TC))
    else:
        i_block = (column // block_columns)[None, :]
        stored = tl.load(p_scale + i_row + i_block, mask=mask, other=0)
        value = decode(code, F) * scale_value(stored, F)
    if TENSOR:
        value = value * tl.load(p_tensor)
    p = p_y + i_lead * y_lead + (row * y_row)[:, None] + (column * y_column)[None, :]
    tl.store(p, round_to(value, value != value, p_y.dtype.element_ty), mask=mask)
