# SPDX-License-Identifier: Apache-2.0
"""torch.ops.pyfmt: schemas, tracing, gradients, precision and misuse."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyfmt.ops", exc_type=ImportError)

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.library import opcheck  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402

import pyfmt.ops  # noqa: E402
from pyfmt import _torch_matmul  # noqa: E402
from pyfmt.formats import get_format  # noqa: E402

ops = torch.ops.pyfmt

# One of each kind: both scale widths, both blocks, whole rows, odd bit widths, unsigned.
FORMATS = ("mxfp4", "nvfp4", "mxfp6_e2m3", "int4-brow-fp16", "e2m1-b16x16-e4m3-ts", "uint3-b7-e8m0")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(grad)


def quantized(x: torch.Tensor, fmt: str, **options: object) -> tuple[object, ...]:
    """Codes, scales, tensor scale (or None) and format, as matmul and linear take them."""
    codes, scales, tensor_scale = ops.quantize(x, fmt, **options)
    return codes, scales, tensor_scale if tensor_scale.numel() else None, fmt


def decoded(q: tuple[object, ...], k: int) -> torch.Tensor:
    codes = q[0]
    return ops.dequantize(*q, (*codes.shape[:-1], k))


def test_the_schemas_are_those_of_the_design():
    verbs = [schema.partition("(")[0] for schema in pyfmt.ops.SCHEMAS]
    wanted = (
        "quantize quantize_dual dequantize fake_quantize hadamard pack unpack amax matmul linear"
    )
    assert verbs == wanted.split()
    for verb in verbs:
        schema = getattr(ops, verb).default._schema
        assert not schema.is_mutable
        assert all(value.alias_info is None for value in schema.returns)


def test_importing_again_is_harmless():
    module = importlib.reload(pyfmt.ops)
    assert module.SCHEMAS
    kept = sys.modules.pop("pyfmt.ops")
    try:
        importlib.import_module("pyfmt.ops")
    finally:
        sys.modules["pyfmt.ops"] = kept
    assert ops.amax(torch.ones(3)) == 1


def test_a_missing_library_says_how_to_build_it():
    code = (
        "from pyfmt.backends import cpu\n"
        "cpu.torch_library_path = lambda: None\n"
        "try:\n    import pyfmt.ops\n"
        "except ImportError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "make setup" in run.stdout and run.stdout.count("\n") == 1


# opcheck: schema, autograd registration, fake kernels, AOT dispatch with dynamic shapes.


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_opcheck_quantize_and_dequantize(fmt: str, axis: int):
    x = randn(5, 70, dtype=torch.bfloat16)
    opcheck(ops.quantize.default, (x, fmt, axis))
    codes, scales, tensor_scale, _ = quantized(x, fmt, axis=axis)
    args = (codes, scales, tensor_scale, fmt, x.shape, axis)
    opcheck(ops.dequantize.default, args, {"dtype": torch.float16})


@pytest.mark.parametrize("shape", [(70,), (2, 3, 33), (0, 32), (4, 0)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_fake_shapes_are_the_real_ones(fmt: str, shape: tuple[int, ...]):
    x = randn(*shape)
    for axis in range(-1, x.dim() - 1):
        real = ops.quantize(x, fmt, axis)
        fake = ops.quantize(x.to("meta"), fmt, axis)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.is_contiguous()
        tensor_scale = real[2] if real[2].numel() else None
        y = ops.dequantize(real[0], real[1], tensor_scale, fmt, x.shape, axis)
        assert y.shape == x.shape
        assert y.is_contiguous()


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("nvfp4", {"recipe": "single_level"}),
        ("nvfp4", {"tensor_scale": torch.tensor(0.25)}),
        ("mxint8", {"scale_rule": "floor", "rounding": "stochastic", "seed": 7, "clip": "full"}),
        ("int4", {"rotation": 32, "signs": torch.ones(32, dtype=torch.int8)}),
    ],
)
def test_opcheck_quantize_options(fmt: str, options: dict[str, object]):
    opcheck(ops.quantize.default, (randn(3, 64), fmt), options)


def test_opcheck_with_gradients():
    signs = torch.ones(32)
    for grad in (False, True):
        x, bias = randn(3, 64, grad=grad), randn(9, grad=grad)
        opcheck(ops.hadamard.default, (x, 32, signs))
        opcheck(
            ops.hadamard.default, (x.detach().t().contiguous().requires_grad_(grad), 64, None, 0)
        )
        opcheck(ops.fake_quantize.default, (x, "mxfp4"))
        for fmt in ("nvfp4", "int4-b16x16-bf16"):
            w = quantized(randn(9, 64, seed=1), fmt)
            opcheck(ops.linear.default, (x, *w, bias, "mxfp4", 32, signs))
            opcheck(ops.linear.default, (x, *w))
            opcheck(ops.matmul.default, (x, None, None, None, *w, 64, bias))
            opcheck(ops.matmul.default, (*quantized(x.detach(), fmt), *w, 64, bias))


def test_opcheck_pack_unpack_amax():
    codes = torch.arange(70, dtype=torch.uint8).remainder(32).repeat(3, 1)
    packed = ops.pack(codes, 5)
    opcheck(ops.pack.default, (codes, 5))
    opcheck(ops.unpack.default, (packed, 5, 70))
    assert torch.equal(ops.unpack(packed, 5, 70), codes)
    opcheck(ops.amax.default, (randn(3, 70),))
    opcheck(ops.amax.default, (randn(3, 70), 16))
    opcheck(ops.amax.default, (randn(3, 70), 2, 0))


# torch.compile and torch.export.


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


# Gradients, against float64 formulas.


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


# matmul and linear: bits and bounds.


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


# Misuse: one sentence each.


def test_misuse_gets_one_sentence():
    x, w = randn(3, 64), quantized(randn(9, 64), "nvfp4")
    codes, scales, tensor_scale, fmt = w
    cases = [
        ("float64", lambda: ops.quantize(x.double(), "mxfp4")),
        ("int64", lambda: ops.quantize(x.long(), "mxfp4")),
        ("bool", lambda: ops.fake_quantize(x > 0, "mxfp4")),
        ("complex", lambda: ops.hadamard(x.to(torch.complex64), 32)),
        ("unknown 'mxfp5'", lambda: ops.quantize(x, "mxfp5")),
        ("unknown 'rciel'", lambda: ops.quantize(x, "mxfp4", scale_rule="rciel")),
        ("axis", lambda: ops.quantize(x, "mxfp4", 2)),
        ("seed", lambda: ops.quantize(x, "mxfp4", rounding="stochastic")),
        ("rotation", lambda: ops.quantize(x, "mxfp4", rotation=128)),
        ("power of two", lambda: ops.hadamard(x, 48)),
        ("signs", lambda: ops.hadamard(x, 32, torch.ones(31))),
        ("codes", lambda: ops.dequantize(codes, scales, tensor_scale, fmt, (9, 80))),
        ("scales", lambda: ops.dequantize(codes, scales[:, :2], tensor_scale, fmt, (9, 64))),
        ("float64", lambda: ops.dequantize(*w, (9, 64), dtype=torch.float64)),
        ("bits", lambda: ops.pack(codes, 9)),
        ("float64", lambda: ops.linear(x.double(), *w)),
        ("codes", lambda: ops.linear(randn(3, 65), *w)),
        ("bias", lambda: ops.linear(x, *w, torch.zeros(8))),
        ("bias", lambda: ops.linear(x, *w, torch.zeros(9, dtype=torch.float64))),
        ("two dimensions", lambda: ops.linear(x, codes[0], scales[0], None, fmt)),
        ("rows of 64", lambda: ops.matmul(randn(3, 65), None, None, None, *w, 64)),
        ("a_scales", lambda: ops.matmul(codes, None, None, fmt, *w, 64)),
        ("tensor_scale", lambda: ops.quantize(x, "nvfp4", tensor_scale=torch.tensor(torch.nan))),
        ("tensor_scale", lambda: ops.quantize(x, "nvfp4", tensor_scale=torch.tensor(-1.0))),
        ("tensor_scale", lambda: ops.quantize(x, "mxfp4", tensor_scale=torch.tensor(1.0))),
        ("recipe", lambda: ops.linear(x, *w, None, "mxfp4", recipe="nvidia")),
        ("to_dense", lambda: ops.quantize(x.to_sparse(), "mxfp4")),
    ]
    for word, call in cases:
        with pytest.raises(RuntimeError) as error:
            call()
        sentence = str(error.value).partition("\nException raised from")[0]
        assert word in sentence, (word, sentence)
        assert "\n" not in sentence.strip(), sentence


# Overhead, printed and not judged: run with -s to see it.


def test_overhead_is_printed():
    x = randn(8, 64)
    w = quantized(randn(16, 64), "mxfp4")
    calls = {
        "quantize": lambda: ops.quantize(x, "mxfp4"),
        "dequantize": lambda: ops.dequantize(*w, (16, 64)),
        "fake_quantize": lambda: ops.fake_quantize(x, "mxfp4"),
        "hadamard": lambda: ops.hadamard(x, 32),
        "amax": lambda: ops.amax(x, 32),
        "linear": lambda: ops.linear(x, *w),
        "linear, quantized activations": lambda: ops.linear(x, *w, None, "mxfp4"),
    }
    for name, call in calls.items():
        measured = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.02)
        print(f"{name:32} {measured.median * 1e6:6.1f} us")
    assert get_format("mxfp4").bits == 4


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "nvint4", "int4"])
def test_quantize_dual_is_two_calls(fmt: str, rotation: int):
    x = randn(48, 64)
    options = (None, None, "nearest", None, "symmetric", None, rotation)
    got = ops.quantize_dual(x, fmt, *options)
    want = (*ops.quantize(x, fmt, -1, *options), *ops.quantize(x, fmt, -2, *options))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    opcheck(ops.quantize_dual.default, (x, fmt, *options))
    with pytest.raises(RuntimeError, match="at least two dimensions"):
        ops.quantize_dual(x[0], fmt)


def test_rotated_directions_have_tensor_scales_of_their_own():
    x = randn(64, 32)
    _, _, along, _, _, across = ops.quantize_dual(x, "nvfp4", rotation=32)
    assert along != across
    given = torch.tensor(0.01)
    for stored in ops.quantize_dual(x, "nvfp4", tensor_scale=given, rotation=32)[2::3]:
        assert stored == given and stored.data_ptr() != given.data_ptr()
