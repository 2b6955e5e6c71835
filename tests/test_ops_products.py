# SPDX-License-Identifier: Apache-2.0
"""matmul and linear of torch.ops.pyfmt: bits and bounds."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyfmt.ops", exc_type=ImportError)

from pyfmt import _torch_matmul  # noqa: E402
from tests.op_cases import FORMATS, decoded, ops, quantized, randn  # noqa: E402


@pytest.mark.parametrize("fmt", FORMATS)
def test_matmul_within_its_bound(fmt: str):
    a, w = randn(4, 7, 70, dtype=torch.bfloat16), quantized(randn(9, 70, seed=1), fmt)
    bias = randn(9, seed=2, dtype=torch.bfloat16)
    b = decoded(w, 70).double()
    for left, dense in (
        ((a, None, None, None), a.double()),
        (quantized(a, fmt), decoded(quantized(a, fmt), 70).double()),
    ):
        y = ops.matmul(*left, *w, 70, bias, torch.float32)
        exact = dense @ b.T + bias.double()
        size = dense.abs() @ b.abs().T + bias.double().abs()
        assert ((y.double() - exact).abs() <= 71 * 2.0**-24 * size + 2.0**-149).all()
    assert ops.matmul(a, None, None, None, *w, 70).dtype == torch.bfloat16
    assert ops.matmul(*quantized(a, fmt), *w, 70).dtype == torch.float32


def test_matmul_is_exact_where_sums_are():
    a = torch.arange(-64, 64, dtype=torch.float32).reshape(2, 64)
    w = quantized(torch.arange(-3.0, 4.0).repeat(64, 1).t().contiguous(), "mxfp4")
    y = ops.matmul(a, None, None, None, *w, 64)
    assert torch.equal(y.double(), a.double() @ decoded(w, 64).double().T)


def test_panels_give_the_same_bits_as_one_expansion(monkeypatch: pytest.MonkeyPatch):
    for fmt in ("mxfp4", "int4-b16x16-bf16"):
        w, x = quantized(torch.randint(-3, 4, (70, 64)).float(), fmt), torch.ones(3, 64)
        whole = ops.linear(x, *w, torch.arange(70.0))
        monkeypatch.setattr(_torch_matmul, "PANEL_ELEMENTS", 20 * 64)
        assert torch.equal(ops.linear(x, *w, torch.arange(70.0)), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 64)])
def test_linear_is_the_composition(shape: tuple[int, ...]):
    signs = torch.sign(randn(64, seed=3))
    x, w, bias = randn(*shape, dtype=torch.bfloat16), quantized(randn(9, 64), "nvfp4"), randn(9)
    for fmt in ("mxfp4", "nvfp4", "int8-b32-fp16", "e2m1-b16x16-e8m0"):
        for rotation in (0, 32):
            pair = (rotation, signs if rotation else None)
            q = quantized(x, fmt, rotation=rotation, signs=pair[1])
            expected = ops.matmul(*q, *w, 64, bias, torch.bfloat16)
            assert torch.equal(ops.linear(x, *w, bias, fmt, *pair), expected)
    assert torch.equal(
        ops.linear(x, *w, bias, None, 32, signs),
        ops.matmul(ops.hadamard(x, 32, signs), None, None, None, *w, 64, bias),
    )
    assert ops.linear(x, *w).shape == (*shape[:-1], 9)


def test_torchs_matmul_precision_changes_no_bit():
    x, w = randn(64, 512), quantized(randn(64, 512, seed=1), "mxint8")
    expected = ops.linear(x, *w)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("medium", "high"):
            torch.set_float32_matmul_precision(precision)
            results = []

            def work(results=results):
                results.extend(ops.linear(x, *w) for _ in range(20))

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(results) == 60
            assert all(torch.equal(y, expected) for y in results)
            assert torch.get_float32_matmul_precision() == precision
            setting = torch.backends.mkldnn.matmul.fp32_precision
            assert setting == {"medium": "bf16", "high": "tf32"}[precision]
    finally:
        torch.set_float32_matmul_precision(before)


def test_strides_and_addresses_change_no_bit():
    w = quantized(randn(300, 512, seed=1), "mxint8")
    for rows in (1, 17, 130):
        for offset in range(1, 16, 3):
            x = randn(rows * 512 + 64)[offset : offset + rows * 512].view(rows, 512)
            expected = ops.linear(x.clone(), *w)
            assert torch.equal(ops.linear(x, *w), expected)
            assert torch.equal(ops.linear(x.t().contiguous().t(), *w), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_dense_operand(dtype: torch.dtype):
    x, w, bias = randn(5, 64, grad=True), quantized(randn(9, 64), "int4"), randn(9)
    with torch.autocast("cpu", dtype=dtype):
        y = ops.linear(x, *w, bias)
        z = ops.matmul(x, None, None, None, *w, 64, bias)
    assert y.dtype == z.dtype == dtype
    assert torch.equal(y, ops.linear(x.to(dtype), *w, bias))
    assert torch.equal(y, z)
    with torch.autocast("cpu", dtype=dtype):
        (inside,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    (outside,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(inside, outside)
