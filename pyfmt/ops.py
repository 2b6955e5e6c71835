# SPDX-License-Identifier: Apache-2.0
"""torch.ops.pyfmt: schemas, kernels and shapes for tracing, once per verb.

Importing this module defines the operators and loads the compiled CPU kernels, which hold the
arithmetic of quantize, dequantize, fake_quantize, hadamard, pack, unpack and amax; `matmul` and
`linear` stand on them (`_torch_matmul.py`), gradients in `_torch_autograd.py`. The compiled GPU
library registers its kernels for the same schemas under its own dispatch key; where it was not
built, the Triton kernels do (`_torch_triton.py`).

Every operator is functional and returns fresh contiguous tensors. Wrong input raises RuntimeError
with the sentence that the function of the same name in `pyfmt` raises as ValueError or TypeError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfmt import (
    _check,
    _torch_autograd,
    _torch_dense,
    _torch_matmul,
    _torch_packet,
    _torch_train,
    _torch_triton,
)
from pyfmt._torch_matmul import raw, row_bytes, scales_shape
from pyfmt.backends import cuda, triton
from pyfmt.backends.cpu import torch_library_path
from pyfmt.formats import SCALES, get_format

# fmt: off
SCHEMAS = (
    "quantize(Tensor x, str format, int axis=-1, str? scale_rule=None, str? recipe=None, "
    "str rounding='nearest', int? seed=None, str clip='symmetric', Tensor? tensor_scale=None, "
    "int rotation=0, Tensor? signs=None) -> (Tensor codes, Tensor scales, Tensor tensor_scale)",

    "quantize_dual(Tensor x, str format, str? scale_rule=None, str? recipe=None, "
    "str rounding='nearest', int? seed=None, str clip='symmetric', Tensor? tensor_scale=None, "
    "int rotation=0, Tensor? signs=None) -> (Tensor codes, Tensor scales, Tensor tensor_scale, "
    "Tensor codes_t, Tensor scales_t, Tensor tensor_scale_t)",

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
    "Tensor? bias=None, ScalarType? dtype=None, str? path=None, str precision='full', "
    "bool batch_invariant=False, Tensor[]? expanded=None) -> Tensor",

    "linear(Tensor x, Tensor w_codes, Tensor w_scales, Tensor? w_tensor_scale, str w_format, "
    "Tensor? bias=None, str? activation=None, int rotation=0, Tensor? signs=None, "
    "str? scale_rule=None, str? recipe=None, str clip='symmetric', Tensor[]? expanded=None, "
    "str? path=None, str precision='full', bool batch_invariant=False) -> Tensor",
)
# What layers call beside the verbs; and the verbs in fewer words, for pyfmt/_direct.py alone, which
# calls them where nothing is traced: they have no fake kernels.
HELPERS = (
    "_expand_weight(Tensor codes, Tensor scales, str format, SymInt k, str kind) -> Tensor[]",

    "_quantize(Tensor x, int plan, int axis=-1, int rotation=0, Tensor? tensor_scale=None, "
    "Tensor? signs=None) -> (Tensor codes, Tensor scales, Tensor tensor_scale)",

    "_fake_quantize(Tensor x, int plan, int axis=-1, Tensor? tensor_scale=None) -> Tensor",
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


_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _two_directions(quantize: Callable[..., Any], x: Tensor, format: str, *rest: Any) -> _Six:
    """quantize along the last axis and along the one before it: (codes, scales, tensor scale)."""
    if x.dim() < 2:
        raise RuntimeError(f"x: expected at least two dimensions, got {x.dim()}")
    return (*quantize(x, format, -1, *rest), *quantize(x, format, -2, *rest))


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
) -> _Six:
    rest = (scale_rule, recipe, rounding, seed, clip, tensor_scale, rotation, signs)
    return _two_directions(_quantize, x, format, *rest)


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
) -> _Six:
    """What serves where no kernel does both."""
    rest = (scale_rule, recipe, rounding, seed, clip, tensor_scale, rotation, signs)
    return _two_directions(torch.ops.pyfmt.quantize.default, x, format, *rest)


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


def _expand_weight(codes: Tensor, scales: Tensor, format: str, k: Any, kind: str) -> list[Tensor]:
    n = codes.shape[0]
    if kind == "exact":
        return [codes.new_empty((n, k), dtype=torch.bfloat16)]
    padded = -(-n // 16) * 16
    return [
        codes.new_empty((padded, scales.shape[1] * 32)),
        codes.new_empty((padded,), dtype=torch.float32),
        codes.new_empty((padded,)),
    ]


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
    "_expand_weight": _expand_weight,
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
        why = ""
        if "cuda" in devices and cuda_kernels() is None:
            why = f" (cuda: {cuda.load()}; triton: {triton.available() or 'it only stands in'})"
        raise RuntimeError(
            f"{verb}: there is no kernel for tensors on {' and '.join(devices)}{why}; move all of "
            "them to the CPU with .cpu()"
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


def cuda_kernels() -> str | None:
    """Return whose kernels serve CUDA tensors: "cuda", "triton" or None.

    Triton's stand in where the compiled library was not built, not where a built one fails.
    """
    if cuda.load() is None:
        return "cuda"
    built = cuda.torch_library_path() is not None
    return None if built or triton.available() is not None else "triton"


def _define() -> None:
    ops: Any = torch.ops.pyfmt
    # The library lives on the namespace, so that reloading this module does not define twice.
    if getattr(ops, "_library", None) is not None:
        return
    _load_kernels()
    library = torch.library.Library("pyfmt", "DEF")
    for schema in (*SCHEMAS, *HELPERS, *_torch_train.SCHEMAS):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for verb, fake in _FAKE.items():
        torch.library.register_fake(f"pyfmt::{verb}", fake, lib=library)
        library.impl(verb, _no_kernel(verb), "CompositeExplicitAutograd")
    library.impl("quantize_dual", _quantize_twice, "CPU")
    if cuda_kernels() == "triton":
        _torch_triton.register(library)
        library.impl("quantize_dual", _quantize_twice, "CUDA")
    for device in ("CPU", "CUDA"):
        library.impl("matmul", _torch_matmul.matmul, device)
        library.impl("linear", _torch_matmul.linear, device)
    library.impl("_expand_weight", _torch_dense.expand_weight, "CUDA")
    for verb in ("_quantize", "_fake_quantize"):
        library.impl(verb, torch.library.fallthrough_kernel, "Autograd")
    _torch_autograd.register(library)
    _torch_train.register(library)
    _torch_packet.install()
    ops._library = library


_define()
