# SPDX-License-Identifier: Apache-2.0
"""Gradients and autocast of the operators.

hadamard has its exact transpose; fake_quantize and the activations of linear are straight-through
(d fake_quantize(x) / dx = 1); matmul and linear differentiate their dense operand and the bias,
quantized operands are constants; everything else refuses an input that requires a gradient.

The kernels stand at the Autograd key itself and step aside in inference: that costs 2 us a call
less than torch.library.register_autograd, and 5 us less with a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfmt._torch_matmul import full_precision_mm

_OPS: Any = torch.ops.pyfmt
_BELOW = torch._C._after_autograd_keyset


def _wanted(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _refuse(verb: str, **tensors: Tensor | None) -> None:
    """Raise for the first tensor that requires a gradient where there is none."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            way = "use fake_quantize (straight-through) or " if verb == "quantize" else ""
            of = "" if name in ("x", "codes") else f" in {name}"
            raise RuntimeError(f"{verb} has no gradient{of}: {way}pass {name}.detach()")


def _without_gradient(verb: str) -> Callable[..., Any]:
    op = getattr(_OPS, verb).default
    redispatch = op._handle.redispatch_boxed  # op.redispatch, but for one call in between
    names = [argument.name for argument in op._schema.arguments]

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            tensors = zip(names, args, strict=False)
            _refuse(verb, **{name: t for name, t in tensors if isinstance(t, Tensor)})
        return redispatch(keyset & _BELOW, *args)

    return kernel


def _below(op: Any, keyset: Any, args: Sequence[Any]) -> Any:
    """Run the operator without its gradient, and the operators that it calls too."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _BELOW, *args)


def _transpose(g: Tensor, size: int, signs: Tensor | None, axis: int = -1) -> Tensor:
    """The transpose of hadamard: g -> signs * (H g / sqrt(size))."""
    g = _OPS.hadamard.default(g, size, None, axis)
    if signs is None:
        return g
    signs = signs.to(g.dtype).repeat(g.shape[axis] // signs.shape[0])
    return g * signs.view([-1 if i == axis % g.dim() else 1 for i in range(g.dim())])


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, size: int, signs: Any, axis: int) -> Any:
        ctx.save_for_backward(signs)
        ctx.size, ctx.axis = size, axis
        return _below(_OPS.hadamard.default, keyset, (x, size, signs, axis))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (signs,) = ctx.saved_tensors
        return None, _transpose(g, ctx.size, signs, ctx.axis), None, None, None


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, options: Any) -> Any:
        return _below(_OPS.fake_quantize.default, keyset, (x, *options))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, g, None


class _Gemm(torch.autograd.Function):
    """y = a b^T + bias of matmul and linear: d a = g b (rotated back), d bias = sum of g."""

    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        op: Any,
        a: Tensor,
        bias: Tensor | None,
        weight: Any,
        rotation: int,
        signs: Tensor | None,
        args: Any,
    ) -> Any:
        codes, scales, tensor_scale, ctx.format = weight
        ctx.save_for_backward(codes, scales, tensor_scale, signs)
        ctx.rotation, ctx.shape, ctx.dtype = rotation, a.shape, a.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _below(op, keyset, args)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        codes, scales, tensor_scale, signs = ctx.saved_tensors
        n, k = codes.shape[0], ctx.shape[-1]
        rows = g.reshape(-1, n) if n else g.new_empty((ctx.shape[:-1].numel(), 0))
        grad_a = grad_bias = None
        if ctx.needs_input_grad[2]:
            b = _OPS.dequantize.default(codes, scales, tensor_scale, ctx.format, (n, k))
            # A backward pass run inside autocast must not lower this product.
            with torch.autocast(g.device.type, enabled=False):
                grad_a = full_precision_mm(rows.float(), b).view(ctx.shape)
            if ctx.rotation:
                grad_a = _transpose(grad_a, ctx.rotation, signs)
            grad_a = grad_a.to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return None, None, grad_a, grad_bias, None, None, None, None


def _hadamard(
    keyset: Any, x: Tensor, size: int, signs: Tensor | None = None, axis: int = -1
) -> Any:
    if _wanted(x, signs):
        _refuse("hadamard", signs=signs)
        return _Hadamard.apply(keyset, x, size, signs, axis)
    return _OPS.hadamard.default.redispatch(keyset & _BELOW, x, size, signs, axis)


def _fake_quantize(keyset: Any, x: Tensor, *options: Any) -> Any:
    tensor_scale = options[7] if len(options) > 7 else None
    if _wanted(x, tensor_scale):
        _refuse("fake_quantize", tensor_scale=tensor_scale)
        return _FakeQuantize.apply(keyset, x, options)
    return _OPS.fake_quantize.default.redispatch(keyset & _BELOW, x, *options)


def _matmul(keyset: Any, *args: Any) -> Any:
    op = _OPS.matmul.default
    a, a_scales, a_tensor_scale, _, *weight = args[:8]
    bias = args[9] if len(args) > 9 else None
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        constants = {"a_scales": a_scales, "a_tensor_scale": a_tensor_scale}
        _refuse("matmul", **constants, b_scales=weight[1], b_tensor_scale=weight[2])
        return _Gemm.apply(keyset, op, a, bias, weight, 0, None, args)
    return _below(op, keyset, args)


def _linear(keyset: Any, *args: Any) -> Any:
    op = _OPS.linear.default
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        x, *weight = args[:5]
        given = args[5:9]
        bias, _, rotation, signs = given + (None, None, 0, None)[len(given) :]
        _refuse("linear", w_scales=weight[1], w_tensor_scale=weight[2], signs=signs)
        return _Gemm.apply(keyset, op, x, bias, weight, rotation, signs, args)
    return _below(op, keyset, args)


def _autocast(op: Any, device: str, key: str) -> Callable[..., Any]:
    """As nn.Linear: a dense float operand is cast to the autocast dtype. Scales and bias stay."""
    here = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(keyset: Any, x: Tensor, *args: Any) -> Any:
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(here):
            return op(x, *args)

    return kernel


def register(library: Any) -> None:
    """Register the gradients and autocast rules of all operators that need one."""
    for verb in ("quantize", "quantize_dual", "dequantize", "amax"):
        library.impl(verb, _without_gradient(verb), "Autograd", with_keyset=True)
    for verb, kernel in (
        ("hadamard", _hadamard),
        ("fake_quantize", _fake_quantize),
        ("matmul", _matmul),
        ("linear", _linear),
    ):
        library.impl(verb, kernel, "Autograd", with_keyset=True)
    for verb in ("matmul", "linear"):
        op = getattr(_OPS, verb).default
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            library.impl(verb, _autocast(op, device, key), key, with_keyset=True)
