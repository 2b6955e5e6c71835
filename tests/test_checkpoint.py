# SPDX-License-Identifier: Apache-2.0
"""Quantized files: bit-for-bit round trips, and which tensors are quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import pyfmt
from pyfmt import FORMATS, container
from pyfmt.checkpoint import load, plan, quantize_file, save, stored
from pyfmt.container import CheckpointError, Reader
from tests import checkpoints
from tests.checkpoints import same, write_raw

BF16 = ml_dtypes.bfloat16
model = checkpoints.model  # the fixture

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
