# SPDX-License-Identifier: Apache-2.0
"""The short way to torch's operators, for plain calls on tensors that nothing traces.

Checking the arguments, choosing a room and reading an operator's options from strings takes longer
than a small operator does. Each function here returns None where the call is not that plain or the
operator refuses it: the caller then goes the long way, whose exceptions are those of the API.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

from pyfmt.backends import cpu, cuda
from pyfmt.formats import CLIPS, FORMATS, RECIPES, SCALE_RULES
from pyfmt.tensor import QTensor

_ROWS = tuple(FORMATS)
_operators: dict[str, Any] = {}


def _operator(name: str) -> Any:
    import torch

    import pyfmt.ops  # noqa: F401  (registers the ops)

    found = _operators[name] = getattr(torch.ops.pyfmt, name).default
    return found


def plain(x: Any) -> bool:
    """Whether x is a tensor that operators serve here and now, and no one looks on.

    Onlookers: torch.compile, dispatch modes such as FakeTensorMode, torch.func transforms.
    """
    torch = sys.modules.get("torch")
    if torch is None or torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return False
    served = cuda.loaded() if x.is_cuda else x.is_cpu and cpu.torch_library_path() is not None
    return (
        served
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.peek_interpreter_stack()
    )


def _any_requires_grad(*tensors: Any) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def kernel(verb: str, x: Any, bias: Any = None) -> Any:
    """Return the Python kernel of matmul or linear, for a call without gradient; else None.

    The operator would run it too, after it has turned all arguments to its own types and back
    twice: at the Autograd key and at the device's.
    """
    if not plain(x):
        return None
    torch = sys.modules["torch"]
    if torch._C._is_any_autocast_enabled() or (
        torch.is_grad_enabled() and _any_requires_grad(x, bias)
    ):
        return None
    return _operators.get(f"kernel of {verb}") or _find_kernel(verb)


def _find_kernel(verb: str) -> Any:
    import torch

    from pyfmt import _torch_matmul

    found = getattr(_torch_matmul, verb)

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return found(*args)

    return _operators.setdefault(f"kernel of {verb}", run)


def _rotates(rotation: Any, signs: Any) -> bool:
    """Whether a rotation is none, or a size, which the operator checks."""
    return signs is None if rotation is None else type(rotation) is int and rotation != 0


@lru_cache(maxsize=1024)
def plan(key: str, scale_rule: str | None, recipe: str | None, clip: str) -> int | None:
    """Return options as the one number that operators read; None for what has none.

    row of the table | rule << 8 | recipe << 10 | clip << 12, as in csrc/options.h.
    """
    fmt = FORMATS.get(key)
    if fmt is None or clip not in CLIPS:
        return None
    for value, known in ((scale_rule, fmt.scale_rules), (recipe, fmt.recipes)):
        if value is not None and value not in known:
            return None
    rule = SCALE_RULES.index(scale_rule or SCALE_RULES[0])
    how = recipe or (RECIPES[0] if fmt.tensor_scale else "single_level")
    return _ROWS.index(key) | rule << 8 | RECIPES.index(how) << 10 | CLIPS.index(clip) << 12


def quantize(
    x: Any,
    fmt: Any,
    axis: Any,
    scale_rule: str | None,
    recipe: str | None,
    clip: str,
    tensor_scale: Any,
    rotation: Any,
    signs: Any,
) -> QTensor | None:
    """Quantize to a format of the table, rounding to nearest."""
    if not plain(x) or x.requires_grad or type(axis) is not int:
        return None
    key = fmt if type(fmt) is str else getattr(fmt, "key", "")
    try:
        how = plan(key, scale_rule, recipe, clip)
        if how is None:
            return None
        op = _operators.get("_quantize") or _operator("_quantize")
        if rotation is tensor_scale is signs is None:
            codes, scales, stored = op(x, how, axis)
        elif _rotates(rotation, signs) and not _any_requires_grad(tensor_scale, signs):
            codes, scales, stored = op(x, how, axis, rotation or 0, tensor_scale, signs)
        else:
            return None
    except (AttributeError, RuntimeError, TypeError):
        return None
    row = FORMATS[key]
    if not row.tensor_scale or recipe == "single_level":
        stored = None
    shape = tuple(x.shape)
    return QTensor.of(codes, scales, stored, row if fmt is key else fmt, shape, axis % len(shape))


def fake_quantize(
    x: Any,
    fmt: Any,
    axis: Any,
    scale_rule: str | None,
    recipe: str | None,
    clip: str,
    tensor_scale: Any,
) -> Any:
    """Quantize and decode by a format of the table, rounding to nearest."""
    if not plain(x) or x.requires_grad:
        return None
    try:
        how = plan(fmt if type(fmt) is str else fmt.key, scale_rule, recipe, clip)
        if how is None:
            return None
        op = _operators.get("_fake_quantize") or _operator("_fake_quantize")
        if tensor_scale is None:
            return op(x, how, axis)
        return None if _any_requires_grad(tensor_scale) else op(x, how, axis, tensor_scale)
    except (AttributeError, RuntimeError, TypeError):
        return None


def dequantize(q: QTensor, dtype: Any) -> Any:
    """Return the values of a QTensor."""
    codes, scales, tensor_scale = q.codes, q.scales, q.tensor_scale
    if not plain(codes) or q.layout != "rows":
        return None
    torch = sys.modules["torch"]
    op = _operators.get("dequantize") or _operator("dequantize")
    try:
        if _any_requires_grad(scales, tensor_scale):
            return None
        # The kernel at the Autograd key is Python and has nothing to do.
        with torch._C._AutoDispatchBelowAutograd():
            return op(
                codes, scales, tensor_scale, q.format.key, q.shape, q.axis, dtype or torch.float32
            )
    except (AttributeError, RuntimeError, TypeError):
        return None


def hadamard(x: Any, size: Any, signs: Any, axis: Any) -> Any:
    """Rotate by blocks."""
    if not plain(x):
        return None
    torch = sys.modules["torch"]
    op = _operators.get("hadamard") or _operator("hadamard")
    try:
        if _any_requires_grad(x, signs):
            return None
        with torch._C._AutoDispatchBelowAutograd():
            return op(x, size, signs, axis)
    except (AttributeError, RuntimeError, TypeError):
        return None


def matmul(a: Any, b: QTensor, bias: Any, dtype: Any, how: tuple[Any, ...]) -> Any:
    """Multiply by a quantized matrix; how: path, precision, batch_invariant."""
    quantized = isinstance(a, QTensor)
    try:
        run = kernel("matmul", a.codes if quantized else a, bias)
        if run is None or b.layout != "rows" or len(b.shape) != 2 or b.axis != 1:
            return None
        if how != (None, "full", False) and not b.codes.is_cuda:
            return None
        if dtype is not None and not isinstance(dtype, sys.modules["torch"].dtype):
            return None
        if not quantized:
            left = (a, None, None, None)
        elif a.layout == "rows" and a.axis == len(a.shape) - 1:
            left = (a.codes, a.scales, a.tensor_scale, a.format.key)
        else:
            return None
        right = (b.codes, b.scales, b.tensor_scale, b.format.key, b.shape[1])
        return run(*left, *right, bias, dtype, *how)
    except (AttributeError, RuntimeError, TypeError):
        return None
