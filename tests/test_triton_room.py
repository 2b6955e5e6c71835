# SPDX-License-Identifier: Apache-2.0
"""The Triton room as a room: what it says, when it is chosen, torch's operators and CuPy arrays."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import pyfmt
from pyfmt import _arrays, reference
from pyfmt.formats import get_format
from tests import grids
from tests.grids import FP16
from tests.mismatch import same_floats
from tests.triton_room import ROOT


def test_signatures_are_the_reference_room_s() -> None:
    import inspect

    from pyfmt.backends import VERBS, triton
    from pyfmt.backends import reference as other

    for verb in (*VERBS, "available", "supports"):
        assert inspect.signature(getattr(triton, verb)) == inspect.signature(getattr(other, verb))


def in_a_process(*arguments: str, **environment: str) -> str:
    """Run Python on the arguments; return what it prints."""
    run = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def test_the_operators_interpreted() -> None:
    assert "all right" in in_a_process("-m", "tests.triton_ops", "cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["kernels", "torch"])
def test_the_operators_where_no_gpu_library_was_built(part: str) -> None:
    assert "all right" in in_a_process("-m", "tests.triton_ops", "cuda", part)


def test_it_says_why_not() -> None:
    import torch

    from pyfmt.backends import triton

    assert "NumPy" in str(triton.supports("quantize", None, np.zeros(1)))
    told = str(triton.supports("quantize", None, torch.zeros(1)))
    assert "not tensors on cpu" in told and "TRITON_INTERPRET=1" in told
    if not torch.cuda.is_available():
        assert "TRITON_INTERPRET" in str(triton.available())
        with pytest.raises(ValueError, match="'triton' cannot quantize: no CUDA device"):
            pyfmt.quantize(torch.zeros(32), "mxfp4", backend="triton")


CHOICES = """
import sys
import pyfmt
assert not {"torch", "triton"} & set(sys.modules)
import torch
x = torch.arange(64.0)
print(pyfmt.backends.explain("quantize", "mxfp4", x))
assert "triton" not in sys.modules
q, want = (pyfmt.quantize(x, "mxfp4", backend=room) for room in ("triton", "reference"))
assert torch.equal(q.codes, want.codes)
try:
    pyfmt.fake_quantize(x.requires_grad_(), "mxfp4", backend="triton")
except ValueError as error:
    print(error)
"""


TRACED = """
import torch
import pyfmt
import pyfmt.ops

pyfmt.ops.cuda_kernels = lambda: "triton"  # as where no GPU library was built
x, w = torch.randn(8, 64), pyfmt.quantize(torch.randn(16, 64), "mxfp4")


def verbs(y):
    q = pyfmt.quantize(y, "nvfp4", tensor_scale=0.5, rotation=32, backend="triton")
    z = pyfmt.fake_quantize(y, "mxint8", backend="triton")
    z = pyfmt.hadamard(z, 32, backend="triton")
    return q.codes, pyfmt.dequantize(q, backend="triton"), pyfmt.matmul(z, w, backend="triton")


compiled = torch.compile(verbs, fullgraph=True, backend="aot_eager")
for ours, want in zip(compiled(x), verbs(x), strict=True):
    assert torch.equal(ours, want)
y = x.clone().requires_grad_()
pyfmt.fake_quantize(y, "mxfp4", backend="triton").sum().backward()
assert torch.equal(y.grad, torch.ones_like(y))
print("all right")
"""


def test_traced_and_differentiated_by_way_of_the_operators() -> None:
    assert "all right" in in_a_process("-W", "ignore", "-c", TRACED, TRITON_INTERPRET="1")


def test_cpu_tensors_when_the_user_asks_for_the_interpreter() -> None:
    """By name only: the CPU room comes first. A gradient is refused, not lost."""
    said = in_a_process("-c", CHOICES, TRITON_INTERPRET="1")
    assert "'cpu': 'chosen'" in said and "'triton': 'able'" in said
    assert "torch cannot differentiate" in said and "pass x.detach()" in said


# ---- on a device only -------------------------------------------------------------------------


@pytest.mark.gpu
def test_cupy_arrays_without_a_copy() -> None:
    cupy = pytest.importorskip("cupy")
    import torch

    values = grids.noise(8, 128, FP16)
    x = cupy.asarray(values)
    assert _arrays.from_cupy(x).data_ptr() == x.data.ptr
    tensor = torch.ones(8, device="cuda", dtype=torch.bfloat16)
    assert _arrays.back_to(tensor, x).data.ptr == tensor.data_ptr()
    for spec in ("mxfp4", "nvfp4", "int4-b32-fp16"):
        fmt = get_format(spec)
        q = pyfmt.quantize(x, fmt, backend="triton")
        want = reference.quantize(values, fmt)
        for got, expected in zip((q.codes, q.scales, q.tensor_scale), want, strict=True):
            assert (got is None) == (expected is None)
            if expected is not None:
                assert isinstance(got, cupy.ndarray)
                same_floats(spec, got.get(), np.asarray(expected))
        y = q.dequantize("float16", backend="triton")
        assert isinstance(y, cupy.ndarray)
        same_floats(spec, y.get(), reference.fake_quantize(values, fmt))


@pytest.mark.gpu
def test_a_room_by_name_and_by_itself() -> None:
    import torch

    x = torch.randn(4, 64, device="cuda")
    told = pyfmt.backends.explain("quantize", "mxfp4", x)
    assert told["triton"] in ("able", "chosen") and "cpu" in told["cpu"], told
    named = pyfmt.quantize(x, "mxfp4", rotation=32, backend="triton")
    chosen = pyfmt.quantize(x, "mxfp4", rotation=32)
    assert torch.equal(named.codes, chosen.codes) and torch.equal(named.scales, chosen.scales)
