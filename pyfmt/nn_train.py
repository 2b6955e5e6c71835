# SPDX-License-Identifier: Apache-2.0
"""Low-bit training: TrainLinear, prepare_for_training, finish_training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import pyfmt.ops  # noqa: F401  (registers torch.ops.pyfmt)
from pyfmt import _check, _torch_train
from pyfmt._model import Left, Slot, match, obstacle, put_back, replace, slots_of
from pyfmt.formats import closest
from pyfmt.recipes import Recipe, get_recipe

# The buffers of signs, and an operand of each product.
SIGNS = {"signs_y": "x", "signs_dx": "dy", "signs_dw": "dy_t"}


def draw_seed() -> Tensor:
    """Return a seed drawn from torch's CPU generator: what stochastic rounding starts from.

    torch.manual_seed makes it reproducible, and activation checkpointing, which restores the
    generator, draws the same one again. X, W and dY are rounded with seed, seed + 1 and seed + 2.
    """
    return torch.randint(_torch_train.SEEDS, (), dtype=torch.int64, device="cpu")


class TrainLinear(nn.Linear):
    """nn.Linear for training whose three products have low-bit operands, forward and backward.

    Y  = Q_x(X) Q_w(W)^T + bias
    dX = Q_dy(dY) Q_w_t(W)
    dW = Q_dy_t(dY)^T Q_x_t(X)
    dbias = sum of dY in float32

    recipe: a name of `RECIPES` or a Recipe, which has a Quantizer for each of the six operands;
    each is quantized along the axis that its product sums over. Every product is
    `pyfmt.matmul` of two quantized operands: float32 sums, one rounding.

    x: (*lead, in_features), bfloat16, float16 or float32, any number of tokens; Y and dX have its
    dtype. The weight may have another dtype (float32 masters under bfloat16 activations); dW has
    the weight's. Under autocast x is cast, the weight is quantized as it is. What is kept for
    backward is Q_x_t(X), packed, and the parameters themselves, which therefore must not change
    before backward (torch says so if they do).

    Parameters and state dict are those of nn.Linear. Stochastic rounding draws one seed a call from
    torch's CPU generator (`draw_seed`). Double backward is refused.

    Raises ValueError or TypeError for an unknown recipe, or a rotation that does not divide
    in_features or out_features; forward raises RuntimeError for a wrong x.
    Source: arXiv 2510.25602, section 3.
    """

    recipe: Recipe
    signs_y: Tensor | None
    signs_dx: Tensor | None
    signs_dw: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: str | Recipe = "mxint8",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._prepare(get_recipe(recipe))

    def _prepare(self, recipe: Recipe) -> None:
        check_fit(recipe, self.in_features, self.out_features)
        _check.float_dtype(self.weight.dtype, "weight")
        self.recipe = recipe
        self._spec, self._stochastic = recipe.spec, recipe.stochastic
        for name in SIGNS:
            self.register_buffer(name, None, persistent=False)
        self._draw_signs()

    def _draw_signs(self) -> None:
        """Make the signs on the weight's device: what a recipe's seed gives, of each size one."""
        for name, operand in SIGNS.items():
            quantizer = self.recipe.quantizers[operand]
            if quantizer.signs and quantizer.rotation:
                generator = torch.Generator().manual_seed(self.recipe.seed)
                bits = torch.randint(0, 2, (quantizer.rotation,), generator=generator, device="cpu")
                self._buffers[name] = (1 - 2 * bits).to(torch.int8).to(self.weight.device)

    # A layer made on the meta device has no signs to move or load: they are drawn where it goes.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainLinear:
        on_meta = self.weight.is_meta
        super()._apply(fn, recurse)
        if on_meta:
            self._draw_signs()
        return self

    def _load_from_state_dict(self, *args: Any, **more: Any) -> None:
        on_meta = self.weight.is_meta
        super()._load_from_state_dict(*args, **more)
        if on_meta:
            self._draw_signs()

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str | Recipe = "mxint8") -> TrainLinear:
        """Return a layer with the parameters of a dense one: the same objects, not copies."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"linear: expected a torch.nn.Linear, got {type(linear).__name__}; take its Linear "
                "layers one by one, or use prepare_for_training"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._prepare(get_recipe(recipe))
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        seed = draw_seed() if self._stochastic else None
        held = self._buffers
        y: Tensor
        y, *_ = torch.ops.pyfmt._train_linear.default(
            x,
            self.weight,
            self.bias,
            self._spec,
            seed,
            held["signs_y"],
            held["signs_dx"],
            held["signs_dw"],
        )
        return y

    def dense(self) -> nn.Linear:
        """Return an nn.Linear with the same parameters: the same objects, not copies."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe}"


def check_fit(recipe: Recipe, in_features: int, out_features: int) -> None:
    """Raise ValueError where a rotation of a recipe does not divide a layer's sizes."""
    for what, operand, length in (
        ("in_features", "x", in_features),
        ("out_features", "dy", out_features),
    ):
        size = recipe.quantizers[operand].rotation
        if size and length % size:
            raise ValueError(
                f"{what}: the recipe rotates {operand} by {size}, and {length} is no multiple of "
                "it; choose a smaller rotation, or skip the layer"
            )


