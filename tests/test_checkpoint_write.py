# SPDX-License-Identifier: Apache-2.0
"""Writing of quantized files: whole or not at all, whatever fails halfway."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from pyfmt import _atomic, container
from pyfmt.checkpoint import load, quantize_file
from pyfmt.container import Entry, Writer
from tests import checkpoints

model = checkpoints.model  # the fixture


def test_overwrite_is_asked_for(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="already exists"):
        quantize_file(model, out, "mxfp4")
    assert out.read_bytes() == b"precious"
    quantize_file(model, out, "mxfp4", overwrite=True)
    assert "a.weight" in load(out)


def test_source_is_never_the_target(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(model)
    for target in (model, link):
        with pytest.raises(FileExistsError, match="one file"):
            quantize_file(model, target, "mxfp4", overwrite=True)
    assert model.read_bytes() == before


def test_target_must_be_a_file_in_a_folder(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        quantize_file(model, tmp_path / "absent" / "out", "mxfp4")
    with pytest.raises(FileExistsError, match="expected the name of a file"):
        quantize_file(model, tmp_path, "mxfp4", overwrite=True)


def test_a_link_is_followed(model: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    quantize_file(model, link, "mxfp4")
    assert link.is_symlink() and "a.weight" in load(real)


@pytest.fixture(params=["unnamed", "named"])
def temporary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of temporary file: without a name, and with one where that cannot be."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("this system has no files without a name")
    return str(request.param)


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_failure_halfway(
    model: Path, tmp_path: Path, temporary: str, error: type[BaseException], old: bytes | None
) -> None:
    out = tmp_path / "out"
    if old is not None:
        out.write_bytes(old)
    seen = []

    def stop(name: str, size: int) -> None:
        seen.append(name)
        if len(seen) == 3:
            raise error

    with pytest.raises(error):
        quantize_file(model, out, "mxfp4", progress=stop, overwrite=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model.safetensors"} | ({"out"} if old else set())
    assert old is None or out.read_bytes() == old


def test_both_temporaries_give_the_same_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_file(model, tmp_path / "a", "nvint4")
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    quantize_file(model, tmp_path / "b", "nvint4")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    for name in "ab":
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_full_disk(
    model: Path, tmp_path: Path, temporary: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":
        opened = _atomic.open_temporary

        class Full:
            def __init__(self, file: Any) -> None:
                self.file, self.left = file, 500

            def write(self, data: Any) -> None:
                self.left -= len(data)
                self.file.write(data) if self.left > 0 else full()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        def open_full(path: Path) -> Any:
            file, name = opened(path)
            return Full(file), name

        monkeypatch.setattr(container, "open_temporary", open_full)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match=r"No space left.*nothing was written"):
        quantize_file(model, tmp_path / "out", "mxfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_full_disk_is_noticed_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = container.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(container.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="No space left"):
        quantize_file(model, tmp_path / "out", "mxfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_write_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    _atomic.write_bytes(path, b"one")
    _atomic.write_bytes(path, b"two")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _atomic.write_bytes(path, b"three")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["facts.json"]


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    entries = {"a": Entry("F32", (2,)), "b": Entry("F32", (2,))}
    with (
        pytest.raises(ValueError, match=r"expected F32 \(2,\), got F32 \(3,\)"),
        Writer(tmp_path / "o", entries) as out,
    ):
        out.write("a", np.zeros(3, np.float32))
    with (
        pytest.raises(ValueError, match="announced but not written"),
        Writer(tmp_path / "o", entries) as out,
    ):
        out.write("a", np.zeros(2, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A file of many tensors takes little more memory than one of them."""
    import tracemalloc

    w = np.random.default_rng(3).standard_normal((64, 1024)).astype(np.float32)
    source = tmp_path / "many.safetensors"
    safetensors.numpy.save_file({f"w{i}": w for i in range(40)}, source)
    quantize_file(source, tmp_path / "warm", "mxfp4", include=["w0"], backend="reference")

    def peak(include: list[str]) -> int:
        tracemalloc.start()
        try:
            quantize_file(source, tmp_path / "out", "mxfp4", include=include, overwrite=True)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak([]) < peak(["w0"]) + 2 * w.nbytes
