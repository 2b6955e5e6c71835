# SPDX-License-Identifier: Apache-2.0
"""The study's measurements: drawn data, tensors of files and models, summaries, resuming."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import pyfmt
from pyfmt import FORMATS, get_format, metrics
from pyfmt.study import measure, run, summary
from pyfmt.study.data import DATASETS, OUTLIER_GAIN, octave, sigmas
from pyfmt.study.source import Source, Tensor, open_source, sample
from tests.tiny_model import tiny_encoder

SMALL = {"sigmas": 8, "rows": 16}
NAMES = ("mxint4", "mxfp4", "nvint4", "nvfp4", "mxint8", "int4")


def tensors() -> Iterator[Tensor]:
    rng = np.random.default_rng(1)
    for i in range(3):
        x = rng.laplace(size=(16, 256)).astype(np.float32)
        yield Tensor(f"w{i}", "weight", x.shape, x)
    yield Tensor("zero", "weight", (2, 256), np.zeros((2, 256), np.float32))
    yield Tensor("x", "activation", (8, 80), rng.standard_normal((8, 80)).astype(np.float32))
    yield Tensor("nan", "activation", (1, 32), np.full((1, 32), np.nan, np.float32))


def source() -> Source:
    return Source("made", "0" * 16, 6, tensors, {"bias": "fewer than 2 dimensions"})


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "QUICK", SMALL)
        return run.study([FORMATS[name] for name in NAMES], source=source(), quick=True)


# Drawn data


def test_sigmas_fill_one_octave_evenly() -> None:
    many = sigmas(64)
    assert many[0] > 1 and many[-1] < 2
    np.testing.assert_allclose(np.diff(np.log2(many)), 1 / 64)


@pytest.mark.parametrize("name", DATASETS)
def test_drawn_data_have_their_sigma_and_dtype(name: str) -> None:
    dataset = DATASETS[name]
    first = list(octave(dataset, count=4, rows=256, seed=3))
    again = list(octave(dataset, count=4, rows=256, seed=3))
    for x, y, sigma in zip(first, again, sigmas(4), strict=True):
        assert x.dtype == np.float32 and x.tobytes() == y.tobytes()
        if name == "outliers":
            loud = np.sort(x.std(axis=0))[-8:]
            assert loud == pytest.approx(np.full(8, OUTLIER_GAIN * sigma), rel=0.25)
        else:
            assert x.std() == pytest.approx(sigma, rel=0.02)
        short = x.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert (short.tobytes() == x.tobytes()) == (dataset.dtype == "bfloat16")
    other = next(octave(dataset, count=4, rows=256, seed=4))
    assert other.tobytes() != first[0].tobytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mxint4", {"floor": 17.88, "rceil": 16.79}),
        ("mxfp4", {"even": 18.99, "floor": 18.76, "rceil": 18.65}),
        ("mxfp8_e4m3", {"rceil": 31.50, "even": 31.06, "floor": 30.50}),
        ("mxint8", {"floor": 41.64, "rceil": 41.61}),
    ],
)
def test_the_octave_gives_the_known_figures(name: str, expected: dict[str, float]) -> None:
    """Gaussian data in bfloat16: figures measured before, within sampling error."""
    format = FORMATS[name]
    for choice, known in expected.items():
        ratios = [
            one.noise / one.signal
            for x in octave(DATASETS["gaussian"], count=32, rows=32, seed=11)
            for one in [measure.noise(x, format, choice)]
        ]
        assert -10 * np.log10(np.mean(ratios)) == pytest.approx(known, abs=0.04), choice


# Single measurements


def test_every_choice_reaches_quantize() -> None:
    x = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
    found = measure.qsnr_table(x, list(FORMATS.values()))
    assert list(found) == list(FORMATS)
    assert found["mxint4"]["floor"] == metrics.qsnr(
        x, pyfmt.fake_quantize(x, "mxint4", scale_rule="floor")
    )
    assert found["nvfp4"]["single_level"] == metrics.qsnr(
        x, pyfmt.fake_quantize(x, "nvfp4", recipe="single_level")
    )
    assert list(found["int8"]) == ["amax"] and next(iter(found["mxfp4"])) == "rceil"


def test_crest_summary_by_hand() -> None:
    x = np.ones((1, 128), np.float32)
    x[0, 32:64] = 0
    x[0, 40] = 3.0
    found = measure.crest_table(x)
    assert list(found) == ["16", "32", "64", "128", "row"]
    # Of the blocks of 16 one is all zero, one holds a single value (4), six are flat (1).
    assert found["16"] == pytest.approx([10 / 7, 1, 1, 1, 1, 3.1, 4])
    assert found["row"][0] == pytest.approx(3 / np.sqrt((96 + 9) / 128))


def test_points_are_those_of_single_blocks() -> None:
    x = np.random.default_rng(3).standard_normal((512, 72)).astype(np.float32)
    format = FORMATS["mxfp4"]
    blocks = measure.Blocks([format, get_format("int8", block="row")])
    blocks.add(x[:200])
    blocks.add(x[200:])
    assert list(blocks.sums) == ["mxfp4"]
    points = blocks.points(1)["mxfp4"]
    assert sum(count for _, _, count in points) == 1024  # the ragged third block is left out
    whole = x[:, :64].reshape(-1, 32)
    kappa = metrics.crest_factor(whole, 32).ravel()
    inside = (kappa >= 2.2) & (kappa < 2.4)
    error = pyfmt.fake_quantize(whole, format) - whole
    ratio = (error**2).sum(1) / (whole**2).sum(1)
    match = [one for one in points if one[2] == inside.sum()]
    expected = -10 * np.log10(ratio[inside].mean())
    assert any(one[1] == pytest.approx(expected, abs=1e-4) for one in match)


# The whole


def test_schema(facts: dict[str, Any]) -> None:
    assert (facts["schema"], facts["complete"]) == (1, True)
    assert set(facts) == {
        "schema", "complete", "settings", "machine", "theory", "data", "model"
    }  # fmt: skip
    assert facts["settings"]["formats"] == list(NAMES)
    assert list(facts["data"]) == list(DATASETS)
    for name, one in facts["data"].items():
        assert set(one) == {"qsnr", "crest", "points"} | (
            {"by_sigma"} if name == "gaussian" else set()
        )
        assert list(one["qsnr"]) == ["0", "16", "32", "128"]
        for table in one["qsnr"].values():
            assert {key: tuple(row) for key, row in table.items()} == {
                key: measure.choices(FORMATS[key]) for key in NAMES
            }
        assert len(one["crest"]["0"]["32"]) == 7
    assert len(facts["data"]["gaussian"]["by_sigma"]["mxfp4"]["even"]) == SMALL["sigmas"]
    assert [one["name"] for one in facts["model"]["tensors"]] == ["w0", "w1", "w2", "x"]
    assert facts["model"]["left_out"] == {
        "bias": "fewer than 2 dimensions",
        "zero": "it is all zero",
        "nan": "it holds NaN or infinity",
    }
    text = run.written(facts)
    assert json.loads(text, parse_constant=pytest.fail) == facts  # no NaN, no Infinity
    assert max(map(len, text.splitlines())) <= 130


def test_tensors_are_measured_as_they_are(facts: dict[str, Any]) -> None:
    first = next(tensors())
    one = facts["model"]["tensors"][0]
    turned = pyfmt.hadamard(first.rows, 32)
    expected = metrics.qsnr(turned, pyfmt.fake_quantize(turned, "mxint4", scale_rule="even"))
    assert one["qsnr"]["32"]["mxint4"]["even"] == pytest.approx(expected, abs=6e-4)
    # 80 columns: rotated by 16 alone; blocks of 128 do not fit.
    ragged = facts["model"]["tensors"][-1]
    assert list(ragged["qsnr"]) == ["0", "16"]
    assert list(ragged["crest"]["0"]) == ["16", "32", "64", "row"]


def test_summaries(facts: dict[str, Any]) -> None:
    pair = (FORMATS["nvint4"], FORMATS["nvfp4"])
    assert summary.pairs_of(facts) == [(FORMATS["mxint4"], FORMATS["mxfp4"]), pair]
    # Laplace values: the float wins plain, the integer after rotation.
    assert summary.win_rate(facts, "weight", "0", pair, "nvidia") == 0
    assert summary.win_rate(facts, "weight", "16", pair, "nvidia") == 1
    assert summary.win_rate(facts, "activation", "128", pair, "nvidia") is None
    own = [one["qsnr"]["0"]["mxfp4"] for one in facts["model"]["tensors"][:3]]
    assert summary.mean_qsnr(facts, "weight", "0", pair[1], "nvidia") is not None
    assert summary.mean_qsnr(facts, "weight", "0", FORMATS["mxfp4"], summary.BEST) == (
        pytest.approx(np.mean([max(one.values()) for one in own]))
    )
    low, middle, high = summary.crest_quartiles(facts, "weight", "0", "32")
    means = sorted(one["crest"]["0"]["32"][0] for one in facts["model"]["tensors"][:3])
    assert (low + high) / 2 == pytest.approx((means[0] + 2 * means[1] + means[2]) / 4)
    assert middle == means[1]
    assert summary.rotation_gain(facts, "weight", FORMATS["nvfp4"]) < 0
    assert summary.own_rotation(facts, FORMATS["nvfp4"]) == "16"
    assert summary.own_rotation(facts, FORMATS["int4"]) == "128"
    said = " ".join(summary.findings(facts))
    assert "mxint4 on Gaussian data" in said and "hurts nvfp4" in said
    assert "not 2.04" in said


def test_ties_count_half(facts: dict[str, Any]) -> None:
    tied = copy.deepcopy(facts)
    for tensor in tied["model"]["tensors"]:
        tensor["qsnr"]["0"]["nvint4"] = tensor["qsnr"]["0"]["nvfp4"]
    pair = (FORMATS["nvint4"], FORMATS["nvfp4"])
    assert summary.win_rate(tied, "weight", "0", pair, "nvidia") == 0.5


def test_resumed_equals_uninterrupted(
    facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "QUICK", SMALL)
    formats = [FORMATS[name] for name in NAMES]
    kept: list[dict[str, Any]] = []

    class Stop(Exception):
        pass

    def keep(known: dict[str, Any]) -> None:
        kept.append(json.loads(run.written(known)))
        if known["model"] and len(known["model"]["tensors"]) == 2:
            raise Stop

    with pytest.raises(Stop):
        run.study(formats, source=source(), quick=True, keep=keep)
    assert not kept[-1]["complete"]
    told: list[str] = []
    again = run.study(
        formats,
        source=source(),
        quick=True,
        earlier=kept[-1],
        progress=lambda what, done, total: told.append(what),
    )
    assert told == ["w2", "zero", "x", "nan", "done"]
    assert again == facts | {"machine": again["machine"]}
    # Other settings, or a run that had come to its end: from the start.
    for other in (kept[-1] | {"settings": {}}, facts, {"schema": 0}, {}):
        assert not run.resumable(other, kept[-1])


def test_a_format_without_loss_is_none_not_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyfmt.study import tables

    monkeypatch.setattr(run, "QUICK", {"sigmas": 2, "rows": 2})
    ones = Tensor("ones", "weight", (4, 128), np.ones((4, 128), np.float32))
    exact = Source("exact", "1" * 16, 1, lambda: iter([ones]))
    found = run.study([FORMATS["mxint8"], FORMATS["mxfp8_e4m3"]], source=exact, quick=True)
    assert found["model"]["tensors"][0]["qsnr"]["0"]["mxint8"]["rceil"] is None
    assert (
        summary.win_rate(found, "weight", "0", (FORMATS["mxint8"], FORMATS["mxfp8_e4m3"]), "rceil")
        is None
    )
    assert all(sheet.rows for sheet in tables.every(found)) and summary.findings(found)


# Sources


def test_sample_takes_whole_rows_evenly() -> None:
    x = np.arange(100 * 8).reshape(10, 10, 8).astype(np.float16)
    assert sample(x, 10_000).shape == (100, 8)
    taken = sample(x, 8 * 20)
    assert taken.dtype == np.float32
    assert taken[:, 0].tolist() == [i * 5 * 8 for i in range(20)]
    assert sample(x, 1).shape == (1, 8)


def test_a_file_s_matrices(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tall = np.arange(4096 * 32, dtype=np.float32).reshape(4096, 32)
    safetensors.numpy.save_file(
        {"tall": tall, "deep": np.ones((4, 32, 1024), np.float16), "bias": tall[0]}, path
    )
    found = open_source(path, 4096)
    assert (found.name, found.count) == ("m", 2)
    assert found.left_out == {"bias": "fewer than 2 dimensions"}
    deep, high = sorted(found.read(), key=lambda tensor: tensor.name)
    assert (deep.shape, deep.rows.shape) == ((4, 32, 1024), (4, 1024))
    assert (high.shape, high.rows.shape, high.kind) == ((4096, 32), (128, 32), "weight")
    starts = high.rows[:, 0] / 32
    assert starts[0] == 0 and starts[-1] > 3800 and (np.diff(starts) > 0).all()
    whole = {tensor.name: tensor for tensor in open_source(path).read()}
    assert whole["tall"].rows.tobytes() == tall.tobytes()
    assert found.fingerprint == open_source(path).fingerprint


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_a_model_s_weights_and_inputs(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    words = [f"Return what number {chr(97 + i % 26)} has to say." for i in range(64)]
    monkeypatch.setattr("pyfmt.compare_text.docstring_sentences", lambda count: words[:count])
    found = open_source(tiny_encoder(tmp_path / kind, kind))
    read = list(found.read())
    weights = [one for one in read if one.kind == "weight"]
    inputs = [one for one in read if one.kind == "activation"]
    assert len(weights) == {"Bert": 6, "Llama": 7}[kind]
    # Query, key and value read one tensor; so do a Llama's gate and up.
    assert len(inputs) == 4
    assert sum("+" in one.name for one in inputs) == {"Bert": 1, "Llama": 2}[kind]
    assert all(one.rows.dtype == np.float32 and len(one.rows) > 100 for one in inputs)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="at least 4,096"):
        open_source(None, 10)
    path = tmp_path / "ids.safetensors"
    safetensors.numpy.save_file({"ids": np.arange(4)}, path)
    with pytest.raises(ValueError, match="nothing to measure"):
        open_source(path)
    pyfmt.save({"w": pyfmt.quantize(np.ones((2, 32), np.float32), "mxfp4")}, tmp_path / "q")
    with pytest.raises(ValueError, match="is quantized already"):
        open_source(tmp_path / "q")
