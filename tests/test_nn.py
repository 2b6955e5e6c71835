# SPDX-License-Identifier: Apache-2.0
"""QuantLinear and quantize_model: values, state dicts, casts, tracing, filters, the way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyfmt.ops", exc_type=ImportError)

from safetensors.torch import load_file, load_model, save_file, save_model  # noqa: E402
from torch import nn  # noqa: E402

from pyfmt.nn import QuantLinear, Report, dequantize_model, quantize_model  # noqa: E402

ops = torch.ops.pyfmt

# Weight-only, weight and activation, each kind of scale, rotation with and without signs.
KINDS = [
    {"weight": "mxfp4"},
    {"weight": "int4", "activation": "mxint8"},
    {"weight": "nvfp4", "activation": "nvfp4", "rotation": 32, "signs": "random", "seed": 3},
    {"weight": "nvint4", "recipe": "single_level", "rotation": 128},
    {"weight": "int8-brow-fp32", "activation": "mxfp8_e4m3", "scale_rule": "floor"},
    {"weight": "e2m1-b16x16-e8m0", "clip": "full"},
]


def kind_name(kind: dict[str, object]) -> str:
    return "-".join(str(value) for value in kind.values())


@pytest.fixture(params=KINDS, ids=kind_name)
def kind(request: pytest.FixtureRequest) -> dict[str, object]:
    return request.param


def linear(k: int = 128, n: int = 48, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# One layer.


def test_the_layer_is_its_formula(kind: dict[str, object]):
    dense = linear()
    layer = QuantLinear.from_linear(dense, **kind)
    x = randn(5, 128)
    rotation, signs = layer.rotation or 0, layer.signs
    rule, recipe, clip = layer.weight_options
    codes, scales, tensor_scale = ops.quantize(
        dense.weight.detach(),
        layer.weight_format,
        scale_rule=rule,
        recipe=recipe,
        clip=clip,
        rotation=rotation,
        signs=signs,
    )
    assert torch.equal(layer.weight_codes, codes)
    assert torch.equal(layer.weight_scales, scales)
    tensor_scale = tensor_scale if tensor_scale.numel() else None
    w = ops.dequantize(codes, scales, tensor_scale, layer.weight_format, (48, 128))
    a = x
    if layer.activation_format:
        rule, recipe, clip = layer.activation_options
        parts = ops.quantize(
            x,
            layer.activation_format,
            scale_rule=rule,
            recipe=recipe,
            clip=clip,
            rotation=rotation,
            signs=signs,
        )
        a_scale = parts[2] if parts[2].numel() else None
        a = ops.dequantize(parts[0], parts[1], a_scale, layer.activation_format, x.shape)
    elif rotation:
        a = ops.hadamard(x, rotation, signs)
    exact = a.double() @ w.double().T + dense.bias.double()
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    # Quantization noise and no more: rotation of weight and activation cancel.
    noise = (layer(x) - dense(x)).norm() / dense(x).norm()
    assert noise < 0.25


def test_dense_is_the_way_back():
    x = randn(5, 128)
    for kind in KINDS[:4]:
        layer = QuantLinear.from_linear(linear(), **{**kind, "activation": None})
        back = layer.dense()
        assert type(back) is nn.Linear
        torch.testing.assert_close(back(x), layer(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(back.weight, layer.weight)
        assert back.bias is layer.bias


def test_any_input_shape(kind: dict[str, object]):
    layer = QuantLinear.from_linear(linear(), **kind)
    x = randn(2, 3, 4, 128)
    y = layer(x)
    assert y.shape == (2, 3, 4, 48)
    assert layer(x[0, 0, 0]).shape == (48,)
    assert layer(x[:0]).shape == (0, 3, 4, 48)
    assert layer(x.transpose(0, 2)).shape == (4, 3, 2, 48)
    if "nvfp4" not in kind.values():  # its activations share one scale among all rows
        torch.testing.assert_close(layer(x[0, 0, 0]), y[0, 0, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x.transpose(0, 2)), y.transpose(0, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_leave_codes_and_scales_alone(kind: dict[str, object], dtype: torch.dtype):
    layer = QuantLinear.from_linear(linear(), **kind)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    method = "half" if dtype == torch.float16 else "bfloat16"
    cast = {
        "to": lambda: copy.deepcopy(layer).to(dtype),
        "method": lambda: getattr(copy.deepcopy(layer), method)(),
        "type": lambda: copy.deepcopy(layer).type(dtype),
        "there and back": lambda: copy.deepcopy(layer).to(dtype).float().to(dtype),
    }
    for call in cast.values():
        moved = call()
        for name, buffer in moved.named_buffers():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name])
        assert moved.bias.dtype == moved.dtype == moved.dense().weight.dtype == dtype
        assert moved(randn(3, 128).to(dtype)).dtype == dtype


def test_double_keeps_the_weight_and_refuses_float64():
    layer = QuantLinear.from_linear(linear(bias=False), "int4").double()
    assert layer.weight_scales.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="float64"):
        layer(randn(3, 128).double())


def test_meta_and_back():
    layer = QuantLinear.from_linear(linear(), "int4")
    state = layer.state_dict()
    empty = copy.deepcopy(layer).to("meta")
    assert empty.weight_scales.is_meta and empty.weight_scales.dtype == torch.bfloat16
    assert empty(randn(3, 128).to("meta")).shape == (3, 48)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(state)
    assert torch.equal(filled(randn(3, 128)), layer(randn(3, 128)))
    fresh = QuantLinear(128, 48, weight="int4", device="meta")
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh(randn(3, 128)), layer(randn(3, 128)))


def test_copies_and_pickles(kind: dict[str, object]):
    layer = QuantLinear.from_linear(linear(), **kind)
    x = randn(3, 128)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)


def test_repr():
    layer = QuantLinear.from_linear(linear(), "nvfp4", "mxfp8_e4m3", 32, "random")
    assert repr(layer) == (
        "QuantLinear(in_features=128, out_features=48, bias=True, weight=nvfp4, "
        "activation=mxfp8_e4m3, rotation=32, signs)"
    )
    assert layer.weight_nbytes == 48 * 64 + 48 * 8 + 4


def test_signs():
    a = QuantLinear.from_linear(linear(), rotation=32, signs="random", seed=1)
    b = QuantLinear.from_linear(linear(), rotation=32, signs="random", seed=1)
    c = QuantLinear.from_linear(linear(), rotation=32, signs="random", seed=2)
    assert torch.equal(a.signs, b.signs) and not torch.equal(a.signs, c.signs)
    short = torch.tensor([1, -1]).repeat(16)
    d = QuantLinear.from_linear(linear(), rotation=32, signs=short)
    assert d.signs.dtype == torch.int8 and d.signs.tolist() == short.tolist() * 4


# State dicts.


def test_state_dict_through_safetensors(kind: dict[str, object], tmp_path):
    layer = QuantLinear.from_linear(linear(), **kind)
    state = layer.state_dict()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    save_file(state, tmp_path / "layer.safetensors")
    fresh = QuantLinear(128, 48, **kind)
    assert not fresh(randn(3, 128)).any()
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(fresh(randn(3, 128)), layer(randn(3, 128)))

    model = nn.Sequential(layer, nn.ReLU(), QuantLinear.from_linear(linear(48, 7)))
    save_model(model, str(tmp_path / "model.safetensors"))
    other = nn.Sequential(QuantLinear(128, 48, **kind), nn.ReLU(), QuantLinear(48, 7))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(randn(3, 128)), model(randn(3, 128)))


def test_a_foreign_state_dict_gets_one_sentence():
    state = QuantLinear.from_linear(linear(), "nvfp4", rotation=32).state_dict()
    cases = [
        (QuantLinear(128, 48, weight="nvint4", rotation=32), state, "made with weight='nvfp4'"),
        (QuantLinear(128, 48, weight="nvfp4"), state, "made with rotation=32"),
        (QuantLinear(128, 32, weight="nvfp4", rotation=32), state, "made with out_features=48"),
        (QuantLinear(128, 48), linear().state_dict(), "dense weight"),
        (
            QuantLinear(128, 48, weight="nvfp4", rotation=32),
            {**state, "_extra_state": torch.tensor([1, 2], dtype=torch.uint8)},
            "damaged",
        ),
        (
            QuantLinear(128, 48, weight="nvfp4", rotation=32),
            {**state, "weight_codes": state["weight_codes"].float()},
            "expected dtype torch.uint8",
        ),
        (
            QuantLinear(128, 48, weight="nvfp4", rotation=32, recipe="single_level"),
            state,
            "weight_tensor_scale: this layer has none",
        ),
    ]
    for layer, given, words in cases:
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError) as error:
            layer.load_state_dict(given)
        assert words in str(error.value)
        after = layer.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# Gradients, autocast, tracing.


def test_gradients_reach_input_and_bias(kind: dict[str, object]):
    layer = QuantLinear.from_linear(linear(), **kind)
    x = randn(5, 128).requires_grad_()
    g = randn(5, 48, seed=1)
    layer(x).backward(g)
    torch.testing.assert_close(x.grad, g @ layer.weight.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, g.sum(0))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_autocast_is_that_of_linear(kind: dict[str, object]):
    layer = QuantLinear.from_linear(linear(), **kind)
    x = randn(5, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, y)


def test_compile_and_export(kind: dict[str, object]):
    layer = QuantLinear.from_linear(linear(), **kind).eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 9):
        assert torch.equal(compiled(randn(n, 128)), layer(randn(n, 128)))
    dynamic = ({0: torch.export.Dim("n", max=1 << 20)},)
    exported = torch.export.export(layer, (randn(8, 128),), dynamic_shapes=dynamic).module()
    assert torch.equal(exported(randn(3, 128)), layer(randn(3, 128)))


def test_misuse_of_a_layer():
    dense = linear()
    cases = [
        (ValueError, "did you mean 'mxfp4'", lambda: QuantLinear.from_linear(dense, "mxfp")),
        (ValueError, "takes none", lambda: QuantLinear.from_linear(dense, "int4", recipe="nvidia")),
        (ValueError, "scale_rule", lambda: QuantLinear.from_linear(dense, scale_rule="flor")),
        (ValueError, "clip", lambda: QuantLinear.from_linear(dense, clip="none")),
        (ValueError, "multiple of 256", lambda: QuantLinear.from_linear(dense, rotation=256)),
        (ValueError, "power of two", lambda: QuantLinear.from_linear(dense, rotation=24)),
        (ValueError, "rotation", lambda: QuantLinear.from_linear(dense, signs="random")),
        (ValueError, "'random'", lambda: QuantLinear.from_linear(dense, rotation=32, signs="x")),
        (
            ValueError,
            "only +1 and -1",
            lambda: QuantLinear.from_linear(dense, rotation=32, signs=torch.zeros(32)),
        ),
        (TypeError, "Conv1d", lambda: QuantLinear.from_linear(nn.Conv1d(3, 3, 3))),
        (TypeError, "float64", lambda: QuantLinear.from_linear(linear().double())),
        (RuntimeError, "expected shape", lambda: QuantLinear.from_linear(dense)(randn(3, 96))),
    ]
    for error, words, call in cases:
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value)


# Whole models.


class Model(nn.Module):
    """Shared, tied, oddly sized, subclassed, hooked and skipped layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 64)
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.block = nn.ModuleDict({"query": nn.Linear(64, 40), "odd": nn.Linear(40, 64)})
        self.hooked = nn.Linear(64, 64)
        self.hooked.register_forward_hook(lambda *_: None)
        self.head = nn.Linear(64, 10, bias=False)
        self.head.weight = self.embed.weight
        self.lm_head = nn.Linear(64, 10)
        self.attention = nn.MultiheadAttention(64, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.again(self.first(self.embed(ids)))
        x = self.block["odd"](self.block["query"](x))
        x = self.attention(x, x, x)[0]
        return self.head(self.hooked(x)) + self.lm_head(x)


IDS = torch.arange(10).reshape(2, 5)


def test_quantize_model_reports_what_it_did():
    model = Model().eval()
    dense = model(IDS)
    report = quantize_model(model, "mxfp4", "mxfp8_e4m3", rotation=32, signs="random")
    assert [layer.name for layer in report.replaced] == ["first", "block.query"]
    assert model.first is model.again and isinstance(model.first, QuantLinear)
    assert report.replaced[0].aliases == ("again",)
    assert report.replaced[0].bytes_before == 64 * 64 * 4
    assert report.bytes_after == (64 + 40) * (32 + 2)
    reasons = {layer.name: layer.why for layer in report.left}
    assert list(reasons) == [
        "block.odd",
        "hooked",
        "head",
        "lm_head",
        "attention.out_proj",
    ]
    for name, words in {
        "block.odd": "not a multiple of 32",
        "hooked": "hooks",
        "head": "tied to embed.weight",
        "lm_head": "skip has 'lm_head'",
        "attention.out_proj": "NonDynamicallyQuantizableLinear",
    }.items():
        assert words in reasons[name]
    table = str(report)
    assert "first (also again)" in table and "mxfp4 x mxfp8_e4m3" in table and "5 left" in table
    assert not model.first.training
    y = model(IDS)
    assert 0 < (y - dense).norm() / dense.norm() < 0.5


def test_undo_and_dequantize_model():
    model = Model()
    first = model.first
    report = quantize_model(model, "int8", keep_originals=True)
    assert isinstance(report, Report)
    report.undo()
    assert model.first is first and model.again is first
    quantize_model(model, "int8")
    quantized = model(IDS)
    assert dequantize_model(model) == ["first", "block.query", "block.odd"]
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert type(model.first) is nn.Linear and model.first is model.again
    torch.testing.assert_close(model(IDS), quantized, rtol=1e-4, atol=1e-5)
    report = quantize_model(model, "mxfp4")
    report.undo()
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "block.*"}, {"block.query", "block.odd"}),
        ({"include": ["query", "again"]}, {"first", "block.query"}),
        ({"skip": ()}, {"first", "block.query", "block.odd", "lm_head"}),
        ({"skip": ["*o*", "f?rst", "lm_*"]}, set()),
        ({"skip": ["first", "lm_head"]}, {"block.query", "block.odd"}),
        ({"include": "block.*", "skip": "odd"}, {"block.query"}),
    ],
)
def test_filters(options: dict[str, object], expected: set[str]):
    report = quantize_model(Model(), **options)
    assert {layer.name for layer in report.replaced} == expected


