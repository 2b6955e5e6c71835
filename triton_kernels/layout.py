# SPDX-License-Identifier: Apache-2.0
"""Packed codes on the device: little-endian bit streams, eight codes in BITS bytes."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pyfmt.triton_kernels.codec import INTERPRET, bits_of

# ---- runs of elements -------------------------------------------------------------------------


@triton.jit
def store_left(p, y, o, left, EVEN: tl.constexpr):
    """Store y at p + o, less what lies beyond `left`."""
    if EVEN:
        tl.store(p + o, y)
    else:
        tl.store(p + o, y, mask=o < left)


@triton.jit
def load_left(p, o, left, EVEN: tl.constexpr):
    if EVEN:
        y = tl.load(p + o)
    else:
        y = tl.load(p + o, mask=o < left, other=0)
    return y


@triton.jit
def chunk_offsets(N: tl.constexpr, W: tl.constexpr, J: tl.constexpr):
    """Return the offsets of N elements in chunks of J pieces of W: the first piece of each."""
    return tl.arange(0, N // (W * J))[:, None] * (W * J) + tl.arange(0, W)[None, :]


@triton.jit
def join_pieces(a, b):
    """Join pieces (M, C) and (M, C), one behind the other: (M, 2 C). Registers only get names."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _load2(p, o, left, W: tl.constexpr, EVEN: tl.constexpr):
    return join_pieces(load_left(p, o, left, EVEN), load_left(p, o + W, left, EVEN))


@triton.jit
def load_chunks(p, left, N: tl.constexpr, W: tl.constexpr, J: tl.constexpr, EVEN: tl.constexpr):
    """Load N elements of a run as chunks (N // (W * J), W * J), of which a thread gets whole ones.

    W: elements of 16 bytes; J (1, 2 or 4): loads that make a chunk, joined in registers. What
    neighbours share (scales, butterflies, packed words) then stays within the thread. left: how
    many elements are there; it counts where EVEN is false.
    """
    o = chunk_offsets(N, W, J)
    if J == 1:
        y = load_left(p, o, left, EVEN)
    elif J == 2:
        y = _load2(p, o, left, W, EVEN)
    else:
        second = _load2(p, o + 2 * W, left, W, EVEN)
        y = join_pieces(_load2(p, o, left, W, EVEN), second)
    return y


# ---- eight codes at a time --------------------------------------------------------------------


@triton.jit
def packed8(code, BITS: tl.constexpr):
    """Join groups of eight codes (..., 8) to BITS * 8 bits: uint32 up to 4 bits, else uint64."""
    shift = tl.arange(0, 8) * BITS
    if len(code.shape) == 2:
        shift = shift[None, :]
    elif len(code.shape) == 3:
        shift = shift[None, None, :]
    else:
        shift = shift[None, None, None, :]
    if BITS > 4:
        word = tl.sum(code.to(tl.uint64) << shift.to(tl.uint64), len(code.shape) - 1)
    else:
        word = tl.sum(code << shift.to(tl.uint32), len(code.shape) - 1)
    return word


