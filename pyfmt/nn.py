# SPDX-License-Identifier: Apache-2.0
"""Quantized layers for torch models: QuantLinear (`nn_linear.py`), quantize_model and
dequantize_model; for training TrainLinear and prepare_for_training (`nn_train.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfmt import _check
from pyfmt._fuse import Group, groups_of
from pyfmt._model import (
    Left,
    Replaced,
    Report,
    Slot,
    match,
    obstacle,
    parameter_owners,
    progress_bar,
    put_back,
    replace,
    slots_of,
)
from pyfmt.formats import Format, closest, get_format
from pyfmt.nn_linear import QuantLinear
from pyfmt.nn_train import TrainLinear, TrainReport, finish_training, prepare_for_training
from pyfmt.recipes import RECIPES, Quantizer, Recipe, get_recipe

__all__ = [
    "RECIPES",
    "QuantLinear",
    "Quantizer",
    "Recipe",
    "Report",
    "TrainLinear",
    "TrainReport",
    "dequantize_model",
    "finish_training",
    "get_recipe",
    "prepare_for_training",
    "quantize_model",
]


def quantize_model(
    model: nn.Module,
    weight: str | Format = "mxfp4",
    activation: str | Format | None = None,
    rotation: int | None = None,
    signs: str | Tensor | None = None,
    *,
    include: str | Iterable[str] | None = None,
    skip: str | Iterable[str] = ("lm_head",),
    types: type | tuple[type, ...] = (nn.Linear,),
    strict: bool = False,
    progress: bool | Callable[[int, int, str], None] = True,
    keep_originals: bool = False,
    fuse: Iterable[Sequence[str]] = (),
    **options: Any,
) -> Report:
    """Replace the Linear layers of a model by QuantLinear, in place.

    weight, activation, rotation, signs and further options: as in QuantLinear. include, skip:
    names ("lm_head"), qualified names or wildcards ("encoder.*"); include None means all. types:
    exact classes to replace. A layer that cannot be replaced is left, with the reason in the
    report; `strict` makes that a ValueError, before anything is replaced. A layer that stands in
    several places is quantized once. progress: a bar on a terminal, or a function of (done,
    total, name). keep_originals lets `report.undo()` put the very same layers back; otherwise it
    makes dense ones from the quantized weights. fuse: names of layers that stand beside each other
    and are given the same x, such as [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] in
    Llama: one product serves them all when the first is called, they share a tensor scale, and one
    that is given anything else works alone.

    Returns a Report: what was replaced, what was left and why; `print(report)` shows a table.
    Raises ValueError or TypeError for wrong options.
    """
    include = (include,) if isinstance(include, str) else include and tuple(include)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    types = types if isinstance(types, tuple) else (types,)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Linear)):
            raise TypeError(f"types: expected torch.nn.Linear or subclasses of it, got {kind!r}")
    if isinstance(model, nn.Linear):
        raise ValueError("model: it is a Linear itself; use QuantLinear.from_linear(model, ...)")
    # A layer of nothing finds wrong options before the model is touched.
    given = signs if isinstance(signs, Tensor) else None
    size = len(given) if given is not None else rotation or 0
    probe: Any = dict(
        weight=weight, activation=activation, rotation=rotation, signs=signs, **options
    )
    QuantLinear(size, 0, **probe)

    tied = parameter_owners(model)
    report = Report(model)
    planned: list[tuple[nn.Linear, list[Slot]]] = []
    for linear, slots in slots_of(model, nn.Linear).items():
        assert isinstance(linear, nn.Linear)
        names = [name for name, _, _ in slots]
        pattern = match(names, skip)
        if pattern is not None:
            why: str | None = f"skip has {pattern!r}"
        elif include is not None and match(names, include) is None:
            why = "include does not have it"
        else:
            why = obstacle(linear, slots, types, tied)
            try:
                _check.float_dtype(linear.weight.dtype, "its weight")
                if rotation is not None:
                    _check.rotation(rotation, given, linear.in_features)
            except (TypeError, ValueError) as error:
                why = why or str(error)
            if why and strict:
                raise ValueError(f"{names[0]} cannot be replaced: {why}")
        if why:
            report.left.append(Left(names[0], why))
        else:
            planned.append((linear, slots))
    if include is not None:
        every = [name for slots in slots_of(model, nn.Linear).values() for name, _, _ in slots]
        for pattern in include:
            if match(every, (pattern,)) is None:
                raise ValueError(
                    f"include: no Linear layer matches {pattern!r}{closest(pattern, every)}"
                )

    together = {i: group for group in groups_of(planned, fuse, weight) for i in group}
    made: dict[int, QuantLinear] = {}
    with progress_bar(progress, len(planned)) as advance:
        for i, (linear, slots) in enumerate(planned):
            if i in together and i not in made:
                linears = [planned[j][0] for j in together[i]]
                made |= zip(together[i], _fused(linears, probe), strict=True)
            layer = made[i] if i in made else QuantLinear.from_linear(linear, **probe)
            replace(slots, layer)
            names = [name for name, _, _ in slots]
            report.replaced.append(
                Replaced(
                    name=names[0],
                    aliases=tuple(names[1:]),
                    shape=(linear.out_features, linear.in_features),
                    weight=layer.weight_format,
                    activation=layer.activation_format,
                    bytes_before=linear.weight.nbytes,
                    bytes_after=layer.weight_nbytes,
                    original=linear if keep_originals else None,
                )
            )
            advance(names[0])
    return report


def _fused(linears: list[nn.Linear], probe: dict[str, Any]) -> list[QuantLinear]:
    """Quantize layers of one input as one, and give each its part."""
    dense = torch.cat([linear.weight.detach() for linear in linears])
    whole = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    whole.weight = nn.Parameter(dense, requires_grad=False)
    joined = QuantLinear.from_linear(whole, **probe | {"expanded": None})
    layers, first, step = [], 0, get_format(joined.weight_format).block_rows
    for linear in linears:
        size, last = (linear.in_features, linear.out_features), first + linear.out_features
        layer = QuantLinear(*size, False, **probe, device="meta", dtype=dense.dtype)
        layer.weight_codes = joined.weight_codes[first:last]
        layer.weight_scales = joined.weight_scales[first // step : last // step]
        if joined.weight_tensor_scale is not None:
            layer.weight_tensor_scale = joined.weight_tensor_scale.clone()
        layer.signs, layer.bias = joined.signs, linear.bias
        layers.append(layer.train(linear.training))
        first = last
    Group(layers)
    return layers


def dequantize_model(model: nn.Module) -> list[str]:
    """Replace every QuantLinear by the dense Linear it stands for; returns their names."""
    return put_back(model, QuantLinear)
