# SPDX-License-Identifier: Apache-2.0
"""The verbs on arrays of any library: check the arguments, choose a room, call it."""

from __future__ import annotations

from typing import Any

from pyfmt import _arrays, _check, _direct, _matmul_paths, backends
from pyfmt.formats import Format, get_format
from pyfmt.reference.rotate import rotate_by_matrix
from pyfmt.tensor import QTensor


def _float_array(x: Any) -> None:
    _arrays.kind(x)
    _check.float_dtype(x.dtype)


def quantize(
    x: Any,
    fmt: str | Format,
    *,
    axis: int = -1,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Any = None,
    rotation: Any = None,
    signs: Any = None,
    backend: str | None = None,
) -> QTensor:
    """Quantize `x` to a block format along `axis`.

    E8M0 scales:  E by `scale_rule` from the block's largest |x|, code = RNE(x * 2^-E)
    E4M3 scales:  s and the tensor scale by `recipe`, code = RNE(x * min(1 / (s * t), FLT_MAX))
    float scales: s = RNE(amax / Qmax), code = RNE(x * (1 / s))

    x: NumPy, CuPy or torch; bfloat16, float16 or float32; one dimension or more.
    scale_rule: "rceil" (default), "floor", "ceil", "even". recipe: "nvidia" (default), "torchao",
    "single_level". rounding: "nearest" or "stochastic" (with a 64-bit `seed`). clip: "symmetric"
    or "full" (integers may use -2^(bits-1)). tensor_scale: a calibrated decode multiplier for
    formats that have one. rotation: a Hadamard size (2 to 1024) applied first, with optional +-1
    `signs`, in float32; or an orthogonal B x B matrix. backend: a room's name; never falls back.

    Returns a QTensor on the same library and device. Raises ValueError or TypeError saying what
    was expected, what came and what to do.
    Source: OCP MX v1.0, section 6.3; NVIDIA NVFP4; arXiv 2510.25602.
    """
    if backend is None and seed is None and rounding == "nearest":
        made = _direct.quantize(
            x, fmt, axis, scale_rule, recipe, clip, tensor_scale, rotation, signs
        )
        if made is not None:
            return made
    fmt = get_format(fmt)
    _float_array(x)
    _arrays.refuse_gradient("quantize", x, "use fake_quantize (straight-through) or ")
    index = _check.axis(axis, x.shape)
    _check.options(fmt, scale_rule, recipe, rounding, seed, clip)
    shape = tuple(x.shape)
    x, rotation = _rotated(x, rotation, signs, index)
    codes, scales, stored = backends.choose("quantize", fmt, x, backend).quantize(
        x,
        fmt,
        axis=index,
        scale_rule=scale_rule,
        recipe=recipe,
        rounding=rounding,
        seed=seed,
        clip=clip,
        tensor_scale=tensor_scale,
        rotation=rotation,
        signs=signs,
    )
    return QTensor(codes, scales, stored, fmt, shape, index)


def _rotated(x: Any, rotation: Any, signs: Any, axis: int) -> tuple[Any, int | None]:
    """Check a rotation; return x multiplied by a matrix, or as it is and the Hadamard size left."""
    if rotation is None:
        if signs is not None:
            raise ValueError("signs: they belong to a rotation; pass rotation=<size> too")
        return x, None
    if isinstance(rotation, int):
        _check.rotation(rotation, signs, x.shape[axis])
        return x, rotation
    if signs is not None:
        raise ValueError("signs: a rotation matrix takes none; multiply its columns by them")
    if _arrays.kind(rotation) != _arrays.kind(x):
        raise TypeError(
            f"rotation: expected a matrix like x ({_arrays.where(x)}), got "
            f"{_arrays.where(rotation)}"
        )
    return rotate_by_matrix(x, rotation, axis), None