@triton.jit
def store_run(p_packed, first, code, left, N: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Store codes (N // 8, 8) that lie in one run, group `first` (int64) at its beginning.

    left: groups from `first` to the end of the run; it counts where EVEN is false. The run begins
    at a multiple of 4 bytes and, for 3 and 6 bits, holds one.
    """
    G: tl.constexpr = N // 8
    if BITS == 8:
        o = tl.arange(0, N)
        store_left(p_packed + first * 8, tl.reshape(code, (N,)).to(tl.uint8), o, left * 8, EVEN)
    elif BITS == 4:
        p = p_packed.to(tl.pointer_type(tl.uint32)) + first
        store_left(p, packed8(code, 4), tl.arange(0, G), left, EVEN)
    elif BITS == 2:
        p = p_packed.to(tl.pointer_type(tl.uint16)) + first
        store_left(p, packed8(code, 2).to(tl.uint16), tl.arange(0, G), left, EVEN)
    elif BITS == 6 or BITS == 3:
        # Four pieces of 24 bits in three words.
        if BITS == 3:
            piece = packed8(code, 3)
        else:
            four = tl.reshape(code, (N // 4, 4))
            shift = (tl.arange(0, 4) * 6).to(tl.uint32)
            piece = tl.sum(four << shift[None, :], 1)
        M: tl.constexpr = N * BITS // 96
        even, odd = tl.split(tl.reshape(piece, (M, 2, 2)))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        w0 = v0 | (v1 << 24)
        w1 = (v1 >> 8) | (v2 << 16)
        w2 = (v2 >> 16) | (v3 << 8)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w1)), (M, 4))
        j = tl.arange(0, 4)[None, :]
        o = tl.arange(0, M)[:, None] * 3 + j
        p = p_packed.to(tl.pointer_type(tl.uint32)) + first * BITS // 4
        mask = j < 3
        if not EVEN:
            mask = mask & (o < left * BITS // 4)
        tl.store(p + o, words, mask=mask)
    else:
        j = tl.arange(0, 8)[None, :]
        o = tl.arange(0, G)[:, None] * BITS + j
        byte = packed8(code, BITS)[:, None] >> (j * 8).to(tl.uint64)
        mask = j < BITS
        if not EVEN:
            mask = mask & (o < left * BITS)
        tl.store(p_packed + first * BITS + o, byte.to(tl.uint8), mask=mask)


@triton.jit
def load_run(p_packed, first, left, N: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Load N codes of a run as (N // 8, 8) uint32, bits above the code undefined."""
    G: tl.constexpr = N // 8
    if BITS == 8:
        o = tl.arange(0, N)
        code = tl.reshape(load_left(p_packed + first * 8, o, left * 8, EVEN), (G, 8)).to(tl.uint32)
    elif BITS == 4:
        p = p_packed.to(tl.pointer_type(tl.uint32)) + first
        word = load_left(p, tl.arange(0, G), left, EVEN)
        code = word[:, None] >> (tl.arange(0, 8) * 4).to(tl.uint32)[None, :]
    elif BITS == 2:
        p = p_packed.to(tl.pointer_type(tl.uint16)) + first
        word = load_left(p, tl.arange(0, G), left, EVEN).to(tl.uint32)
        code = word[:, None] >> (tl.arange(0, 8) * 2).to(tl.uint32)[None, :]
    elif BITS == 6 or BITS == 3:
        M: tl.constexpr = N * BITS // 96
        j = tl.arange(0, 4)[None, :]
        o = tl.arange(0, M)[:, None] * 3 + j
        p = p_packed.to(tl.pointer_type(tl.uint32)) + first * BITS // 4
        mask = j < 3
        if not EVEN:
            mask = mask & (o < left * BITS // 4)
        words = tl.load(p + o, mask=mask, other=0)
        even, w1 = tl.split(tl.reshape(words, (M, 2, 2)))
        w0, w2 = tl.split(even)
        w1, _ = tl.split(w1)
        v1 = (w0 >> 24) | (w1 << 8)
        v2 = (w1 >> 16) | (w2 << 16)
        pieces = tl.reshape(tl.join(tl.join(w0, v2), tl.join(v1, w2 >> 8)), (M * 4,))
        shift = (tl.arange(0, 24 // BITS) * BITS).to(tl.uint32)
        code = tl.reshape(pieces[:, None] >> shift[None, :], (G, 8))
    else:
        j = tl.arange(0, 8)[None, :]
        o = tl.arange(0, G)[:, None] * BITS + j
        mask = j < BITS
        if not EVEN:
            mask = mask & (o < left * BITS)
        byte = tl.load(p_packed + first * BITS + o, mask=mask, other=0).to(tl.uint64)
        word = tl.sum(byte << (j * 8).to(tl.uint64), 1)
        shift = (tl.arange(0, 8) * BITS).to(tl.uint64)
        code = (word[:, None] >> shift[None, :]).to(tl.uint32)
    return code


@triton.jit
def store_bytes(p_row, group, code, bytes_left, BITS: tl.constexpr):
    """Store codes (A, B, C, 8) byte by byte: BITS bytes for each group, within `bytes_left`.

    p_row: (A, 1, 1) pointers to rows of packed codes; group: (B, C), each group's number in its
    row; bytes_left: (A, B, C), how many of the group's bytes are there.
    """
    j = tl.arange(0, 8)
    word = packed8(code, BITS).to(tl.uint64)
    byte = word[:, :, :, None] >> (j * 8).to(tl.uint64)[None, None, None, :]
    p = (p_row + group[None, :, :] * BITS)[:, :, :, None] + j[None, None, None, :]
    mask = j[None, None, None, :] < bytes_left[:, :, :, None]
    tl.store(p, byte.to(tl.uint8), mask=mask)


@triton.jit
def load_codes(
    p_row, is_row, first, columns, BITS: tl.constexpr, WORDS: tl.constexpr, TR: tl.constexpr,
    TC: tl.constexpr,
):  # fmt: skip
    """Load TC codes of TR rows from column `first` on, bits above the code undefined."""
    if WORDS:
        # The rows' bytes are whole words: a word is there where its first code is.
        o_word = first // 8 + tl.arange(0, TC // 8)
        p = p_row.to(tl.pointer_type(tl.uint32))[:, None] + o_word[None, :]
        mask = is_row[:, None] & (o_word * 8 < columns)[None, :]
        word = tl.load(p, mask=mask, other=0)
        shift = (tl.arange(0, 8) * 4).to(tl.uint32)[None, None, :]
        code = tl.reshape(word[:, :, None] >> shift, (TR, TC))
    else:
        column = first + tl.arange(0, TC)
        mask = is_row[:, None] & (column < columns)[None, :]
        if BITS == 8:
            code = tl.load(p_row[:, None] + column[None, :], mask=mask, other=0).to(tl.uint32)
        else:
            bit = column * BITS
            p = p_row[:, None] + (bit // 8)[None, :]
            code = tl.load(p, mask=mask, other=0).to(tl.uint32)
            if 8 % BITS != 0:
                more = mask & (bit % 8 + BITS > 8)[None, :]
                code = code | (tl.load(p + 1, mask=more, other=0).to(tl.uint32) << 8)
            code = code >> (bit % 8).to(tl.uint32)[None, :]
    return code


# ---- codes of four bits, from numbers ----------------------------------------------------------


@triton.jit
def _two_halves(low, high):
    """Return two tensors, rounded to float16, as the halves of one uint32."""
    if INTERPRET:
        a = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        b = high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        y = a | (b << 16)
    else:
        y = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.uint32, True, 1
        )
    return y


@triton.jit
def _four_tops(a, b, c, d):
    """Return the top bytes of four uint32 as one, the first lowest."""
    if INTERPRET:
        y = (a >> 24) | ((b >> 24) << 8) | ((c >> 24) << 16) | ((d >> 24) << 24)
    else:
        y = tl.inline_asm_elementwise(
            "{.reg .b32 p, q; prmt.b32 p, $1, $2, 0x73; prmt.b32 q, $3, $4, 0x73; "
            "prmt.b32 $0, p, q, 0x5410;}",
            "=r,r,r,r,r", [a, b, c, d], tl.uint32, True, 1,
        )  # fmt: skip
    return y


@triton.jit
def _split4(x):
    """Return the four columns of (M, 4)."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def packed_halves(value, y, MAN: tl.constexpr):
    """Pack numbers of 4 bits, eight in a uint32; see F.HALVES.

    value: (M, 8) magnitudes, each a float16 whose exponent and fraction are the code; y: (M, 8)
    with their signs.
    """
    M: tl.constexpr = y.shape[0]
    # Element j beside element j + 4, the code at bit 10 - MAN of its half.
    low, high = tl.split(tl.permute(tl.reshape(value, (M, 2, 4)), (0, 2, 1)))
    a, b, c, d = _split4(_two_halves(low, high))
    word = ((((a >> 4) + b) >> 4) + c + (d << 4)) >> (2 - MAN)
    even, odd = tl.split(tl.reshape(bits_of(y), (M, 4, 2)))
    a, b, c, d = _split4(even)
    word = word | ((_four_tops(a, b, c, d) >> 4) & 0x08080808)
    a, b, c, d = _split4(odd)
    return word | (_four_tops(a, b, c, d) & 0x80808080)


# ---- the verbs pack and unpack ----------------------------------------------------------------


@triton.jit
def pack_kernel(
    p_code, p_packed, n_groups, n, groups, row_bytes,
    BITS: tl.constexpr, G: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Pack rows of n codes. RUN: rows of whole groups of eight, taken as one run."""
    first = tl.program_id(0).to(tl.int64) * G
    o_group = tl.arange(0, G)
    j = tl.arange(0, 8)[None, :]
    left = tl.minimum(n_groups - first, G).to(tl.int32)
    if RUN:
        o = tl.arange(0, G * 8)
        code = load_left(p_code + first * 8, o, left * 8, EVEN).to(tl.uint32) & (2**BITS - 1)
        code = tl.reshape(code, (G, 8))
        store_run(p_packed, first, code, left, G * 8, BITS, EVEN)
    else:
        i_group = first + o_group
        row = (i_group // groups)[:, None]
        column = (i_group % groups)[:, None]
        mask = (o_group < left)[:, None] & (column * 8 + j < n)
        code = tl.load(p_code + row * n + column * 8 + j, mask=mask, other=0)
        word = packed8(code.to(tl.uint32) & (2**BITS - 1), BITS).to(tl.uint64)
        byte = word[:, None] >> (j * 8).to(tl.uint64)
        mask = (j < BITS) & (o_group < left)[:, None] & (column * BITS + j < row_bytes)
        tl.store(p_packed + row * row_bytes + column * BITS + j, byte.to(tl.uint8), mask=mask)


@triton.jit
def unpack_kernel(
    p_packed, p_code, n_groups, n, groups, row_bytes,
    BITS: tl.constexpr, G: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Unpack n codes of each row; rows lie row_bytes apart."""
    first = tl.program_id(0).to(tl.int64) * G
    o_group = tl.arange(0, G)
    j = tl.arange(0, 8)[None, :]
    left = tl.minimum(n_groups - first, G).to(tl.int32)
    if RUN:
        code = load_run(p_packed, first, left, G * 8, BITS, EVEN) & (2**BITS - 1)
        o = tl.arange(0, G * 8)
        store_left(p_code + first * 8, tl.reshape(code, (G * 8,)).to(tl.uint8), o, left * 8, EVEN)
    else:
        i_group = first + o_group
        row = (i_group // groups)[:, None]
        column = (i_group % groups)[:, None]
        mask = (j < BITS) & (o_group < left)[:, None] & (column * BITS + j < row_bytes)
        byte = tl.load(p_packed + row * row_bytes + column * BITS + j, mask=mask, other=0)
        word = tl.sum(byte.to(tl.uint64) << (j * 8).to(tl.uint64), 1)
        code = (word[:, None] >> (j * BITS).to(tl.uint64)) & (2**BITS - 1)
        mask = (o_group < left)[:, None] & (column * 8 + j < n)
        tl.store(p_code + row * n + column * 8 + j, code.to(tl.uint8), mask=mask)
