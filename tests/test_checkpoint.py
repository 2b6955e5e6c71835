# SPDX-License-Identifier: Apache-2.0
"""Quantized files: bit-for-bit round trips, hostile input, and writes that fail halfway."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import pyfmt
from pyfmt import FORMATS, _atomic, container
from pyfmt.checkpoint import load, plan, quantize_file, save, stored
from pyfmt.container import CheckpointError, Entry, Reader, Writer

BF16 = ml_dtypes.bfloat16


def write_raw(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    """Write a file with any header at all, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def same(a: Any, b: Any) -> None:
    """Two arrays, or two QTensors, of the same bits."""
    if isinstance(a, pyfmt.QTensor):
        assert (a.format, a.shape, a.axis, a.layout) == (b.format, b.shape, b.axis, b.layout)
        same(a.codes, b.codes)
        same(a.scales, b.scales)
        assert (a.tensor_scale is None) == (b.tensor_scale is None)
        if a.tensor_scale is not None:
            same(np.asarray(a.tensor_scale), np.asarray(b.tensor_scale))
        return
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with every kind of tensor that a model's checkpoint holds."""
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((6, 70)).astype(np.float32),
        "b.weight": rng.standard_normal((4, 64)).astype(np.float16),
        "c.weight": rng.standard_normal((2, 3, 64)).astype(BF16),
        "a.bias": np.arange(6, dtype=np.float32),
        "ids": np.arange(5, dtype=np.int64),
        "table": np.arange(6, dtype=np.float64).reshape(2, 3),
        "eight": np.arange(4, dtype=np.float32).reshape(2, 2).astype(ml_dtypes.float8_e4m3fn),
        "none": np.zeros((0, 4), np.float32),
        "one": np.float32(3).reshape(()),
    }
    path = tmp_path / "model.safetensors"
    entries = {name: Entry(container.type_name(a.dtype), a.shape) for name, a in tensors.items()}
    with Writer(path, entries, {"format": "pt"}) as out:
        for name, array in tensors.items():
            out.write(name, array)
    return path


# Round trips


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_file_equals_quantize(model: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "out.safetensors"
    outcomes = quantize_file(model, out, format)
    before, after = load(model), load(out)
    assert list(before) != [] and sorted(before) == sorted(after)
    for name, array in before.items():
        chosen = name.endswith(".weight")
        same(after[name], pyfmt.quantize(array, format) if chosen else array)
    assert {o.name for o in outcomes if o.action == "quantized"} == {
        "a.weight",
        "b.weight",
        "c.weight",
    }
    assert sum(o.bytes_after for o in outcomes) == sum(
        entry.nbytes for entry in Reader(out).entries.values()
    )
    with Reader(out) as reader:
        assert reader.metadata["format"] == "pt"
        assert stored(reader)["b.weight"].dtype == "F16"


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("int4-brow-fp32", {}),
        ("e2m1-b16x16-e4m3-ts", {}),
        ("e3m2-b16-e8m0", {"axis": 0}),
        ("mxint4", {"axis": -2, "scale_rule": "floor", "clip": "full"}),
        ("nvfp4", {"recipe": "single_level"}),
        ("mxfp4", {"rounding": "stochastic", "seed": 7}),
    ],
)
def test_options_and_made_formats(
    model: Path, tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    out = tmp_path / "out.safetensors"
    quantize_file(model, out, format, include=["[ac].weight"], **options)
    before, after = load(model), load(out)
    for name in ("a.weight", "c.weight"):
        same(after[name], pyfmt.quantize(before[name], format, **options))
    same(after["b.weight"], before["b.weight"])


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_save_and_load(tmp_path: Path, framework: Any) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 48)).astype(np.float32)
    tensors: dict[str, Any] = {
        "w": pyfmt.quantize(x, "nvint4"),
        "v": pyfmt.quantize(x, "int8", axis=0),
        "half": x.astype(BF16),
        "bits": x[:1].astype(ml_dtypes.float8_e5m2),
        "scalar": np.array(2, np.int32),
        "flags": np.array([True, False]),
    }
    path = tmp_path / "q.safetensors"
    save(tensors, path, metadata={"who": "me"})
    if framework == "torch":
        torch = pytest.importorskip("torch")
        loaded = load(path, framework="torch")
        assert loaded["half"].dtype == torch.bfloat16
        assert loaded["bits"].dtype == torch.float8_e5m2
        assert loaded["scalar"].shape == ()
        assert isinstance(loaded["w"].codes, torch.Tensor)
        # Torch tensors are saved with the same bits again.
        save(loaded, path, overwrite=True)
    back = load(path)
    assert sorted(back) == sorted(tensors)
    for name, tensor in tensors.items():
        same(back[name], tensor)