def test_types_and_strict():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(64, 8), Special(64, 8))
    assert [layer.name for layer in quantize_model(copy.deepcopy(model)).replaced] == ["0"]
    assert [layer.name for layer in quantize_model(model, types=Special).replaced] == ["1"]
    odd = nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 64))
    with pytest.raises(ValueError, match="1 cannot be replaced: rotation"):
        quantize_model(odd, rotation=32, strict=True)
    assert type(odd[0]) is nn.Linear


def test_progress_is_called_once_a_layer():
    seen = []
    quantize_model(Model(), progress=lambda *event: seen.append(event))
    assert seen == [(1, 3, "first"), (2, 3, "block.query"), (3, 3, "block.odd")]


def test_progress_bar_only_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch):
    quantize_model(Model())
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    quantize_model(Model())
    assert "100%" in capsys.readouterr().err


def test_a_quantized_model_learns():
    model = Model()
    quantize_model(model, "nvfp4", "mxfp8_e4m3", 8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model.first.bias.grad is not None and losses[-1] < losses[0]


def test_a_quantized_model_compiles_in_one_graph():
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    quantize_model(model, "mxfp4", "mxfp4", 32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 8):
        assert torch.equal(compiled(randn(n, 64)), model(randn(n, 64)))


def test_misuse_of_quantize_model_touches_nothing():
    model = Model()
    cases = [
        (ValueError, "did you mean", lambda: quantize_model(model, "mxfp5")),
        (ValueError, "power of two", lambda: quantize_model(model, rotation=48)),
        (ValueError, "no Linear layer matches", lambda: quantize_model(model, include="querry")),
        (ValueError, "recipe", lambda: quantize_model(model, recipe="nvidia")),
        (TypeError, "types", lambda: quantize_model(model, types=(nn.Conv2d,))),
        (ValueError, "it is a Linear itself", lambda: quantize_model(nn.Linear(64, 8))),
    ]
    for error, words, call in cases:
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value)
        assert not any(isinstance(module, QuantLinear) for module in model.modules())
