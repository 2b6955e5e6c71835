# SPDX-License-Identifier: Apache-2.0
"""torch's operators served by the Triton kernels, checked in a process of their own.

    TRITON_INTERPRET=1 python -m tests.triton_ops cpu    the kernels as CPU ones, interpreted
    python -m tests.triton_ops cuda                      as they are where no GPU library was built

The kernels are registered when `pyfmt.ops` is imported, so neither way fits a process of the tests.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

import pyfmt
from pyfmt import reference
from pyfmt.backends import cuda
from pyfmt.formats import FORMATS, get_format
from tests import grids
from tests.rooms import to_numpy, to_torch
from tests.triton_room import poisoned_empty

MADE = ("e2m1-b16x16-e8m0", "e1m2-b32-fp32", "e3m2-b7-e8m0", "int8-brow-bf16")
MISUSE = (
    (lambda ops, x: ops.quantize(x.double(), "mxfp4"), "expected dtype bfloat16, float16 or"),
    (lambda ops, x: ops.quantize(x, "mxfp5"), "unknown format 'mxfp5'"),
    (lambda ops, x: ops.quantize(x, "mxfp4", 2), "axis: expected"),
    (lambda ops, x: ops.quantize(x, "mxfp4", rotation=48), "expected a power of two"),
    (lambda ops, x: ops.quantize(x, "mxfp4", rotation=128), "not a multiple of 128"),
    (lambda ops, x: ops.quantize(x, "mxfp4", rounding="stochastic"), "seed"),
    (lambda ops, x: ops.quantize(x, "mxfp4", tensor_scale=x[0, 0]), "has none"),
    (lambda ops, x: ops.quantize(x, "nvfp4", tensor_scale=x[0]), "expected one float32 number"),
    (lambda ops, x: ops.quantize(x, "nvfp4", tensor_scale=x.new_ones(()).half()), "of dtype float"),
    (lambda ops, x: ops.dequantize(x.byte(), x.byte(), None, "mxfp4", (4, 64)), "codes: expected"),
    (lambda ops, x: ops.pack(x, 4), "expected dtype uint8"),
    (lambda ops, x: ops.unpack(x.byte(), 9, 4), "bits: expected"),
    (lambda ops, x: ops.amax(x, 0), "block: expected"),
)


def interpreted_ops() -> Any:
    """torch.ops.pyfmt_triton: the schemas of pyfmt.ops served by interpreted kernels."""
    from pyfmt import _torch_triton
    from pyfmt.ops import SCHEMAS

    library = torch.library.Library("pyfmt_triton", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _torch_triton.register(library, "CPU")
    ops: Any = torch.ops.pyfmt_triton
    ops.library = library  # as long as its operators live
    return ops


def same(what: str, got: Any, want: Any) -> None:
    """Assert equal shapes, dtypes and bits; an empty tensor stands for None."""
    got = to_numpy(got.cpu())
    want = np.zeros(0, np.float32) if want is None else np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype, (what, got.shape, want.shape)
    assert got.tobytes() == want.tobytes(), what


def check_bits(ops: Any, device: str) -> None:
    """Every operator on named formats and a few others, against the reference."""
    # On a device every case is compiled: other tests have all of them there.
    names = ("nvfp4", MADE[0]) if device == "cuda" else (*FORMATS, *MADE)
    for name in names:
        fmt = get_format(name)
        for dtype, axis in ((grids.BF16, -1), (grids.FP32, 0))[: 1 if device == "cuda" else 2]:
            x = grids.noise(32, 80, dtype)
            there = to_torch(x).to(device)
            want = reference.quantize(x, fmt, axis=axis)
            got = ops.quantize(there, fmt.key, axis)
            for part, g, w in zip(("codes", "scales", "tensor scale"), got, want, strict=True):
                same(f"{name} {part}", g, w)
            scale = got[2] if got[2].numel() else None
            y = ops.dequantize(*got[:2], scale, fmt.key, x.shape, axis, there.dtype)
            values = reference.dequantize(*want, fmt, x.shape, axis=axis, dtype=dtype)
            same(f"{name} dequantize", y, values)
            same(f"{name} fake_quantize", ops.fake_quantize(there, fmt.key, axis), values)
            options = {"rounding": "stochastic", "seed": -3}
            got = ops.quantize(there, fmt.key, axis, rotation=16, **options)
            want = reference.quantize(x, fmt, axis=axis, rotation=16, **options)
            same(f"{name} rotated", got[0], want[0])
        if fmt.tensor_scale:
            given = torch.tensor(0.01, device=device)
            got = ops.quantize(there, fmt.key, tensor_scale=given)
            same(name, got[0], reference.quantize(x, fmt, tensor_scale=np.float32(0.01))[0])
    same("hadamard", ops.hadamard(there, 16), reference.hadamard(x, 16))
    same("amax", ops.amax(there), reference.amax(x))
    same("amax of blocks", ops.amax(there, 7), reference.amax(x, 7))
    codes = np.arange(66, dtype=np.uint8).reshape(3, 22)
    packed = reference.pack(codes, 6)
    same("pack", ops.pack(to_torch(codes).to(device), 6), packed)
    same("unpack", ops.unpack(to_torch(packed).to(device), 6, 20), reference.unpack(packed, 6, 20))
    same("empty", ops.quantize(there[:0], "nvfp4")[2], np.float32(1.0))


ELSEWHERE = (
    (lambda ops, x: ops.hadamard(x, 32, torch.ones(32)), "on the device of the others"),
    (lambda ops, x: ops.quantize(x, "nvfp4", tensor_scale=torch.ones(())), "on the device of the"),
)


def check_sentences(ops: Any, device: str) -> None:
    x = torch.ones(4, 64, device=device)
    for call, words in (*MISUSE, *(ELSEWHERE if device == "cuda" else ())):
        said = ""
        try:
            call(ops, x)
        except RuntimeError as error:
            said = str(error)
        assert words in said, (words, said)


def check_torch(device: str) -> None:
    """What torch makes of the operators: tracing, gradients, layers, rooms."""
    from torch.library import opcheck

    ops: Any = torch.ops.pyfmt
    x = torch.randn(8, 64, device=device, dtype=torch.bfloat16)
    for name in ("mxfp4", "nvfp4"):
        q = ops.quantize(x, name)
        scale = q[2] if q[2].numel() else None
        opcheck(ops.quantize.default, (x, name))
        opcheck(ops.dequantize.default, (*q[:2], scale, name, x.shape))
        opcheck(ops.fake_quantize.default, (x.clone().requires_grad_(), name))
        names = [r.name for r in ops.quantize_dual.default._schema.returns]
        twice = dict(zip(names, ops.quantize_dual(x, name), strict=True))
        for end, part in (("", q), ("_t", ops.quantize(x, name, -2))):
            assert torch.equal(twice["codes" + end], part[0])
            assert torch.equal(twice["scales" + end], part[1])
    opcheck(ops.hadamard.default, (x.clone().requires_grad_(), 32))
    opcheck(ops.amax.default, (x,))

    told = pyfmt.backends.explain("quantize", "mxfp4", x)
    assert told["triton"] == "chosen" and "missing" in told["cuda"], told

    def both(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pyfmt.quantize(y, "mxfp4", rotation=32).codes, pyfmt.fake_quantize(y, "nvfp4")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), both(x), strict=True))
    y = x.clone().requires_grad_()
    pyfmt.fake_quantize(y, "mxfp4").sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    layer = pyfmt.nn.QuantLinear.from_linear(
        torch.nn.Linear(64, 32, device=device), weight="mxfp4", activation="mxint8", rotation=32
    )
    out = layer(x.float())
    assert out.shape == (8, 32) and out.isfinite().all()


def main(device: str, part: str = "") -> None:
    """Run all checks, or one part of them: "kernels" or "torch"."""
    if device == "cuda":
        cuda._LIBRARY_BUILT = False
        import pyfmt.ops

        assert pyfmt.ops.cuda_kernels() == "triton"
        ops: Any = torch.ops.pyfmt
    else:
        ops = interpreted_ops()
    if part != "torch":
        kept, torch.empty = torch.empty, poisoned_empty()
        check_bits(ops, device)
        torch.empty = kept
        check_sentences(ops, device)
    if part != "kernels" and device == "cuda":
        check_torch(device)
    print("all right")


if __name__ == "__main__":
    main(*sys.argv[1:])
