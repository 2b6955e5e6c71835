# SPDX-License-Identifier: Apache-2.0
"""Large rotations fused with quantize, where codes are packed float16 fields and scales E8M0.

The general kernel gives a thread one block of 32, and every stride from 32 on costs a shuffle.
Here it takes two, one of either half of a rotation, so that the last stride stays within it; and
the rotation's factor enters with the scale, which saves a multiplication.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pyfmt.triton_kernels.codec import (
    block_scale,
    largest,
    not_finite,
    round_small,
    stored_as,
    to_float32,
)
from pyfmt.triton_kernels.layout import join_pieces, packed_halves
from pyfmt.triton_kernels.rotate import butterflies


@triton.jit
def _load_blocks(p, W: tl.constexpr):
    """Load blocks of 4 W elements at p (R,), each by one thread in pieces of W: (R, 4 W)."""
    p = p[:, None] + tl.arange(0, W)[None, :]
    first = join_pieces(tl.load(p), tl.load(p + W))
    return join_pieces(first, join_pieces(tl.load(p + 2 * W), tl.load(p + 3 * W)))


@triton.jit
def _finish(b_x, p_y, p_scale, F: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr):
    """Store the codes and scales of blocks (R, 8 G) that the rotation's factor still lacks."""
    FACTOR: tl.constexpr = SIZE**-0.5
    R: tl.constexpr = b_x.shape[0]
    # Rounding goes with the order: the largest of the products is the product of the largest.
    amax = largest(b_x, 1) * FACTOR
    bad = not_finite(amax)
    stored, inverse, _ = block_scale(amax, 1.0, 1.0, F)
    inverse = inverse * F.UNIT
    # One rounding is as good as two unless a rotated number that matters is subnormal (scales
    # below 8), or the factor with the scale is (scales above 230).
    if tl.max((stored - 8).to(tl.uint32, bitcast=True), 0) > 222:
        b_y = (b_x * FACTOR) * inverse[:, None]
    else:
        b_y = b_x * (inverse * FACTOR)[:, None]
    tl.store(p_scale, stored_as(stored, p_scale.dtype.element_ty))
    b_y = tl.reshape(b_y, (R * G, 8))
    word = tl.reshape(packed_halves(round_small(b_y, F), b_y, F.MAN), (R, G))
    tl.store(p_y[:, None] + tl.arange(0, G)[None, :], tl.where(bad[:, None], 0, word))


@triton.jit
def quantize_rotated_kernel(
    p_x, p_y, p_scale,
    F: tl.constexpr, SIZE: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Rotate and quantize NB blocks of BLOCK = 4 W elements of a run, whole tiles only."""
    R: tl.constexpr = NB // 2
    H: tl.constexpr = SIZE // BLOCK // 2
    G: tl.constexpr = BLOCK // 8
    i = tl.arange(0, R)
    block = tl.program_id(0).to(tl.int64) * NB + (i // H * (2 * H) + i % H)
    b_low = to_float32(_load_blocks(p_x + block * BLOCK, W))
    b_high = to_float32(_load_blocks(p_x + (block + H) * BLOCK, W))
    b_low = tl.reshape(butterflies(b_low, SIZE // 2, R * BLOCK), (R, BLOCK))
    b_high = tl.reshape(butterflies(b_high, SIZE // 2, R * BLOCK), (R, BLOCK))
    p_word = p_y.to(tl.pointer_type(tl.uint32)) + block * G
    _finish(b_low + b_high, p_word, p_scale + block, F, SIZE, G)
    _finish(b_low - b_high, p_word + H * G, p_scale + block + H, F, SIZE, G)
