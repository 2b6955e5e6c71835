# SPDX-License-Identifier: Apache-2.0
"""Exact, fast low-bit block formats: MXINT8, MXFP4, NVFP4, INT4 and their kin.

NumPy in, NumPy out; torch in, torch out. Importing pyfmt loads neither torch nor triton:
`import pyfmt.ops` registers `torch.ops.pyfmt.*`, `pyfmt.nn` holds the quantized layers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pyfmt import backends
from pyfmt.api import dequantize, fake_quantize, hadamard, matmul, quantize, quantize_dual
from pyfmt.formats import FORMATS, Element, Format, get_format
from pyfmt.tensor import QTensor

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "Element",
    "Format",
    "QTensor",
    "__version__",
    "backends",
    "dequantize",
    "fake_quantize",
    "get_format",
    "hadamard",
    "load",
    "matmul",
    "nn",
    "ops",
    "quantize",
    "quantize_dual",
    "save",
]

_MODULES = ("nn", "ops")


def __getattr__(name: str) -> Any:
    """Load what needs torch or safetensors when it is first asked for."""
    if name in _MODULES:
        return import_module(f"pyfmt.{name}")
    if name in ("load", "save"):
        return getattr(import_module("pyfmt.checkpoint"), name)
    raise AttributeError(f"module 'pyfmt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
