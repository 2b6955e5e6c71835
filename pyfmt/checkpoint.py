# SPDX-License-Identifier: Apache-2.0
"""Quantized tensors in safetensors files: save, load, and quantize a file tensor by tensor.

A tensor `w` is stored as `w.codes`, `w.scales` and, where the format has one, `w.tensor_scale`;
the metadata entry "pyfmt" holds JSON with every such tensor's format, axis, shape and first dtype.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pyfmt import _arrays
from pyfmt._atomic import check_target
from pyfmt.container import CheckpointError, Entry, Reader, Writer, type_name
from pyfmt.formats import SCALES, Format, get_format

if TYPE_CHECKING:
    from pyfmt.tensor import QTensor

KEY = "pyfmt"
VERSION = 1
QUANTIZABLE = ("F32", "F16", "BF16")
_SCALE_ENTRIES = {"uint8": "U8", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Stored:
    """What a file's metadata says about one quantized tensor."""

    format: Format
    axis: int
    shape: tuple[int, ...]
    dtype: str | None = None

    def entries(self, name: str) -> dict[str, Entry]:
        """The tensors that hold it, with the dtypes and shapes they must have."""
        moved = list(self.shape)
        length = moved.pop(self.axis)
        lead = [*moved]
        if self.format.block_rows > 1 and lead:
            lead[-1] = -(-lead[-1] // self.format.block_rows)
        entries = {
            f"{name}.codes": Entry("U8", (*moved, self.format.row_bytes(length))),
            f"{name}.scales": Entry(
                _SCALE_ENTRIES[SCALES[self.format.scale].dtype],
                (*lead, self.format.blocks(length)),
            ),
        }
        return entries

    def facts(self) -> dict[str, object]:
        facts = {"format": self.format.name, "axis": self.axis, "shape": list(self.shape)}
        return facts | ({"dtype": self.dtype} if self.dtype else {})


@dataclass(frozen=True)
class Outcome:
    """What `quantize_file` did with one tensor, and why it left the ones it left."""

    name: str
    action: Literal["quantized", "copied"]
    reason: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int


def stored(reader: Reader) -> dict[str, Stored]:
    """Return what a file says about its quantized tensors; empty for a file without any.

    Raises CheckpointError where the metadata cannot be read, names an unknown format, or does not
    match the tensors in the file.
    """
    if KEY not in reader.metadata:
        return {}
    try:
        facts = json.loads(reader.metadata[KEY])
    except (ValueError, RecursionError):
        raise _bad(reader, "is not JSON") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("tensors"), dict):
        raise _bad(reader, "holds no table of tensors")
    if facts.get("version") != VERSION:
        raise _bad(reader, f"has version {facts.get('version')!r:.40}, expected {VERSION}")
    table = {name: _stored_one(reader, name, one) for name, one in facts["tensors"].items()}
    for name, one in table.items():
        if name in reader.entries:
            raise _bad(reader, f"lists {name!r}, which is also stored unquantized")
        parts = one.entries(name)
        if f"{name}.tensor_scale" in reader.entries and one.format.tensor_scale:
            parts[f"{name}.tensor_scale"] = Entry("F32", ())
        for part, expected in parts.items():
            got = reader.entries.get(part)
            if got is None:
                raise _bad(reader, f"lists {name!r}, whose tensor {part!r} is missing")
            if (got.dtype, got.shape) != (expected.dtype, expected.shape):
                raise _bad(
                    reader,
                    f"does not match: {part!r} should be {expected.dtype} "
                    f"{list(expected.shape)} for {one.format.name} of shape "
                    f"{list(one.shape)}, the file has {got.dtype} {list(got.shape)}",
                )
    return table


def _bad(reader: Reader, what: str) -> CheckpointError:
    return CheckpointError(f"{reader.path}: its pyfmt metadata {what}")


def _stored_one(reader: Reader, name: str, facts: object) -> Stored:
    if not isinstance(facts, dict):
        raise _bad(reader, f"for {name!r} is no table")
    shape, axis, dtype = facts.get("shape"), facts.get("axis"), facts.get("dtype")
    if not (
        isinstance(shape, list)
        and shape
        and all(type(size) is int and 0 <= size < 2**63 for size in shape)
    ):
        raise _bad(reader, f"for {name!r} has shape {shape!r:.60}, expected a list of sizes")
    if type(axis) is not int or not -len(shape) <= axis < len(shape):
        raise _bad(reader, f"for {name!r} has axis {axis!r:.40}, the shape is {shape}")
    if dtype is not None and dtype not in QUANTIZABLE:
        raise _bad(reader, f"for {name!r} has dtype {dtype!r:.40}, expected F32, F16 or BF16")
    try:
        format = get_format(facts.get("format"))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise _bad(reader, f"for {name!r}: {error}") from None
    return Stored(format, axis, tuple(shape), dtype)


