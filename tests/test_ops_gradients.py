# SPDX-License-Identifier: Apache-2.0
"""Gradients of torch.ops.pyfmt, against float64 formulas."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyfmt.ops", exc_type=ImportError)

from tests.op_cases import decoded, ops, quantized, randn  # noqa: E402


def sylvester(size: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("length", [16, 64])
def test_hadamard_gradient_is_the_transpose(axis: int, length: int):
    x = randn(64, 64, grad=True)
    signs = torch.sign(randn(length, seed=3)).to(torch.int8)
    g = randn(64, 64, seed=4)
    (got,) = torch.autograd.grad(ops.hadamard(x, 16, signs, axis), x, g)
    m = torch.block_diag(*[sylvester(16)] * 4) * signs.repeat(64 // length).double()
    expected = g.double() @ m if axis == -1 else m.T @ g.double()
    close(got, expected)


def test_hadamard_gradcheck_second_order():
    x = randn(2, 32, grad=True)
    (g,) = torch.autograd.grad(ops.hadamard(x, 32).square().sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), x)
    close(gg, torch.full((2, 32), 2.0, dtype=torch.float64))


def test_fake_quantize_is_straight_through():
    x, g = randn(3, 40, grad=True), randn(3, 40, seed=1)
    (got,) = torch.autograd.grad(ops.fake_quantize(x, "nvfp4"), x, g)
    assert torch.equal(got, g)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "int4-b16x16-bf16"])
def test_matmul_gradient(fmt: str):
    w = quantized(randn(9, 64), fmt)
    a, bias, g = randn(2, 3, 64, grad=True), randn(9, grad=True), randn(2, 3, 9, seed=5)
    y = ops.matmul(a, None, None, None, *w, 64, bias)
    got_a, got_bias = torch.autograd.grad(y, (a, bias), g)
    close(got_a, g.double() @ decoded(w, 64).double())
    close(got_bias, g.double().sum((0, 1)))


@pytest.mark.parametrize("activation", [None, "mxint8"])
@pytest.mark.parametrize("rotation", [0, 32])
def test_linear_gradient(activation: str | None, rotation: int):
    signs = torch.sign(randn(64, seed=3)) if rotation else None
    w = quantized(randn(9, 64), "mxfp4")
    x, bias, g = randn(5, 64, grad=True), randn(9, grad=True), randn(5, 9, seed=5)
    y = ops.linear(x, *w, bias, activation, rotation, signs)
    got_x, got_bias = torch.autograd.grad(y, (x, bias), g)
    expected = g.double() @ decoded(w, 64).double()
    if rotation:
        expected = expected @ torch.block_diag(*[sylvester(32)] * 2) * signs.double()
    close(got_x, expected)
    close(got_bias, g.double().sum(0))
    with torch.no_grad():
        assert torch.equal(ops.linear(x, *w, bias, activation, rotation, signs), y)


def test_gradients_have_their_inputs_dtypes():
    w = quantized(randn(9, 64), "mxfp4")
    x, bias = randn(5, 64, dtype=torch.bfloat16, grad=True), randn(9, grad=True)
    ops.linear(x, *w, bias, "mxfp4", 16).sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32)


def test_no_gradient_says_so():
    x, w = randn(3, 64, grad=True), quantized(randn(9, 64), "int4")
    scales = w[1].clone().requires_grad_()
    cases = {
        "quantize has no gradient: use fake_quantize (straight-through) or pass x.detach()": (
            lambda: ops.quantize(x, "mxfp4")
        ),
        "amax has no gradient: pass x.detach()": lambda: ops.amax(x, 16),
        "dequantize has no gradient in scales: pass scales.detach()": (
            lambda: ops.dequantize(w[0], scales, None, "int4", (9, 64))
        ),
        "linear has no gradient in w_scales: pass w_scales.detach()": (
            lambda: ops.linear(x, w[0], scales, None, "int4")
        ),
        "matmul has no gradient in b_scales: pass b_scales.detach()": (
            lambda: ops.matmul(x, None, None, None, w[0], scales, None, "int4", 64)
        ),
        "hadamard has no gradient in signs: pass signs.detach()": (
            lambda: ops.hadamard(x, 64, torch.ones(64, requires_grad=True))
        ),
    }
    for sentence, call in cases.items():
        with pytest.raises(RuntimeError) as error:
            call()
        assert str(error.value) == sentence
        with torch.no_grad():
            call()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="quantize has no gradient"):
        torch.compile(lambda x: ops.quantize(x, "mxfp4"), backend="aot_eager")(x)
