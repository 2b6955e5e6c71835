# SPDX-License-Identifier: Apache-2.0
"""What each format would make of the tensors in a safetensors file, read piece by piece."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pyfmt.checkpoint import plan, stored
from pyfmt.container import CheckpointError, Entry, Reader
from pyfmt.formats import Format, get_format
from pyfmt.metrics import Noise, crest_factor

CREST_BLOCKS = (16, 32)
PIECE = 1 << 22  # elements held at once, unless one slice of the first axis has more


@dataclass(frozen=True)
class TensorReport:
    """One tensor measured: crest factors by block size and QSNR (dB) by format name.

    `best` names, for every element width in bits, the format of the highest QSNR.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    crest: dict[int, float]
    qsnr: dict[str, float]
    best: dict[int, str]


def inspect_file(
    path: str | os.PathLike[str],
    formats: Sequence[str | Format],
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    progress: Callable[[str, int], None] | None = None,
) -> tuple[list[TensorReport], dict[str, str]]:
    """Measure the floating tensors of two or more dimensions, formats along the last axis.

    Returns the reports and, for every tensor left out, the reason. Crest factors are medians over
    blocks. `progress(name, bytes)` is called after each tensor.

    Raises CheckpointError for a damaged file, one quantized already or one with nothing to
    measure.
    """
    chosen = [get_format(format) for format in formats]
    with Reader(path) as reader:
        if stored(reader):
            raise CheckpointError(
                f"{path}: is quantized already; expected a file of plain tensors, whose formats "
                "can still be compared"
            )
        reasons = plan(reader, include, exclude)
        reports = []
        for name, reason in reasons.items():
            if not reason:
                reports.append(_measure(reader, name, chosen))
            if progress is not None:
                progress(name, reader.entries[name].nbytes)
    if not reports:
        raise CheckpointError(
            f"{path}: nothing to measure; expected at least one chosen floating tensor of two or "
            "more dimensions"
        )
    return reports, {name: reason for name, reason in reasons.items() if reason}


def _pieces(reader: Reader, name: str, rows: int) -> Iterator[np.ndarray]:
    for first in range(0, reader.entries[name].shape[0], rows):
        yield reader.read_rows(name, first, first + rows)


def _rows_per_piece(entry: Entry, formats: Sequence[Format]) -> int:
    """Slices of the first axis in one piece, whole blocks of every square-block format."""
    whole = int(np.lcm.reduce([format.block_rows for format in formats], initial=1))
    rows = max(PIECE // max(int(np.prod(entry.shape[1:])), 1), 1)
    return max(rows // whole, 1) * whole


def _measure(reader: Reader, name: str, formats: Sequence[Format]) -> TensorReport:
    from pyfmt import api

    entry = reader.entries[name]
    rows = _rows_per_piece(entry, formats)
    amax = 0.0
    crest: dict[int, list[np.ndarray]] = {block: [] for block in CREST_BLOCKS}
    for piece in _pieces(reader, name, rows):
        size = np.abs(piece.astype(np.float32))
        amax = max(amax, float(size.max(initial=0, where=np.isfinite(size))))
        for block in CREST_BLOCKS:
            kappa = crest_factor(piece, block).ravel()
            crest[block].append(kappa[np.isfinite(kappa)].astype(np.float32))
    noise = {format.name: Noise() for format in formats}
    # One value tells the tensor's scale to every piece, by the format's own recipe.
    loudest = np.array([amax], np.float32)
    shared = {
        format.name: api.quantize(loudest, format).tensor_scale
        for format in formats
        if format.tensor_scale and amax > 0
    }
    for piece in _pieces(reader, name, rows):
        for format in formats:
            scale = shared.get(format.name)
            wide = piece.astype(np.float32)
            made = api.fake_quantize(wide, format, tensor_scale=scale)
            noise[format.name].add(wide, made)
    qsnr = {format: total.qsnr for format, total in noise.items()}
    best: dict[int, str] = {}
    for format in sorted(formats, key=lambda format: format.bits):
        previous = best.get(format.bits)
        # A NaN loses against every number.
        if previous is None or not qsnr[previous] >= qsnr[format.name]:
            best[format.bits] = format.name
    return TensorReport(
        name,
        entry.shape,
        entry.dtype,
        {block: _median(parts) for block, parts in crest.items()},
        qsnr,
        best,
    )


def _median(parts: list[np.ndarray]) -> float:
    values = np.concatenate(parts) if parts else np.empty(0)
    return float(np.median(values)) if values.size else float("nan")
