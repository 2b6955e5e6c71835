# SPDX-License-Identifier: Apache-2.0
"""Block Hadamard rotation on the device, in float32 with the reference's order of additions."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pyfmt.triton_kernels.codec import float_of, round_to, to_float32
from pyfmt.triton_kernels.layout import chunk_offsets, join_pieces, load_chunks, store_left


@triton.jit
def _butterflies(x, STRIDE: tl.constexpr, N: tl.constexpr):
    """One stage: (a, b) -> (a + b, a - b) for elements STRIDE apart.

    An element's partner is the sum of the pair's bits as integers less its own bits. The compiler
    cancels that to the move itself: a register of the same thread or one shuffle between lanes.
    """
    pair = tl.reshape(x, (N // (2 * STRIDE), 2, STRIDE))
    bits = pair.to(tl.int32, bitcast=True)
    partner = float_of(tl.sum(bits, 1, keep_dims=True) - bits)
    sign = (1 - 2 * tl.arange(0, 2)).to(tl.float32)[None, :, None]
    return tl.fma(pair, sign, partner)


@triton.jit
def butterflies(x, SIZE: tl.constexpr, N: tl.constexpr):
    """Return H x of a run of N float32 elements by blocks of SIZE: strides 1, 2, 4, ..."""
    y = x
    for k in tl.static_range(10):
        if 2**k < SIZE:
            y = _butterflies(y, 2**k, N)
    return y


@triton.jit
def rotate(x, SIZE: tl.constexpr, N: tl.constexpr):
    """Rotate a run of N float32 elements by blocks of SIZE; x: any shape of N elements.

    y = H x * float32(SIZE^(-1/2)). Returns the shape of x.
    """
    return tl.reshape(butterflies(x, SIZE, N), x.shape) * SIZE**-0.5


@triton.jit
def _signs1(p, first, length, o, W: tl.constexpr, SIGNS: tl.constexpr, SIZE: tl.constexpr):
    """Load the signs of pieces of W elements that begin o (M, 1) elements after `first`."""
    i = tl.arange(0, W)[None, :]
    if SIGNS == "block":
        # Every tile begins with a block.
        p = p + ((o + i).to(tl.uint32) % SIZE).to(tl.int32)
    elif SIZE >= W:
        p = p + ((first + o) % length + i)
    else:
        p = p + (first + o + i) % length
    return to_float32(tl.load(p))


@triton.jit
def _signs2(p, first, length, o, W: tl.constexpr, SIGNS: tl.constexpr, SIZE: tl.constexpr):
    a = _signs1(p, first, length, o, W, SIGNS, SIZE)
    return join_pieces(a, _signs1(p, first, length, o + W, W, SIGNS, SIZE))


@triton.jit
def load_signs(
    p, first, length, N: tl.constexpr, W: tl.constexpr, J: tl.constexpr,
    SIGNS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Load the signs of the N elements from `first` on, as the chunks of `load_chunks`.

    SIGNS: "block" where they repeat with each block of SIZE, "row" with each row of `length`.
    """
    o = tl.arange(0, N // (W * J))[:, None] * (W * J)
    if J == 1:
        y = _signs1(p, first, length, o, W, SIGNS, SIZE)
    elif J == 2:
        y = _signs2(p, first, length, o, W, SIGNS, SIZE)
    else:
        y = _signs2(p, first, length, o, W, SIGNS, SIZE)
        y = join_pieces(y, _signs2(p, first, length, o + 2 * W, W, SIGNS, SIZE))
    return y


@triton.jit
def hadamard_kernel(
    p_x, p_y, p_signs, length, n,
    SIGNS: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rotate the n elements of a run by blocks of SIZE, N elements a program."""
    first = tl.program_id(0).to(tl.int64) * N
    left = tl.minimum(n - first, N).to(tl.int32)
    b_x = to_float32(load_chunks(p_x + first, left, N, W, 1, EVEN))  # [N / W, W]
    if SIGNS != "":
        b_x = b_x * load_signs(p_signs, first, length, N, W, 1, SIGNS, SIZE)
    b_y = rotate(b_x, SIZE, N)
    b_y = round_to(b_y, b_y != b_y, p_y.dtype.element_ty)
    store_left(p_y + first, b_y, chunk_offsets(N, W, 1), left, EVEN)
