# SPDX-License-Identifier: Apache-2.0
"""bench/train_lm.py and bench/train_layer.py on a tiny model: records, checkpoints, resumption."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("pyfmt.ops", exc_type=ImportError)

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def train_lm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("train_lm")


def visit(train_lm: Any, folder: Path, *more: str) -> dict[str, Any]:
    where = ["--json", str(folder / "runs.json"), "--checkpoints", str(folder / "ck")]
    texts = ["--text", *sorted(map(str, BENCH.parent.glob("pyfmt/*.py")))]
    assert train_lm.main(["--tiny", "--device", "cpu", *where, *texts, *more]) == 0
    path = folder / "runs.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def curves(record: dict[str, Any]) -> dict[str, Any]:
    return {run["recipe"]: (run["losses"], run["held_out"]) for run in record["runs"]}


def test_an_interrupted_run_goes_on_to_the_same_curve(train_lm: Any, tmp_path: Path) -> None:
    recipes = ["--recipes", "bf16", "mxint8", "nvfp4"]
    whole = visit(train_lm, tmp_path / "whole", *recipes, "--figure", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    where = ["--json", str(tmp_path / "whole" / "runs.json"), "--figure", str(tmp_path / "b.png")]
    assert train_lm.main(["--draw", *where]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert list(whole["summary"]) == ["bf16", "mxint8", "nvfp4"]
    assert whole["summary"]["bf16"]["percent_over_bf16"] == 0
    for name, (losses, held_out) in curves(whole).items():
        assert [step for step, _ in losses] == [2, 4, 6, 8] and held_out < losses[0][1], name

    part = tmp_path / "part"
    assert visit(train_lm, part, *recipes, "--stop-at", "3")["runs"] == []
    assert [path.name for path in (part / "ck").iterdir()] == ["bf16-0.pt"]
    for _ in range(8):
        record = visit(train_lm, part, *recipes, "--seconds", "0.01")
    assert not record["runs"] or len(record["runs"]) < 3
    visit(train_lm, part, *recipes, "--recipes", "bf16", "nvfp4", "--stop-at", "5")
    record = visit(train_lm, part, *recipes)
    assert curves(record) == curves(whole)
    assert not list((part / "ck").iterdir())
    assert not list(part.glob(".*"))


def test_processes_beside_one_another_train_the_same(train_lm: Any, tmp_path: Path) -> None:
    recipes = ["--recipes", "bf16", "mxint8", "mxfp4"]
    one = visit(train_lm, tmp_path / "one", *recipes)
    two = visit(train_lm, tmp_path / "two", *recipes, "--device", "cpu", "cpu")
    assert curves(one) == curves(two)
    assert one["summary"] == two["summary"]


def test_runs_of_other_settings_are_refused(train_lm: Any, tmp_path: Path) -> None:
    visit(train_lm, tmp_path, "--recipes", "bf16")
    with pytest.raises(SystemExit, match="other settings"):
        visit(train_lm, tmp_path, "--recipes", "bf16", "--steps", "9")
    visit(train_lm, tmp_path, "--recipes", "mxfp4", "--stop-at", "2")
    (tmp_path / "runs.json").unlink()
    with pytest.raises(SystemExit, match="other settings"):
        visit(train_lm, tmp_path, "--recipes", "mxfp4", "--steps", "9")


def test_shape_and_schedule(train_lm: Any) -> None:
    settings = train_lm.Settings()
    assert 45e6 < train_lm.parameters(settings) < 55e6
    rates = [settings.rate_at(step) for step in range(settings.steps)]
    assert max(rates) == settings.rate == rates[settings.warmup]
    assert 0.09 < rates[-1] / settings.rate < 0.11


def test_summary_counts_seeds_in_pairs(train_lm: Any) -> None:
    runs = [
        {"recipe": "bf16", "seed": 0, "held_out": 1.0},
        {"recipe": "bf16", "seed": 1, "held_out": 2.0},
        {"recipe": "mxint8", "seed": 0, "held_out": 1.01},
        {"recipe": "mxint8", "seed": 1, "held_out": 2.06},
    ]
    row = train_lm.summary(runs)["mxint8"]
    assert row["seeds"] == [0, 1] and row["percent_over_bf16"] == pytest.approx(2.0)
    assert row["percent_range"] == pytest.approx([1.0, 3.0])


def test_one_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    train_layer = importlib.import_module("train_layer")
    path = tmp_path / "layer.json"
    given = ["--tokens", "256", "--sizes", "128", "64", "--device", "cpu", "--json", str(path)]
    assert train_layer.main(given) == 0
    lines = json.loads(path.read_text())["lines"]
    assert set(lines) == {"bf16", *train_layer.RECIPES}
    for name, line in lines.items():
        if name != "bf16":
            assert line["of_bf16"] <= train_layer.MEMORY[train_layer.bits(name)]
