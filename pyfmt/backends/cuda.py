# SPDX-License-Identifier: Apache-2.0
"""The CUDA room: compiled kernels on torch's CUDA tensors and on CuPy arrays, every format.

CuPy arrays go in and out by DLPack on the same memory. Nothing here waits for the device.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfmt import _arrays, _check
from pyfmt._arrays import back_to, from_cupy, signs_for, unread
from pyfmt.formats import Format
from pyfmt.tensor import QTensor

# Looked up once: a call does not ask the file system, and torch.compile traces through it.
_LIBRARY = Path(__file__).resolve().parent.parent / "_torch_ops_cuda.so"
_LIBRARY_BUILT = _LIBRARY.exists()
# None: not tried yet; "": loaded; else why it could not be.
_failure: str | None = None


def torch_library_path() -> Path | None:
    """Return the compiled library of GPU kernels, or None where it was not built."""
    return _LIBRARY if _LIBRARY_BUILT else None


def serves(archs: str, capability: tuple[int, int]) -> bool:
    """Return whether code for `archs` ("90a-real;90-virtual") runs on a compute capability."""
    major, minor = capability
    for word in archs.split(";"):
        match = re.fullmatch(r"(\d+)(\d)([af]?)-(real|virtual)", word)
        if match is None:
            continue
        built, exact = (int(match[1]), int(match[2])), match[3] == "a"
        if match[4] == "virtual" and not exact and built <= (major, minor):
            return True
        if built == (major, minor) or (not exact and built[0] == major and built[1] <= minor):
            return True
    return False


def load() -> str | None:
    """Load the kernels into torch.ops.pyfmt, once; return None or the reason why not."""
    global _failure
    if _failure is None:
        _failure = _load()
    return _failure or None


def loaded() -> bool:
    """Return whether the kernels have been loaded; asks nobody."""
    return _failure == ""


def _load() -> str:
    if not _LIBRARY_BUILT:
        return (
            "the GPU library is missing; build it with `make setup` in a checkout, or `pip install "
            "--no-build-isolation .`, where nvcc 12.8 or later and torch are"
        )
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; `pip install torch`"
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the GPU library does not load here ({error}); build it again with `make setup`"
    archs = torch.ops.pyfmt._cuda_archs()
    capability = torch.cuda.get_device_capability()
    if not serves(archs, capability):
        own = "".join(map(str, capability))
        return (
            f"the GPU library is compiled for {archs} and this GPU has compute capability "
            f"{capability[0]}.{capability[1]}; rebuild with PYFMT_CUDA_ARCHS={own}-real"
        )
    return ""


def available() -> str | None:
    """Return None where the library and a CUDA device are there, else what is missing."""
    return load()


def supports(verb: str, fmt: Format | None, x: Any) -> str | None:
    """CUDA tensors and CuPy arrays, every format."""
    library = _arrays.kind(x)
    if library == "numpy":
        return "it serves CUDA tensors and CuPy arrays, not NumPy arrays"
    if library == "torch" and x.device.type != "cuda":
        return f"it serves CUDA tensors, not tensors on {x.device}"
    return None


# ---- arrays -----------------------------------------------------------------------------------


def _ops() -> Any:
    """Return torch.ops.pyfmt with the kernels registered."""
    import torch

    import pyfmt.ops  # noqa: F401  (registers the ops)

    reason = load()
    if reason is not None:
        raise RuntimeError(f"backend 'cuda': {reason}")
    return torch.ops.pyfmt


def _scalar(value: Any, x: Any) -> Any:
    """Return a tensor scale as one float32 on x's device; what lies there already is not read."""
    import torch

    value = from_cupy(value)
    if value is None:
        return None
    if not _arrays.is_torch(value):
        return torch.full((), float(value), dtype=torch.float32, device=x.device)
    return value.to(x.device, torch.float32).reshape(())


def _signed(seed: int | None) -> int | None:
    """Return the same 64 bits as the signed int that op schemas have."""
    return None if seed is None else (seed + 2**63) % 2**64 - 2**63


