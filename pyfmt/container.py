# SPDX-License-Identifier: Apache-2.0
"""Reading and writing safetensors files one tensor at a time, in bounded memory.

The safetensors library validates what is read; the writer is ours because the library's wants
every tensor in memory at once. A written file appears under its name whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from pyfmt._atomic import check_target, fsync_folder, link_temporary, open_temporary

MAX_HEADER = 100_000_000  # the library reads no longer header than this
CHUNK = 1 << 24

# safetensors name -> bits of one element, NumPy dtype (None: no NumPy type, copied only as bytes)
_TYPES: dict[str, tuple[int, np.dtype | None]] = {
    "BOOL": (8, np.dtype(np.bool_)),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, np.dtype(np.uint8)),
    "I8": (8, np.dtype(np.int8)),
    "F8_E5M2": (8, np.dtype(ml_dtypes.float8_e5m2)),
    "F8_E4M3": (8, np.dtype(ml_dtypes.float8_e4m3fn)),
    "F8_E8M0": (8, np.dtype(ml_dtypes.float8_e8m0fnu)),
    "F8_E5M2FNUZ": (8, np.dtype(ml_dtypes.float8_e5m2fnuz)),
    "F8_E4M3FNUZ": (8, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    "I16": (16, np.dtype(np.int16)),
    "U16": (16, np.dtype(np.uint16)),
    "F16": (16, np.dtype(np.float16)),
    "BF16": (16, np.dtype(ml_dtypes.bfloat16)),
    "I32": (32, np.dtype(np.int32)),
    "U32": (32, np.dtype(np.uint32)),
    "F32": (32, np.dtype(np.float32)),
    "C64": (64, np.dtype(np.complex64)),
    "F64": (64, np.dtype(np.float64)),
    "I64": (64, np.dtype(np.int64)),
    "U64": (64, np.dtype(np.uint64)),
}
_NAMES = {dtype: name for name, (_, dtype) in _TYPES.items() if dtype is not None}


class CheckpointError(ValueError):
    """A file that is not what it should be; the message is one sentence naming the file."""


def type_name(dtype: np.dtype) -> str:
    """Return the safetensors name of a NumPy dtype; raises TypeError where it has none."""
    try:
        return _NAMES[np.dtype(dtype)]
    except KeyError:
        raise TypeError(f"safetensors has no dtype for NumPy's {np.dtype(dtype).name}") from None


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: safetensors dtype name, shape and place in the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return -(-math.prod(self.shape) * _TYPES[self.dtype][0] // 8)


class Reader:
    """An open safetensors file: `metadata`, `entries`, and tensors read one at a time.

    Raises CheckpointError where the header lies, repeats a name, or the file is cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        if not self.path.is_file():
            raise CheckpointError(f"{path}: expected a safetensors file, this is no regular file")
        self._file = open(self.path, "rb")
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        import safetensors

        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 10:
            raise self._bad(f"it has {size} bytes, fewer than the shortest header")
        if length > MAX_HEADER:
            raise self._bad(f"its header claims {length:,} bytes, the limit is {MAX_HEADER:,}")
        if 8 + length > size:
            raise self._bad(f"its header claims {length:,} bytes, the file has {size:,}")
        # The library checks dtypes, shapes, offsets (no holes, no overlap) and the file's length.
        try:
            with safetensors.safe_open(self.path, "np"):
                pass
        except safetensors.SafetensorError as error:
            reason = str(error).removeprefix("Error while deserializing header: ")
            raise self._bad(reason.split(", expected one of")[0]) from None
        # Only this check is ours: the library lets the last of two equal names win.
        try:
            header = json.loads(self._file.read(length), object_pairs_hook=_no_repeats)
        except (ValueError, RecursionError) as error:
            raise self._bad(str(error)) from None
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._data = 8 + length
        self.entries = {
            name: Entry(facts["dtype"], tuple(facts["shape"]), facts["data_offsets"][0])
            for name, facts in header.items()
        }

    def _bad(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a valid safetensors file: {reason}")

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the raw bytes of one tensor in pieces of at most 16 MiB."""
        entry = self.entries[name]
        buffer = memoryview(bytearray(min(CHUNK, entry.nbytes)))
        for start in range(0, entry.nbytes, CHUNK):
            piece = buffer[: min(CHUNK, entry.nbytes - start)]
            self._read_into(piece, entry.start + start, name)
            yield piece

    def read(self, name: str) -> np.ndarray:
        """Read one tensor; bfloat16 and the 8-bit floats come as ml_dtypes.

        Raises CheckpointError for the types of fewer than 8 bits, which NumPy does not have.
        """
        entry = self.entries[name]
        return self.read_rows(name, 0, entry.shape[0]) if entry.shape else self._read(name, entry)

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Read the slices first .. last - 1 along the first axis of one tensor."""
        entry = self.entries[name]
        first, last = max(first, 0), min(last, entry.shape[0])
        row = Entry(entry.dtype, entry.shape[1:])
        part = Entry(
            entry.dtype,
            (max(last - first, 0), *entry.shape[1:]),
            entry.start + first * row.nbytes,
        )
        return self._read(name, part)

    def _read(self, name: str, entry: Entry) -> np.ndarray:
        dtype = _TYPES[entry.dtype][1]
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {entry.dtype}, which NumPy cannot hold; "
                "expected a type of 8 bits or more"
            )
        raw = np.empty(entry.nbytes, np.uint8)
        self._read_into(raw.data, entry.start, name)
        return raw.view(dtype).reshape(entry.shape)

    def _read_into(self, buffer: memoryview, start: int, name: str) -> None:
        self._file.seek(self._data + start)
        if self._file.readinto(buffer) != len(buffer):
            raise self._bad(f"it ends inside tensor {name!r}")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) != len(pairs):
        seen: set[str] = set()
        for twice, _ in pairs:
            if twice in seen:
                break
            seen.add(twice)
        raise ValueError(f"its header holds {twice!r} twice")
    return names


