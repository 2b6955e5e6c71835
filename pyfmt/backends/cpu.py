# SPDX-License-Identifier: Apache-2.0
"""The CPU room: compiled kernels, through torch's ops for tensors and pybind11 for NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyfmt import _arrays, _check
from pyfmt.formats import SCALES, Format
from pyfmt.reference.quantize import Blocks

_REBUILD = "build it with `make setup` in a checkout, or `pip install .`"


def torch_library_path() -> Path | None:
    """Return the compiled library of torch ops, or None where it was not built."""
    path = Path(__file__).resolve().parent.parent / "_torch_ops.so"
    return path if path.exists() else None


def _native() -> Any:
    """Return the compiled NumPy module; ImportError where it was not built."""
    from pyfmt import _native

    return _native


def available() -> str | None:
    """Return None where a compiled library is there, else how to get one."""
    if torch_library_path() is not None:
        return None
    try:
        _native()
    except ImportError:
        return f"the compiled library is missing; {_REBUILD}"
    return None


def supports(verb: str, fmt: Format | None, x: Any) -> str | None:
    """NumPy arrays and CPU tensors, every format."""
    library = _arrays.kind(x)
    if library == "torch":
        if x.device.type != "cpu":
            return f"it serves tensors on cpu, not on {x.device}"
        if torch_library_path() is None:
            return f"the library of torch ops is missing; {_REBUILD} with torch installed"
        return None
    if library == "cupy":
        return "it serves NumPy arrays and CPU tensors, not CuPy arrays"
    try:
        _native()
    except ImportError:
        return f"the NumPy module is missing; {_REBUILD}"
    return None


# ---- torch tensors: the ops -------------------------------------------------------------------


def _torch_ops() -> Any:
    """Return torch.ops.pyfmt, registered."""
    import torch

    import pyfmt.ops  # noqa: F401  (registers the ops)

    return torch.ops.pyfmt


def _as_tensor_scale(value: Any, x: Any) -> Any:
    """Return a caller's tensor scale as the float32 tensor that the ops take."""
    import torch

    if value is None or isinstance(value, torch.Tensor):
        return value
    return torch.tensor(float(value), dtype=torch.float32, device=x.device)


def _some(tensor_scale: Any) -> Any:
    """Return the op's tensor scale, or None where it is the empty tensor of formats without."""
    return tensor_scale if tensor_scale.numel() else None
