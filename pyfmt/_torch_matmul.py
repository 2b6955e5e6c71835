# SPDX-License-Identifier: Apache-2.0
"""The matmul and linear operators: checks, the choice of a path, and the portable path.

y = RNE(a b^T + bias), float32 sums and bias. The portable path expands to float32 for one dense
GEMM, whose bits do not depend on torch's settings for float32 matmuls; the paths of GPUs are in
`_torch_dense.py`, that of the CPU in `_torch_matmul_cpu.py`.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyfmt import _check, _torch_dense, _torch_matmul_cpu
from pyfmt import _matmul_paths as paths
from pyfmt._torch_native import native
from pyfmt._torch_operands import Left, Out, Parts, Right, chunks, fp32
from pyfmt.formats import Format, get_format

# A weight of more elements is expanded in panels of rows, so that memory stays bounded.
PANEL_ELEMENTS = 1 << 26

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

T = TypeVar("T")
_OPS: Any = torch.ops.pyfmt


def raw(check: Callable[..., T], *args: Any) -> T:
    """Call a check; raw operators raise RuntimeError with its sentence."""
    try:
        return check(*args)
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from None


def _check_float(x: Tensor, what: str) -> None:
    if x.dtype not in _FLOATS:
        raw(_check.float_dtype, x.dtype, what)


def row_bytes(fmt: Format, length: Any) -> Any:
    """`Format.row_bytes`, also for a symbolic length."""
    padded = length if fmt.block == "row" else fmt.padded(length)
    return -(-padded * fmt.bits // 8)


def scales_shape(fmt: Format, lead: Sequence[Any], length: Any) -> tuple[Any, ...]:
    """The shape of the scales of (*lead, length), also for symbolic sizes."""
    blocks = torch.sym_min(length, 1) if fmt.block == "row" else fmt.blocks(length)
    if fmt.block_rows == 1 or not lead:
        return (*lead, blocks)
    return (*lead[:-1], -(-lead[-1] // fmt.block_rows), blocks)


# The kernels check what nothing below them does; that codes and scales belong together and have
# rows of k elements is dequantize's check, which the fake kernels repeat.


def _check_rows(codes: Tensor, scales: Tensor, format: str, k: Any) -> None:
    fmt, lead = raw(get_format, format), codes.shape[:-1]
    raw(_check.codes_and_scales, codes, scales, fmt, lead, k, scales_shape(fmt, lead, k))


def _check_weight(what: str, b: Tensor, bias: Tensor | None) -> None:
    if b.dim() != 2:
        raise RuntimeError(
            f"{what}: expected two dimensions (rows, bytes), got {b.dim()}; flatten the rows"
        )
    if bias is not None:
        _check_float(bias, "bias")
        if bias.dim() != 1 or bias.shape[0] != b.shape[0]:
            raise RuntimeError(
                f"bias: expected shape ({b.shape[0]},), one number for each row of {what}, got "
                f"{tuple(bias.shape)}"
            )


def _check_matmul(
    a: Tensor,
    a_scales: Tensor | None,
    a_format: str | None,
    b: Tensor,
    k: Any,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> torch.dtype:
    """Check the arguments and return the result's dtype: as asked, else a dense a's, or float32."""
    raw(_check.axis, -1, a.shape)
    if a_format is None:
        _check_float(a, "a")
        if a.shape[-1] != k:
            raise RuntimeError(
                f"a: expected rows of {k} elements like those of b, got {a.shape[-1]}"
            )
    elif a_scales is None:
        raise RuntimeError(
            f"a_scales: a holds codes of {a_format} and needs them; pass what quantize returned, "
            "or a_format=None for a dense a"
        )
    _check_weight("b", b, bias)
    if dtype is not None:
        raw(_check.float_dtype, dtype, "dtype")
        return dtype
    return a.dtype if a_format is None else torch.float32


def _check_linear(x: Tensor, w_codes: Tensor, bias: Tensor | None) -> None:
    _check_float(x, "x")
    if x.dim() == 0:
        raw(_check.axis, -1, x.shape)
    _check_weight("w_codes", w_codes, bias)


def matmul_fake(
    a: Tensor,
    a_scales: Tensor | None,
    a_tensor_scale: Tensor | None,
    a_format: str | None,
    b: Tensor,
    b_scales: Tensor,
    b_tensor_scale: Tensor | None,
    b_format: str,
    k: Any,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    path: str | None = None,
    precision: str = "full",
    batch_invariant: bool = False,
    expanded: Sequence[Tensor] | None = None,
) -> Tensor:
    out = _check_matmul(a, a_scales, a_format, b, k, bias, dtype)
    if a_format is not None:
        _check_rows(a, a_scales, a_format, k)  # type: ignore[arg-type]
    _check_rows(b, b_scales, b_format, k)
    raw(paths.check, path, precision)
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=out)


def linear_fake(
    x: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor | None,
    w_format: str,
    bias: Tensor | None = None,
    activation: str | None = None,
    rotation: int = 0,
    signs: Tensor | None = None,
    scale_rule: str | None = None,
    recipe: str | None = None,
    clip: str = "symmetric",
    expanded: Sequence[Tensor] | None = None,
    path: str | None = None,
    precision: str = "full",
    batch_invariant: bool = False,
) -> Tensor:
    _check_linear(x, w_codes, bias)
    _check_rows(w_codes, w_scales, w_format, x.shape[-1])
    raw(paths.check, path, precision)
    if activation is not None:
        fmt = raw(get_format, activation)
        raw(_check.options, fmt, scale_rule, recipe, "nearest", None, clip)
    if rotation:
        raw(_check.rotation, rotation, signs, x.shape[-1])
    return x.new_empty((*x.shape[:-1], w_codes.shape[0]))


class _Precision:
    """How many threads compute in full float32 now, and the setting to restore after them."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.lock = threading.Lock()
        self.users = 0
        self.saved = ""

    def read(self) -> str:
        return torch._C._get_fp32_precision_getter(self.backend, "matmul")

    def write(self, value: str) -> None:
        torch._C._set_fp32_precision_setter(self.backend, "matmul", value)

    def enter(self) -> bool:
        """Make products full float32; False where they are and nothing is to be restored."""
        with self.lock:
            if self.users == 0:
                value = self.read()
                if value in ("ieee", "none"):
                    return False
                # A value that the backend has as a whole was inherited: leave it inherited.
                whole = torch._C._get_fp32_precision_getter(self.backend, "all")
                self.saved = "none" if value == whole else value
                self.write("ieee")
            self.users += 1
            return True

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                self.write(self.saved)


