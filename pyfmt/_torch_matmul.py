# SPDX-License-Identifier: Apache-2.0
"""The matmul and linear operators: expand to float32, one dense GEMM, one final rounding.

y = RNE(a b^T + bias), products and sums in float32, float32 bias. The bits do not depend on
torch's settings for float32 matmuls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyfmt import _check
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
) -> Tensor:
    out = _check_matmul(a, a_scales, a_format, b, k, bias, dtype)
    if a_format is not None:
        _check_rows(a, a_scales, a_format, k)  # type: ignore[arg-type]
    _check_rows(b, b_scales, b_format, k)
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
) -> Tensor:
    _check_linear(x, w_codes, bias)
    _check_rows(w_codes, w_scales, w_format, x.shape[-1])
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


def _expand(codes: Tensor, scales: Any, tensor_scale: Any, fmt: str, shape: Any) -> Tensor:
    y: Tensor = _OPS.dequantize.default(codes, scales, tensor_scale, fmt, shape)
    return y


def _gemm(
    a: Tensor,
    b: Tensor,
    b_scales: Tensor,
    b_tensor_scale: Tensor | None,
    b_format: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y = a b^T + bias for a dense a of shape (*lead, K) and a quantized b of N rows."""
    k, n = a.shape[-1], b.shape[0]
    flat = a if a.dim() == 2 else a.reshape(a.shape[:-1].numel(), k)
    flat = flat.float().contiguous()
    # The order of a BLAS library's sums may follow addresses and strides: give it always the same.
    if flat.data_ptr() % 64:
        flat = flat.clone()
    if n * k <= PANEL_ELEMENTS:
        y = _panel(flat, b, b_scales, b_tensor_scale, b_format, bias, dtype)
    else:
        rows = get_format(b_format).block_rows
        step = max(PANEL_ELEMENTS // k // rows, 1) * rows
        parts = []
        for i in range(0, n, step):
            scales = b_scales[i // rows : -(-(i + step) // rows)]
            part_bias = None if bias is None else bias[i : i + step]
            part = (b[i : i + step], scales, b_tensor_scale, b_format, part_bias, dtype)
            parts.append(_panel(flat, *part))
        y = torch.cat(parts, dim=1)
    return y if a.dim() == 2 else y.view(*a.shape[:-1], n)


def _panel(
    a: Tensor,
    b: Tensor,
    b_scales: Tensor,
    b_tensor_scale: Tensor | None,
    b_format: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    w = _expand(b, b_scales, b_tensor_scale, b_format, (b.shape[0], a.shape[1]))
    y = full_precision_mm(a, w.t())
    if bias is not None:
        y += bias
    return y if dtype is torch.float32 else y.to(dtype)


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
) -> Tensor:
    """y = a b^T + bias; a of shape (*lead, K) dense or quantized, b of shape (N, K) quantized."""
    out = _check_matmul(a, a_scales, a_format, b, k, bias, dtype)
    if a_format is not None:
        a = _expand(a, a_scales, a_tensor_scale, a_format, (*a.shape[:-1], k))
    return _gemm(a, b, b_scales, b_tensor_scale, b_format, bias, out)


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
) -> Tensor:
    """matmul(quantize(x, activation, rotation=...), w) + bias in x's dtype.

    Without an activation format the left operand is hadamard(x), rounded to x's dtype.
    """
    _check_linear(x, w_codes, bias)
    a = x
    if activation is not None:
        # In float32 fake_quantize is quantize and dequantize bit for bit, in one pass.
        a = x.float()
        if rotation:
            a = _OPS.hadamard.default(a, rotation, signs)
        a = _OPS.fake_quantize.default(a, activation, -1, scale_rule, recipe, "nearest", None, clip)
    elif rotation:
        a = _OPS.hadamard.default(x, rotation, signs)
    return _gemm(a, w_codes, w_scales, w_tensor_scale, w_format, bias, x.dtype)
