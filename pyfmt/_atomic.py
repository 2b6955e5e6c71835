# SPDX-License-Identifier: Apache-2.0
"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file whole or not at all, replacing what is there.

    Raises OSError with a sentence where the disk is full or not writable.
    """
    target = Path(path).resolve()
    check_target(target, overwrite=True)
    temporary = temporary_name(target)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(
            error.errno, f"{os.strerror(error.errno or 0)} while writing {target}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_target(path: Path, overwrite: bool) -> None:
    """Raise where a result cannot be written under this name: taken, no file, no folder."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, "no such folder to write into", str(path.parent)
            ) from None
        return
    if not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "expected the name of a file, this is none", str(path))
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "already exists; it was left as it is", str(path))


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.tmp")


def open_temporary(path: Path) -> tuple[BinaryIO, Path | None]:
    """Open a file without a name in the target's folder, or with one where that cannot be."""
    # A file without a name vanishes by itself, even when the process is killed.
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
            return os.fdopen(descriptor, "wb"), None
    name = temporary_name(path)
    descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    return os.fdopen(descriptor, "wb"), name


def link_temporary(descriptor: int, path: Path) -> Path:
    """Give the file without a name one beside its target; a rename then puts it there."""
    name = temporary_name(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # Naming the folder makes Python call linkat, the one call that follows the link in /proc.
        os.link(f"/proc/self/fd/{descriptor}", name.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)
    return name


def fsync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the file system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
