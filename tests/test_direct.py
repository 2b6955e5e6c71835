# SPDX-License-Identifier: Apache-2.0
"""The short way to the operators gives what the long way gives, and steps aside for onlookers."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pyfmt  # noqa: E402
from pyfmt import _direct  # noqa: E402
from pyfmt.formats import FORMATS, Format, get_format  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def both_ways(monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[Any, Any]:
    """Return what a call gives the short way, which must be taken, and the long way."""
    short, taken = call(), []
    with monkeypatch.context() as patch:
        patch.setattr(_direct, "plain", lambda x: taken.append(x))
        long = call()
    assert taken, "the short way was not asked"
    return short, long


def same(a: Any, b: Any) -> None:
    assert (a is None) == (b is None)
    if a is not None:
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def same_quantized(a: pyfmt.QTensor, b: pyfmt.QTensor) -> None:
    for part in ("codes", "scales", "tensor_scale"):
        same(getattr(a, part), getattr(b, part))
    for fact in ("format", "shape", "axis", "layout"):
        assert getattr(a, fact) == getattr(b, fact) and type(getattr(a, fact)) is type(
            getattr(b, fact)
        )


def options_of(fmt: Format) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}, {"axis": 0}, {"axis": -2}, {"clip": "full"}]
    found += [{"scale_rule": rule} for rule in fmt.scale_rules]
    found += [{"recipe": recipe} for recipe in fmt.recipes]
    if fmt.tensor_scale:
        found += [{"tensor_scale": torch.tensor(0.01)}, {"tensor_scale": 0.01}]
    found += [{"rotation": 32}, {"rotation": 32, "signs": torch.ones(32)}]
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*FORMATS, "e3m2-b32-bf16"])
def test_both_ways_give_the_same(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.randn(64, 128, device=device) * 9).bfloat16()
    fmt = get_format(name)
    for given in options_of(fmt):
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        for asked in (name, fmt):
            quantize = lambda a=asked, o=options: pyfmt.quantize(x, a, **o)  # noqa: E731
            short, long = both_ways(monkeypatch, quantize)
            same_quantized(short, long)
            assert short.format is fmt
        same(*both_ways(monkeypatch, lambda q=short: q.dequantize(torch.bfloat16)))
        same(*both_ways(monkeypatch, lambda q=short: q.dequantize()))
        if "rotation" not in options:
            fake = lambda o=options: pyfmt.fake_quantize(x, name, **o)  # noqa: E731
            same(*both_ways(monkeypatch, fake))
    same(*both_ways(monkeypatch, lambda: pyfmt.hadamard(x, 64, axis=0)))
    w = pyfmt.quantize(x, name)
    bias = torch.randn(64, device=device)
    for a in (x, w):
        same(*both_ways(monkeypatch, lambda a=a: pyfmt.matmul(a, w)))
        same(*both_ways(monkeypatch, lambda a=a: pyfmt.matmul(a, w, bias, dtype=torch.float16)))
    layer = pyfmt.nn.QuantLinear(128, 64, weight=name, device=device, dtype=torch.bfloat16)
    layer.requires_grad_(False)
    same(*both_ways(monkeypatch, lambda: layer(x)))


def test_the_short_way_is_taken() -> None:
    x = torch.randn(4, 64)
    assert _direct.plain(x)
    quantized = _direct.quantize(x, "nvfp4", -1, None, "torchao", "full", None, 16, None)
    assert quantized is not None and quantized.tensor_scale is not None
    assert _direct.fake_quantize(x, "mxfp4", -1, "even", None, "symmetric", None) is not None
    assert _direct.dequantize(quantized, torch.float16) is not None
    assert _direct.hadamard(x, 16, None, 0) is None  # 4 is no multiple of 16
    assert _direct.hadamard(x, 4, None, 0) is not None
    assert _direct.matmul(x, quantized, None, None, (None, "full", False)) is not None


def test_who_looks_on_sees_the_operators_themselves() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(4, 64)
    layer = pyfmt.nn.QuantLinear(64, 8, bias=False)

    def f(x: Any) -> Any:
        return pyfmt.quantize(x, "mxfp4").codes, pyfmt.fake_quantize(x, "nvfp4")

    for mode in ("real", "fake"):
        traced = str(make_fx(f, tracing_mode=mode)(x).graph)
        assert "pyfmt.quantize.default" in traced and "pyfmt.fake_quantize.default" in traced
        assert "pyfmt._" not in traced
    assert "pyfmt.linear.default" in str(make_fx(layer)(x).graph)
    with pytest.raises(ValueError, match="quantize has no gradient"):
        torch.func.grad(lambda x: pyfmt.quantize(x, "mxfp4").dequantize().sum())(x)


def test_gradients_go_the_long_way() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    with pytest.raises(ValueError, match="quantize has no gradient"):
        pyfmt.quantize(x, "mxfp4")
    signs = torch.ones(16, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient in signs"):
        pyfmt.quantize(x.detach(), "nvfp4", rotation=16, signs=signs)
    layer = pyfmt.nn.QuantLinear(64, 8)
    layer(x).sum().backward()
    assert x.grad is not None and layer.bias.grad is not None
    w = pyfmt.quantize(torch.randn(8, 64), "mxfp4")
    assert pyfmt.matmul(x, w).requires_grad
    with torch.no_grad():
        assert not pyfmt.matmul(x, w).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [{"rotation": 0}, {"rotation": 48}, {"signs": 1}, {"axis": 2}, {"axis": "1"}, {"clip": "none"}]
    + [{"scale_rule": "up"}, {"recipe": "nvidia"}, {"tensor_scale": 1.0}, {"rounding": "up"}],
)
def test_wrong_arguments_get_the_same_exceptions(options: Any, monkeypatch: Any) -> None:
    x = torch.randn(4, 64)
    said = []
    for way in (_direct.plain, lambda x: False):
        monkeypatch.setattr(_direct, "plain", way)
        with pytest.raises((TypeError, ValueError)) as caught:
            pyfmt.quantize(x, "mxfp4", **options)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]


# ---- torch.ops.pyfmt.quantize itself ------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*FORMATS, "e3m2-b32-bf16"])
def test_the_operator_gives_what_its_overload_gives(name: str, device: str) -> None:
    x = (torch.randn(64, 128, device=device) * 9).bfloat16()
    for given in options_of(get_format(name)):
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        if isinstance(options.get("tensor_scale"), float):
            continue
        for more in ({}, {"rounding": "stochastic", "seed": 3}):
            got = torch.ops.pyfmt.quantize(x, name, **options, **more)
            want = torch.ops.pyfmt.quantize.default(x, name, **options, **more)
            for a, b in zip(got, want, strict=True):
                same(a, b)


def test_the_operator_takes_the_short_way_unless_someone_looks_on() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(f))
            return f(*args, **(kwargs or {}))

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(f))
            return f(*args, **(kwargs or {}))

    op, x = torch.ops.pyfmt.quantize, torch.randn(4, 64)
    assert isinstance(op, torch._ops.OpOverloadPacket) and str(op) == "pyfmt.quantize"
    with torch.profiler.profile() as plain:
        op(x, "mxfp4")
    names = {event.key for event in plain.key_averages()}
    assert "pyfmt::_quantize" in names and "pyfmt::quantize" not in names
    for mode in (Functions(), Calls()):
        seen.clear()
        with mode:
            op(x, "mxfp4")
        assert any(name.startswith("pyfmt.quantize") for name in seen)
        assert not any("_quantize" in name for name in seen)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="quantize has no gradient"):
        op(x, "mxfp4")
    with torch.no_grad():
        op(x, "mxfp4")
    traced = torch.compile(lambda x: op(x, "mxfp4"), backend="eager", fullgraph=True)
    same(traced(x.detach())[0], op(x.detach(), "mxfp4")[0])


@pytest.mark.parametrize(
    ("args", "options"),
    [((), {}), (("mxfp5",), {}), (("mxfp4", 7), {}), (("mxfp4", "0"), {}), ((4,), {})]
    + [(("mxfp4",), {"clip": "none"}), (("mxfp4",), {"rotation": 48}), (("mxfp4",), {"no": 1})]
    + [(("mxfp4",), {"tensor_scale": torch.ones(())}), (("nvfp4",), {"tensor_scale": 1.0})],
)
def test_the_operator_refuses_in_its_own_words(args: Any, options: Any) -> None:
    x = torch.randn(4, 64)
    said = []
    plain = torch._ops.OpOverloadPacket.__call__
    for call in (
        torch.ops.pyfmt.quantize,
        lambda *a, **k: plain(torch.ops.pyfmt.quantize, *a, **k),
    ):
        with pytest.raises((TypeError, RuntimeError)) as caught:
            call(x, *args, **options)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]
