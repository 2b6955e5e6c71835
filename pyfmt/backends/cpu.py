# SPDX-License-Identifier: Apache-2.0
"""The CPU room: compiled kernels, through torch's ops for tensors and pybind11 for NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfmt import _arrays, _check
from pyfmt.backends import _cpu_numpy
from pyfmt.formats import Format
from pyfmt.tensor import QTensor

_REBUILD = "build it with `make setup` in a checkout, or `pip install .`"


# Looked up once: a call does not ask the file system, and torch.compile traces through it.
_LIBRARY = Path(__file__).resolve().parent.parent / "_torch_ops.so"
_LIBRARY_BUILT = _LIBRARY.exists()


def torch_library_path() -> Path | None:
    """Return the compiled library of torch ops, or None where it was not built."""
    return _LIBRARY if _LIBRARY_BUILT else None


def available() -> str | None:
    """Return None where a compiled library is there, else how to get one."""
    if torch_library_path() is not None:
        return None
    try:
        _cpu_numpy.native()
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
        _cpu_numpy.native()
    except ImportError:
        return f"the NumPy module is missing; {_REBUILD}"
    return None


# ---- torch tensors: the ops -------------------------------------------------------------------


def _torch_ops() -> Any:
    """Return torch.ops.pyfmt, registered."""
    import torch

    import pyfmt.ops  # noqa: F401  (registers the ops)

    return torch.ops.pyfmt


def _as_tensor_scale(value: Any, fmt: Format, recipe: str | None, x: Any) -> Any:
    """Return a caller's tensor scale, checked, as the float32 tensor that the ops take."""
    import torch

    if value is None:
        return None
    given = isinstance(value, torch.Tensor)
    if not (given and torch.compiler.is_compiling()):
        _check.tensor_scale(value, fmt, recipe or "")
    return (
        value.float() if given else torch.tensor(float(value), dtype=torch.float32, device=x.device)
    )


def _signed(seed: int | None) -> int | None:
    """Return the same 64 bits as the signed int that op schemas have."""
    return None if seed is None else (seed + 2**63) % 2**64 - 2**63


def _some(tensor_scale: Any) -> Any:
    """Return the op's tensor scale, or None where it is the empty tensor of formats without."""
    return tensor_scale if tensor_scale.numel() else None


# ---- the verbs --------------------------------------------------------------------------------


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
    if not _arrays.is_torch(x):
        return _cpu_numpy.quantize(
            x, fmt, axis, scale_rule, recipe, rounding, seed, clip, tensor_scale, rotation, signs
        )
    codes, scales, stored = _torch_ops().quantize(
        x,
        fmt.key,
        axis,
        scale_rule,
        recipe,
        rounding,
        _signed(seed),
        clip,
        _as_tensor_scale(tensor_scale, fmt, recipe, x),
        rotation or 0,
        _arrays.signs_for(signs, x),
    )
    return codes, scales, _some(stored)


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
    if not _arrays.is_torch(codes):
        return _cpu_numpy.dequantize(codes, scales, tensor_scale, fmt, shape, axis, dtype)
    return _torch_ops().dequantize(
        codes, scales, tensor_scale, fmt.key, shape, axis, _arrays.torch_dtype(dtype)
    )


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
    if not _arrays.is_torch(x):
        return _cpu_numpy.fake_quantize(
            x, fmt, axis, scale_rule, recipe, rounding, seed, clip, tensor_scale
        )
    return _torch_ops().fake_quantize(
        x,
        fmt.key,
        axis,
        scale_rule,
        recipe,
        rounding,
        _signed(seed),
        clip,
        _as_tensor_scale(tensor_scale, fmt, recipe, x),
    )


def hadamard(x: Any, size: int, signs: Any = None, *, axis: int = -1) -> Any:
    if not _arrays.is_torch(x):
        return _cpu_numpy.hadamard(x, size, signs, axis)
    return _torch_ops().hadamard(x, size, _arrays.signs_for(signs, x), axis)


def pack(codes: Any, bits: int) -> Any:
    if not _arrays.is_torch(codes):
        return _cpu_numpy.pack(codes, bits)
    return _torch_ops().pack(codes, bits)


def unpack(packed: Any, bits: int, length: int) -> Any:
    if not _arrays.is_torch(packed):
        return _cpu_numpy.unpack(packed, bits, length)
    return _torch_ops().unpack(packed, bits, length)


def amax(x: Any, block: int | None = None, *, axis: int = -1) -> Any:
    if not _arrays.is_torch(x):
        return _cpu_numpy.amax(x, block, axis)
    return _torch_ops().amax(x, block, axis)


def matmul(a: Any, b: Any, bias: Any = None, *, dtype: Any = "float32") -> Any:
    """Multiply packed operands as they are: see csrc/cpu/matmul.h."""
    quantized = isinstance(a, QTensor)
    if _arrays.is_torch(b.codes):
        left = (a.codes, a.scales, a.tensor_scale, a.format.key) if quantized else (a, *[None] * 3)
        right = (b.codes, b.scales, b.tensor_scale, b.format.key)
        return _torch_ops().matmul(*left, *right, b.shape[1], bias, _arrays.torch_dtype(dtype))
    return _cpu_numpy.matmul(a, b, bias, dtype)


def explain_matmul(a: Any, b: QTensor, batch_invariant: bool = False) -> dict[str, str]:
    """Return for each GEMM path of the CPU "chosen" with the instruction sets, or "able"."""
    from pyfmt import _matmul_paths

    room = _torch_ops() if _arrays.is_torch(b.codes) else _cpu_numpy.native()
    level, levels = matmul_levels(room)
    words = f"kernels for {level} of {', '.join(levels)}; there are none for AMX"
    fmt = a.format if isinstance(a, QTensor) else None
    n, k = b.shape
    rows = a.shape[0] if len(a.shape) == 1 else a.shape[-2]
    call = _matmul_paths.Call(fmt, "", b.format, rows, n, k, "", batch_invariant)
    if _matmul_paths.choose_on_cpu(call) == "packed":
        return {"packed": f"chosen: {words}", "portable": "able"}
    return {
        "packed": "its sums depend on how many rows there are",
        "portable": "chosen: results must not depend on the batch",
    }


def matmul_levels(room: Any) -> tuple[str, list[str]]:
    """Return the instruction set that products use, and all that this processor has kernels for."""
    if hasattr(room, "_cpu_matmul_level"):
        return room._cpu_matmul_level(), room._cpu_matmul_levels().split(",")
    return room.matmul_level(), room.matmul_levels().split(",")
