# SPDX-License-Identifier: Apache-2.0
"""Damaged, foreign and hostile files: each is refused with a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import pyfmt
from pyfmt.checkpoint import load, quantize_file, save
from pyfmt.container import CheckpointError, Reader
from tests import checkpoints
from tests.checkpoints import write_raw

model = checkpoints.model  # the fixture


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header longer than the file": (b"{}", b"", 1000, "claims 1,000 bytes"),
    "header beyond the limit": (b"{}", b"", 2**60, "the limit is"),
    "header too short": (b'{"a":1}', b"", 3, "not a valid"),
    "no JSON": (b"\xff\xfe no JSON here", b"", None, "not a valid"),
    "nested deep": (b"[" * 50000, b"", None, "not a valid"),
    "list": ([], b"", None, "not a valid"),
    "unknown dtype": ({"a": entry("F33")}, bytes(8), None, "unknown variant"),
    "negative size": ({"a": entry(shape=[-2])}, bytes(8), None, "not a valid"),
    "size overflow": ({"a": entry(shape=[2**40, 2**40])}, bytes(8), None, "overflow"),
    "shape against bytes": ({"a": entry(shape=[3])}, bytes(8), None, "not a valid"),
    "offsets backwards": ({"a": entry(offsets=[8, 0])}, bytes(8), None, "invalid offset"),
    "hole at the start": ({"a": entry(offsets=[4, 12])}, bytes(12), None, "invalid offset"),
    "data cut short": ({"a": entry()}, bytes(7), None, "not fully covered"),
    "data too long": ({"a": entry()}, bytes(9), None, "not fully covered"),
    "overlap": (
        {"a": entry(), "b": entry(offsets=[4, 12])},
        bytes(12),
        None,
        "invalid offset",
    ),
    "name twice": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        None,
        "holds 'a' twice",
    ),
    "metadata of numbers": ({"__metadata__": {"pyfmt": 1}}, b"", None, "not a valid"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_container(tmp_path: Path, case: str) -> None:
    header, body, length, sentence = HOSTILE[case]
    path = write_raw(tmp_path / "bad.safetensors", header, body, length)
    for action in (
        lambda: load(path),
        lambda: quantize_file(path, tmp_path / "out.safetensors", "mxfp4"),
    ):
        with pytest.raises(CheckpointError, match=sentence) as caught:
            action()
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]


@pytest.mark.parametrize("content", [b"", b"12345", b"PK\x03\x04 a zip archive, say", bytes(64)])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        load(path)


def test_every_truncation_is_noticed(tmp_path: Path, model: Path) -> None:
    whole = model.read_bytes()
    path = tmp_path / "cut"
    for size in [*range(40), *range(40, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            Reader(path)


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w"
    safetensors.numpy.save_file({"w": np.zeros(1 << 16, np.float32)}, path)
    with Reader(path) as reader:
        os.truncate(path, 1 << 17)
        with pytest.raises(CheckpointError, match="it ends inside tensor 'w'"):
            reader.read("w")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no regular file"):
        load(tmp_path)


def forged(tmp_path: Path, change: Any, drop: str | None = None) -> Path:
    """A quantized file whose pyfmt metadata was changed."""
    x = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
    good = tmp_path / "good.safetensors"
    save({"w": pyfmt.quantize(x, "nvfp4"), "b": x[0]}, good, overwrite=True)
    with Reader(good) as reader:
        facts = json.loads(reader.metadata["pyfmt"])
        arrays = {name: reader.read(name) for name in reader.entries if name != drop}
    text = change(facts) if callable(change) else change
    bad = tmp_path / "bad.safetensors"
    if not isinstance(text, str):
        text = json.dumps(facts)
    safetensors.numpy.save_file(arrays, bad, {"pyfmt": text})
    return bad


def setting(key: str, value: Any) -> Any:
    return lambda facts: facts["tensors"]["w"].__setitem__(key, value)


FORGED: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "is not JSON"),
    "nested deep": ("[" * 100000, "is not JSON"),
    "endless number": ('{"version": ' + "9" * 5000 + "}", "is not JSON"),
    "no table": ("[]", "holds no table"),
    "version": (lambda f: f.__setitem__("version", 9), "has version 9, expected 1"),
    "unknown format": (setting("format", "mxfp5"), "unknown format 'mxfp5'"),
    "format of another type": (setting("format", ["mxfp4"]), "expected a name"),
    "another format": (setting("format", "mxint8"), "does not match"),
    "another shape": (setting("shape", [4, 65]), "does not match"),
    "swapped shape": (setting("shape", [64, 4]), "does not match"),
    "huge shape": (setting("shape", [2**62, 2**62]), "does not match"),
    "negative shape": (setting("shape", [-4, 64]), "expected a list of sizes"),
    "no shape": (setting("shape", []), "expected a list of sizes"),
    "shape of floats": (setting("shape", [4.0, 64]), "expected a list of sizes"),
    "shape of booleans": (setting("shape", [True, 64]), "expected a list of sizes"),
    "axis": (setting("axis", 2), "axis 2"),
    "axis of text": (setting("axis", "last"), "axis 'last'"),
    "dtype": (setting("dtype", "F64"), "dtype 'F64'"),
    "facts": (lambda f: f["tensors"].__setitem__("w", 3), "is no table"),
    "absent tensor": (
        lambda f: f["tensors"].__setitem__("v", f["tensors"]["w"]),
        "'v.codes' is missing",
    ),
    "plain tensor": (
        lambda f: f["tensors"].__setitem__("b", f["tensors"]["w"]),
        "also stored unquantized",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_metadata(tmp_path: Path, case: str) -> None:
    change, sentence = FORGED[case]
    path = forged(tmp_path, change)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_forged_tensor_scale(tmp_path: Path, value: float) -> None:
    q = pyfmt.quantize(np.ones((2, 16), np.float32), "nvfp4")
    bad = pyfmt.QTensor(q.codes, q.scales, np.array(value, np.float32), q.format, q.shape, q.axis)
    save({"w": bad}, tmp_path / "bad")
    with pytest.raises(CheckpointError, match="expected a finite positive number"):
        load(tmp_path / "bad")


def test_missing_scales(tmp_path: Path) -> None:
    path = forged(tmp_path, lambda facts: None, drop="w.scales")
    with pytest.raises(CheckpointError, match=r"'w\.scales' is missing"):
        load(path)


def test_quantized_twice(model: Path, tmp_path: Path) -> None:
    once = tmp_path / "once"
    quantize_file(model, once, "mxint8")
    with pytest.raises(CheckpointError, match=r"is quantized already \(mxint8\)"):
        quantize_file(once, tmp_path / "twice", "mxfp4")
    assert not (tmp_path / "twice").exists()
