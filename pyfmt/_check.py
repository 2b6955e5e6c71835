# SPDX-License-Identifier: Apache-2.0
"""What the arguments of the verbs must be; every sentence about a wrong one stands here.

Each check raises ValueError or TypeError that says what was expected, what came and what to do.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from pyfmt.formats import CLIPS, ROTATION_SIZES, ROUNDINGS, SCALES, Format, closest

_FLOATS = ("bfloat16", "float16", "float32")


def dtype_name(dtype: Any) -> str:
    """Return "bfloat16" for torch.bfloat16, ml_dtypes.bfloat16, np.dtype("bfloat16") and so on."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).rpartition(".")[2]


def float_dtype(dtype: Any, what: str = "x") -> str:
    """Return the name of an input or output dtype, which must be one of the three floats."""
    name = dtype_name(dtype)
    if name not in _FLOATS:
        raise TypeError(
            f"{what}: expected dtype bfloat16, float16 or float32, got {name}; convert it to "
            "float32 first"
        )
    return name


def axis(axis: Any, shape: Sequence[int]) -> int:
    """Return the axis counted from the front."""
    if not shape:
        raise ValueError(
            "x: expected at least one dimension, got a 0-dim array; reshape it to (1,)"
        )
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis: expected an int, got {axis!r}") from None
    n = len(shape)
    if not -n <= index < n:
        raise ValueError(f"axis: expected {-n} to {n - 1} for shape {tuple(shape)}, got {index}")
    return index % n


def _one_of(what: str, value: Any, known: Sequence[str], why: str = "") -> None:
    if value not in known:
        raise ValueError(f"{what}: unknown {value!r}{why}{closest(value, known)}")


def options(
    fmt: Format,
    scale_rule: str | None,
    recipe: str | None,
    rounding: str,
    seed: int | None,
    clip: str,
) -> tuple[str, str]:
    """Return the scale rule and recipe with defaults filled in ("" where the format has none)."""
    for what, value, known in (
        ("scale_rule", scale_rule, fmt.scale_rules),
        ("recipe", recipe, fmt.recipes),
    ):
        if value is not None and not known:
            raise ValueError(
                f"{what}: {fmt.name} takes none (its scale is {fmt.scale}), got {value!r}; leave "
                "it out"
            )
        if value is not None:
            _one_of(what, value, known, f" for {fmt.name}")
    _one_of("rounding", rounding, ROUNDINGS)
    _one_of("clip", clip, CLIPS)
    if rounding == "stochastic":
        if seed is None:
            raise ValueError("seed: stochastic rounding needs one; pass seed=<int of 64 bits>")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed: expected an int of 64 bits, got {seed}")
    return (
        scale_rule or next(iter(fmt.scale_rules), ""),
        recipe or next(iter(fmt.recipes), ""),
    )


def tensor_scale(value: Any, fmt: Format, recipe: str) -> None:
    """Check a caller's tensor scale: one positive finite float, where the format has one."""
    if value is None:
        return
    if not fmt.tensor_scale or recipe == "single_level":
        which = "the single_level recipe" if fmt.tensor_scale else fmt.name
        raise ValueError(f"tensor_scale: {which} has none; leave it out")
    scalar = _scalar("tensor_scale", value)
    if not (math.isfinite(scalar) and scalar > 0):
        raise ValueError(
            f"tensor_scale: expected a positive finite number, got {scalar}; it is the decode "
            "multiplier, for example amax / (448 * 6)"
        )


def stored_tensor_scale(value: Any, fmt: Format) -> None:
    """Check the tensor scale that comes with codes and scales."""
    if value is not None:
        if not fmt.tensor_scale:
            raise ValueError(f"tensor_scale: {fmt.name} has none; pass None")
        _scalar("tensor_scale", value)


def _scalar(what: str, value: Any) -> float:
    size = math.prod(getattr(value, "shape", ()))
    if size != 1:
        raise ValueError(f"{what}: expected one number, got shape {tuple(value.shape)}")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{what}: expected a number, got {type(value).__name__}") from None


