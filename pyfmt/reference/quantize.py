# SPDX-License-Identifier: Apache-2.0
"""Quantize, dequantize and fake-quantize: block scales by every rule and recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyfmt import _check
from pyfmt.formats import FLT_MAX, Format
from pyfmt.reference import codec, layout
from pyfmt.reference.codec import Array, namespace, to_float32
from pyfmt.reference.rotate import rotate_rows

E4M3_MAX = codec.E4M3.max


class Blocks(NamedTuple):
    """How a tensor falls into blocks once the quantized axis is last: (lead, rows, length)."""

    lead: int
    rows: int
    length: int
    block_rows: int
    block_columns: int

    @classmethod
    def of(cls, shape: Sequence[int], fmt: Format) -> Blocks:
        """Describe rows of `shape` (quantized axis last); square blocks span the last two axes."""
        *lead, length = shape
        rows = lead[-1] if lead else 1
        count = int(np.prod(lead[:-1], dtype=np.int64)) if lead else 1
        return cls(count, rows, length, fmt.block_rows, fmt.block_columns(length))

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return -(-self.rows // self.block_rows), -(-self.length // self.block_columns)

    def split(self, rows: Array) -> Array:
        """Return (lead, grid rows, block rows, grid columns, block columns), padded with zeros."""
        xp, (r, c) = namespace(rows), self.grid
        x = rows.reshape(self.lead, self.rows, self.length)
        pad_r, pad_c = r * self.block_rows - self.rows, c * self.block_columns - self.length
        x = xp.pad(x, [(0, 0), (0, pad_r), (0, pad_c)])
        return x.reshape(self.lead, r, self.block_rows, c, self.block_columns)

    def join(self, blocks: Array, lead: Sequence[int]) -> Array:
        """Undo `split` except for the padding of the last axis: (*lead, padded length)."""
        r, c = self.grid
        x = blocks.reshape(self.lead, r * self.block_rows, c * self.block_columns)
        return x[:, : self.rows].reshape(*lead, c * self.block_columns)

    def scales_shape(self, lead: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales: (*lead, blocks), with block rows for square blocks."""
        r, c = self.grid
        return (*lead[:-1], r, c) if lead else (c,)


def _e8m0(blocks: Array, amax: Array, fmt: Format, rule: str) -> tuple[Array, Array]:
    """Return scale bytes and y = x * 2^-E, exactly (float64)."""
    xp = namespace(blocks)
    exponent = codec.e8m0_exponent(amax, fmt.element, rule)
    y = xp.ldexp(blocks.astype(np.float64), -exponent[:, :, None, :, None])
    return (exponent + 127).astype(np.uint8), y


def _e4m3_scale(
    amax: Array, fmt: Format, recipe: str, tensor_amax: Array, given: Array | None
) -> tuple[Array, Array, Array | None]:
    """Return E4M3 scale codes, the element multiplier and the tensor scale, step by step in fp32.

    nvidia: S = min(448 Q / amax_tensor, FLT_MAX), tensor_scale = 1 / S,
            s = e4m3(min(amax * (S * (1 / Q)), FLT_MAX)), enc = min(1 / (s * tensor_scale), FLT_MAX)
    torchao: tensor_scale = amax_tensor / (448 Q), s = e4m3(clamp(amax / Q / tensor_scale, 2^-6,
            448)), enc = min(1 / tensor_scale / s, FLT_MAX)
    single_level: nvidia with S = 1 and no tensor scale. A given tensor_scale makes nvidia's S
    min(1 / tensor_scale, FLT_MAX).
    """
    xp = namespace(amax)
    one, q, top = np.float32(1), np.float32(fmt.max), np.float32(E4M3_MAX * fmt.max)
    huge = np.float32(FLT_MAX)
    zero = tensor_amax == 0
    if recipe == "torchao":
        tensor_scale = tensor_amax / top if given is None else given
        # amax_tensor of zero, and one so small that the quotient underflows.
        tensor_scale = xp.where(tensor_scale == 0, one, tensor_scale)
        s = xp.clip(amax / q / tensor_scale, np.float32(2.0**-6), np.float32(E4M3_MAX))
        codes = codec.round_scale(s, "e4m3")
        enc = one / tensor_scale / codec.decode_scale(codes, "e4m3")
        return codes, xp.minimum(enc, huge), tensor_scale
    if recipe == "single_level":
        big_s = tensor_scale = xp.ones_like(tensor_amax)
    elif given is not None:
        big_s, tensor_scale = xp.minimum(one / given, huge), given
    else:
        big_s = xp.where(zero, one, xp.minimum(top / xp.where(zero, one, tensor_amax), huge))
        tensor_scale = one / big_s
    s = xp.minimum(amax * (big_s * (one / q)), huge)
    # The factor overflows for Q below 1, and a zero block times infinity is still a zero block.
    codes = codec.round_scale(xp.where(amax == 0, np.float32(0), s), "e4m3")
    enc = _reciprocal(codec.decode_scale(codes, "e4m3") * tensor_scale)
    enc = xp.where(codes == 0, np.float32(0), enc)
    return codes, enc, None if recipe == "single_level" else tensor_scale