class Writer:
    """Writes a safetensors file whose dtypes and shapes are known and whose tensors are not yet.

        with Writer(path, {"w": Entry("BF16", (2, 4))}) as out:
            out.write("w", array)

    Tensors may come in any order; each goes to its place at once. The file gets its name after
    the last byte is on the disk; an error, Ctrl-C or a kill leaves nothing behind.

    Raises FileExistsError where the file is there and `overwrite` is false, OSError with a
    sentence where the disk is full or not writable.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        # A link is followed: the file it names is replaced, not the link.
        self.path = Path(path).resolve()
        self._overwrite = overwrite
        self._missing = set(entries)
        self.entries: dict[str, Entry] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        # Widest types first, as the library does, keeps every tensor aligned.
        for name in sorted(entries, key=lambda name: (-_TYPES[entries[name].dtype][0], name)):
            entry = Entry(entries[name].dtype, entries[name].shape, position)
            position += entry.nbytes
            header[name] = {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "data_offsets": (entry.start, position),
            }
            self.entries[name] = entry
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER:
            raise ValueError(
                f"{path}: the header would take {len(text):,} bytes, the limit is {MAX_HEADER:,}; "
                "write fewer tensors into one file"
            )
        self._header = len(text).to_bytes(8, "little") + text
        self.nbytes = len(self._header) + position

    def __enter__(self) -> Writer:
        check_target(self.path, self._overwrite)
        free = shutil.disk_usage(self.path.parent).free
        if free < self.nbytes:
            raise self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        self._file, self._temporary = open_temporary(self.path)
        try:
            self._put(0, [self._header])
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, array: np.ndarray) -> None:
        """Put one tensor in its place; raises ValueError where it is not as announced."""
        entry = self.entries[name]
        got = Entry(type_name(array.dtype), array.shape)
        if (got.dtype, got.shape) != (entry.dtype, entry.shape):
            raise ValueError(
                f"tensor {name!r}: expected {entry.dtype} {entry.shape}, "
                f"got {got.dtype} {got.shape}"
            )
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.write_raw(name, (raw[i : i + CHUNK] for i in range(0, raw.size, CHUNK)))

    def write_raw(self, name: str, chunks: Iterable[Any]) -> None:
        """Put one tensor in its place from its raw bytes."""
        self._put(len(self._header) + self.entries[name].start, chunks)
        self._missing.discard(name)

    def _put(self, position: int, chunks: Iterable[Any]) -> None:
        try:
            self._file.seek(position)
            for chunk in chunks:
                self._file.write(chunk)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> OSError:
        reason = os.strerror(error.errno) if error.errno else str(error)
        return OSError(
            error.errno,
            f"{reason} while writing {self.path} ({self.nbytes:,} bytes); nothing was written",
        )

    def _commit(self) -> None:
        if self._missing:
            raise ValueError(f"{self.path}: tensors announced but not written: {self._missing}")
        try:
            # An empty last tensor writes nothing, so the length is set rather than assumed.
            self._file.truncate(self.nbytes)
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._temporary is None:
                self._temporary = link_temporary(self._file.fileno(), self.path)
            check_target(self.path, self._overwrite)
            os.replace(self._temporary, self.path)
            self._temporary = None
            fsync_folder(self.path.parent)
        except FileExistsError:
            raise
        except OSError as error:
            raise self._failed(error) from error

    def _discard(self) -> None:
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()