def load(
    path: str | os.PathLike[str],
    *,
    framework: Literal["numpy", "torch"] = "numpy",
    names: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Load a file: a QTensor for every quantized tensor, an array or torch tensor for the rest.

    `names` loads those tensors alone. Raises CheckpointError for a file that is damaged or does
    not match its metadata, KeyError for a name that is not in the file.
    """
    if framework not in ("numpy", "torch"):
        raise ValueError(f"framework: expected 'numpy' or 'torch', got {framework!r}")
    with Reader(path) as reader:
        table = stored(reader)
        parts = {
            f"{name}{part}" for name in table for part in (".codes", ".scales", ".tensor_scale")
        }
        every = [*table, *(name for name in reader.entries if name not in parts)]
        chosen = every if names is None else list(names)
        unknown = [name for name in chosen if name not in every]
        if unknown:
            raise KeyError(f"{path} holds no tensor {unknown[0]!r}")
        loaded: dict[str, Any] = {}
        for name in chosen:
            if name in table:
                tensor = _load_one(reader, name, table[name])
                loaded[name] = tensor.torch() if framework == "torch" else tensor
            else:
                array = reader.read(name)
                loaded[name] = _to_torch(array) if framework == "torch" else array
        return loaded


def _load_one(reader: Reader, name: str, facts: Stored) -> QTensor:
    from pyfmt.tensor import QTensor

    scale = None
    if f"{name}.tensor_scale" in reader.entries and facts.format.tensor_scale:
        scale = reader.read(f"{name}.tensor_scale")
        if not (np.isfinite(scale) and scale >= 0):
            raise CheckpointError(
                f"{reader.path}: tensor {name!r} has tensor_scale {scale}, expected a finite "
                "positive number"
            )
    return QTensor(
        reader.read(f"{name}.codes"),
        reader.read(f"{name}.scales"),
        scale,
        facts.format,
        facts.shape,
        facts.axis,
    )


def _to_torch(array: np.ndarray) -> Any:
    """Make a torch tensor of the same bits (torch reads no ml_dtypes)."""
    import ml_dtypes
    import torch

    if not hasattr(ml_dtypes, array.dtype.name):
        return torch.from_numpy(array)
    bits = torch.from_numpy(array.reshape(-1).view(f"u{array.dtype.itemsize}"))
    return bits.view(getattr(torch, array.dtype.name)).reshape(array.shape)


def _to_numpy(tensor: Any) -> np.ndarray:
    """Make a NumPy array of the same bits from a NumPy or CuPy array or a torch tensor."""
    if not _arrays.is_torch(tensor):
        array = np.asarray(tensor.get() if _is_cupy(tensor) else tensor)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    import ml_dtypes
    import torch

    tensor = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if not hasattr(ml_dtypes, name):
        return np.asarray(tensor.numpy())
    bits = tensor.reshape(-1).view(torch.uint8 if tensor.itemsize == 1 else torch.int16).numpy()
    return bits.view(getattr(ml_dtypes, name)).reshape(tuple(tensor.shape))


def _is_cupy(tensor: Any) -> bool:
    return type(tensor).__module__.partition(".")[0] == "cupy"


def _parts(name: str, tensor: QTensor) -> dict[str, np.ndarray]:
    parts = {f"{name}.codes": tensor.codes, f"{name}.scales": tensor.scales}
    if tensor.tensor_scale is not None:
        parts[f"{name}.tensor_scale"] = tensor.tensor_scale
    return {part: _to_numpy(array) for part, array in parts.items()}


def _metadata(
    table: Mapping[str, Stored], others: Mapping[str, str] | None, **settings: object
) -> dict[str, str]:
    facts = {
        "version": VERSION,
        "tensors": {name: one.facts() for name, one in table.items()},
        **({"settings": settings} if settings else {}),
    }
    return {**(others or {}), KEY: json.dumps(facts, separators=(",", ":"))}


def save(
    tensors: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write QTensors, NumPy arrays and torch tensors into one file, whole or not at all.

    Raises FileExistsError where the file is there and `overwrite` is false, ValueError where two
    tensors would get one name or a QTensor is not in the "rows" layout.
    """
    from pyfmt.tensor import QTensor

    arrays: dict[str, np.ndarray] = {}
    table: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QTensor):
            if tensor.layout != "rows":
                raise ValueError(f"{name!r}: expected the layout 'rows', got {tensor.layout!r}")
            table[name] = Stored(tensor.format, tensor.axis, tuple(tensor.shape))
            parts = _parts(name, tensor)
        else:
            parts = {name: _to_numpy(tensor)}
        for part, array in parts.items():
            _refuse_clash(part, arrays, tensors if part != name else ())
            arrays[part] = array
    entries = {name: Entry(type_name(a.dtype), a.shape) for name, a in arrays.items()}
    if table:
        metadata = _metadata(table, metadata)
    with Writer(path, entries, metadata, overwrite=overwrite) as out:
        for name, array in arrays.items():
            out.write(name, array)


