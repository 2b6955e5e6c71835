# SPDX-License-Identifier: Apache-2.0
"""Tensors on a GPU that is not the current one: every verb works where its tensors are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pyfmt  # noqa: E402
import pyfmt.nn  # noqa: E402
from pyfmt.backends import cuda  # noqa: E402
from pyfmt.formats import FORMATS  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

FAR = "cuda:1"


@pytest.fixture(autouse=True)
def first_device_current() -> Any:
    """cuda:0 is current before a test, and still after it."""
    reason = cuda.load()
    assert reason is None, reason
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


def calls(x: Any) -> dict[str, Callable[[], Any]]:
    """Every verb of the codec on x's device, as functions of no arguments that return tensors."""
    ops: Any = torch.ops.pyfmt
    given = torch.tensor(0.01, device=x.device)
    signs = torch.randn(128, device=x.device).sign()
    found: dict[str, Callable[[], Any]] = {}
    for name in [*FORMATS, "e2m1-b16x16-e8m0", "int8-brow-bf16", "e3m2-b8-fp32"]:
        found[f"quantize {name}"] = lambda f=name: ops.quantize(x, f)
        found[f"fake {name}"] = lambda f=name: [ops.fake_quantize(x, f)]
        found[f"stochastic {name}"] = lambda f=name: ops.quantize(
            x, f, rounding="stochastic", seed=3
        )
        parts = ops.quantize(x, name)
        scale = parts[2] if parts[2].numel() else None
        found[f"dequantize {name}"] = lambda f=name, p=parts, s=scale: [
            ops.dequantize(*p[:2], s, f, x.shape, -1, x.dtype)
        ]
    found["given"] = lambda: ops.quantize(x, "nvfp4", tensor_scale=given)
    found["across"] = lambda: ops.quantize(x, "nvint4", 0)
    for name in ("mxfp4", "nvfp4"):
        found[f"dual {name}"] = lambda f=name: ops.quantize_dual(x, f)
        found[f"dual rotated {name}"] = lambda f=name: ops.quantize_dual(x, f, rotation=32)
        for size in (16, 128, 1024):
            found[f"rotated {size} {name}"] = lambda f=name, n=size: ops.quantize(x, f, rotation=n)
        found[f"signs {name}"] = lambda f=name: ops.quantize(x, f, rotation=128, signs=signs)
    for size in (2, 64, 512):
        found[f"hadamard {size}"] = lambda n=size: [ops.hadamard(x, n)]
    found["amax"] = lambda: [ops.amax(x), ops.amax(x, 32)]
    codes = ops.quantize(x, "mxint8")[0] & 63
    found["pack"] = lambda: [ops.pack(codes, 6), ops.unpack(ops.pack(codes, 6), 6, 100)]
    found["pyfmt"] = lambda: [
        (q := pyfmt.quantize(x, "nvfp4")).codes,
        q.scales,
        q.tensor_scale,
        q.dequantize(torch.bfloat16),
        pyfmt.fake_quantize(x, "mxint4"),
        pyfmt.hadamard(x, 32),
    ]
    return found


def same(what: str, got: Any, want: Any) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.device == torch.device(FAR), f"{what}: on {g.device}"
        assert torch.equal(g.cpu(), w.cpu()), what


@pytest.fixture
def both() -> tuple[Any, Any]:
    """The same numbers on the current device and on the other."""
    x = (torch.randn(256, 1024, device="cuda:0") * 3).bfloat16()
    return x, x.to(FAR)


def test_every_verb_on_the_other_device(both: tuple[Any, Any]) -> None:
    near, far = both
    here, there = calls(near), calls(far)
    for what in here:
        same(what, there[what](), here[what]())


def test_on_a_stream_of_the_other_device(both: tuple[Any, Any]) -> None:
    near, far = both
    here = calls(near)
    stream = torch.cuda.Stream(FAR)
    later = torch.zeros_like(far)
    there = calls(later)
    torch.cuda.synchronize(FAR)
    for what in [w for w in here if not w.startswith(("dequantize", "pack"))]:
        with torch.cuda.stream(stream):
            later.zero_()
            torch.cuda._sleep(2_000_000)
            later.copy_(far)
            # Wrong unless the kernels queue behind the copy.
            got = there[what]()
        stream.synchronize()
        torch.cuda.set_device(0)
        same(what, got, here[what]())


def test_inside_a_graph_of_the_other_device(both: tuple[Any, Any]) -> None:
    near, far = both
    here, there = calls(near), calls(far)
    for what in ("quantize mxfp4", "quantize nvfp4", "fake nvint4", "dual nvfp4", "signs nvfp4"):
        there[what]()
        with torch.cuda.device(FAR):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = there[what]()
        graph.replay()
        torch.cuda.synchronize(FAR)
        same(what, got, here[what]())


def test_layers_on_the_other_device() -> None:
    linear = torch.nn.Linear(256, 128, device=FAR, dtype=torch.bfloat16)
    for options in ({}, {"activation": "mxfp4", "rotation": 32}):
        layer = pyfmt.nn.QuantLinear.from_linear(linear, weight="mxfp4", **options)
        near = pyfmt.nn.QuantLinear.from_linear(linear, weight="mxfp4", **options).to("cuda:0")
        for rows in (1, 40, 300):
            x = torch.randn(rows, 256, device=FAR, dtype=torch.bfloat16)
            with torch.no_grad():
                y = layer(x)
                assert y.device == torch.device(FAR)
                assert torch.equal(y.cpu(), near(x.to("cuda:0")).cpu())
            assert torch.equal(layer(x), y)


def test_operands_on_two_devices_are_refused(both: tuple[Any, Any]) -> None:
    far = both[1]
    q, scale = pyfmt.quantize(far, "mxfp4"), torch.tensor(0.01, device="cuda:0")
    with pytest.raises(RuntimeError, match="on the device of the others"):
        torch.ops.pyfmt.dequantize(q.codes, q.scales.to("cuda:0"), None, "mxfp4", far.shape)
    with pytest.raises(RuntimeError, match="on the device of the others"):
        torch.ops.pyfmt.quantize(far, "nvfp4", tensor_scale=scale)
