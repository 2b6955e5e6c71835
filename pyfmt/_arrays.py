# SPDX-License-Identifier: Apache-2.0
"""Which library an array belongs to, and moves between libraries without losing bits."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from pyfmt import _check

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def is_torch(x: Any) -> bool:
    """Return whether `x` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def refuse_gradient(who: str, x: Any, instead: str = "") -> None:
    """Raise ValueError for a tensor that requires a gradient, in grad mode, where none exists."""
    if is_torch(x) and x.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise ValueError(f"{who} has no gradient: {instead}pass x.detach()")


def kind(x: Any) -> str:
    """Return "numpy", "cupy" or "torch"; TypeError for anything else."""
    if isinstance(x, np.ndarray):
        return "numpy"
    if is_torch(x):
        return "torch"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return "cupy"
    raise TypeError(
        "x: expected a NumPy array, a CuPy array or a torch tensor, got "
        f"{type(x).__module__}.{type(x).__name__}; convert it with numpy.asarray or torch.tensor"
    )


def where(x: Any) -> str:
    """Describe an array's home for messages, for example "torch tensor on cpu"."""
    library = kind(x)
    return f"torch tensor on {x.device}" if library == "torch" else f"{library} array"


def to_numpy(x: Any) -> np.ndarray:
    """Return a torch, CuPy or NumPy array as NumPy, bfloat16 through ml_dtypes."""
    library = kind(x)
    if library == "cupy":
        return x.get()
    if library == "numpy":
        return x
    import torch

    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.uint16).numpy().view(_BFLOAT16)
    return x.numpy()


def to_torch(x: np.ndarray, device: Any = None) -> Any:
    """Return a NumPy array as a torch tensor on `device`, sharing memory where it can."""
    import torch

    x = np.ascontiguousarray(x) if x.ndim else np.array(x)
    if not x.flags.writeable:
        x = x.copy()
    if x.dtype == _BFLOAT16:
        tensor = torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(x)
    return tensor if device is None else tensor.to(device)


def from_cupy(x: Any) -> Any:
    """Return a CuPy array as a torch tensor on the same memory; anything else as it is."""
    if x is None or is_torch(x) or type(x).__module__.partition(".")[0] != "cupy":
        return x
    import torch
    from torch.utils.dlpack import from_dlpack

    if _check.dtype_name(x.dtype) == "bfloat16":
        return from_dlpack(x.view("int16")).view(torch.bfloat16)
    return from_dlpack(x)


def back_to(y: Any, like: Any) -> Any:
    """Return a tensor as the library of `like` has it, torch or CuPy, on the same memory."""
    if y is None or is_torch(like):
        return y
    import cupy
    import torch

    if y.dtype == torch.bfloat16:
        return cupy.from_dlpack(y.view(torch.int16)).view(ml_dtypes.bfloat16)
    return cupy.from_dlpack(y)


def signs_for(signs: Any, x: Any) -> Any:
    """Return a rotation's signs as a contiguous tensor on x's device, or None."""
    signs = from_cupy(signs)
    if signs is None:
        return None
    return (signs if is_torch(signs) else to_torch(signs)).to(x.device).contiguous()


def unread(value: Any) -> Any:
    """Return a stand-in for one number on a GPU, so that checking it does not wait for it."""
    return 1.0 if is_torch(value) and value.is_cuda and value.numel() == 1 else value


def torch_dtype(dtype: Any) -> Any:
    """Return the torch dtype of a float dtype from any library."""
    import torch

    return getattr(torch, _check.float_dtype(dtype, "dtype"))


def numpy_dtype(dtype: Any) -> np.dtype:
    """Return the NumPy dtype of a float dtype from any library."""
    name = _check.float_dtype(dtype, "dtype")
    return _BFLOAT16 if name == "bfloat16" else np.dtype(name)