def quantize_dual(
    x: Any,
    fmt: str | Format,
    *,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Any = None,
    rotation: Any = None,
    signs: Any = None,
    backend: str | None = None,
) -> tuple[QTensor, QTensor]:
    """Quantize `x` along its last axis and along the one before it: what training needs.

    (quantize(x, fmt, axis=-1, ...), quantize(x, fmt, axis=-2, ...)), bit for bit. The CUDA room
    reads x once for both where kernels do so: blocks of 16 to 128 in contiguous matrices of whole
    blocks.

    x: (..., M, N); all else as in `quantize`. A rotation turns each direction along its own axis,
    and `signs` apply to both; a dynamic tensor scale is each direction's own, a given one serves
    both. Raises ValueError or TypeError saying what was expected, what came and what to do.
    """
    fmt = get_format(fmt)
    _float_array(x)
    if len(x.shape) < 2:
        raise ValueError(
            f"x: expected at least two dimensions, got {len(x.shape)}; use quantize for one"
        )
    if rotation is not None and not isinstance(rotation, int):
        along, across = (
            quantize(
                x,
                fmt,
                axis=axis,
                scale_rule=scale_rule,
                recipe=recipe,
                rounding=rounding,
                seed=seed,
                clip=clip,
                tensor_scale=tensor_scale,
                rotation=rotation,
                signs=signs,
                backend=backend,
            )
            for axis in (-1, -2)
        )
        return along, across
    _arrays.refuse_gradient("quantize_dual", x, "use fake_quantize (straight-through) or ")
    _check.options(fmt, scale_rule, recipe, rounding, seed, clip)
    for axis in (-1, -2):
        _rotated(x, rotation, signs, axis)
    room = backends.choose("quantize_dual", fmt, x, backend)
    codes, scales, stored, codes_t, scales_t, stored_t = room.quantize_dual(
        x,
        fmt,
        scale_rule=scale_rule,
        recipe=recipe,
        rounding=rounding,
        seed=seed,
        clip=clip,
        tensor_scale=tensor_scale,
        rotation=rotation,
        signs=signs,
    )
    shape = tuple(x.shape)
    last = len(shape) - 1
    return (
        QTensor(codes, scales, stored, fmt, shape, last),
        QTensor(codes_t, scales_t, stored_t, fmt, shape, last - 1),
    )