def rotation(size: Any, signs: Any, length: int) -> None:
    """Check a Hadamard size and its signs against the length of the rotated axis."""
    if isinstance(size, bool) or not isinstance(size, int) or size not in ROTATION_SIZES:
        raise ValueError(f"rotation: expected a power of two from 2 to 1024, got {size!r}")
    if length % size:
        raise ValueError(
            f"rotation: the axis has {length} elements, not a multiple of {size}; pad it or choose "
            "a smaller size"
        )
    if signs is not None:
        shape = tuple(signs.shape)
        if len(shape) != 1 or shape[0] not in (size, length):
            raise ValueError(
                f"signs: expected shape ({size},) or ({length},) of +1 and -1, got {shape}"
            )


def block(size: Any) -> None:
    """Check a block size."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"block: expected a positive int, got {size!r}")


def _bits(bits: Any) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits: expected an int from 2 to 8, got {bits!r}")


def _uint8(what: str, dtype: Any, shape: Sequence[int]) -> None:
    if dtype_name(dtype) != "uint8":
        raise TypeError(f"{what}: expected dtype uint8, got {dtype_name(dtype)}")
    if not shape:
        raise ValueError(f"{what}: expected at least one dimension, got a 0-dim array")


def pack(dtype: Any, shape: Sequence[int], bits: Any) -> None:
    """Check the arguments of pack."""
    _bits(bits)
    _uint8("codes", dtype, shape)


def unpack(dtype: Any, shape: Sequence[int], bits: Any, length: Any) -> None:
    """Check the arguments of unpack."""
    _bits(bits)
    _uint8("packed", dtype, shape)
    need = -(-length * bits // 8)
    if length < 0 or shape[-1] < need:
        raise ValueError(
            f"packed: expected at least {need} bytes a row for {length} codes of {bits} bits, got "
            f"{shape[-1]}"
        )


def codes_and_scales(
    codes: Any,
    scales: Any,
    fmt: Format,
    lead: Sequence[int],
    length: int,
    scales_shape: Sequence[int],
) -> None:
    """Check that codes and scales belong to one tensor of (*lead, length)."""
    _uint8("codes", codes.dtype, codes.shape)
    shape = (*lead, fmt.row_bytes(length))
    if tuple(codes.shape) != shape:
        raise ValueError(
            f"codes: expected shape {shape} for {fmt.name} of logical shape {(*lead, length)} "
            f"(quantized axis last), got {tuple(codes.shape)}"
        )
    if tuple(scales.shape) != tuple(scales_shape):
        raise ValueError(
            f"scales: expected shape {tuple(scales_shape)} for {fmt.name}, got "
            f"{tuple(scales.shape)}"
        )
    dtype = SCALES[fmt.scale].dtype
    if dtype_name(scales.dtype) != dtype:
        raise TypeError(
            f"scales: expected dtype {dtype} for {fmt.name}, got {dtype_name(scales.dtype)}"
        )


def matrix(matrix: Any, length: int) -> None:
    """Check an arbitrary rotation matrix against the length of the rotated axis."""
    shape = tuple(getattr(matrix, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            "rotation: expected a Hadamard size or a square matrix, got "
            f"{f'shape {shape}' if shape else repr(matrix)}"
        )
    if length % shape[0]:
        raise ValueError(f"rotation: the axis has {length} elements, not a multiple of {shape[0]}")


def matmul_shapes(a: Any, b: Any, bias: Any) -> None:
    """Check the operands of matmul: a (..., K), b (N, K), bias (N,), quantized along K."""
    if len(b.shape) != 2:
        raise ValueError(f"b: expected a matrix (N, K), got shape {tuple(b.shape)}")
    if not a.shape or a.shape[-1] != b.shape[1]:
        raise ValueError(
            f"a: expected the last axis to be b's, {b.shape[1]}, got shape {tuple(a.shape)}"
        )
    for what, q in (("a", a), ("b", b)):
        if hasattr(q, "codes") and q.axis != len(q.shape) - 1:
            raise ValueError(
                f"{what}: expected it quantized along its last axis, got axis {q.axis}; quantize "
                "with axis=-1"
            )
    if bias is not None and tuple(bias.shape) != (b.shape[0],):
        raise ValueError(f"bias: expected shape ({b.shape[0]},), got {tuple(bias.shape)}")
