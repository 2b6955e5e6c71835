# SPDX-License-Identifier: Apache-2.0
"""The operators of a linear layer in low-bit training: forward, backward, and their gradient.

    Y = X W^T + bias,  dX = dY W,  dW = dY^T X,  dbias = sum of dY

Each operand is quantized along the axis that its product sums over (`recipes.py`), each product is
torch.ops.pyfmt.matmul. For backward the layer keeps X along the tokens as codes and scales, and
the weight itself: it is the parameter, so it costs nothing, and quantizing it again costs one read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfmt import _check, _torch_autograd, _torch_dense, _torch_matmul
from pyfmt import _matmul_paths as paths
from pyfmt._torch_autograd import _below, _wanted
from pyfmt._torch_matmul import _check_float, has_scale, raw, row_bytes, scales_shape
from pyfmt._torch_operands import PANEL_BYTES, Left, Out, Right
from pyfmt.formats import SCALES, Format, get_format
from pyfmt.recipes import Quantizer, Recipe, from_spec

# fmt: off
SCHEMAS = (
    "_train_linear(Tensor x, Tensor w, Tensor? bias, str recipe, Tensor? seed=None, "
    "Tensor? signs_y=None, Tensor? signs_dx=None, Tensor? signs_dw=None, bool save=False) -> "
    "(Tensor y, Tensor codes, Tensor scales, Tensor tensor_scale)",

    "_train_linear_backward(Tensor g, Tensor w, Tensor codes, Tensor scales, Tensor tensor_scale, "
    "str recipe, Tensor? seed, Tensor? signs_dx, Tensor? signs_dw, ScalarType? bias_dtype, "
    "bool needs_x, bool needs_w) -> (Tensor dx, Tensor dw, Tensor dbias)",
)
# fmt: on

_OPS: Any = torch.ops.pyfmt

# What a seed is drawn from; the seeds of X, W and dY are it and the next two.
SEEDS = 1 << 62
_X, _W, _DY = range(3)

Parts = tuple[Tensor, Tensor, Tensor]  # codes, scales, tensor scale (empty where there is none)


class Values(NamedTuple):
    """What the `exact` path makes of a weight: bfloat16 element * scale, and the tensor scale."""

    values: Tensor
    tensor_scale: Tensor


def rows_format(key: str) -> Format:
    """The format that a matrix is multiplied in: square blocks are repeated for each of their
    rows, which leaves the values and lets every product take them."""
    fmt = get_format(key)
    return get_format(fmt, block=fmt.block_columns(1)) if fmt.block_rows > 1 else fmt


def padded(tokens: Any, rotation: int | None) -> Any:
    """Tokens up to a multiple of a rotation along them; the added ones are zeros."""
    return tokens if rotation is None else -(-tokens // rotation) * rotation


def _repeated(parts: Sequence[Tensor], fmt: Format) -> Parts:
    codes, scales, tensor_scale = parts
    if fmt.block_rows > 1:
        scales = scales.repeat_interleave(fmt.block_rows, 0)[: codes.shape[0]].contiguous()
    return codes, scales, tensor_scale


def _options(q: Quantizer, seed: int, signs: Tensor | None) -> tuple[Any, ...]:
    given = seed % 2**63 if q.stochastic else None
    rotation = q.rotation or 0
    return q.scale_rule, q.recipe, q.rounding, given, q.clip, None, rotation, signs


def _one(t: Tensor, q: Quantizer, axis: int, seed: int, signs: Tensor | None) -> Parts:
    """Quantize a matrix along one axis."""
    missing = padded(t.shape[axis], q.rotation) - t.shape[axis]
    if missing:  # the tokens alone: forward checked the others
        t = torch.nn.functional.pad(t, (0, 0, 0, missing))
    parts = _OPS.quantize.default(t, q.format, axis, *_options(q, seed, signs))
    return _repeated(parts, get_format(q.format))


def _both(
    t: Tensor, along: Quantizer, across: Quantizer, seed: int, signs: Tensor | None, turned: Any
) -> tuple[Parts, Parts]:
    """Quantize a matrix of tokens along its last axis and along the tokens; one read where the two
    are alike (quantizers that are equal have the same signs) but for a rotation of the second."""
    fmt = get_format(along.format)
    if padded(t.shape[0], across.rotation) == t.shape[0]:
        if along == across:
            six = _OPS.quantize_dual.default(t, along.format, *_options(along, seed, signs))
            return _repeated(six[:3], fmt), _repeated(six[3:], fmt)
        if t.is_cuda and t.numel() and _rotates_second(along, across) and _has_turned():
            rule, recipe, rounding, given, clip, _, size, bits = _options(across, seed, turned)
            six = _OPS._quantize_turned.default(
                t, along.format, rule, recipe, rounding, given, clip, size, bits
            )
            return _repeated(six[:3], fmt), _repeated(six[3:], fmt)
    return _one(t, along, -1, seed, signs), _one(t, across, -2, seed, turned)


@lru_cache(maxsize=256)
def _rotates_second(along: Quantizer, across: Quantizer) -> bool:
    """Whether the second quantizer is the first and a rotation."""
    return bool(across.rotation) and replace(across, rotation=None, signs=None) == along


@lru_cache(maxsize=1)
def _has_turned() -> bool:
    return hasattr(_OPS, "_quantize_turned")


@lru_cache(maxsize=1024)
def _is_exact(device: torch.device, a_key: str, b_key: str, m: int, n: int, k: int) -> bool:
    """Whether a product takes the `exact` path."""
    formats = rows_format(a_key), rows_format(b_key)
    call = paths.Call(formats[0], "", formats[1], m, n, k)
    return bool(_torch_matmul._choose(call, device, None) == "exact")


def _weight(
    w: Tensor, q: Quantizer, axis: int, seed: int, signs: Tensor | None, a_key: str, m: int
) -> Parts | Values:
    """Quantize a weight along an axis, to be multiplied by m rows of a format.

    Square blocks are the same along both axes, so that the values of W^T are those of W: no codes
    are turned for them, the product reads W by columns.
    """
    fmt = get_format(q.format)
    square = 1 < fmt.block_rows == fmt.block_columns(w.shape[-1])
    if square and w.is_cuda and not q.stochastic and not q.rotation:
        n, k = w.shape if axis == -1 else (w.shape[1], w.shape[0])
        whole = 2 * w.numel() <= PANEL_BYTES
        if whole and _is_exact(w.device, a_key, q.format, m, n, k):
            codes, scales, stored = _one(w, q, -1, seed, signs)
            key = rows_format(q.format).key
            values = _OPS.dequantize.default(codes, scales, None, key, w.shape, -1, torch.bfloat16)
            return Values(values if axis == -1 else values.t(), stored)
    return _one(w, q, axis, seed, signs)


def _product(
    a: Parts,
    a_key: str,
    b: Parts | Values,
    b_key: str,
    k: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if isinstance(b, Values):
        scale = a[2] if has_scale(a[2]) else None
        rows = paths.facts(rows_format(a_key).key)
        given = Left(a[0].shape[0], k, rows, None, a[0], a[1], scale)
        scale = b.tensor_scale if has_scale(b.tensor_scale) else None
        facts, n = paths.facts(rows_format(b_key).key), b.values.shape[0]
        kept = Right(b.values, b.values, scale, facts, n, [b.values])
        return _torch_dense.exact(given, kept, Out(bias, dtype))
    left = (a[0], a[1], a[2] if has_scale(a[2]) else None, rows_format(a_key).key)
    right = (b[0], b[1], b[2] if has_scale(b[2]) else None, rows_format(b_key).key)
    y: Tensor = _OPS.matmul.default(*left, *right, k, bias, dtype)
    return y


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1]).contiguous()


def _checked(x: Tensor, w: Tensor, bias: Tensor | None, spec: str) -> Recipe:
    recipe: Recipe = raw(from_spec, spec)
    _check_float(x, "x")
    _check_float(w, "weight")
    if w.dim() != 2:
        raise RuntimeError(f"weight: expected two dimensions, got {w.dim()}")
    n, k = w.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise RuntimeError(
            f"x: expected a last axis of {k} elements, the layer's inputs, got shape "
            f"{tuple(x.shape)}"
        )
    if bias is not None:
        _check_float(bias, "bias")
        if bias.dim() != 1 or bias.shape[0] != n:
            raise RuntimeError(f"bias: expected shape ({n},), got {tuple(bias.shape)}")
    for q, length in ((recipe.x, k), (recipe.w_t, n)):
        if q.rotation:
            raw(_check.rotation, q.rotation, None, length)
    return recipe


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    spec: str,
    seed: Tensor | None = None,
    signs_y: Tensor | None = None,
    signs_dx: Tensor | None = None,
    signs_dw: Tensor | None = None,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and, with `save`, what dW needs of x: its codes, scales and tensor scale."""
    recipe = _checked(x, w, bias, spec)
    n, k = w.shape
    flat, base = _rows(x), 0 if seed is None else int(seed)
    if save:
        along, across = _both(flat, recipe.x, recipe.x_t, base + _X, signs_y, signs_dw)
    else:
        along = _one(flat, recipe.x, -1, base + _X, signs_y)
        across = _nothing(x, recipe)
    tokens = flat.shape[0]
    weight = _weight(w, recipe.w, -1, base + _W, signs_y, recipe.x.format, tokens)
    y = _product(along, recipe.x.format, weight, recipe.w.format, k, bias, x.dtype)
    return (y.view(*x.shape[:-1], n), *across)


