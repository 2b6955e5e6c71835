# SPDX-License-Identifier: Apache-2.0
"""Layers that are given the same x, such as q, k and v of an attention, in one product.

Their codes and scales lie end to end in memory; each layer keeps its own part as a view, so state
dicts hold what they would without. The first layer of a group computes for all, and the others take
their columns, if what they are given is the very tensor that the first one was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyfmt._model import Slot, match
from pyfmt.formats import get_format

if TYPE_CHECKING:
    from pyfmt.nn_linear import QuantLinear

PARTS = ("weight_codes", "weight_scales")


def _version(x: Tensor) -> int | None:
    """What changes when x is written to; None where torch does not count."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


class Group:
    """Layers of one input, their joined weight, and the product that is being handed out."""

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self.layers = list(layers)
        ends = list(accumulate(layer.out_features for layer in layers))
        self.columns = list(zip([0, *ends], ends, strict=False))
        self.weight: tuple[Tensor, Tensor, Tensor | None] | None = None
        self.kept: list[Tensor] | None = None
        self.x: Tensor | None = None
        self.version: int | None = None
        self.y: Tensor | None = None
        for index, layer in enumerate(layers):
            layer.group = (self, index)
        self.join()

    def join(self) -> None:
        """Put the layers' codes end to end again, after a move or a load.

        Not where they are on several devices, as in the midst of a move, or where their tensor
        scales differ, as loading other weights may make them: each layer then works alone.
        """
        self.weight = self.kept = self.x = self.y = None
        first = self.layers[0]
        devices = {layer.weight_codes.device for layer in self.layers}
        if len(devices) > 1 or first.weight_codes.is_meta:
            return
        scale = first.weight_tensor_scale
        if scale is not None:
            others = [layer.weight_tensor_scale for layer in self.layers]
            if not all(other is not None and torch.equal(other, scale) for other in others):
                return
        codes, scales = (self._joined(name) for name in PARTS)
        self.weight = codes, scales, scale
        if first.keeps is not None and codes.is_cuda:
            self.kept = torch.ops.pyfmt._expand_weight(
                codes, scales, first.weight_format, first.in_features, first.keeps
            )

    def _joined(self, name: str) -> Tensor:
        parts = [layer._buffers[name] for layer in self.layers]
        whole = torch.cat(parts)  # type: ignore[arg-type]
        first = 0
        for layer, part in zip(self.layers, parts, strict=True):
            last = first + part.shape[0]  # type: ignore[union-attr]
            layer._buffers[name] = whole[first:last]
            first = last
        return whole

    def part(self, index: int, x: Tensor) -> Tensor | None:
        """Columns of one layer; None where it has to work alone."""
        if index == 0:
            if self.weight is None:
                return None
            biases = [layer.bias for layer in self.layers]
            bias = None if biases[0] is None else torch.cat(biases)  # type: ignore[arg-type]
            self.y = self.layers[0].product(x, *self.weight, bias, self.kept)
            self.x, self.version = x, _version(x)
        elif self.y is None or self.x is not x or self.version != _version(x):
            return None
        first, last = self.columns[index]
        y: Tensor = self.y[..., first:last]
        if index == len(self.layers) - 1:
            self.x = self.y = None
        return y


def groups_of(
    planned: Sequence[tuple[nn.Linear, list[Slot]]],
    fuse: Iterable[Sequence[str]],
    weight: Any,
) -> list[list[int]]:
    """Which of the planned layers go together: indices, each group in the order of its names.

    Layers go together where they stand beside each other in one module under the names of one
    entry of `fuse`, agree in input length and dtype, and all or none have a bias.
    """
    step = get_format(weight).block_rows
    found = []
    for names in fuse:
        by_parent: dict[int, dict[str, int]] = {}
        for i, (_, slots) in enumerate(planned):
            name = match([slots[0][2]], names)
            if len(slots) == 1 and name is not None:
                by_parent.setdefault(id(slots[0][1]), {})[name] = i
        mine = []
        for members in by_parent.values():
            linears = [planned[members[name]][0] for name in names if name in members]
            facts = {
                (v.in_features, v.weight.dtype, v.weight.device, v.bias is None) for v in linears
            }
            whole = all(v.out_features % step == 0 for v in linears)
            if len(linears) == len(names) and len(facts) == 1 and whole:
                mine.append([members[name] for name in names])
        if not mine:
            raise ValueError(
                f"fuse: no module has layers {', '.join(names)} to be replaced that agree in "
                "input length and dtype; name layers that stand beside each other, such as "
                "('q_proj', 'k_proj', 'v_proj')"
            )
        found += mine
    taken = [i for group in found for i in group]
    if len(taken) != len(set(taken)):
        raise ValueError("fuse: a layer stands in two groups; name each layer once")
    return found