def _refuse_clash(part: str, *taken: Iterable[str]) -> None:
    if any(part in names for names in taken):
        raise ValueError(
            f"two tensors would be stored as {part!r}; rename one or leave it out of quantization"
        )


def plan(
    reader: Reader, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> dict[str, str]:
    """Return every tensor of the file with the reason to leave it as it is ("" = quantize).

    Chosen are floating tensors of two or more dimensions whose name fits an `include` pattern
    (all do where none is given) and no `exclude` pattern; `*` and `?` as in file names.

    Raises ValueError for a pattern that fits no name in the file.
    """
    include, exclude = list(include), list(exclude)
    names = list(reader.entries)
    for pattern in include + exclude:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"pattern {pattern!r} fits no tensor in {reader.path}")

    def reason(name: str, entry: Entry) -> str:
        if entry.dtype not in QUANTIZABLE:
            return f"{entry.dtype}, only {', '.join(QUANTIZABLE)} are quantized"
        if len(entry.shape) < 2:
            return "fewer than 2 dimensions"
        if 0 in entry.shape:
            return "empty"
        if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
            return "not included"
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            return "excluded"
        return ""

    return {name: reason(name, entry) for name, entry in reader.entries.items()}


def quantize_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str | Format,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    axis: int = -1,
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
    **options: Any,
) -> list[Outcome]:
    """Quantize a safetensors file into another, one tensor at a time.

    Memory holds the largest tensor and what becomes of it. `options` go to `pyfmt.quantize`
    (scale_rule, recipe, rounding, seed, clip, backend); `plan` says which tensors are chosen.
    `progress(name, bytes)` is called after each tensor. The target appears whole or not at all.

    Raises CheckpointError for a source that is damaged or quantized already, ValueError where
    nothing is chosen, FileExistsError where the target is there and `overwrite` is false.
    """
    from pyfmt.api import quantize

    format = get_format(format)
    with Reader(source) as reader:
        done = stored(reader)
        if done:
            formats = ", ".join(sorted({one.format.name for one in done.values()}))
            raise CheckpointError(
                f"{source}: is quantized already ({formats}); expected a file of plain tensors"
            )
        target_path = Path(target).resolve()
        if target_path == reader.path.resolve():
            raise FileExistsError(
                errno.EEXIST, "source and target are one file; choose another name", str(target)
            )
        check_target(target_path, overwrite)
        reasons = plan(reader, include, exclude)
        table: dict[str, Stored] = {}
        entries: dict[str, Entry] = {}
        for name, reason in reasons.items():
            entry = reader.entries[name]
            if reason:
                _refuse_clash(name, entries)
                entries[name] = entry
                continue
            if not -len(entry.shape) <= axis < len(entry.shape):
                raise ValueError(
                    f"axis: {axis} is outside tensor {name!r} of shape {list(entry.shape)}; "
                    "choose another axis or exclude the tensor"
                )
            table[name] = Stored(format, axis % len(entry.shape), entry.shape, entry.dtype)
            parts = table[name].entries(name)
            if format.tensor_scale and options.get("recipe") != "single_level":
                parts[f"{name}.tensor_scale"] = Entry("F32", ())
            for part in parts:
                _refuse_clash(part, entries, reader.entries)
            entries |= parts
        if not table:
            raise ValueError(
                f"{source}: nothing to quantize; expected at least one chosen floating tensor of "
                "two or more dimensions"
            )
        settings = {key: value for key, value in options.items() if value is not None}
        settings.pop("backend", None)
        metadata = _metadata(table, reader.metadata, **settings)
        outcomes = []
        with Writer(target, entries, metadata, overwrite=overwrite) as out:
            for name, reason in reasons.items():
                before = after = reader.entries[name].nbytes
                if reason:
                    out.write_raw(name, reader.chunks(name))
                else:
                    made = quantize(reader.read(name), format, axis=axis, **options)
                    parts_made = _parts(name, made)
                    for part, array in parts_made.items():
                        out.write(part, array)
                    after = sum(array.nbytes for array in parts_made.values())
                outcomes.append(
                    Outcome(
                        name,
                        "copied" if reason else "quantized",
                        reason,
                        reader.entries[name].shape,
                        before,
                        after,
                    )
                )
                if progress is not None:
                    progress(name, before)
        return outcomes


def describe(outcome: Outcome) -> dict[str, object]:
    """Return an outcome as plain data for JSON."""
    return asdict(outcome)
