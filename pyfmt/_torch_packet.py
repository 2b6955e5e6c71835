# SPDX-License-Identifier: Apache-2.0
"""torch.ops.pyfmt.quantize, called eagerly: the short way where nothing looks on.

An operator's gradient rule here is Python, and its options are strings: together they take longer
than the kernel of a small tensor. A plain call goes to `_quantize`, which takes its options as one
number and has no rule of its own; every other call is torch's as ever, and so are all errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

from pyfmt._direct import plain, plan

_planned: Any = None


def _short(
    x: Any,
    format: str,
    axis: int = -1,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Tensor | None = None,
    rotation: int = 0,
    signs: Tensor | None = None,
) -> Any:
    """Return what the operator would; None where it is to be asked itself."""
    if not plain(x) or x.requires_grad or rounding != "nearest" or seed is not None:
        return None
    if torch._C._len_torch_function_stack():
        return None
    how = plan(format, scale_rule, recipe, clip)
    if how is None:
        return None
    if tensor_scale is None and signs is None:
        return _planned(x, how, axis, rotation) if rotation else _planned(x, how, axis)
    for t in (tensor_scale, signs):
        if t is not None and (type(t) is not Tensor or t.requires_grad):
            return None
    return _planned(x, how, axis, rotation, tensor_scale, signs)


class _Quantize(OpOverloadPacket):
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        try:
            found = _short(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError):
            found = None  # torch says what is wrong
        return super().__call__(*args, **kwargs) if found is None else found


def install() -> None:
    """Let torch.ops.pyfmt.quantize take the short way."""
    global _planned
    ops: Any = torch.ops.pyfmt
    _planned = ops._quantize.default._op
    ops.quantize.__class__ = _Quantize