def _reciprocal(s: Array) -> Array:
    """Return min(1 / s, FLT_MAX) in float32."""
    return namespace(s).minimum(np.float32(1) / s, np.float32(FLT_MAX))


def _float_scale(amax: Array, fmt: Format) -> tuple[Array, Array]:
    """Return s = RNE(amax / Qmax) in the scale's dtype and the multiplier 1 / s (0 where s is)."""
    xp = namespace(amax)
    scales = codec.round_scale(amax / np.float32(fmt.max), fmt.scale)
    s = codec.decode_scale(scales, fmt.scale)
    return scales, xp.where(s == 0, np.float32(0), _reciprocal(s))


def _finite_amax(x: Array) -> Array:
    """Return the largest finite |x| as a 0-dim float32 (0 for none)."""
    xp = namespace(x)
    magnitudes = xp.where(xp.isfinite(x), xp.abs(x), np.float32(0))
    return xp.asarray(xp.max(magnitudes) if x.size else 0, dtype=np.float32)


def quantize(
    x: Array,
    fmt: Format,
    *,
    axis: int = -1,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Any = None,
    rotation: int | None = None,
    signs: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """Quantize `x` in blocks along `axis`; returns (codes, scales, tensor_scale or None).

    E8M0 scales: code = RNE(x * 2^-E); E4M3: the recipe's steps; float scales: s = RNE(amax / Qmax),
    code = RNE(x * (1 / s)). A block holding NaN or infinity gets a NaN scale and codes 0.

    x: bfloat16, float16 or float32, any shape of one dimension or more. codes: packed uint8,
    (*lead, bytes of a padded row) with the quantized axis moved last; scales: (*lead, blocks),
    uint8 for E8M0 and E4M3, else the float scale's dtype; tensor_scale: 0-dim float32.
    Stochastic rounding draws from Philox at the element's flat index in the moved tensor.

    Raises ValueError or TypeError naming what was expected, what came and what to do.
    Source: OCP MX v1.0, section 6.3; NVIDIA NVFP4; arXiv 2510.25602 (symmetric integers).
    """
    xp = namespace(x)
    _check.float_dtype(x.dtype)
    axis = _check.axis(axis, x.shape)
    scale_rule, recipe = _check.options(fmt, scale_rule, recipe, rounding, seed, clip)
    _check.tensor_scale(tensor_scale, fmt, recipe)
    rows = xp.ascontiguousarray(xp.moveaxis(to_float32(x), axis, -1))
    if rotation:
        _check.rotation(rotation, signs, rows.shape[-1])
        rows = rotate_rows(rows, rotation, signs)
    *lead, _ = rows.shape
    view = Blocks.of(rows.shape, fmt)

    blocks = view.split(rows)
    finite = xp.isfinite(blocks).all(axis=(2, 4))
    blocks = xp.where(finite[:, :, None, :, None], blocks, np.float32(0))
    largest = (
        xp.max(xp.abs(blocks), axis=(2, 4))
        if blocks.size
        else xp.zeros(finite.shape, dtype=np.float32)
    )

    stored = None
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        if fmt.scale == "e8m0":
            scales, y = _e8m0(blocks, largest, fmt, scale_rule)
        else:
            if fmt.scale == "e4m3":
                given = None if tensor_scale is None else xp.asarray(tensor_scale, dtype=np.float32)
                given = None if given is None else given.reshape(())
                scales, enc, stored = _e4m3_scale(largest, fmt, recipe, _finite_amax(rows), given)
            else:
                scales, enc = _float_scale(largest, fmt)
            y = blocks * enc[:, :, None, :, None]

    random = None
    if seed is not None and rounding == "stochastic":
        index = xp.arange(rows.size, dtype=np.int64).reshape(rows.shape)
        random = view.split(codec.random24(seed, index))
    codes = view.join(codec.encode(y, fmt.element, clip=clip, random=random), lead)
    scales = codec.nan_scales(scales, ~finite, fmt.scale)
    packed = layout.pack(codes, fmt.bits)
    stored = None if stored is None else xp.asarray(stored)
    return packed, scales.reshape(view.scales_shape(lead)), stored


def dequantize(
    codes: Array,
    scales: Array,
    tensor_scale: Array | None,
    fmt: Format,
    shape: Sequence[int],
    *,
    axis: int = -1,
    dtype: Any = np.float32,
) -> Array:
    """Return the values that codes and scales stand for, in `shape` and `dtype`.

    value = RNE_dtype(float32(element * scale) * tensor_scale)

    codes, scales, tensor_scale: as `quantize` returns them; shape: the logical shape; dtype:
    bfloat16, float16 or float32. Raises ValueError where the shapes do not belong together.
    """
    xp, shape = namespace(codes), tuple(shape)
    axis = _check.axis(axis, shape)
    _check.float_dtype(dtype)
    lead = shape[:axis] + shape[axis + 1 :]
    length = shape[axis]
    view = Blocks.of((*lead, length), fmt)
    _check.codes_and_scales(codes, scales, fmt, lead, length, view.scales_shape(lead))
    _check.stored_tensor_scale(tensor_scale, fmt)
    elements = codec.decode(layout.unpack(codes, fmt.bits, fmt.padded(length)), fmt.element)
    blocks = view.split(elements[..., :length])
    s = codec.decode_scale(scales, fmt.scale).reshape(view.lead, *view.grid)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = blocks * s[:, :, None, :, None]
        if tensor_scale is not None:
            values = values * xp.asarray(tensor_scale, dtype=np.float32).reshape(())
    rows = view.join(values, lead)[..., :length]
    return xp.moveaxis(codec.from_float32(xp.ascontiguousarray(rows), dtype), -1, axis)


def fake_quantize(x: Array, fmt: Format, *, axis: int = -1, **options: Any) -> Array:
    """Return `dequantize(quantize(x))` in x's dtype; options as in `quantize`, less rotation."""
    codes, scales, tensor_scale = quantize(x, fmt, axis=axis, **options)
    return dequantize(codes, scales, tensor_scale, fmt, x.shape, axis=axis, dtype=x.dtype)


def amax(x: Array, block: int | None = None, *, axis: int = -1) -> Array:
    """Return the largest magnitude of the tensor (finite elements only) or of each block.

    x: bfloat16, float16 or float32. block None: 0-dim float32, 0 where nothing is finite; else
    (*lead, ceil(K / block)) float32 with `axis` moved last, NaN for a block with NaN or infinity.
    """
    xp = namespace(x)
    _check.float_dtype(x.dtype)
    values = to_float32(x)
    if block is None:
        return _finite_amax(values)
    axis = _check.axis(axis, x.shape)
    _check.block(block)
    rows = xp.moveaxis(values, axis, -1)
    *lead, length = rows.shape
    view = Blocks(int(np.prod(lead, dtype=np.int64)), 1, length, 1, block)
    blocks = view.split(xp.ascontiguousarray(rows))
    shape = (*lead, view.grid[1])
    if not blocks.size:
        return xp.zeros(shape, dtype=np.float32)
    finite = xp.isfinite(blocks).all(axis=(2, 4))
    largest = xp.max(xp.abs(xp.where(finite[:, :, None, :, None], blocks, np.float32(0))), (2, 4))
    return xp.where(finite, largest, np.float32(np.nan)).reshape(shape)
