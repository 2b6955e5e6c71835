# SPDX-License-Identifier: Apache-2.0
"""Recipes of low-bit training: how the six operands of a linear layer's products are quantized.

    Y  = X W^T      x, w      along K, the layer's inputs
    dX = dY W       dy, w_t   along N, its outputs
    dW = dY^T X     dy_t, x_t along the tokens

Data only; `pyfmt.nn.TrainLinear` computes with them.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, field, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from pyfmt import _check
from pyfmt.formats import Format, closest, get_format

# The two operands of each product, whose rotations have to cancel.
PAIRS = (("x", "w"), ("dy", "w_t"), ("dy_t", "x_t"))


@dataclass(frozen=True, init=False)
class Quantizer:
    """How one operand is quantized: the options of `pyfmt.quantize`.

    format: a name or a Format, kept as its key; square blocks (`nvfp4` with block (16, 16)) give a
    weight and its transpose the same codes. rotation: a Hadamard size along the summed axis; both
    operands of a product have the same. signs: None or "random", drawn with the recipe's seed.
    Stochastic rounding takes a new seed in every call (see TrainLinear).

    Raises ValueError or TypeError for a format or options that do not fit.
    """

    format: str
    scale_rule: str | None = None
    recipe: str | None = None
    rounding: str = "nearest"
    clip: str = "symmetric"
    rotation: int | None = None
    signs: str | None = None

    def __init__(
        self,
        format: str | Format,
        *,
        scale_rule: str | None = None,
        recipe: str | None = None,
        rounding: str = "nearest",
        clip: str = "symmetric",
        rotation: int | None = None,
        signs: str | None = None,
    ) -> None:
        fmt = get_format(format)
        seed = 0 if rounding == "stochastic" else None
        _check.options(fmt, scale_rule, recipe, rounding, seed, clip)
        if rotation is not None:
            _check.rotation(rotation, None, rotation if isinstance(rotation, int) else 0)
        if signs not in (None, "random"):
            raise ValueError(f"signs: expected None or 'random', got {signs!r}")
        if signs is not None and rotation is None:
            raise ValueError("signs: they belong to a rotation; pass rotation=<size> too")
        given = (fmt.key, scale_rule, recipe, rounding, clip, rotation, signs)
        for name, value in zip(self.__dataclass_fields__, given, strict=True):
            object.__setattr__(self, name, value)

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"


@dataclass(frozen=True, init=False)
class Recipe:
    """A Quantizer for each of the six operands of a linear layer's three products.

    Y = x(X) w(W)^T,  dX = dy(dY) w_t(W),  dW = dy_t(dY)^T x_t(X)

    A format or its name stands for a Quantizer with nothing else said. Left out: w, dy and x_t are
    as x, w_t as w, dy_t as dy. seed: of random signs. `dataclasses.replace` changes a recipe.

    Raises ValueError where the two operands of a product are not rotated alike.
    """

    x: Quantizer
    w: Quantizer
    dy: Quantizer
    w_t: Quantizer
    x_t: Quantizer
    dy_t: Quantizer
    name: str = field(default="custom", compare=False)
    seed: int = 0

    def __init__(
        self,
        x: Quantizer | str | Format,
        w: Quantizer | str | Format | None = None,
        dy: Quantizer | str | Format | None = None,
        w_t: Quantizer | str | Format | None = None,
        x_t: Quantizer | str | Format | None = None,
        dy_t: Quantizer | str | Format | None = None,
        *,
        name: str = "custom",
        seed: int = 0,
    ) -> None:
        made: dict[str, Any] = {"name": name, "seed": seed}
        like = {"w": "x", "dy": "x", "w_t": "w", "x_t": "x", "dy_t": "dy"}
        given = {"x": x, "w": w, "dy": dy, "w_t": w_t, "x_t": x_t, "dy_t": dy_t}
        for operand, value in given.items():
            if value is None and operand in like:
                made[operand] = made[like[operand]]
            else:
                made[operand] = value if isinstance(value, Quantizer) else Quantizer(value)  # type: ignore[arg-type]
        for one, other in PAIRS:
            a, b = made[one], made[other]
            if (a.rotation, a.signs) != (b.rotation, b.signs):
                raise ValueError(
                    f"{one} and {other} are multiplied, so their rotations have to cancel: "
                    f"expected the same rotation and signs, got {a.rotation}, {a.signs!r} and "
                    f"{b.rotation}, {b.signs!r}"
                )
        for key, value in made.items():
            object.__setattr__(self, key, value)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The six by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)[:6]}

    @property
    def stochastic(self) -> bool:
        """Whether any operand is rounded stochastically."""
        return any(q.stochastic for q in self.quantizers.values())

    @property
    def spec(self) -> str:
        """The six quantizers as JSON; what operators carry."""
        return json.dumps([astuple(q) for q in self.quantizers.values()])

    def __str__(self) -> str:
        return self.name


@lru_cache(maxsize=256)
def from_spec(spec: str) -> Recipe:
    """Return the recipe of a `Recipe.spec`; ValueError where it is none."""
    names = list(Quantizer.__dataclass_fields__)
    try:
        rows = [dict(zip(names, row, strict=True)) for row in json.loads(spec)]
        six = [Quantizer(**row) for row in rows]
    except (TypeError, json.JSONDecodeError):
        six = []
    if len(six) != 6:
        raise ValueError(f"recipe: expected what Recipe.spec writes, got {spec[:80]!r}")
    return Recipe(*six)


def _two_level(name: str) -> Recipe:
    """NVIDIA's: square weight blocks, stochastic gradients, rotated weight gradient."""
    turned: dict[str, Any] = {"rotation": 16, "signs": "random"}
    return Recipe(
        x=name,
        w=get_format(name, block=(16, 16)),
        dy=Quantizer(name, rounding="stochastic"),
        x_t=Quantizer(name, **turned),
        dy_t=Quantizer(name, rounding="stochastic", **turned),
        name=name,
    )


def _mxfp4() -> Recipe:
    turned: dict[str, Any] = {"rotation": 32, "signs": "random"}
    return Recipe(
        x="mxfp4",
        dy=Quantizer("mxfp4", rounding="stochastic"),
        x_t=Quantizer("mxfp4", **turned),
        dy_t=Quantizer("mxfp4", rounding="stochastic", **turned),
        name="mxfp4",
    )


# Gradients of mxfp8 are E4M3 too: with a scale for 32 numbers their range suffices, and the third
# mantissa bit is worth more than E5M2's range.
# mxint8_full is for comparison: `floor` lets codes reach -128, `rceil` stops at +-127 anyway.
# Sources: mxint8, nvint4 arXiv 2510.25602; mxfp8 arXiv 2506.08027; nvfp4 arXiv 2509.25149; the
# rounding and rotation of mxfp4 arXiv 2502.20586.
RECIPES: MappingProxyType[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("mxint8", name="mxint8"),
            Recipe(Quantizer("mxint8", scale_rule="floor", clip="full"), name="mxint8_full"),
            Recipe("mxfp8_e4m3", name="mxfp8"),
            _two_level("nvint4"),
            _two_level("nvfp4"),
            _mxfp4(),
        )
    }
)


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Return a recipe by name; a Recipe is returned as it is.

    Raises ValueError (with the closest names) for an unknown name, TypeError for other types.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(
            f"recipe: expected a name or a pyfmt.nn.Recipe, got {type(recipe).__name__}; names are "
            "in pyfmt.nn.RECIPES"
        )
    if recipe not in RECIPES:
        raise ValueError(f"recipe: unknown {recipe!r}{closest(recipe, RECIPES)}")
    return RECIPES[recipe]
