# SPDX-License-Identifier: Apache-2.0
"""The reference room: NumPy and CuPy arrays as they are, torch tensors by way of NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyfmt import _arrays, reference
from pyfmt.formats import Format
from pyfmt.reference.codec import namespace


def available() -> str | None:
    """The reference runs everywhere."""
    return None


def supports(verb: str, fmt: Format | None, x: Any) -> str | None:
    """Torch tensors are served when asked for by name; everything else always."""
    return None


def _in(x: Any) -> Any:
    """Return `x` as the reference takes it: torch tensors become NumPy."""
    if not _arrays.is_torch(x):
        return x
    _arrays.refuse_gradient("the reference room", x)
    return _arrays.to_numpy(x)


def _out(result: Any, like: Any) -> Any:
    """Return a NumPy result as a tensor on the device of `like` where that is a torch tensor."""
    if result is None or not _arrays.is_torch(like):
        return result
    return _arrays.to_torch(result, like.device)


def quantize(
    x: Any,
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
    signs: Any = None,
) -> tuple[Any, Any, Any]:
    parts = reference.quantize(
        _in(x),
        fmt,
        axis=axis,
        scale_rule=scale_rule,
        recipe=recipe,
        rounding=rounding,
        seed=seed,
        clip=clip,
        tensor_scale=_in(tensor_scale),
        rotation=rotation,
        signs=_in(signs),
    )
    codes, scales, stored = (_out(part, x) for part in parts)
    return codes, scales, stored


def quantize_dual(
    x: Any,
    fmt: Format,
    *,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Any = None,
    rotation: int | None = None,
    signs: Any = None,
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """quantize along the last axis, then along the one before it."""
    options: dict[str, Any] = {
        "scale_rule": scale_rule,
        "recipe": recipe,
        "rounding": rounding,
        "seed": seed,
        "clip": clip,
        "tensor_scale": tensor_scale,
        "rotation": rotation,
        "signs": signs,
    }
    return (*quantize(x, fmt, axis=-1, **options), *quantize(x, fmt, axis=-2, **options))


def dequantize(
    codes: Any,
    scales: Any,
    tensor_scale: Any,
    fmt: Format,
    shape: Sequence[int],
    *,
    axis: int = -1,
    dtype: Any = "float32",
) -> Any:
    y = reference.dequantize(
        _in(codes),
        _in(scales),
        _in(tensor_scale),
        fmt,
        shape,
        axis=axis,
        dtype=_arrays.numpy_dtype(dtype),
    )
    return _out(y, codes)


def fake_quantize(
    x: Any,
    fmt: Format,
    *,
    axis: int = -1,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Any = None,
) -> Any:
    y = reference.fake_quantize(
        _in(x),
        fmt,
        axis=axis,
        scale_rule=scale_rule,
        recipe=recipe,
        rounding=rounding,
        seed=seed,
        clip=clip,
        tensor_scale=_in(tensor_scale),
    )
    return _out(y, x)


def hadamard(x: Any, size: int, signs: Any = None, *, axis: int = -1) -> Any:
    return _out(reference.hadamard(_in(x), size, _in(signs), axis=axis), x)


def pack(codes: Any, bits: int) -> Any:
    return _out(reference.pack(_in(codes), bits), codes)


def unpack(packed: Any, bits: int, length: int) -> Any:
    return _out(reference.unpack(_in(packed), bits, length), packed)


def amax(x: Any, block: int | None = None, *, axis: int = -1) -> Any:
    return _out(reference.amax(_in(x), block, axis=axis), x)


def matmul(a: Any, b: Any, bias: Any = None, *, dtype: Any = "float32") -> Any:
    """Multiply QTensors or dense arrays: y = a b^T + bias, summed in float64, rounded once."""
    dense_a, dense_b = (
        x
        if not hasattr(x, "codes")
        else dequantize(x.codes, x.scales, x.tensor_scale, x.format, x.shape, axis=x.axis)
        for x in (a, b)
    )
    left, right = _in(dense_a), _in(dense_b)
    xp = namespace(right)
    y = reference.matmul(
        xp.asarray(left, dtype="float32"), right, _in(bias), dtype=_arrays.numpy_dtype(dtype)
    )
    return _out(y, b.codes if hasattr(b, "codes") else b)
