# SPDX-License-Identifier: Apache-2.0
"""Layers, recipes and gradients that the tests of training share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyfmt.nn import RECIPES, Quantizer, Recipe, TrainLinear

OURS = {
    "mixed": Recipe(
        x="mxfp6_e2m3",
        w="mxint4",
        dy="mxfp8_e5m2",
        w_t="nvint4",
        x_t="mxint6",
        dy_t="int8-b32-fp32",
    ),
    "all rotated": Recipe(Quantizer("mxfp8_e4m3", rotation=16, signs="random"), seed=3),
    "square": Recipe("mxfp4", w="e2m1-b32x32-e8m0", dy=Quantizer("mxfp4", rounding="stochastic")),
    "single level": Recipe(
        Quantizer("nvfp4", recipe="single_level", rounding="stochastic", clip="full")
    ),
}
ALL = {**RECIPES, **OURS}
STOCHASTIC = "nvfp4"


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Gaussian numbers whose rows and columns differ by octaves, so that scales do too."""
    sizes = randn(rows, 1, seed=seed + 100) + randn(1, columns, seed=seed + 101)
    return randn(rows, columns, seed=seed) * torch.exp2(sizes)


def layer_of(recipe: Any, k: int = 64, n: int = 48, bias: bool = True, **how: Any) -> TrainLinear:
    torch.manual_seed(0)
    layer = TrainLinear(k, n, bias, recipe=recipe, **how)
    with torch.no_grad():
        layer.weight.copy_(spread(n, k) * k**-0.5)
    return layer


def grads(model: nn.Module, call: Any, seed: int = 5) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    x = randn(6, 64).requires_grad_()
    call(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(i, j) for i, j in zip(a, b, strict=True))


def stack(recipe: Any = STOCHASTIC) -> nn.Sequential:
    model = nn.Sequential(layer_of(recipe), nn.GELU(), layer_of(recipe, 48, 32), nn.Dropout(0.5))
    return model.train()
