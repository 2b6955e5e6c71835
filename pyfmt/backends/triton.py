# SPDX-License-Identifier: Apache-2.0
"""The Triton room: CUDA tensors and CuPy arrays, every format, user-made ones included.

Runs where Triton and a CUDA device are; with TRITON_INTERPRET=1 in the environment the same kernels
run on the CPU, slowly, on CPU tensors. CuPy arrays go in and out by DLPack without a copy.

Kernels are launched directly. Calls that torch traces or differentiates go through torch.ops.pyfmt,
whose CUDA kernels are this room's where the compiled GPU library was not built.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from pyfmt import _arrays, _check
from pyfmt._arrays import back_to, from_cupy, signs_for, unread
from pyfmt.formats import Format

# What the kernels will read when they are imported: Triton decides there, once.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_INSTEAD = "TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly"
# None: not looked up yet; "": nothing; else what the room lacks here.
_lack: str | None = None


def _missing() -> str:
    for module in ("triton", "torch"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; `pip install {module}`"
    import torch

    if not _INTERPRETED and not torch.cuda.is_available():
        return f"no CUDA device is visible; {_INSTEAD}"
    return ""


def available() -> str | None:
    """Return None where Triton and a CUDA device (or the interpreter) are there, else the lack."""
    global _lack
    if _lack is None:
        _lack = _missing()
    return _lack or None


def supports(verb: str, fmt: Format | None, x: Any) -> str | None:
    """CUDA tensors and CuPy arrays, every format; CPU tensors in Triton's interpreter."""
    library = _arrays.kind(x)
    if library == "numpy":
        return "it serves CUDA tensors and CuPy arrays, not NumPy arrays"
    if library == "torch" and x.device.type not in ("cuda", "cpu" if _INTERPRETED else "cuda"):
        return f"it serves CUDA tensors, not tensors on {x.device}; {_INSTEAD}"
    if verb == "matmul":
        import torch

        # A traced call goes through the operator, which sees to that itself.
        traced = torch.compiler.is_compiling()
        if not traced and torch.get_float32_matmul_precision() != "highest":
            return (
                "float32 products are not exact here; "
                "torch.set_float32_matmul_precision('highest') makes them so"
            )
    return None


def _ops(*tensors: Any) -> Any:
    """Return torch.ops.pyfmt for a call that is traced or differentiated, else None."""
    import torch

    compiling = torch.compiler.is_compiling()
    if not compiling:
        for t in tensors:
            if getattr(t, "requires_grad", False) and torch.is_grad_enabled():
                break
        else:
            return None
    from pyfmt import ops

    if ops.cuda_kernels() != "triton":
        raise ValueError(
            f"backend 'triton': it launches its kernels directly, torch cannot "
            f"{'trace' if compiling else 'differentiate'} them beside the GPU library; leave "
            "backend out" + ("" if compiling else " or pass x.detach()")
        )
    return torch.ops.pyfmt


# ---- arrays -----------------------------------------------------------------------------------


def _launches() -> Any:
    """Return the module that launches the kernels."""
    from pyfmt.backends import _triton_launch

    return _triton_launch


def _given(value: Any, x: Any, fmt: Format, recipe: str | None) -> tuple[str, Any]:
    """Check a caller's tensor scale; return how it is given and a float or a tensor on a device."""
    if value is None:
        return "", None
    value = from_cupy(value)
    _check.tensor_scale(unread(value), fmt, recipe or "")
    if _arrays.is_torch(value) and value.is_cuda:
        import torch

        return "given", value.to(x.device, torch.float32).reshape(())
    import numpy as np

    return "value", float(np.float32(float(value)))


def _key(seed: int | None, rounding: str) -> tuple[int, int, Any]:
    """Return the low and high word of a seed as signed 32-bit integers, and what plans key by."""
    if rounding != "stochastic":
        return 0, 0, None
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        return 0, 0, seed
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32), 0


def _signed(seed: int | None) -> int | None:
    """Return the same 64 bits as the signed int that op schemas have."""
    return None if seed is None else (seed + 2**63) % 2**64 - 2**63


