# SPDX-License-Identifier: Apache-2.0
"""Real tensors to measure: a model's weights and layer inputs, or the matrices of a file."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from pyfmt.compare_model import Encoder

SENTENCES = 64  # one batch of them gives the activations
TOKENS = 1024  # rows of each layer's input that are kept
ELEMENTS = 1 << 20  # of each tensor that are measured, whole rows spread over it
STRIPS = 16


@dataclass(frozen=True)
class Tensor:
    """One tensor: float32 rows in the direction that a layer sums over, a sample where large."""

    name: str
    kind: str  # "weight" or "activation"
    shape: tuple[int, ...]
    rows: np.ndarray


@dataclass
class Source:
    """Where tensors come from; `read` yields them, `count` of them where it is known before."""

    name: str
    fingerprint: str
    count: int
    read: Callable[[], Iterator[Tensor]]
    left_out: dict[str, str] = field(default_factory=dict)


def open_source(path: str | os.PathLike[str] | None, elements: int = ELEMENTS) -> Source:
    """Open a safetensors file, a transformers folder, or (None) the bundled all-MiniLM-L6-v2.

    A folder's linear layers are measured with their inputs on 64 sentences, a file's floating
    tensors of two or more dimensions alone. At most `elements` of each tensor are taken.

    Raises FileNotFoundError, ValueError and ImportError with a sentence each.
    """
    if elements < 4096:
        raise ValueError(f"elements: expected at least 4,096 of each tensor, got {elements:,}")
    if path is not None:
        place = Path(path)
        if not place.exists():
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(path))
        if not place.is_dir():
            return _file(place, elements)
    return _folder(path, elements)


def sample(x: np.ndarray, elements: int) -> np.ndarray:
    """Return whole rows, spread evenly, of at most `elements` in all (one row at least)."""
    rows = x.reshape(-1, x.shape[-1])
    wanted = max(elements // max(rows.shape[1], 1), 1)
    if len(rows) > wanted:
        rows = rows[np.arange(wanted) * len(rows) // wanted]
    return rows.astype(np.float32)


def _fingerprint(paths: list[Path]) -> str:
    """Say whether a later run finds the same files: their names, sizes and times."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _file(path: Path, elements: int) -> Source:
    from pyfmt.checkpoint import plan, stored
    from pyfmt.container import CheckpointError, Reader

    with Reader(path) as reader:
        if stored(reader):
            raise CheckpointError(f"{path}: is quantized already; expected a file of plain tensors")
        reasons = plan(reader)
    chosen = [name for name, reason in reasons.items() if not reason]
    if not chosen:
        raise CheckpointError(
            f"{path}: nothing to measure; expected at least one floating tensor of two or more "
            "dimensions"
        )

    def read() -> Iterator[Tensor]:
        with Reader(path) as reader:
            for name in chosen:
                shape = reader.entries[name].shape
                yield Tensor(name, "weight", shape, sample(_strips(reader, name), elements))

    def _strips(reader: Reader, name: str) -> np.ndarray:
        """Read strips along the first axis, spread evenly, of what will be taken."""
        shape = reader.entries[name].shape
        wanted = -(-elements // int(np.prod(shape[1:])))
        if shape[0] <= wanted:
            return reader.read(name)
        strips = min(STRIPS, wanted)
        starts = [i * (shape[0] - wanted // strips) // strips for i in range(strips)]
        parts = [reader.read_rows(name, start, start + wanted // strips) for start in starts]
        return np.concatenate(parts)

    left = {name: reason for name, reason in reasons.items() if reason}
    return Source(path.stem, _fingerprint([path]), len(chosen), read, left)


def _folder(path: str | os.PathLike[str] | None, elements: int) -> Source:
    from pyfmt.compare import linear_layers
    from pyfmt.compare_model import Encoder, bundled_model

    folder = bundled_model() if path is None else Path(path)
    encoder = Encoder(path, pooled=False)
    linears = linear_layers(encoder.model)
    if not linears:
        raise ValueError(
            f"{folder}: the model has no linear layers; pass its safetensors file instead to "
            "measure every matrix in it"
        )

    def read() -> Iterator[Tensor]:
        for name, linear in linears.items():
            weight = linear.weight.detach().numpy()
            yield Tensor(f"{name}.weight", "weight", weight.shape, sample(weight, elements))
        for name, rows in _inputs(encoder, linears).items():
            yield Tensor(f"{name}.input", "activation", rows.shape, sample(rows, elements))

    files = [one for one in folder.iterdir() if one.is_file()]
    return Source(encoder.name, _fingerprint(files), 2 * len(linears), read)


def _inputs(encoder: Encoder, linears: dict[str, torch.nn.Linear]) -> dict[str, np.ndarray]:
    """Return the layers' inputs; layers that read the same tensor share one, under all names."""
    from pyfmt.compare import layer_inputs
    from pyfmt.compare_text import docstring_sentences

    (batch,) = encoder.tokenize(docstring_sentences(SENTENCES))
    read = layer_inputs(encoder.model, linears, batch, TOKENS)
    different: dict[bytes, tuple[list[str], np.ndarray]] = {}
    for name, tensor in read.items():
        rows = tensor.float().numpy()
        different.setdefault(hashlib.sha256(rows.tobytes()).digest(), ([], rows))[0].append(name)
    return {_joined(names): rows for names, rows in different.values()}


def _joined(names: list[str]) -> str:
    """Write layers of one parent briefly: a.query, a.key -> a.query+key."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(names) == 1 or len(parents) != 1 or parents == {""}:
        return "+".join(names)
    return f"{parents.pop()}." + "+".join(name.rpartition(".")[2] for name in names)