_PRECISION = {"cpu": _Precision("mkldnn"), "cuda": _Precision("cuda")}


def full_precision_mm(a: Tensor, b: Tensor) -> Tensor:
    """torch.mm in float32 whatever torch.set_float32_matmul_precision says.

    The setting belongs to the process, so users are counted: the first one saves and sets it, the
    last one restores it, and threads that multiply at the same time all see it set.
    """
    precision = _PRECISION.get(a.device.type)
    if precision is None or not precision.enter():
        return torch.mm(a, b)
    try:
        return torch.mm(a, b)
    finally:
        precision.leave()


def _portable(left: Left, right: Right, out: Out) -> Tensor:
    """y = a b^T + bias for a dense or quantized a of M rows and a quantized b of N rows."""
    flat, n, k = fp32(left).contiguous(), right.n, left.k
    # The order of a BLAS library's sums may follow addresses and strides: give it always the same.
    if flat.data_ptr() % 64:
        flat = flat.clone()
    if n * k <= PANEL_ELEMENTS:
        return _panel(flat, right, 0, n, out)
    rows = right.format.block_rows
    step = max(PANEL_ELEMENTS // k // rows, 1) * rows
    parts = [_panel(flat, right, i, min(i + step, n), out) for i in range(0, n, step)]
    return torch.cat(parts, dim=1)


def _panel(a: Tensor, right: Right, first: int, last: int, out: Out) -> Tensor:
    codes, scales = right.rows(first, last)
    shape = (last - first, a.shape[1])
    w = _OPS.dequantize.default(codes, scales, right.tensor_scale, right.format.key, shape)
    y = full_precision_mm(a, w.t())
    if out.bias is not None:
        y += out.bias[first:last]
    return y if out.dtype is torch.float32 else y.to(out.dtype)


def _portable_rows(left: Left, right: Right, out: Out) -> Tensor:
    return chunks(left, right, out, paths.INVARIANT_ROWS["portable"], _portable)


_RUN = {
    **_torch_dense.RUN,
    "native": native,
    "packed": _torch_matmul_cpu.packed,
    "portable": _portable_rows,
}


@lru_cache(maxsize=64)
def _machine(index: int) -> paths.Machine | None:
    if not hasattr(_OPS, "_finish"):  # the compiled GPU library is not there
        return None
    return paths.Machine(
        torch.cuda.get_device_capability(index),
        skinny=hasattr(_OPS, "_matmul_skinny"),
        wide=hasattr(_OPS, "_matmul_wide"),
        native=importlib.util.find_spec("triton") is not None,
    )


def machine_of(device: torch.device) -> paths.Machine | None:
    """What a GPU offers; None for other devices, and where the GPU library is not there."""
    return _machine(device.index or 0) if device.type == "cuda" else None


# What a call of a shape and formats was checked for and given: operands are checked once a shape.
_choices: dict[Any, str] = {}
_CHOICES = 8192


def _choose(call: paths.Call, device: torch.device, path: str | None) -> str:
    machine = machine_of(device)
    if machine is None and device.type == "cpu" and _torch_matmul_cpu.available():
        return raw(paths.choose_on_cpu, call, path)
    if machine is None:
        if path not in (None, "portable"):
            raise RuntimeError(
                f"path: tensors on {device.type} have the portable path alone here, got {path!r}; "
                "leave it out (the others need CUDA tensors and the compiled GPU library)"
            )
        return "portable"
    if 0 in (call.m, call.n, call.k):
        return "portable"
    return raw(paths.choose, call, machine, path)


def _remember(key: Any, name: str) -> str:
    if len(_choices) >= _CHOICES:
        _choices.clear()
    _choices[key] = name
    return name


def kind_of(kept: Sequence[Tensor] | None) -> str:
    """What an expanded weight is for: "fold", "exact", or "" where there is none."""
    return "" if not kept else "fold" if len(kept) > 1 else "exact"


def matmul(
    a: Tensor,
    a_scales: Tensor | None,
    a_tensor_scale: Tensor | None,
    a_format: str | None,
    b: Tensor,
    b_scales: Tensor,
    b_tensor_scale: Tensor | None,
    b_format: str,
    k: int,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    path: str | None = None,
    precision: str = "full",
    batch_invariant: bool = False,
    expanded: Sequence[Tensor] | None = None,
) -> Tensor:
    """y = a b^T + bias; a of shape (*lead, K) dense or quantized, b of shape (N, K) quantized.

    expanded: what _expand_weight returned for b.
    """
    out = _check_matmul(a, a_scales, a_format, b, k, bias, dtype)
    lead, n, kept = a.shape[:-1], b.shape[0], kind_of(expanded)
    a_grid = None if a_scales is None else a_scales.shape
    key = (
        a.shape, a.dtype, a_grid, a_format, b.shape, b_scales.shape, b_scales.dtype, b_format, k,
        a.device, kept, path, precision, batch_invariant,
    )  # fmt: skip
    name = _choices.get(key)
    m = lead.numel()
    if name is None:
        raw(paths.check, path, precision)
        fmt = None
        if a_format is not None:
            fmt = raw(get_format, a_format)
            _check_rows(a, a_scales, a_format, k)  # type: ignore[arg-type]
        _check_rows(b, b_scales, b_format, k)
        dense = str(a.dtype).removeprefix("torch.")
        call = paths.Call(fmt, dense, get_format(b_format), m, n, k, kept, batch_invariant)
        name = _remember(key, _choose(call, a.device, path))
    if a_format is None:
        left = Left(m, k, x=a if a.dim() == 2 else a.reshape(m, k))
    else:
        left = Left(m, k, raw(paths.facts, a_format))
        left.codes, left.scales = a, a_scales
        left.tensor_scale = a_tensor_scale if has_scale(a_tensor_scale) else None
        if a.dim() != 2:
            _flatten(left, a, a_scales)  # type: ignore[arg-type]
    scale = b_tensor_scale if has_scale(b_tensor_scale) else None
    right = Right(b, b_scales, scale, paths.facts(b_format), n)
    if kept == name:
        right.kept = list(expanded)  # type: ignore[arg-type]
    y = _RUN[name](left, right, Out(bias, out, precision == "fast", batch_invariant))
    return y if a.dim() == 2 else y.view(*lead, n)


def has_scale(t: Tensor | None) -> bool:
    """Formats without a tensor scale come with the empty one that quantize returned."""
    return t is not None and t.numel() > 0


def _flatten(left: Left, codes: Tensor, scales: Tensor) -> None:
    """Codes of (*lead, bytes) as rows; square blocks are decoded, for they lie within matrices."""
    assert left.format is not None
    if left.format.block_rows == 1:
        left.codes = codes.reshape(left.rows, codes.shape[-1])
        left.scales = scales.reshape(left.rows, scales.shape[-1])
        return
    shape = (*codes.shape[:-1], left.k)
    x = _OPS.dequantize.default(codes, scales, left.tensor_scale, left.format.key, shape)
    left.x = x.reshape(left.rows, left.k)
    left.format = left.codes = left.scales = left.tensor_scale = None


def linear(
    x: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor | None,
    w_format: str,
    bias: Tensor | None = None,
    activation: str | None = None,
    rotation: int = 0,
    signs: Tensor | None = None,
    scale_rule: str | None = None,
    recipe: str | None = None,
    clip: str = "symmetric",
    expanded: Sequence[Tensor] | None = None,
    path: str | None = None,
    precision: str = "full",
    batch_invariant: bool = False,
) -> Tensor:
    """matmul(quantize(x, activation, rotation=...), w) + bias in x's dtype.

    Without an activation format the left operand is hadamard(x), rounded to x's dtype. expanded:
    what _expand_weight returned for the weight.
    """
    _check_linear(x, w_codes, bias)
    lead, k, n = x.shape[:-1], x.shape[-1], w_codes.shape[0]
    kept = kind_of(expanded)
    key = (
        x.shape, x.dtype, activation, w_codes.shape, w_scales.shape, w_scales.dtype, w_format,
        x.device, kept, rotation, scale_rule, recipe, clip, path, precision, batch_invariant,
    )  # fmt: skip
    name = _choices.get(key)
    m = lead.numel()
    if name is None:
        raw(paths.check, path, precision)
        _check_rows(w_codes, w_scales, w_format, k)
        fmt = None if activation is None else raw(get_format, activation)
        if fmt is not None:
            raw(_check.options, fmt, scale_rule, recipe, "nearest", None, clip)
            if batch_invariant and fmt.tensor_scale and recipe != "single_level":
                raise RuntimeError(
                    f"batch_invariant: the tensor scale of {fmt.name} activations depends on the "
                    "whole batch; pass recipe='single_level'"
                )
        if rotation:
            raw(_check.rotation, rotation, signs, k)
        dense = str(x.dtype).removeprefix("torch.")
        if fmt is not None and fmt.block_rows > 1 and x.dim() != 2:
            fmt, dense = None, "float32"
        call = paths.Call(fmt, dense, get_format(w_format), m, n, k, kept, batch_invariant)
        name = _remember(key, _choose(call, x.device, path))
    if name == "skinny" and activation is None and not rotation and not batch_invariant:
        # The whole of a small call: what stands below would do the same, a few microseconds later.
        scale = w_tensor_scale if has_scale(w_tensor_scale) else None
        rows = x if x.dim() == 2 else x.reshape(m, k)
        y = Parts.ops._matmul_skinny.default(
            rows, w_codes, w_scales, scale, w_format, k, bias, x.dtype
        )
        return y if x.dim() == 2 else y.view(*lead, n)
    facts = None if activation is None else paths.facts(activation)
    left = Left(m, k, facts, x, None, None, None, scale_rule, recipe, clip, rotation, signs)
    if x.dim() != 2:
        if facts is not None and facts.block_rows > 1:
            # Square blocks lie within matrices: they are quantized before the rows are one matrix.
            left = Left(m, k, x=fp32(left))
        left.x = left.x.reshape(m, k)  # type: ignore[union-attr]
    scale = w_tensor_scale if has_scale(w_tensor_scale) else None
    right = Right(w_codes, w_scales, scale, paths.facts(w_format), n)
    if kept == name:
        right.kept = list(expanded)  # type: ignore[arg-type]
    y = _RUN[name](left, right, Out(bias, x.dtype, precision == "fast", batch_invariant))
    return y if x.dim() == 2 else y.view(*lead, n)
