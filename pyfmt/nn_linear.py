# SPDX-License-Identifier: Apache-2.0
"""QuantLinear: a linear layer that holds packed weights and calls `torch.ops.pyfmt.linear`.

Which kernel that means is the operator's business, so a faster one changes nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import pyfmt.ops  # noqa: F401  (registers torch.ops.pyfmt)
from pyfmt import _check, _direct, _matmul_paths
from pyfmt._fuse import Group
from pyfmt._torch_matmul import row_bytes, scales_shape
from pyfmt.formats import SCALES, Format, get_format

# Integer types that hold the bits of a float buffer while a module is cast.
_BITS = {2: torch.int16, 4: torch.int32}


def _option(what: str, value: str | None, *formats: Format | None) -> list[str | None]:
    """Give a scale rule or recipe to each format that takes it; ValueError if none does."""
    taken = [value if f is not None and value in getattr(f, what) else None for f in formats]
    if value is not None and not any(taken):
        first = next(f for f in formats if f is not None)
        rule, recipe = (value, None) if what == "scale_rules" else (None, value)
        _check.options(first, rule, recipe, "nearest", None, "symmetric")
    return taken


def _signs(signs: Any, rotation: int | None, length: int, seed: int) -> Tensor | None:
    """Return +-1 signs for every input as int8, or None."""
    if rotation is None:
        if signs is not None:
            raise ValueError("signs: they belong to a rotation; pass rotation=<size> too")
        return None
    if isinstance(signs, str):
        if signs != "random":
            raise ValueError(f"signs: expected None, 'random' or a tensor of +-1, got {signs!r}")
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(0, 2, (length,), generator=generator, device="cpu")
        signs = (1 - 2 * bits).to(torch.int8)
    elif signs is not None:
        signs = torch.as_tensor(signs).detach()
    _check.rotation(rotation, signs, length)
    if signs is None:
        return None
    if not bool((signs.abs() == 1).all()):
        raise ValueError("signs: expected only +1 and -1; use (signs > 0) * 2 - 1 to make them")
    return signs.to(torch.int8).repeat(length // signs.shape[0])


# Buffers of a weight kept expanded: fp8 bytes, row scales and marks; or bfloat16.
KEPT = ("expanded_weight", "expanded_scale", "expanded_marks")


def _kept_kind(weight: Format, activation: Format | None) -> str:
    """What a weight is expanded to; ValueError where it cannot be."""
    if activation is not None and _matmul_paths.folds(activation) and _matmul_paths.folds(weight):
        return "fold"
    if _matmul_paths.exact_in_bf16(weight):
        return "exact"
    raise ValueError(
        f"expanded: {weight.name} is not exact in bfloat16, so it cannot be kept expanded; leave "
        "it out"
    )


class QuantLinear(nn.Module):
    """A linear layer with a quantized weight and, if asked, quantized activations.

    y = A(x) W^T + bias, with W the decoded weight and A(x) = x, rotated and quantized as asked

    weight, activation: formats by name or as a Format; activation None keeps x dense. rotation: a
    block Hadamard size (2 to 1024) that divides in_features: the weight is rotated once, x in
    every call, and the two cancel. signs: None, "random" (drawn with `seed`) or a tensor of +-1,
    applied before the rotation. scale_rule, recipe: for those of the two formats that take them.
    expanded: "keep" holds the weight on a GPU a second time as what dense GEMMs take (one byte an
    element for MXFP4, MXINT4 and MXFP6 with such activations, else two), out of the state dict;
    call `expand` after changing codes by hand. path, precision, batch_invariant: see
    `pyfmt.matmul`.

    x: (*lead, in_features), bfloat16, float16 or float32; y: (*lead, out_features) in x's dtype,
    with float32 sums and bias (see `pyfmt.matmul`). Gradients reach x and bias; activation
    quantization is straight-through. The new layer's weight is zero: make one with `from_linear`,
    or load a state dict, which says what its codes mean and is refused where this layer differs.

    Raises ValueError or TypeError for formats, sizes or options that do not fit.
    """

    weight_codes: Tensor
    weight_scales: Tensor
    weight_tensor_scale: Tensor | None
    signs: Tensor | None
    expanded_weight: Tensor | None
    expanded_scale: Tensor | None
    expanded_marks: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight: str | Format = "mxfp4",
        activation: str | Format | None = None,
        rotation: int | None = None,
        signs: str | Tensor | None = None,
        seed: int = 0,
        scale_rule: str | None = None,
        recipe: str | None = None,
        clip: str = "symmetric",
        expanded: str | None = None,
        path: str | None = None,
        precision: str = "full",
        batch_invariant: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        fmt = get_format(weight)
        act = None if activation is None else get_format(activation)
        _check.options(fmt, None, None, "nearest", None, clip)
        rules = _option("scale_rules", scale_rule, fmt, act)
        recipes = _option("recipes", recipe, fmt, act)
        self.in_features, self.out_features = in_features, out_features
        self.weight_format = fmt.key
        self.activation_format = None if act is None else act.key
        self.rotation = rotation
        self.weight_options = (rules[0], recipes[0], clip)
        self.activation_options = (rules[1], recipes[1], clip)
        self.dtype = dtype or torch.get_default_dtype()
        _matmul_paths.check(path, precision)
        if expanded not in (None, "keep"):
            raise ValueError(f"expanded: expected None or 'keep', got {expanded!r}")
        self.keeps = _kept_kind(fmt, act) if expanded else None
        self.way = (path, precision, batch_invariant)
        self.group: tuple[Group, int] | None = None  # see quantize_model's fuse

        rows = (out_features,)
        codes = torch.zeros((*rows, row_bytes(fmt, in_features)), dtype=torch.uint8, device=device)
        scale_dtype = getattr(torch, SCALES[fmt.scale].dtype)
        scales = torch.zeros(scales_shape(fmt, rows, in_features), dtype=scale_dtype, device=device)
        one_scale = fmt.tensor_scale and recipes[0] != "single_level"
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scales", scales)
        self.register_buffer(
            "weight_tensor_scale",
            torch.ones((), dtype=torch.float32, device=device) if one_scale else None,
        )
        drawn = _signs(signs, rotation, in_features, seed)
        self.register_buffer("signs", None if drawn is None else drawn.to(device))
        for name in KEPT:
            self.register_buffer(name, None, persistent=False)
        self.register_parameter(
            "bias",
            nn.Parameter(torch.zeros(rows, dtype=self.dtype, device=device)) if bias else None,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weight: str | Format = "mxfp4",
        activation: str | Format | None = None,
        rotation: int | None = None,
        signs: str | Tensor | None = None,
        **options: Any,
    ) -> QuantLinear:
        """Quantize a dense layer; the arguments are the constructor's. Shares the bias."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"linear: expected a torch.nn.Linear, got {type(linear).__name__}; take its "
                "Linear layers one by one, or use quantize_model"
            )
        dense = linear.weight.detach()
        _check.float_dtype(dense.dtype, "linear.weight")
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            weight=weight,
            activation=activation,
            rotation=rotation,
            signs=signs,
            device=dense.device,
            dtype=dense.dtype,
            **options,
        )
        scale_rule, recipe, clip = layer.weight_options
        layer.weight_codes, layer.weight_scales, tensor_scale = torch.ops.pyfmt.quantize(
            dense,
            layer.weight_format,
            scale_rule=scale_rule,
            recipe=recipe,
            clip=clip,
            rotation=rotation or 0,
            signs=layer.signs,
        )
        if layer.weight_tensor_scale is not None:
            layer.weight_tensor_scale = tensor_scale
        layer.bias = linear.bias
        layer.expand()
        return layer.train(linear.training)

    def expand(self) -> None:
        """Expand the weight anew where it is kept expanded: on a GPU, with expanded="keep"."""
        for name in KEPT:
            setattr(self, name, None)
        if self.group is not None:
            self.group[0].join()
            return
        if self.keeps is None or not self.weight_codes.is_cuda:
            return
        parts = torch.ops.pyfmt._expand_weight(
            self.weight_codes,
            self.weight_scales,
            self.weight_format,
            self.in_features,
            self.keeps,
        )
        for name, part in zip(KEPT, parts, strict=False):
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        if self.group is not None:
            group, index = self.group
            y = group.part(index, x)
            if y is not None:
                return y
        # Buffers by way of their dict: nn.Module's attributes cost a microsecond each.
        held = self._buffers
        return self.product(
            x,
            held["weight_codes"],
            held["weight_scales"],
            held["weight_tensor_scale"],
            self._parameters["bias"],
            None if held["expanded_weight"] is None else self._expanded(),
        )

    def product(
        self,
        x: Tensor,
        codes: Any,
        scales: Any,
        tensor_scale: Tensor | None,
        bias: Tensor | None,
        kept: list[Tensor] | None,
    ) -> Tensor:
        """The layer's operator on x and a weight of its format."""
        scale_rule, recipe, clip = self.activation_options
        linear = _direct.kernel("linear", x, bias) or torch.ops.pyfmt.linear.default
        y: Tensor = linear(
            x,
            codes,
            scales,
            tensor_scale,
            self.weight_format,
            bias,
            self.activation_format,
            self.rotation or 0,
            self._buffers["signs"],
            scale_rule,
            recipe,
            clip,
            kept,
            *self.way,
        )
        return y

    def _expanded(self) -> list[Tensor]:
        held = self._buffers
        return [part for name in KEPT if (part := held[name]) is not None]

    @property
    def weight(self) -> Tensor:
        """The weight that the layer stands for, dense and rotated back; computed at each access."""
        w: Tensor = torch.ops.pyfmt.dequantize(
            self.weight_codes,
            self.weight_scales,
            self.weight_tensor_scale,
            self.weight_format,
            (self.out_features, self.in_features),
        )
        if self.rotation:
            w = torch.ops.pyfmt.hadamard(w, self.rotation)
            w = w if self.signs is None else w * self.signs
        return w.to(self.dtype)

    def dense(self) -> nn.Linear:
        """Return a dense layer with this layer's weight, in its dtype. Shares the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weight's codes and scales."""
        parts = (self.weight_codes, self.weight_scales, self.weight_tensor_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def extra_repr(self) -> str:
        facts = [f"in_features={self.in_features}, out_features={self.out_features}"]
        facts.append(f"bias={self.bias is not None}, weight={self.weight_format}")
        if self.activation_format is not None:
            facts.append(f"activation={self.activation_format}")
        if self.rotation:
            facts.append(f"rotation={self.rotation}" + ("" if self.signs is None else ", signs"))
        if self.group is not None:
            facts.append(f"fused={self.group[1] + 1} of {len(self.group[0].layers)}")
        return ", ".join(facts)

    # Moves and casts: codes and scales move, and keep their bits whatever dtype is asked for.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        def keep(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if t.is_floating_point() or moved.dtype == t.dtype else t.to(moved.device)

        for name in KEPT:  # made anew where the codes go
            setattr(self, name, None)
        floats = {
            name: buffer.dtype
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        }
        for name, dtype in floats.items():
            self._buffers[name] = self._buffers[name].view(_BITS[dtype.itemsize])  # type: ignore[union-attr]
        try:
            super()._apply(keep, recurse)
        finally:
            for name, dtype in floats.items():
                self._buffers[name] = self._buffers[name].view(dtype)  # type: ignore[union-attr]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_codes.device)).dtype
        self.expand()
        return self

    # State dicts hold tensors only, so the facts travel as the bytes of a JSON text.

    def _facts(self) -> dict[str, Any]:
        return {
            "weight": self.weight_format,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rotation": self.rotation,
        }

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(json.dumps(self._facts()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """The facts were compared before anything was loaded."""

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:  # type: ignore[no-untyped-def]
        problem = self._problem(state_dict, prefix)
        if problem:
            error_msgs = args[-1]
            error_msgs.append(f"{prefix.rstrip('.') or 'QuantLinear'}: {problem}")
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.expand()

    def _problem(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Say why a state dict does not fit this layer, or return None."""
        if prefix + "weight" in state_dict and prefix + "weight_codes" not in state_dict:
            return (
                "the state dict holds a dense weight; load it into the dense model, then quantize "
                "it with quantize_model or QuantLinear.from_linear"
            )
        state = state_dict.get(prefix + "_extra_state")
        if state is not None:
            try:
                facts = json.loads(bytes(state.tolist()))
                assert isinstance(facts, dict)
            except (AssertionError, AttributeError, TypeError, ValueError):
                return "its _extra_state is not what QuantLinear writes; the file is damaged"
            for name, mine in self._facts().items():
                if facts.get(name) != mine:
                    return (
                        f"the state dict was made with {name}={facts.get(name)!r}, this layer has "
                        f"{mine!r}; construct it with the same {name}"
                    )
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if buffer is not None and given is not None and given.dtype != buffer.dtype:
                return f"{name}: expected dtype {buffer.dtype}, got {given.dtype}; keep its bits"
            if buffer is None and given is not None:
                return f"{name}: this layer has none; construct it with the same options"
        return None
