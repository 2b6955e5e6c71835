# SPDX-License-Identifier: Apache-2.0
"""torch.ops.pyfmt: schemas, kernels and shapes for tracing, once per verb.

Importing this module defines the operators and loads the compiled CPU kernels, which hold the
arithmetic of quantize, dequantize, fake_quantize, hadamard, pack, unpack and amax; `matmul` and
`linear` stand on them (`_torch_matmul.py`), gradients in `_torch_autograd.py`. A GPU room
registers its kernels for the same schemas under its own dispatch key.

Every operator is functional and returns fresh contiguous tensors. Wrong input raises RuntimeError
with the sentence that the function of the same name in `pyfmt` raises as ValueError or TypeError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfmt import _check, _torch_autograd, _torch_matmul, _torch_matmul_cpu
from pyfmt._torch_matmul import raw, row_bytes, scales_shape
from pyfmt.backends import cuda
from pyfmt.backends.cpu import torch_library_path
from pyfmt.formats import SCALES, get_format

# fmt: off
SCHEMAS = (
    "quantize(Tensor x, str format, int axis=-1, str? scale_rule=None, str? recipe=None, "
    "str rounding='nearest', int? seed=None, str clip='symmetric', Tensor? tensor_scale=None, "
    "int rotation=0, Tensor? signs=None) -> (Tensor codes, Tensor scales, Tensor tensor_scale)",

    "quantize_dual(Tensor x, str format, str? scale_rule=None, str? recipe=None, "
    "str rounding='nearest', int? seed=None, str clip='symmetric', Tensor? tensor_scale=None, "
    "int rotation=0, Tensor? signs=None) -> (Tensor codes, Tensor scales, Tensor codes_t, "
    "Tensor scales_t, Tensor tensor_scale)",

    "dequantize(Tensor codes, Tensor scales, Tensor? tensor_scale, str format, SymInt[] shape, "
    "int axis=-1, ScalarType dtype=float) -> Tensor",

    "fake_quantize(Tensor x, str format, int axis=-1, str? scale_rule=None, str? recipe=None, "
    "str rounding='nearest', int? seed=None, str clip='symmetric', Tensor? tensor_scale=None) "
    "-> Tensor",

    "hadamard(Tensor x, int size, Tensor? signs=None, int axis=-1) -> Tensor",

    "pack(Tensor codes, int bits) -> Tensor",

    "unpack(Tensor packed, int bits, SymInt length) -> Tensor",

    "amax(Tensor x, SymInt? block=None, int axis=-1) -> Tensor",

    "matmul(Tensor a, Tensor? a_scales, Tensor? a_tensor_scale, str? a_format, "
    "Tensor b, Tensor b_scales, Tensor? b_tensor_scale, str b_format, SymInt k, "
    "Tensor? bias=None, ScalarType? dtype=None) -> Tensor",

    "linear(Tensor x, Tensor w_codes, Tensor w_scales, Tensor? w_tensor_scale, str w_format, "
    "Tensor? bias=None, str? activation=None, int rotation=0, Tensor? signs=None, "
    "str? scale_rule=None, str? recipe=None, str clip='symmetric') -> Tensor",
)
# fmt: on


# Fake kernels: shapes and dtypes of the results, for sizes that may be symbols.


def _float_rows(x: Tensor, axis: int) -> tuple[tuple[Any, ...], Any]:
    """Check x and split its shape into the lead sizes and the length of the quantized axis."""
    raw(_check.float_dtype, x.dtype)
    axis = raw(_check.axis, axis, x.shape)
    return (*x.shape[:axis], *x.shape[axis + 1 :]), x.shape[axis]


def _quantize(
    x: Tensor,
    format: str,
    axis: int = -1,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Tensor | None = None,
    rotation: int = 0,
    signs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    fmt = raw(get_format, format)
    lead, length = _float_rows(x, axis)
    _, recipe = raw(_check.options, fmt, scale_rule, recipe, rounding, seed, clip)
    if rotation:
        raw(_check.rotation, rotation, signs, length)
    one_scale = fmt.tensor_scale and recipe != "single_level"
    return (
        x.new_empty((*lead, row_bytes(fmt, length)), dtype=torch.uint8),
        x.new_empty(scales_shape(fmt, lead, length), dtype=getattr(torch, SCALES[fmt.scale].dtype)),
        x.new_empty(() if one_scale else (0,), dtype=torch.float32),
    )


def _check_dual(
    x: Tensor, format: str, recipe: str | None, tensor_scale: Tensor | None, rotation: int
) -> None:
    if x.dim() < 2:
        raise RuntimeError(f"x: expected at least two dimensions, got {x.dim()}")
    fmt = raw(get_format, format)
    if rotation and fmt.tensor_scale and recipe != "single_level" and tensor_scale is None:
        raise RuntimeError(
            "tensor_scale: the two rotations of x have different ones; pass one to use for both"
        )


def _quantize_dual(
    x: Tensor,
    format: str,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Tensor | None = None,
    rotation: int = 0,
    signs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_dual(x, format, recipe, tensor_scale, rotation)
    rest = (scale_rule, recipe, rounding, seed, clip, tensor_scale, rotation, signs)
    codes, scales, stored = _quantize(x, format, -1, *rest)
    codes_t, scales_t, _ = _quantize(x, format, -2, *rest)
    return codes, scales, codes_t, scales_t, stored


def _quantize_twice(
    x: Tensor,
    format: str,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Tensor | None = None,
    rotation: int = 0,
    signs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """quantize along the last axis and along the one before it, where no kernel does both."""
    _check_dual(x, format, recipe, tensor_scale, rotation)
    quantize: Any = torch.ops.pyfmt.quantize.default
    rest = (scale_rule, recipe, rounding, seed, clip, tensor_scale, rotation, signs)
    codes, scales, stored = quantize(x, format, -1, *rest)
    codes_t, scales_t, _ = quantize(x, format, -2, *rest)
    return codes, scales, codes_t, scales_t, stored


def _dequantize(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    shape: Sequence[Any],
    axis: int = -1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    fmt = raw(get_format, format)
    raw(_check.float_dtype, dtype, "dtype")
    axis = raw(_check.axis, axis, shape)
    lead = (*shape[:axis], *shape[axis + 1 :])
    expected = scales_shape(fmt, lead, shape[axis])
    raw(_check.codes_and_scales, codes, scales, fmt, lead, shape[axis], expected)
    return codes.new_empty(tuple(shape), dtype=dtype)


def _fake_quantize(
    x: Tensor,
    format: str,
    axis: int = -1,
    scale_rule: str | None = None,
    recipe: str | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    clip: str = "symmetric",
    tensor_scale: Tensor | None = None,
) -> Tensor:
    fmt = raw(get_format, format)
    _float_rows(x, axis)
    raw(_check.options, fmt, scale_rule, recipe, rounding, seed, clip)
    return x.new_empty(x.shape)


def _hadamard(x: Tensor, size: int, signs: Tensor | None = None, axis: int = -1) -> Tensor:
    _, length = _float_rows(x, axis)
    raw(_check.rotation, size, signs, length)
    return x.new_empty(x.shape)


def _pack(codes: Tensor, bits: int) -> Tensor:
    raw(_check.pack, codes.dtype, codes.shape, bits)
    return codes.new_empty((*codes.shape[:-1], -(-codes.shape[-1] * bits // 8)))


def _unpack(packed: Tensor, bits: int, length: Any) -> Tensor:
    raw(_check.unpack, packed.dtype, packed.shape, bits, length)
    return packed.new_empty((*packed.shape[:-1], length))


def _amax(x: Tensor, block: Any = None, axis: int = -1) -> Tensor:
    raw(_check.float_dtype, x.dtype)
    if block is None:
        return x.new_empty((), dtype=torch.float32)
    if isinstance(block, int):
        raw(_check.block, block)
    lead, length = _float_rows(x, axis)
    return x.new_empty((*lead, -(-length // block)), dtype=torch.float32)


_FAKE: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "quantize_dual": _quantize_dual,
    "dequantize": _dequantize,
    "fake_quantize": _fake_quantize,
    "hadamard": _hadamard,
    "pack": _pack,
    "unpack": _unpack,
    "amax": _amax,
    "matmul": _torch_matmul.matmul_fake,
    "linear": _torch_matmul.linear_fake,
}


def _no_kernel(verb: str) -> Callable[..., Any]:
    """What a device without a kernel of its own gets."""

    def kernel(*args: Any) -> Any:
        tensors = [t for t in args if isinstance(t, Tensor)]
        for t in tensors:
            if t.layout != torch.strided:
                raise RuntimeError(
                    f"{verb}: expected dense tensors, got one of layout {t.layout}; convert it "
                    "with .to_dense()"
                )
        devices = sorted({t.device.type for t in tensors})
        raise RuntimeError(
            f"{verb}: there is no kernel for tensors on {' and '.join(devices)}; move all of them "
            "to the CPU with .cpu()"
        )

    return kernel


def _load_kernels() -> None:
    path = torch_library_path()
    if path is None:
        raise ImportError(
            "pyfmt was built without its torch ops; run `make setup` in a checkout, or install "
            "torch first and then pyfmt-kernels with `pip install --no-build-isolation`"
        )
    torch.ops.load_library(str(path))
    cuda.load()  # where there is no GPU or library for it, the room says so when asked


def _define() -> None:
    ops: Any = torch.ops.pyfmt
    # The library lives on the namespace, so that reloading this module does not define twice.
    if getattr(ops, "_library", None) is not None:
        return
    _load_kernels()
    library = torch.library.Library("pyfmt", "DEF")
    for schema in SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for verb, fake in _FAKE.items():
        torch.library.register_fake(f"pyfmt::{verb}", fake, lib=library)
        library.impl(verb, _no_kernel(verb), "CompositeExplicitAutograd")
    library.impl("quantize_dual", _quantize_twice, "CPU")
    for device, room in (("CPU", _torch_matmul_cpu), ("CUDA", _torch_matmul)):
        library.impl("matmul", room.matmul, device)
        library.impl("linear", room.linear, device)
    _torch_autograd.register(library)
    ops._library = library


_define()
