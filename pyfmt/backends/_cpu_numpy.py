# SPDX-License-Identifier: Apache-2.0
"""The NumPy half of the CPU room: arrays to row views and back, around the compiled module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyfmt import _arrays, _check
from pyfmt.formats import SCALES, Format
from pyfmt.reference.codec import FLOAT_DTYPES
from pyfmt.reference.quantize import Blocks
from pyfmt.tensor import QTensor

Array = np.ndarray


def native() -> Any:
    """Return the compiled module; ImportError where it was not built."""
    from pyfmt import _native

    return _native


def _raw(x: Array) -> Array:
    """Return 16-bit floats as their bits, as the compiled module takes them."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def _row_view(x: Array, axis: int, block_rows: int = 1) -> tuple[Array, tuple[int, ...], str]:
    """Return (rows, K) or (lead, rows, K) bits, the shape without the axis, the dtype's name."""
    dtype = _check.float_dtype(x.dtype)
    axis = _check.axis(axis, x.shape)
    moved = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    *lead, length = moved.shape
    rows = lead[-1:] or [1]
    count = np.prod(lead, dtype=np.int64) // max(rows[0], 1)
    shape = (count, rows[0], length) if block_rows > 1 else (count * rows[0], length)
    return _raw(moved.reshape(shape)), tuple(lead), dtype


def _back(bits: Array, lead: tuple[int, ...], axis: int, dtype: Any) -> Array:
    """Undo `_row_view` for a result of x's shape."""
    rows = bits.view(_arrays.numpy_dtype(dtype)).reshape(*lead, bits.shape[-1])
    return np.moveaxis(rows, -1, axis)


def _scalar(tensor_scale: Any, fmt: Format, recipe: str | None) -> float | None:
    _check.tensor_scale(tensor_scale, fmt, recipe or "")
    return None if tensor_scale is None else float(np.asarray(tensor_scale).reshape(()))


def quantize(
    x: Array,
    fmt: Format,
    axis: int,
    scale_rule: str | None,
    recipe: str | None,
    rounding: str,
    seed: int | None,
    clip: str,
    tensor_scale: Any,
    rotation: int | None,
    signs: Array | None,
) -> tuple[Array, Array, Array | None]:
    _check.options(fmt, scale_rule, recipe, rounding, seed, clip)
    rows, lead, dtype = _row_view(x, axis, fmt.block_rows)
    if rotation:
        _check.rotation(rotation, signs, rows.shape[-1])
    codes, scales, stored = native().quantize(
        rows,
        dtype,
        fmt.key,
        scale_rule,
        recipe,
        rounding,
        seed,
        clip,
        _scalar(tensor_scale, fmt, recipe),
        rotation or 0,
        signs,
    )
    view = Blocks.of((*lead, rows.shape[-1]), fmt)
    scale_dtype = FLOAT_DTYPES.get(SCALES[fmt.scale].dtype, np.uint8)
    return (
        codes.reshape(*lead, codes.shape[-1]),
        scales.view(scale_dtype).reshape(view.scales_shape(lead)),
        None if stored is None else np.array(stored, dtype=np.float32),
    )


def dequantize(
    codes: Array,
    scales: Array,
    tensor_scale: Any,
    fmt: Format,
    shape: Sequence[int],
    axis: int,
    dtype: Any,
) -> Array:
    shape = tuple(shape)
    axis = _check.axis(axis, shape)
    name = _check.float_dtype(dtype, "dtype")
    lead, length = shape[:axis] + shape[axis + 1 :], shape[axis]
    view = Blocks.of((*lead, length), fmt)
    _check.codes_and_scales(codes, scales, fmt, lead, length, view.scales_shape(lead))
    _check.stored_tensor_scale(tensor_scale, fmt)
    grid = (view.lead, view.rows) if fmt.block_rows > 1 else (view.lead * view.rows,)
    scale_rows = (view.lead, view.grid[0]) if fmt.block_rows > 1 else grid
    bits = np.ascontiguousarray(scales).view(f"uint{SCALES[fmt.scale].bits}")
    out = native().dequantize(
        np.ascontiguousarray(codes).reshape(*grid, codes.shape[-1]),
        bits.reshape(*scale_rows, view.grid[1]),
        None if tensor_scale is None else float(np.asarray(tensor_scale).reshape(())),
        fmt.key,
        length,
        grid[-1],
        name,
    )
    return _back(out, lead, axis, name)