@dataclass
class TrainReport:
    """The layers that prepare_for_training replaced and those it left, with the reason."""

    recipe: Recipe
    replaced: list[str] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, recipe {self.recipe}"]
        lines += [f"  {name}" for name in self.replaced]
        lines.append(f"{len(self.left)} left")
        lines += [f"  {layer.name}: {layer.why}" for layer in self.left]
        return "\n".join(lines)


def prepare_for_training(
    model: nn.Module,
    recipe: str | Recipe = "mxint8",
    *,
    include: str | Iterable[str] | None = None,
    skip: str | Iterable[str] = ("lm_head",),
    types: type | tuple[type, ...] = (nn.Linear,),
    strict: bool = False,
) -> TrainReport:
    """Replace the Linear layers of a model by TrainLinear, in place, with the same parameters.

    include, skip, types, strict: as in `quantize_model`; tied weights stay tied. An optimizer made
    before keeps its parameters. Call it before wrapping the model (DDP, FSDP, torch.compile). A
    model prepared before is prepared anew with `types=(nn.Linear, TrainLinear)`.

    Returns a TrainReport: what was replaced, what was left and why. `finish_training` undoes it.
    Raises ValueError or TypeError for wrong options, before the model is touched.
    """
    recipe = get_recipe(recipe)
    include = (include,) if isinstance(include, str) else include and tuple(include)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    types = types if isinstance(types, tuple) else (types,)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Linear)):
            raise TypeError(f"types: expected torch.nn.Linear or subclasses of it, got {kind!r}")
    if isinstance(model, nn.Linear):
        raise ValueError("model: it is a Linear itself; use TrainLinear.from_linear(model, ...)")
    report = TrainReport(recipe)
    planned: list[tuple[nn.Linear, list[Slot]]] = []
    every: list[str] = []
    for linear, slots in slots_of(model, nn.Linear).items():
        assert isinstance(linear, nn.Linear)
        names = [name for name, _, _ in slots]
        every += names
        pattern = match(names, skip)
        if pattern is not None:
            why: str | None = f"skip has {pattern!r}"
        elif include is not None and match(names, include) is None:
            why = "include does not have it"
        else:
            why = obstacle(linear, slots, types, {})
            try:
                _check.float_dtype(linear.weight.dtype, "its weight")
                check_fit(recipe, linear.in_features, linear.out_features)
            except (TypeError, ValueError) as error:
                why = why or str(error)
            if why and strict:
                raise ValueError(f"{names[0]} cannot be replaced: {why}")
        if why:
            report.left.append(Left(names[0], why))
        else:
            planned.append((linear, slots))
    for pattern in include or ():
        if match(every, (pattern,)) is None:
            raise ValueError(
                f"include: no Linear layer matches {pattern!r}{closest(pattern, every)}"
            )
    for linear, slots in planned:
        replace(slots, TrainLinear.from_linear(linear, recipe))
        report.replaced.append(slots[0][0])
    return report


def finish_training(model: nn.Module) -> list[str]:
    """Replace every TrainLinear by the nn.Linear of its parameters; returns their names."""
    return put_back(model, TrainLinear)