def _scale_dtype(key: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, SCALES[get_format(key).scale].dtype)
    return dtype


def _nothing(x: Tensor, recipe: Recipe) -> Parts:
    scales = x.new_empty((0,), dtype=_scale_dtype(recipe.x_t.format))
    return x.new_empty((0,), dtype=torch.uint8), scales, x.new_empty((0,), dtype=torch.float32)


def forward_fake(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    spec: str,
    seed: Tensor | None = None,
    signs_y: Tensor | None = None,
    signs_dx: Tensor | None = None,
    signs_dw: Tensor | None = None,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    recipe = _checked(x, w, bias, spec)
    n, k = w.shape
    y = x.new_empty((*x.shape[:-1], n))
    if not save:
        return (y, *_nothing(x, recipe))
    q = recipe.x_t
    fmt, tokens = rows_format(q.format), padded(math.prod(x.shape[:-1]), q.rotation)
    codes = x.new_empty((k, row_bytes(fmt, tokens)), dtype=torch.uint8)
    scales = x.new_empty(scales_shape(fmt, (k,), tokens), dtype=_scale_dtype(q.format))
    one_scale = fmt.tensor_scale and q.recipe != "single_level"
    return y, codes, scales, x.new_empty(() if one_scale else (0,), dtype=torch.float32)


def backward(
    g: Tensor,
    w: Tensor,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    spec: str,
    seed: Tensor | None,
    signs_dx: Tensor | None,
    signs_dw: Tensor | None,
    bias_dtype: torch.dtype | None,
    needs_x: bool,
    needs_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; empty where one is not needed."""
    recipe: Recipe = raw(from_spec, spec)
    _check_float(g, "the gradient of y")
    n, k = w.shape
    flat, base = _rows(g), 0 if seed is None else int(seed)
    tokens = padded(flat.shape[0], recipe.x_t.rotation)
    dx, dw, dbias = (g.new_empty((0,), dtype=d) for d in (g.dtype, w.dtype, bias_dtype or g.dtype))
    along = across = None
    if needs_x and needs_w:
        along, across = _both(flat, recipe.dy, recipe.dy_t, base + _DY, signs_dx, signs_dw)
    elif needs_x:
        along = _one(flat, recipe.dy, -1, base + _DY, signs_dx)
    elif needs_w:
        across = _one(flat, recipe.dy_t, -2, base + _DY, signs_dw)
    if along is not None:
        rows = flat.shape[0]
        weight = _weight(w, recipe.w_t, -2, base + _W, signs_dx, recipe.dy.format, rows)
        dx = _product(along, recipe.dy.format, weight, recipe.w_t.format, n, None, g.dtype)
        dx = dx.view(*g.shape[:-1], k)
    if across is not None:
        kept = (codes, scales, tensor_scale)
        formats = recipe.dy_t.format, recipe.x_t.format
        dw = _product(across, formats[0], kept, formats[1], tokens, None, w.dtype)
    if bias_dtype is not None:
        dbias = flat.sum(0, dtype=torch.float32).to(bias_dtype)
    return dx, dw, dbias


def backward_fake(
    g: Tensor,
    w: Tensor,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    spec: str,
    seed: Tensor | None,
    signs_dx: Tensor | None,
    signs_dw: Tensor | None,
    bias_dtype: torch.dtype | None,
    needs_x: bool,
    needs_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = w.shape
    return (
        g.new_empty((*g.shape[:-1], k) if needs_x else (0,)),
        g.new_empty((n, k) if needs_w else (0,), dtype=w.dtype),
        g.new_empty((n,) if bias_dtype is not None else (0,), dtype=bias_dtype or g.dtype),
    )


class _TrainLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        spec: str,
        seed: Tensor | None,
        *signs: Tensor | None,
    ) -> Any:
        _, ctx.needs_x, ctx.needs_w, needs_bias, *_ = ctx.needs_input_grad
        args = (x, w, bias, spec, seed, *signs, ctx.needs_w)
        y, *kept = _below(_OPS._train_linear.default, keyset, args)
        ctx.spec = spec
        ctx.bias_dtype = bias.dtype if needs_bias and bias is not None else None
        ctx.save_for_backward(w, *kept, seed, *signs[1:])
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        return (y, *kept)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        grads: tuple[Any, ...] = (None, None, None)
        if g is not None:
            w, codes, scales, tensor_scale, seed, *signs = ctx.saved_tensors
            dx, dw, dbias = _OPS._train_linear_backward.default(
                g, w, codes, scales, tensor_scale, ctx.spec, seed, *signs, ctx.bias_dtype,
                ctx.needs_x, ctx.needs_w,
            )  # fmt: skip
            grads = (
                dx if ctx.needs_x else None,
                dw if ctx.needs_w else None,
                None if ctx.bias_dtype is None else dbias,
            )
        return None, *grads, None, None, None, None, None


def _autograd(
    keyset: Any,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    spec: str,
    seed: Tensor | None = None,
    signs_y: Tensor | None = None,
    signs_dx: Tensor | None = None,
    signs_dw: Tensor | None = None,
    save: bool = False,
) -> Any:
    signs = (signs_y, signs_dx, signs_dw)
    if _wanted(x, w, bias):
        return _TrainLinear.apply(keyset, x, w, bias, spec, seed, *signs)
    return _below(_OPS._train_linear.default, keyset, (x, w, bias, spec, seed, *signs, save))


def _once(keyset: Any, *args: Any) -> Any:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        raise RuntimeError(
            "TrainLinear has no second derivative: its backward rounds the gradient; leave out "
            "create_graph=True, or use finish_training to make the layers dense"
        )
    return _below(_OPS._train_linear_backward.default, keyset, args)


def register(library: Any) -> None:
    """Register both operators: kernels for every device, shapes, gradient, autocast."""
    for verb, kernel, fake in (
        ("_train_linear", forward, forward_fake),
        ("_train_linear_backward", backward, backward_fake),
    ):
        library.impl(verb, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyfmt::{verb}", fake, lib=library)
    library.impl("_train_linear", _autograd, "Autograd", with_keyset=True)
    library.impl("_train_linear_backward", _once, "Autograd", with_keyset=True)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        cast = _torch_autograd._autocast(_OPS._train_linear.default, device, key)
        library.impl("_train_linear", cast, key, with_keyset=True)