def _scalar(value: Any, x: Any) -> Any:
    """Return a tensor scale as one float32 on x's device, as the ops take it."""
    import torch

    if value is None:
        return None
    if not _arrays.is_torch(value):
        return torch.full((), float(value), dtype=torch.float32, device=x.device)
    return value.to(x.device, torch.float32).reshape(())


def _fill(stored: Any, given: Any) -> None:
    """Store the tensor scale of a tensor without elements."""
    if stored is not None:
        stored.copy_(given) if _arrays.is_torch(given) else stored.fill_(given or 1.0)


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
    import torch

    ops = _ops(x, tensor_scale, signs)
    if ops is not None:
        codes, scales, stored = ops.quantize(
            x, fmt.key, axis, scale_rule, recipe, rounding, _signed(seed), clip,
            _scalar(tensor_scale, x), rotation or 0, signs_for(signs, x),
        )  # fmt: skip
        return codes, scales, stored if stored.numel() else None
    launches, tensor = _launches(), from_cupy(x)
    low, high, seed_kind = _key(seed, rounding)
    given, source = _given(tensor_scale, tensor, fmt, recipe)
    rotation = rotation or 1
    signs = signs_for(signs, tensor)
    count = 0 if signs is None else signs.numel()
    plan = launches.plan(
        fmt, tensor.shape, tensor.dtype, axis, scale_rule, recipe, rounding, seed_kind, clip, given,
        rotation, count,
    )  # fmt: skip
    if rotation > 1:
        _check.rotation(rotation, signs, tensor.shape[plan.axis])
    device = tensor.device
    codes = torch.empty(plan.codes, dtype=torch.uint8, device=device)
    scales = torch.empty(plan.scales, dtype=plan.scale_dtype, device=device)
    stored = torch.empty((), dtype=torch.float32, device=device) if plan.tensor else None
    if tensor.numel():
        moved = tensor if plan.axis == tensor.ndim - 1 else tensor.movedim(plan.axis, -1)
        options = launches.Options(low, high, rotation, signs, source, stored)
        launches.quantize(moved, codes, scales, fmt, plan, options)
    else:
        _fill(stored, source)
    return back_to(codes, x), back_to(scales, x), back_to(stored, x)


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
    import torch

    shape, dtype = tuple(shape), _arrays.torch_dtype(dtype)
    ops = _ops(codes, scales, tensor_scale)
    if ops is not None:
        scale = _scalar(tensor_scale, codes)
        return ops.dequantize(codes, scales, scale, fmt.key, shape, axis, dtype)
    launches = _launches()
    b_codes, b_scales, t = (
        from_cupy(codes),
        from_cupy(scales),
        from_cupy(tensor_scale),
    )
    axis, lead, columns, expected, run = launches.dequantize_plan(
        fmt, shape, axis, dtype, t is not None
    )
    _check.codes_and_scales(b_codes, b_scales, fmt, lead, columns, expected)
    if t is not None:
        _check.stored_tensor_scale(unread(t), fmt)
        t = t if _arrays.is_torch(t) else torch.tensor(float(t), dtype=torch.float32)
        t = t.to(b_codes.device, torch.float32).reshape(())
    y = torch.empty(shape, dtype=dtype, device=b_codes.device)
    if y.numel():
        moved = y if axis == y.ndim - 1 else y.movedim(axis, -1)
        launches.dequantize(b_codes.contiguous(), b_scales.contiguous(), t, moved, fmt, run)
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
    import torch

    ops = _ops(x, tensor_scale)
    if ops is not None:
        return ops.fake_quantize(
            x, fmt.key, axis, scale_rule, recipe, rounding, _signed(seed), clip,
            _scalar(tensor_scale, x),
        )  # fmt: skip
    launches, tensor = _launches(), from_cupy(x)
    low, high, seed_kind = _key(seed, rounding)
    given, source = _given(tensor_scale, tensor, fmt, recipe)
    plan = launches.plan(
        fmt, tensor.shape, tensor.dtype, axis, scale_rule, recipe, rounding, seed_kind, clip, given,
        fake=True,
    )  # fmt: skip
    y = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.numel():
        stored = torch.empty((), dtype=torch.float32, device=y.device) if plan.tensor else None
        last = plan.axis == tensor.ndim - 1
        moved, out = (t if last else t.movedim(plan.axis, -1) for t in (tensor, y))
        options = launches.Options(low, high, 1, None, source, stored)
        launches.fake_quantize(moved, out, fmt, plan, options)
    return back_to(y, x)