def _given(value: Any, fmt: Format, recipe: str | None, x: Any) -> Any:
    """Check a caller's tensor scale as far as the host knows it, and put it on the device."""
    if value is None:
        return None
    recipe = recipe or next(iter(fmt.recipes), "")
    _check.tensor_scale(unread(value), fmt, recipe)
    return _scalar(value, x)


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
    tensor = from_cupy(x)
    codes, scales, stored = _ops().quantize(
        tensor,
        fmt.key,
        axis,
        scale_rule,
        recipe,
        rounding,
        _signed(seed),
        clip,
        _given(tensor_scale, fmt, recipe, tensor),
        rotation or 0,
        signs_for(signs, tensor),
    )
    return (
        back_to(codes, x),
        back_to(scales, x),
        back_to(stored, x) if stored.numel() else None,
    )


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
    tensor = from_cupy(x)
    parts = _ops().quantize_dual(
        tensor,
        fmt.key,
        scale_rule,
        recipe,
        rounding,
        _signed(seed),
        clip,
        _given(tensor_scale, fmt, recipe, tensor),
        rotation or 0,
        signs_for(signs, tensor),
    )
    along, across = (
        (
            back_to(codes, x),
            back_to(scales, x),
            back_to(stored, x) if stored.numel() else None,
        )
        for codes, scales, stored in (parts[:3], parts[3:])
    )
    return (*along, *across)


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
    packed = from_cupy(codes)
    y = _ops().dequantize(
        packed,
        from_cupy(scales),
        _scalar(tensor_scale, packed),
        fmt.key,
        shape,
        axis,
        _arrays.torch_dtype(dtype),
    )
    return back_to(y, codes)


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
    tensor = from_cupy(x)
    y = _ops().fake_quantize(
        tensor,
        fmt.key,
        axis,
        scale_rule,
        recipe,
        rounding,
        _signed(seed),
        clip,
        _given(tensor_scale, fmt, recipe, tensor),
    )
    return back_to(y, x)


def hadamard(x: Any, size: int, signs: Any = None, *, axis: int = -1) -> Any:
    tensor = from_cupy(x)
    return back_to(_ops().hadamard(tensor, size, signs_for(signs, tensor), axis), x)


def pack(codes: Any, bits: int) -> Any:
    return back_to(_ops().pack(from_cupy(codes), bits), codes)


def unpack(packed: Any, bits: int, length: int) -> Any:
    return back_to(_ops().unpack(from_cupy(packed), bits, length), packed)


def amax(x: Any, block: int | None = None, *, axis: int = -1) -> Any:
    return back_to(_ops().amax(from_cupy(x), block, axis), x)


def matmul(a: Any, b: Any, bias: Any = None, *, dtype: Any = "float32") -> Any:
    """Multiply by the path that the table chooses; see `matmul_by` and docs/matmul.md."""
    return matmul_by(a, b, bias, dtype=dtype)


def matmul_by(
    a: Any,
    b: Any,
    bias: Any = None,
    *,
    dtype: Any = "float32",
    path: str | None = None,
    precision: str = "full",
    batch_invariant: bool = False,
) -> Any:
    """Multiply by a path of choice."""
    left: tuple[Any, ...] = (from_cupy(a), None, None, None)
    if isinstance(a, QTensor):
        left = (*_parts(a), a.format.key)
    y = _ops().matmul(
        *left, *_parts(b), b.format.key, b.shape[b.axis], from_cupy(bias),
        _arrays.torch_dtype(dtype), path, precision, batch_invariant,
    )  # fmt: skip
    return back_to(y, b.codes)


def explain_matmul(a: Any, b: QTensor, batch_invariant: bool = False) -> dict[str, str]:
    """Return for each GEMM path "chosen" with the reason, "able", or why it cannot serve."""
    from pyfmt import _matmul_paths, _torch_matmul

    _ops()
    codes = from_cupy(b.codes)
    machine = _torch_matmul.machine_of(codes.device)
    if machine is None:
        raise ValueError(f"b: GEMM paths are those of CUDA tensors, got one on {codes.device}")
    fmt = a.format if isinstance(a, QTensor) else None
    dense = "" if fmt else _check.dtype_name(a.dtype)
    rows = math.prod(a.shape[:-1])
    n, k = b.shape
    call = _matmul_paths.Call(fmt, dense, b.format, rows, n, k, "", batch_invariant)
    return _matmul_paths.explain(call, machine)


def fold_exceptions(device: Any = None) -> Any:
    """Return how many rows did not fold since the process began, as an int64 tensor on the device.

    Such rows were computed on an exact path. Nothing waits for the device until the number is
    read, with int(...).
    """
    import torch

    from pyfmt._torch_operands import total_of

    _ops()
    index = torch.device("cuda" if device is None else device).index
    place = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    total = total_of(place)
    return torch.zeros((), dtype=torch.int64) if total is None else total.clone()


def _parts(q: QTensor) -> tuple[Any, Any, Any]:
    codes = from_cupy(q.codes)
    return codes, from_cupy(q.scales), _scalar(q.tensor_scale, codes)
