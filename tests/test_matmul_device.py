# SPDX-License-Identifier: Apache-2.0
"""The GEMM paths on a GPU: error bounds on hard operands, repeatability, graphs, batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pyfmt
import pyfmt.nn
from pyfmt import _matmul_paths as paths
from pyfmt.backends import cuda
from pyfmt.formats import FORMATS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda.available() is not None, reason="no GPU to run on"
)
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# c of |err| <= c * sum|a||b| + half an ulp, as docs/matmul.md states it.
FP8_STEP = 2.0**-6


def bound(path: str, k: int) -> float:
    return FP8_STEP if path == "fold" else k * 2.0**-24


def gaussian(rows: int, k: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, k, generator=g, device="cuda")


def outlier(rows: int, k: int, g: torch.Generator) -> torch.Tensor:
    x = gaussian(rows, k, g)
    x[:, torch.randint(0, k, (8,), generator=g, device="cuda")] *= 1000
    return x


def positive(rows: int, k: int, g: torch.Generator) -> torch.Tensor:
    return gaussian(rows, k, g).abs()


def wide_spread(rows: int, k: int, g: torch.Generator) -> torch.Tensor:
    powers = torch.randint(-11, 12, (rows, k // 32), generator=g, device="cuda")
    return gaussian(rows, k, g) * torch.exp2(powers.float()).repeat_interleave(32, 1)


def adversarial(rows: int, k: int, g: torch.Generator) -> torch.Tensor:
    """Large numbers alone in their blocks, others just below what an fp8 accumulator keeps."""
    x = torch.full((rows, k), 1.5 * 2.0**-12, device="cuda")
    x[:, torch.arange(k, device="cuda") % 128 < 32] = 0
    x[:, ::128] = 1.0
    return x


OPERANDS: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    f.__name__: f for f in (gaussian, outlier, positive, wide_spread, adversarial)
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def check(y: torch.Tensor, a: torch.Tensor, w: torch.Tensor, c: float, bias: Any = None) -> float:
    """Return the measured c; assert the bound."""
    exact, weight = a.double() @ w.double().t(), a.double().abs() @ w.double().abs().t()
    if bias is not None:
        exact, weight = exact + bias.double(), weight + bias.double().abs()
    rest = HALF_ULP[y.dtype] * 1.01 * exact.abs() + 2.0**-126
    error = (y.double() - exact).abs()
    assert (error <= c * weight + rest).all(), f"{((error - rest) / weight).max()} against {c}"
    return float(((error - rest) / weight).max())


def both(kind: str, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(m)
    if kind == "adversarial":
        return adversarial(m, k, g), torch.ones(n, k, device="cuda")
    return OPERANDS[kind](m, k, g), OPERANDS["gaussian" if kind == "outlier" else kind](n, k, g)


def able(left: str | None, right: str, m: int, k: int) -> list[str]:
    fmt = None if left is None else FORMATS[left]
    call = paths.Call(fmt, "bfloat16", FORMATS[right], m, 1000, k)
    machine = pyfmt._torch_matmul.machine_of(torch.device("cuda", 0))
    assert machine is not None
    return [p for p in paths.PATHS if paths.cannot(p, call, machine) is None]


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("pair", [
    ("mxfp4", "mxfp4"), ("mxint4", "mxfp6_e2m3"), ("mxfp6_e3m2", "mxfp6_e3m2"),
    ("nvfp4", "nvfp4"), ("mxint8", "mxfp8_e4m3"), (None, "mxfp4"), (None, "nvint4"),
    (None, "int4"), ("int8", "int8"),
])  # fmt: skip
def test_every_able_path_keeps_its_bound(pair: tuple[str | None, str], kind: str) -> None:
    for m, n, k in ((7, 136, 1024), (300, 256, 2080), (40, 33, 96)):
        a, w = both(kind, m, n, k)
        qw = pyfmt.quantize(w, pair[1])
        bias = torch.randn(n, device="cuda")
        if pair[0] is None:
            qa = a.bfloat16()
            decoded = qa.double()
        else:
            qa = pyfmt.quantize(a, pair[0])
            decoded = qa.dequantize().double()
        values = qw.dequantize().double()
        for path in able(*pair, m, k):
            for dtype in (torch.bfloat16, torch.float32):
                y = pyfmt.matmul(qa, qw, bias, dtype=dtype, path=path)
                check(y, decoded, values, bound(path, k), bias)
                again = pyfmt.matmul(qa, qw, bias, dtype=dtype, path=path)
                assert torch.equal(y, again), f"{path} gives other bits the second time"
            y = pyfmt.matmul(qa, qw, bias.bfloat16(), dtype=torch.bfloat16, path=path)
            check(y, decoded, values, bound(path, k), bias.bfloat16())


def test_sums_that_are_exact_come_out_exact() -> None:
    g = generator(3)
    a = torch.randint(-3, 4, (130, 512), generator=g, device="cuda").float()
    w = torch.randint(-3, 4, (144, 512), generator=g, device="cuda").float()
    a[:, ::32], w[:, ::32] = 4, 4
    bias = torch.randint(-50, 50, (144,), generator=g, device="cuda").float()
    qa, qw = pyfmt.quantize(a, "mxfp4"), pyfmt.quantize(w, "mxfp4")
    assert torch.equal(qa.dequantize(), a) and torch.equal(qw.dequantize(), w)
    want = a @ w.t() + bias
    for path in able("mxfp4", "mxfp4", 130, 512):
        for b in (bias, bias.bfloat16()):
            for dtype in (torch.float32, torch.bfloat16):
                y = pyfmt.matmul(qa, qw, b, dtype=dtype, path=path)
                assert torch.equal(y, want.to(dtype)), path


def test_scaled_products_of_columns_and_onto_a_matrix() -> None:
    ops = torch.ops.pyfmt
    if not ops._has_scaled_gemm():
        pytest.skip("torch brought no cuBLASLt along")
    g = torch.Generator("cuda").manual_seed(4)
    a, w, y = (
        torch.randint(-9, 10, shape, generator=g, device="cuda")
        for shape in ((72, 96), (48, 96), (72, 48))
    )
    factor, zero, one = (torch.tensor(x, device="cuda") for x in (0.25, 0.0, 1.0))
    want = 0.25 * (a.double() @ w.double().t())
    a, w = a.bfloat16(), w.bfloat16()
    for right in (w, w.t().contiguous().t()):
        got = ops._scaled_gemm(a, right, factor, zero, torch.float32)
        assert torch.equal(got.double(), want)
        onto = y.float()
        ops._scaled_gemm_add(onto, a, right, factor, one)
        assert torch.equal(onto.double(), want + y)
    with pytest.raises(RuntimeError, match="y: expected a contiguous matrix of 72 x 48"):
        ops._scaled_gemm_add(y.float().t(), a, w, factor, one)


def test_products_of_folded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = torch.ops.pyfmt
    g = torch.Generator("cuda").manual_seed(5)
    a, w = (
        torch.randint(-2, 3, shape, generator=g, device="cuda").float()
        for shape in ((600, 512), (144, 512))
    )
    a_scale = 2.0 ** torch.randint(-3, 4, (600,), generator=g, device="cuda")
    w_scale = 2.0 ** torch.randint(-3, 4, (144,), generator=g, device="cuda")
    bias = torch.randint(-9, 10, (144,), generator=g, device="cuda").bfloat16()
    want = (a.double() @ w.double().t()) * a_scale[:, None] * w_scale
    w8 = w.to(torch.float8_e4m3fn).view(torch.uint8)
    for e5m2 in (False, True):
        a8 = a.to(torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn).view(torch.uint8)
        for dtype, added in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, bias)):
            shape = (600, 144, 512, dtype, e5m2, added is not None, False)
            if not ops._folded_gemm_serves(a8, *shape):
                continue
            y = ops._folded_gemm(a8, e5m2, a_scale, w8, w_scale, added, dtype, False)
            types = (torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn, torch.float8_e4m3fn)
            known = torch._scaled_mm(
                a8.view(types[0]), w8.view(types[1]).t(), a_scale[:, None], w_scale[None],
                bias=added, out_dtype=dtype,
            )  # fmt: skip
            assert torch.equal(y, known)
            assert added is not None or torch.equal(y, want.to(dtype))
    assert not ops._folded_gemm_serves(w8, 600, 140, 512, torch.bfloat16, True, False, False)
    # The same by the path, with the weight written out.
    monkeypatch.setattr(paths, "PACKED", {})
    qa, qw = pyfmt.quantize(a, "mxfp4"), pyfmt.quantize(w, "mxfp4")
    exact = qa.dequantize().double() @ qw.dequantize().double().t()
    for added in (None, bias, bias.float()):
        for dtype in (torch.float32, torch.bfloat16):
            y = pyfmt.matmul(qa, qw, added, dtype=dtype, path="fold")
            whole = exact if added is None else exact + added.double()
            assert torch.equal(y, whole.to(dtype))
    # Rotated and quantized on the way, beside the weight: the bits of codes that were there before.
    x = torch.randn(2048, 512, generator=g, device="cuda", dtype=torch.bfloat16)
    for name in ("mxfp4", "mxfp6_e2m3"):
        q = pyfmt.quantize(w, name)
        codes = pyfmt.quantize(x, name, rotation=32)
        for _ in range(20):
            got = ops.linear(
                x, q.codes, q.scales, None, name, None, name, 32, path="fold"
            )  # fmt: skip
            assert torch.equal(got, pyfmt.matmul(codes, q, dtype=torch.bfloat16, path="fold"))


def test_rows_that_do_not_fold_are_repaired_and_counted() -> None:
    a, w = both("gaussian", 200, 160, 512)
    a[3, 64:96] *= 2.0**-45
    a[199] *= 2.0**70
    w[150, :32] *= 2.0**40
    qa, qw = pyfmt.quantize(a, "mxfp4"), pyfmt.quantize(w, "mxfp4")
    before = cuda.fold_exceptions()
    y = pyfmt.matmul(qa, qw, dtype=torch.bfloat16, path="fold")
    check(y, qa.dequantize(), qw.dequantize(), FP8_STEP)
    exceptional = y[[3, 199]].clone()
    check(exceptional, qa.dequantize()[[3, 199]], qw.dequantize(), 512 * 2.0**-24)
    assert int(cuda.fold_exceptions() - before) == 3


def layer(**options: Any) -> pyfmt.nn.QuantLinear:
    torch.manual_seed(1)
    dense = torch.nn.Linear(512, 384, device="cuda", dtype=torch.bfloat16)
    return pyfmt.nn.QuantLinear.from_linear(dense, **options)


LAYERS = [
    {"weight": "mxfp4"}, {"weight": "nvfp4"}, {"weight": "int4"}, {"weight": "mxint8"},
    {"weight": "mxfp4", "activation": "mxfp4", "rotation": 32},
    {"weight": "mxfp4", "activation": "mxfp4", "rotation": 128, "signs": "random"},
    {"weight": "nvfp4", "activation": "nvfp4", "rotation": 16},
    {"weight": "mxfp4", "activation": "mxfp4", "rotation": 32, "expanded": "keep"},
    {"weight": "mxint8", "activation": "mxint8", "expanded": "keep"},
]  # fmt: skip


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_layers_in_graphs_and_compiled(options: dict[str, Any]) -> None:
    q = layer(**options)
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        for rows in (1, 16, 100, 700):
            x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
            want = q(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = q(x)
            y.zero_()
            graph.replay()
            assert torch.equal(y, want)
            assert torch.equal(compiled(x), want)
    names = set(q.state_dict())
    assert not {n for n in names if n.startswith("expanded")}


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_linear_equals_matmul_of_the_quantized_rows(options: dict[str, Any]) -> None:
    q = layer(**options)
    w = torch.ops.pyfmt.dequantize(
        q.weight_codes, q.weight_scales, q.weight_tensor_scale, q.weight_format, (384, 512)
    )
    for rows in (3, 48, 130, 1000):
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        if q.activation_format is None:
            a = x.float()
        else:
            parts = torch.ops.pyfmt.quantize(
                x, q.activation_format, rotation=q.rotation or 0, signs=q.signs
            )
            a = torch.ops.pyfmt.dequantize(*parts, q.activation_format, x.shape)
        with torch.no_grad():
            check(q(x), a, w, FP8_STEP, q.bias)


@pytest.mark.parametrize("options", [
    {"weight": "mxfp4"}, {"weight": "mxfp4", "activation": "mxfp4", "rotation": 32},
    {"weight": "mxint8"}, {"weight": "int4"}, {"weight": "mxint8", "activation": "mxint8"},
    {"weight": "nvfp4", "activation": "nvfp4", "recipe": "single_level"},
])  # fmt: skip
def test_batch_invariant_layers(options: dict[str, Any]) -> None:
    q = layer(**options, batch_invariant=True)
    g = generator(5)
    x = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16, generator=g)
    with torch.no_grad():
        whole = q(x)
        for rows in (1, 2, 16, 17, 64, 65, 300, 700):
            for first in (0, 5, 1024 - rows):
                y = q(x[first : first + rows])
                assert torch.equal(y, whole[first : first + rows]), f"{rows} rows from {first}"
        order = torch.randperm(1024, device="cuda", generator=g)
        assert torch.equal(q(x[order]), whole[order])
        twice = torch.cat([x, x])
        assert torch.equal(q(twice)[1024:], whole)


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_layers_in_a_row_wait_for_each_other(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    layers = []
    for _ in range(6):
        dense = torch.nn.Linear(2048, 2048, device="cuda", dtype=torch.bfloat16)
        layers.append(pyfmt.nn.QuantLinear.from_linear(dense, **options))

    def chain(x: torch.Tensor, wait: bool) -> torch.Tensor:
        for q in layers:
            x = q(x)
            if wait:
                torch.cuda.synchronize()
        return x

    with torch.no_grad():
        for rows in (1, 16, 48, 300):
            x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
            want = chain(x, True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = chain(x, False)
            for _ in range(20):
                y.zero_()
                graph.replay()
                assert torch.equal(y, want), rows
                assert torch.equal(chain(x, False), want), rows


def test_fused_layers_give_the_same_numbers() -> None:
    torch.manual_seed(3)
    parts = {name: torch.nn.Linear(512, n, False) for name, n in (("q", 512), ("k", 128))}
    model = torch.nn.ModuleDict(parts).to("cuda", torch.bfloat16)
    for options in ({}, {"activation": "mxfp4", "rotation": 32, "expanded": "keep"}):
        alone, fused = copy.deepcopy(model), copy.deepcopy(model)
        pyfmt.nn.quantize_model(alone, progress=False, **options)
        pyfmt.nn.quantize_model(fused, progress=False, fuse=[("q", "k")], **options)
        for rows in (1, 16, 300):
            x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                for name in ("q", "k"):
                    want = alone[name](x).float()
                    # Exact operands, sums in another order: no more than a unit of the last place.
                    torch.testing.assert_close(
                        fused[name](x).float(), want, rtol=2.0**-7, atol=1e-3
                    )