def hadamard(x: Any, size: int, signs: Any = None, *, axis: int = -1) -> Any:
    import torch

    ops = _ops(x, signs)
    if ops is not None:
        return ops.hadamard(x, size, signs_for(signs, x), axis)
    tensor = from_cupy(x)
    _check.float_dtype(tensor.dtype)
    axis = _check.axis(axis, tensor.shape)
    _check.rotation(size, signs, tensor.shape[axis])
    moved = tensor.movedim(axis, -1).contiguous()
    y = torch.empty(moved.shape, dtype=moved.dtype, device=moved.device)
    if y.numel():
        _launches().hadamard(moved, y, size, signs_for(signs, tensor))
    return back_to(y.movedim(-1, axis).contiguous(), x)


def pack(codes: Any, bits: int) -> Any:
    import torch

    ops = _ops(codes)
    if ops is not None:
        return ops.pack(codes, bits)
    tensor = from_cupy(codes)
    _check.pack(tensor.dtype, tensor.shape, bits)
    *lead, n = tensor.shape
    packed = torch.empty((*lead, -(-n * bits // 8)), dtype=torch.uint8, device=tensor.device)
    if packed.numel():
        _launches().pack(tensor.contiguous(), packed, bits)
    return back_to(packed, codes)


def unpack(packed: Any, bits: int, length: int) -> Any:
    import torch

    ops = _ops(packed)
    if ops is not None:
        return ops.unpack(packed, bits, length)
    tensor = from_cupy(packed)
    _check.unpack(tensor.dtype, tensor.shape, bits, length)
    y = torch.empty((*tensor.shape[:-1], length), dtype=torch.uint8, device=tensor.device)
    if y.numel():
        _launches().unpack(tensor.contiguous(), y, bits)
    return back_to(y, packed)


def amax(x: Any, block: int | None = None, *, axis: int = -1) -> Any:
    import torch

    ops = _ops(x)
    if ops is not None:
        return ops.amax(x, block, axis)
    tensor = from_cupy(x)
    _check.float_dtype(tensor.dtype)
    if block is None:
        y = torch.empty((), dtype=torch.float32, device=tensor.device)
        if tensor.numel():
            _launches().amax_tensor(tensor, y)
        else:
            y.zero_()
        return back_to(y, x)
    axis = _check.axis(axis, tensor.shape)
    _check.block(block)
    moved = tensor.movedim(axis, -1)
    *lead, columns = moved.shape
    y = torch.empty((*lead, -(-columns // block)), dtype=torch.float32, device=tensor.device)
    if y.numel():
        _launches().amax_blocks(moved, y, block)
    return back_to(y, x)


def matmul(a: Any, b: Any, bias: Any = None, *, dtype: Any = "float32") -> Any:
    """Expand both operands to float32, one dense GEMM, float32 bias, one rounding."""
    quantized = hasattr(a, "codes")
    ops = _ops(*((a.codes,) if quantized else (a,)), bias)
    if ops is not None:
        left, right = (
            (q.codes, q.scales, _scalar(q.tensor_scale, q.codes))
            if hasattr(q, "codes")
            else (q, None, None)
            for q in (a, b)
        )
        names = (a.format.key if quantized else None, b.format.key)
        return ops.matmul(
            *left, names[0], *right, names[1], b.shape[b.axis], bias, _arrays.torch_dtype(dtype)
        )
    dense = [
        from_cupy(dequantize(q.codes, q.scales, q.tensor_scale, q.format, q.shape, axis=q.axis))
        if hasattr(q, "codes")
        else from_cupy(q).float()
        for q in (a, b)
    ]
    y = dense[0] @ dense[1].mT
    if bias is not None:
        y = y + from_cupy(bias).float()
    return back_to(y.to(_arrays.torch_dtype(dtype)), b.codes if hasattr(b, "codes") else b)
