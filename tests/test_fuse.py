# SPDX-License-Identifier: Apache-2.0
"""Layers fused by quantize_model: the same numbers as alone, whatever happens to them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import pyfmt
import pyfmt.nn

FUSE = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


class Block(nn.Module):
    """Projections as in a Llama layer; `other` is what k and v are given, if not x."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 48, bias=bias)
        self.k_proj = nn.Linear(64, 16, bias=bias)
        self.v_proj = nn.Linear(64, 16, bias=bias)
        self.gate_proj = nn.Linear(48, 96, bias=False)
        self.up_proj = nn.Linear(48, 96, bias=False)
        self.down_proj = nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        q = self.q_proj(x)
        y = x if other is None else other
        k, v = self.k_proj(y), self.v_proj(y)
        h = q + torch.cat([k, v, k], -1)
        return self.down_proj(torch.sigmoid(self.gate_proj(h)) * self.up_proj(h))


def models(bias: bool = False, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same block with fused layers and without."""
    torch.manual_seed(0)
    dense = Block(bias)
    alone, fused = copy.deepcopy(dense), dense
    pyfmt.nn.quantize_model(alone, progress=False, **options)
    report = pyfmt.nn.quantize_model(fused, progress=False, fuse=FUSE, **options)
    assert len(report.replaced) == 6
    return alone, fused


FORMATS = [
    {"weight": "mxfp4"}, {"weight": "int4", "activation": "mxint8"}, {"weight": "mxfp6_e2m3"},
    {"weight": "mxfp4", "activation": "mxfp4", "rotation": 16, "signs": "random"},
    {"weight": "nvfp4", "recipe": "single_level"}, {"weight": "e2m1-b16x16-e4m3"},
]  # fmt: skip


def integers(*shape: int) -> torch.Tensor:
    """Draw small whole numbers: their sums are exact, in whatever order they are added."""
    return torch.randint(-8, 9, shape).float()


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_fused_layers_give_what_layers_alone_do(options: dict[str, Any]) -> None:
    alone, fused = models(bias=True, **options)
    x, other = integers(3, 5, 64), integers(3, 5, 64)
    with torch.no_grad():
        assert torch.equal(fused(x), alone(x))
        assert torch.equal(fused(x, other), alone(x, other))
        assert torch.equal(fused.v_proj(x), alone.v_proj(x))
    for name, value in alone.state_dict().items():
        assert torch.equal(value, fused.state_dict()[name]), name


def test_what_is_handed_out_is_of_the_tensor_given() -> None:
    _, fused = models(weight="mxfp4")
    group = fused.q_proj.group[0]  # type: ignore[union-attr,index]
    x = torch.randn(2, 64)
    with torch.no_grad():
        fused.q_proj(x)
        want = fused.k_proj(x * 2)
        x *= 2
        assert torch.equal(fused.k_proj(x), want)
        fused(x)
        assert group.x is None and group.y is None
    assert "fused=2 of 3" in repr(fused.k_proj)


def test_one_product_serves_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = models(weight="mxfp4")
    calls = []
    real = pyfmt.nn.QuantLinear.product
    monkeypatch.setattr(
        pyfmt.nn.QuantLinear, "product", lambda *a: calls.append(a[2].shape[0]) or real(*a)
    )
    with torch.no_grad():
        fused(torch.randn(2, 64))
    assert calls == [80, 192, 64]


def test_a_tensor_scale_is_shared() -> None:
    _, fused = models(weight="nvfp4")
    scales = [fused.q_proj, fused.k_proj, fused.v_proj]
    whole = pyfmt.quantize(torch.cat([layer.weight for layer in scales]), "nvfp4")
    assert whole.tensor_scale is not None
    assert all(torch.equal(v.weight_tensor_scale, scales[0].weight_tensor_scale) for v in scales)
    # Weights from elsewhere with scales of their own: each layer works alone, rightly.
    alone, _ = models(weight="nvfp4")
    alone.k_proj.weight_tensor_scale *= 2
    fused.load_state_dict(alone.state_dict())
    assert fused.q_proj.group[0].weight is None  # type: ignore[union-attr,index]
    x = integers(4, 64)
    with torch.no_grad():
        assert torch.equal(fused(x), alone(x))


def test_copies_moves_and_files() -> None:
    alone, fused = models(weight="mxfp4", activation="mxfp4")
    x = integers(4, 64)
    with torch.no_grad():
        want = alone(x)
        assert torch.equal(copy.deepcopy(fused)(x), want)
        assert torch.equal(fused.to(torch.float64).float()(x), want)
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), want)
        other = Block()
        pyfmt.nn.quantize_model(other, progress=False, fuse=FUSE, activation="mxfp4")
        other.load_state_dict(alone.state_dict())
        assert torch.equal(other(x), want)
    joined = fused.q_proj.group[0].weight[0]  # type: ignore[union-attr,index]
    assert joined.data_ptr() == fused.q_proj.weight_codes.data_ptr()
    pyfmt.nn.dequantize_model(fused)
    assert isinstance(fused.k_proj, nn.Linear)


def test_gradients_and_compiled() -> None:
    alone, fused = models(bias=True, weight="mxfp4")
    x = torch.randn(4, 64, requires_grad=True)
    fused(x).square().sum().backward()
    mine, bias = x.grad, fused.k_proj.bias.grad
    x.grad = None
    alone(x).square().sum().backward()
    torch.testing.assert_close(mine, x.grad)
    torch.testing.assert_close(bias, alone.k_proj.bias.grad)
    compiled = torch.compile(fused, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        for rows in (1, 4, 1):
            y = torch.randn(rows, 64)
            assert torch.equal(compiled(y), fused(y))
    assert fused.q_proj.group[0].y is None  # type: ignore[union-attr,index]


def test_words_for_wrong_names() -> None:
    with pytest.raises(ValueError, match="no module has layers q_proj, nothing"):
        pyfmt.nn.quantize_model(Block(), progress=False, fuse=[("q_proj", "nothing")])
    with pytest.raises(ValueError, match="stands in two groups"):
        pyfmt.nn.quantize_model(
            Block(), progress=False, fuse=[("q_proj", "k_proj"), ("k_proj", "v_proj")]
        )
    with pytest.raises(ValueError, match="agree in input length"):
        pyfmt.nn.quantize_model(Block(), progress=False, fuse=[("q_proj", "up_proj")])
