# SPDX-License-Identifier: Apache-2.0
"""A model's Linear layers: where they stand, what keeps one from being replaced, and the report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

Slot = tuple[str, nn.Module, str]  # qualified name, parent, name in the parent


def slots_of(model: nn.Module, kind: type[nn.Module]) -> dict[nn.Module, list[Slot]]:
    """Every place where each module of a kind stands (several where it is shared)."""
    found: dict[nn.Module, list[Slot]] = {}
    for qualified, module in model.named_modules(remove_duplicate=False):
        if qualified and isinstance(module, kind):
            path, _, name = qualified.rpartition(".")
            found.setdefault(module, []).append((qualified, model.get_submodule(path), name))
    return found


def replace(slots: Iterable[Slot], module: nn.Module) -> None:
    """Put a module into slots."""
    for _, parent, name in slots:
        parent._modules[name] = module


def put_back(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Replace every module of a kind by its `dense()`; returns their names."""
    names = []
    for layer, slots in slots_of(model, kind).items():
        replace(slots, layer.dense())  # type: ignore[operator]
        names.append(slots[0][0])
    return names


def match(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """Return the first pattern that is a name, its last component or a wildcard match of it."""
    names = list(names)
    for pattern in patterns:
        for name in names:
            if pattern == name.rpartition(".")[2] or fnmatchcase(name, pattern):
                return pattern
    return None


def parameter_owners(model: nn.Module) -> dict[Tensor, list[tuple[str, nn.Module]]]:
    """The qualified names and modules of each parameter (several where it is tied)."""
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for path, owner in model.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((f"{path}.{name}".lstrip("."), owner))
    return owners


def obstacle(
    linear: nn.Linear,
    slots: Iterable[Slot],
    types: tuple[type, ...],
    owners: dict[Tensor, list[tuple[str, nn.Module]]],
) -> str | None:
    """Say what keeps a layer from being replaced, or return None."""
    if type(linear) not in types:
        return f"it is a {type(linear).__name__}, which may do more than Linear; name it in types"
    tied = [name for name, owner in owners.get(linear.weight, ()) if owner is not linear]
    if tied:
        return f"its weight is tied to {', '.join(tied)}"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
        return "it has hooks, which a replacement would lose"
    if linear.weight.is_meta:
        return "its weight is on the meta device; load it first"
    for _, parent, _ in slots:
        if isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention):
            return f"{type(parent).__name__} reads its weight directly"
    return None


@dataclass(frozen=True)
class Replaced:
    """One layer that was replaced; aliases are the other places where it stands."""

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, int]
    weight: str
    activation: str | None
    bytes_before: int
    bytes_after: int
    original: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Left:
    """One layer that stays dense, and why."""

    name: str
    why: str


@dataclass
class Report:
    """The layers that quantize_model replaced and those it left; prints as a table."""

    model: Any = field(repr=False)
    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.replaced)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.replaced)

    def undo(self) -> None:
        """Put dense layers back: the originals where they were kept, else dequantized ones."""
        from pyfmt.nn import dequantize_model

        originals = [layer for layer in self.replaced if layer.original is not None]
        for layer in originals:
            for name in (layer.name, *layer.aliases):
                path, _, last = name.rpartition(".")
                self.model.get_submodule(path)._modules[last] = layer.original
        dequantize_model(self.model)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "shape", "format", "MB before", "MB after")]
        for layer in self.replaced:
            formats = layer.weight + (f" x {layer.activation}" if layer.activation else "")
            name = layer.name + (f" (also {', '.join(layer.aliases)})" if layer.aliases else "")
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            rows.append((name, shape, formats, *map(_mb, (layer.bytes_before, layer.bytes_after))))
        total = f"{len(self.replaced)} replaced"
        rows.append((total, "", "", _mb(self.bytes_before), _mb(self.bytes_after)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i > 2 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        rule = "-" * max(map(len, lines))
        lines = [lines[0], rule, *lines[1:-1], *([rule] if self.replaced else []), lines[-1]]
        if self.left:
            lines.append(f"{len(self.left)} left")
            lines += [f"  {layer.name}: {layer.why}" for layer in self.left]
        return "\n".join(lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:.3f}"


@contextmanager
def progress_bar(
    progress: bool | Callable[[int, int, str], None], total: int
) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with each finished name: a bar on a terminal, or the caller's."""
    if callable(progress):
        done = 0

        def report(name: str) -> None:
            nonlocal done
            done += 1
            progress(done, total, name)

        yield report
        return
    bar = _rich_bar() if progress and sys.stderr.isatty() else None
    if bar is None:
        yield lambda name: None
        return
    with bar:
        task = bar.add_task("quantizing", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)


def _rich_bar() -> Any:
    """Return a rich progress bar on stderr, or None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    return Progress(console=Console(stderr=True), transient=True)