def test_save_keeps_values_of_views_and_foreign_byte_order(tmp_path: Path) -> None:
    x = np.arange(12, dtype=">f4").reshape(3, 4)
    save({"swapped": x, "view": x.astype("=f4").T[::2]}, tmp_path / "o")
    back = safetensors.numpy.load_file(tmp_path / "o")
    np.testing.assert_array_equal(back["swapped"], x)
    np.testing.assert_array_equal(back["view"], x.T[::2])


def test_save_refuses_what_safetensors_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no dtype for NumPy's complex128"):
        save({"z": np.zeros(2, np.complex128)}, tmp_path / "o")


def test_load_some(model: Path) -> None:
    assert list(load(model, names=["ids"])) == ["ids"]
    with pytest.raises(KeyError, match="holds no tensor 'idx'"):
        load(model, names=["idx"])


def test_the_library_reads_what_is_written(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    quantize_file(model, out, "nvfp4", exclude=["b.*"])
    with safetensors.safe_open(out, "np") as file:
        names = set(file.keys())
        assert {"a.weight.codes", "a.weight.scales", "a.weight.tensor_scale"} <= names
        assert "b.weight" in names and "b.weight.codes" not in names
        np.testing.assert_array_equal(file.get_tensor("ids"), np.arange(5))
    # Every tensor stands at a multiple of its element's size, as the library writes them.
    with Reader(out) as reader:
        for entry in reader.entries.values():
            itemsize = container._TYPES[entry.dtype][0] // 8
            assert (reader._data + entry.start) % itemsize == 0


def test_types_without_numpy_dtype_are_copied(tmp_path: Path) -> None:
    header = {
        "w": {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, 256]},
        "four": {"dtype": "F4", "shape": [2, 4], "data_offsets": [256, 260]},
    }
    source = write_raw(tmp_path / "a", header, bytes(range(256)) + b"wxyz")
    out = tmp_path / "b"
    quantize_file(source, out, "mxint8")
    with Reader(out) as reader:
        assert b"".join(reader.chunks("four")) == b"wxyz"
        with pytest.raises(CheckpointError, match="dtype F4, which NumPy cannot hold"):
            reader.read("four")


# Which tensors


def test_plan_gives_reasons(model: Path) -> None:
    with Reader(model) as reader:
        reasons = plan(reader, exclude=["c.*"])
    assert reasons["a.weight"] == ""
    assert reasons["c.weight"] == "excluded"
    assert reasons["a.bias"] == "fewer than 2 dimensions"
    assert reasons["none"] == "empty"
    assert reasons["table"].startswith("F64")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"include": ["x.*"]}, "fits no tensor"),
        ({"exclude": ["*"]}, "nothing to quantize"),
        ({"axis": 2}, "axis: 2 is outside tensor"),
        ({"format": "mxfp5"}, "unknown format 'mxfp5'"),
        ({"scale_rule": "round"}, "scale_rule: unknown 'round'"),
        ({"format": "int4", "scale_rule": "floor"}, "takes none"),
        ({"rounding": "stochastic"}, "seed"),
    ],
)
def test_wrong_choices(model: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=sentence):
        quantize_file(model, out, **({"format": "mxfp4"} | changes))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def test_names_that_would_clash(tmp_path: Path) -> None:
    w = np.ones((2, 32), np.float32)
    path = tmp_path / "clash.safetensors"
    safetensors.numpy.save_file({"w": w, "w.codes": np.ones(3, np.uint8)}, path)
    with pytest.raises(ValueError, match=r"stored as 'w\.codes'"):
        quantize_file(path, tmp_path / "o", "mxfp4")
    with pytest.raises(ValueError, match=r"stored as 'w\.scales'"):
        save({"w": pyfmt.quantize(w, "mxfp4"), "w.scales": w}, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_blocked_layout_is_refused(tmp_path: Path) -> None:
    q = pyfmt.quantize(np.ones((128, 128), np.float32), "mxfp4").to_layout("blocked_128x4")
    with pytest.raises(ValueError, match="expected the layout 'rows'"):
        save({"w": q}, tmp_path / "o")


# Damaged, foreign and hostile files


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


# Writing: whole or not at all


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