def fake_quantize(
    x: Array,
    fmt: Format,
    axis: int,
    scale_rule: str | None,
    recipe: str | None,
    rounding: str,
    seed: int | None,
    clip: str,
    tensor_scale: Any,
) -> Array:
    _check.options(fmt, scale_rule, recipe, rounding, seed, clip)
    rows, lead, dtype = _row_view(x, axis, fmt.block_rows)
    out = native().fake_quantize(
        rows,
        dtype,
        fmt.key,
        scale_rule,
        recipe,
        rounding,
        seed,
        clip,
        _scalar(tensor_scale, fmt, recipe),
    )
    return _back(out, lead, axis, dtype)


def hadamard(x: Array, size: int, signs: Array | None, axis: int) -> Array:
    rows, lead, dtype = _row_view(x, axis)
    _check.rotation(size, signs, rows.shape[-1])
    return _back(native().hadamard(rows, dtype, size, signs), lead, axis, dtype)


def _packed(q: QTensor) -> tuple[Array, Array, float | None, str]:
    """Return a QTensor quantized along its last axis as the compiled module takes it."""
    lead, length = q.shape[:-1], q.shape[-1]
    view = Blocks.of((*lead, length), q.format)
    square = q.format.block_rows > 1
    grid = (view.lead, view.rows) if square else (view.lead * view.rows,)
    scale_rows = (view.lead, view.grid[0]) if square else grid
    bits = np.ascontiguousarray(q.scales).view(f"uint{SCALES[q.format.scale].bits}")
    return (
        np.ascontiguousarray(q.codes).reshape(*grid, q.codes.shape[-1]),
        bits.reshape(*scale_rows, view.grid[1]),
        None if q.tensor_scale is None else float(np.asarray(q.tensor_scale).reshape(())),
        q.format.key,
    )


def matmul(a: Any, b: QTensor, bias: Array | None, dtype: Any) -> Array:
    k, name = b.shape[1], np.dtype(_arrays.numpy_dtype(dtype)).name
    lead = a.shape[:-1]
    if isinstance(a, QTensor):
        left: tuple[Any, ...] = _packed(a)
    else:
        rows = np.ascontiguousarray(a).reshape(int(np.prod(lead, dtype=np.int64)), k)
        left = (_raw(rows), a.dtype.name)
    given = None if bias is None else np.ascontiguousarray(_raw(bias))
    bias_name = "float32" if bias is None else bias.dtype.name
    y: Array = native().matmul(left, _packed(b), k, given, bias_name, name)
    return y.view(_arrays.numpy_dtype(dtype)).reshape(*lead, b.shape[0])


def _byte_rows(x: Array) -> Array:
    return np.ascontiguousarray(x).reshape(int(np.prod(x.shape[:-1], dtype=np.int64)), x.shape[-1])


def pack(codes: Array, bits: int) -> Array:
    _check.pack(codes.dtype, codes.shape, bits)
    out: Array = native().pack(_byte_rows(codes), bits)
    return out.reshape(*codes.shape[:-1], out.shape[-1])


def unpack(packed: Array, bits: int, length: int) -> Array:
    _check.unpack(packed.dtype, packed.shape, bits, length)
    out: Array = native().unpack(_byte_rows(packed), bits, length)
    return out.reshape(*packed.shape[:-1], length)


def amax(x: Array, block: int | None, axis: int) -> Array:
    if block is None:
        _check.float_dtype(x.dtype)
        rows = _raw(np.ascontiguousarray(x)).reshape(1, x.size)
        return np.array(native().amax(rows, x.dtype.name, None), dtype=np.float32)
    _check.block(block)
    rows, lead, dtype = _row_view(x, axis)
    out: Array = native().amax(rows, dtype, block)
    return out.reshape(*lead, out.shape[-1])