def dequantize(q: QTensor, dtype: Any = None, *, backend: str | None = None) -> Any:
    """Return the values of a QTensor: RNE_dtype(float32(element * scale) * tensor_scale).

    dtype: bfloat16, float16 or float32 (the default), of any library. Returns an array of the
    logical shape, on the QTensor's library and device. Raises ValueError or TypeError.
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"q: expected a QTensor, got {type(q).__name__}; make one with quantize")
    name = "float32" if dtype is None else _check.float_dtype(dtype, "dtype")
    if backend is None:
        y = _direct.dequantize(q, dtype)
        if y is not None:
            return y
    q = q.to_layout("rows")
    room = backends.choose("dequantize", q.format, q.codes, backend)
    return room.dequantize(
        q.codes, q.scales, q.tensor_scale, q.format, q.shape, axis=q.axis, dtype=name
    )


def fake_quantize(
    x: Any,
    fmt: str | Format,
    *,
    axis: int = -1,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Any = None,
    backend: str | None = None,
) -> Any:
    """Quantize and dequantize in one pass: `quantize(x, ...).dequantize(x.dtype)`, bit for bit.

    Arguments as in `quantize`. Returns x's shape and dtype. On torch the gradient is
    straight-through: d fake_quantize(x) / dx = 1.
    """
    if backend is None and seed is None and rounding == "nearest":
        y = _direct.fake_quantize(x, fmt, axis, scale_rule, recipe, clip, tensor_scale)
        if y is not None:
            return y
    fmt = get_format(fmt)
    _float_array(x)
    index = _check.axis(axis, x.shape)
    _check.options(fmt, scale_rule, recipe, rounding, seed, clip)
    return backends.choose("fake_quantize", fmt, x, backend).fake_quantize(
        x,
        fmt,
        axis=index,
        scale_rule=scale_rule,
        recipe=recipe,
        rounding=rounding,
        seed=seed,
        clip=clip,
        tensor_scale=tensor_scale,
    )


def hadamard(
    x: Any, size: int, signs: Any = None, *, axis: int = -1, backend: str | None = None
) -> Any:
    """Rotate `x` along `axis` by an orthonormal block Hadamard matrix.

    y = H (signs * x) / sqrt(size), H in Sylvester order, float32 butterflies at strides
    1, 2, 4, ..., one multiply by float32(2^(-k/2)), one rounding to x's dtype.

    x: NumPy, CuPy or torch; bfloat16, float16 or float32; `axis` a multiple of `size` (a power of
    two, 2 to 1024). signs: +-1, of length `size` or the axis's. Returns x's shape and dtype.
    Its own inverse without signs, up to rounding. Raises ValueError or TypeError.
    """
    if backend is None:
        y = _direct.hadamard(x, size, signs, axis)
        if y is not None:
            return y
    _float_array(x)
    index = _check.axis(axis, x.shape)
    _check.rotation(size, signs, x.shape[index])
    return backends.choose("hadamard", None, x, backend).hadamard(x, size, signs, axis=index)


def matmul(
    a: Any,
    b: QTensor,
    bias: Any = None,
    *,
    dtype: Any = None,
    backend: str | None = None,
    path: str | None = None,
    precision: str = "full",
    batch_invariant: bool = False,
) -> Any:
    """Multiply by a quantized matrix: y = a b^T + bias on decoded values.

    a: (..., M, K), a QTensor or a dense array; b: a QTensor of shape (N, K); both quantized along
    their last axis; bias: (N,). float32 accumulation, float32 bias, one rounding to `dtype`
    (a's dtype where a is dense, else float32). Returns (..., M, N).
    |err| <= c * (sum|a||b| + |bias|) + half an output ulp against the exact sum; on the CPU
    c = (K + 3) * 2^-24. Where both sides are integers or short floats such as E2M1 under E8M0
    scales, a block's dot product is exact and c = (blocks + 3) * 2^-24, bit for bit
    `pyfmt.reference.matmul_by_blocks`. A tensor scale multiplies the sums. The reference room sums
    in float64. On a GPU c depends on the path (docs/matmul.md).

    On a GPU a table made by measurement chooses the path; `path` names one ("skinny", "wide",
    "fold", "exact", "portable", "native"), and never falls back.
    precision="fast" lets the fold path keep its sums in the fp8 units' narrow accumulator.
    batch_invariant=True gives each row of a the same bits whatever the other rows are.

    Raises ValueError or TypeError saying what was expected, what came and what to do.
    """
    if not isinstance(b, QTensor):
        raise TypeError(
            f"b: expected a QTensor, got {type(b).__name__}; quantize it with "
            "pyfmt.quantize(b, format) first"
        )
    if backend is None:
        y = _direct.matmul(a, b, bias, dtype, (path, precision, batch_invariant))
        if y is not None:
            return y
    dense = not isinstance(a, QTensor)
    if dense:
        _float_array(a)
    _check.matmul_shapes(a, b, bias)
    _matmul_paths.check(path, precision)
    given = a.dtype if dense and dtype is None else dtype
    name = "float32" if given is None else _check.float_dtype(given, "dtype")
    room = backends.choose("matmul", b.format, b.codes, backend)
    if path is None and precision == "full" and not batch_invariant:
        return room.matmul(a, b, bias, dtype=name)
    if room is not backends.get("cuda"):
        raise ValueError(
            "path, precision and batch_invariant belong to the cuda room, and b is a "
            f"{_arrays.where(b.codes)}; move it to a GPU or leave them out"
        )
    try:
        return room.matmul_by(
            a,
            b,
            bias,
            dtype=name,
            path=path,
            precision=precision,
            batch_invariant=batch_invariant,
        )
    except RuntimeError as error:
        if str(error).startswith("path "):
            raise ValueError(str(error)) from None
        raise
