# SPDX-License-Identifier: Apache-2.0
"""torch.ops.pyfmt under torch.compile and torch.export."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyfmt.ops", exc_type=ImportError)

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from tests.op_cases import ops, quantized, randn  # noqa: E402


def traced(function, *samples: torch.Tensor, backend: str = "aot_eager") -> None:
    """One graph, without recompiling, gives the eager bits for every sample."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=graphs, dynamic=True)
    for x in samples:
        assert torch.equal(compiled(x), function(x))
    assert graphs.frame_count == 1


def round_trip(x: torch.Tensor) -> torch.Tensor:
    codes, scales, tensor_scale = ops.quantize(x * 2, "nvfp4")
    return ops.dequantize(codes, scales, tensor_scale, "nvfp4", x.shape) + 1


# More than one block each way: a size of 1 is a graph of its own in torch.
SAMPLES = [randn(n, k) for n, k in ((40, 70), (70, 96), (99, 161))]


def test_compile_with_inductor():
    traced(round_trip, *SAMPLES, backend="inductor")


@pytest.mark.parametrize("fmt", ["int4-brow-bf16", "e2m1-b16x16-e4m3", "mxfp6_e3m2"])
def test_compile_dynamic_shapes(fmt: str):
    def f(x):
        codes, scales, _ = ops.quantize(x, fmt, 0)
        y = ops.dequantize(codes, scales, None, fmt, x.shape, 0)
        y = y + ops.fake_quantize(x, fmt) + ops.amax(x)
        packed = ops.pack(x.to(torch.uint8) & 7, 3)
        return y + ops.unpack(packed, 3, x.shape[1]) + ops.amax(x, 8).sum()

    traced(f, *SAMPLES)


def test_compile_mark_dynamic_linear():
    w = quantized(randn(9, 64), "nvfp4")

    def f(x):
        return ops.linear(ops.hadamard(x, 64), *w, None, "mxfp8_e4m3", 32)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for n in (2, 3, 17):
        x = randn(n, 64)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), f(x))


def test_compile_unbacked_rows():
    w = quantized(randn(9, 64), "mxfp4")

    def f(x, keep):
        rows = x[keep.nonzero().squeeze(1)]
        return ops.linear(ops.fake_quantize(rows, "mxint8"), *w)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        x, keep = randn(5, 64), torch.tensor([1, 0, 1, 1, 0])
        assert torch.equal(compiled(x, keep), f(x, keep))


def test_compile_gradients():
    w = quantized(randn(9, 64), "int4")
    signs = torch.tensor([1.0, -1.0]).repeat(16)

    def f(x, bias):
        y = ops.hadamard(ops.fake_quantize(x, "mxfp4"), 16)
        return ops.linear(y, *w, bias, "mxint8", 32, signs)

    torch._dynamo.reset()
    grads = []
    for call in (f, torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)):
        x, bias = randn(4, 64, grad=True), randn(9, grad=True)
        call(x, bias).square().sum().backward()
        grads.append((x.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compile_python_api():
    import pyfmt

    def f(x):
        y = pyfmt.quantize(x, "nvfp4").dequantize(x.dtype)
        return y + pyfmt.fake_quantize(x, "mxfp4") + pyfmt.hadamard(x, 32)

    traced(f, *(randn(n, k) for n, k in ((5, 64), (7, 96))))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            codes, scales, tensor_scale = ops.quantize(randn(9, 64), "nvfp4")
            self.register_buffer("codes", codes)
            self.register_buffer("scales", scales)
            self.register_buffer("tensor_scale", tensor_scale)

        def forward(self, x):
            w = (self.codes, self.scales, self.tensor_scale, "nvfp4")
            return round_trip(x), ops.linear(x, *w), ops.amax(x, 16)

    model = Model()
    dynamic = ({0: torch.export.Dim("n", max=1 << 20)},)
    exported = torch.export.export(model, (randn(8, 64),), dynamic_shapes=dynamic, strict=strict)
    for n in (3, 40):
        got, expected = exported.module()(randn(n, 64)), model(randn(n, 64))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
