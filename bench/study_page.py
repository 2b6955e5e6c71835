# SPDX-License-Identifier: Apache-2.0
"""Write docs/int-vs-fp.md from bench/study_page.template.md and the JSON of `pyfmt study`.

`--check` only compares and exits 1 where the page is stale; `--figures` draws docs/study_*.png too.
The template's places, {win[weight 0 mxint8 mxfp8_e4m3]}, name functions below and their arguments:
every number comes from bench/results/study.json and train_lm.json, or from pyfmt/study/paper.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from pyfmt.formats import Format, get_format
from pyfmt.study import paper, summary, tables
from pyfmt.study.charts import charts
from pyfmt.study.data import DATASETS, FREEDOM, OUTLIER_EVERY, OUTLIER_GAIN
from pyfmt.study.measure import choices
from pyfmt.study.tables import Sheet, number

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "bench" / "results" / "study.json"
TRAINING = SOURCE.with_name("train_lm.json")
TEMPLATE = ROOT / "bench" / "study_page.template.md"
PAGE = ROOT / "docs" / "int-vs-fp.md"

Facts = dict[str, Any]


class Lookup:
    """A function of words, for the template: {name[a b c]} is function("a", "b", "c")."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __getitem__(self, words: str) -> Any:
        return self.function(*words.split())


def drawn(facts: Facts, dataset: str, name: str, choice: str, rotation: str = "0") -> float:
    """Return the QSNR of drawn data."""
    db: float = facts["data"][dataset]["qsnr"][rotation][name][choice]
    return db


def mean(facts: Facts, kind: str, rotation: str, name: str) -> float:
    """Return the mean QSNR of the model's tensors, by the default rule or recipe."""
    format = get_format(name)
    found = summary.mean_qsnr(facts, kind, rotation, format, choices(format)[0])
    assert found is not None, (kind, rotation, name)
    return found


def paper_crossovers(facts: Facts) -> Sheet:
    sheet = Sheet(
        "",
        ["integer", "float", "paper", "ours", "own largest code", "rho = 1", "block reaches"],
        left=2,
    )
    for one in facts["theory"]:
        printed = paper.CROSSOVERS.get((one["integer"], one["floating"]))
        figures = ("crossover", "crossover_exact", "crossover_rho_1", "largest_kappa")
        cells = [f"`{one['integer']}`", f"`{one['floating']}`", number(printed)]
        sheet.rows.append([*cells, *(number(one[figure]) for figure in figures)])
    return sheet


def paper_crest(facts: Facts) -> Sheet:
    """Quartiles of crest factors: the paper's, ours, and what Gaussian data have."""
    sheet = Sheet(
        "", ["block", "", "paper, Llama-3.1-8B", "weights", "activations", "Gaussian mean"], left=2
    )
    for block, printed in paper.CREST.items():
        for name, rotation in (("plain", "0"), ("rotated", str(block))):
            cells = [
                summary.crest_quartiles(facts, kind, rotation, str(block))
                for kind in ("weight", "activation")
            ]
            gaussian = facts["data"]["gaussian"]["crest"]["0"][str(block)][0]
            quartiles = [_quartiles(one) for one in (printed[name], *cells)]
            sheet.rows.append([str(block), name, *quartiles, number(gaussian)])
    return sheet


def _quartiles(values: Iterable[float] | None) -> str:
    return "-" if values is None else " / ".join(number(value) for value in values)


def paper_qsnr(facts: Facts) -> Sheet:
    """Mean QSNR: the paper's, and ours in the same rule, plain and rotated by the own block."""
    heads = ["format", "paper", "weights", "activations", "Gaussian"]
    sheet = Sheet("", [*heads, "paper, rotated", "weights, rotated", "activations, rotated"])
    for name, printed in paper.QSNR.items():
        own = summary.own_rotation(facts, get_format(name))
        cells = [number(printed["plain"])]
        cells += [number(mean(facts, kind, "0", name)) for kind in ("weight", "activation")]
        cells += [number(drawn(facts, "gaussian", name, choices(get_format(name))[0]))]
        cells += [number(printed["rotated"])]
        cells += [number(mean(facts, kind, own, name)) for kind in ("weight", "activation")]
        sheet.rows.append([f"`{name}`", *cells])
    return sheet


def rules(facts: Facts) -> Sheet:
    """QSNR of Gaussian data by scale rule, and the gap between rivals."""
    names = ["mxint4", "mxfp4", "mxint6", "mxfp6_e2m3", "mxint8", "mxfp8_e4m3"]
    sheet = Sheet("", ["scale rule", *(f"`{name}`" for name in names), "INT - FP, 4 bits"])
    for rule in ("rceil", "floor", "even", "ceil"):
        found = [drawn(facts, "gaussian", name, rule) for name in names]
        sheet.rows.append([rule, *map(number, found), f"{found[0] - found[1]:+.2f}"])
    return sheet


def rotation_effects(facts: Facts) -> Sheet:
    """What rotation by the own block does to each format's mean QSNR, by kind of data."""
    datasets = ("gaussian", "laplace", "outliers")
    heads = [DATASETS[name].label for name in datasets]
    sheet = Sheet("", ["format", "rotation", *heads, "weights", "activations"], left=2)
    for format in summary.formats_of(facts):
        own, choice = summary.own_rotation(facts, format), choices(format)[0]
        cells = []
        for name in datasets:
            plain, turned = (drawn(facts, name, format.key, choice, r) for r in ("0", own))
            cells.append(turned - plain)
        for kind in ("weight", "activation"):
            gain = summary.rotation_gain(facts, kind, format)
            assert gain is not None
            cells.append(gain)
        sheet.rows.append([f"`{format.name}`", own, *map(_gain, cells)])
    return sheet


def _gain(value: float) -> str:
    """Signed, losses beyond 0.05 dB in bold."""
    text = f"{value:+.2f}"
    return f"**{text}**" if value <= -0.05 else text


def named(sheet: Sheet) -> str:
    """Return a sheet of the terminal as Markdown, format names as code."""
    known = {name for format in sheet.rows for name in format[:1] if _is_format(name)}
    rows = [[f"`{row[0]}`" if row[0] in known else row[0], *row[1:]] for row in sheet.rows]
    return Sheet(sheet.title, sheet.columns, rows, sheet.left).markdown()


def _is_format(name: str) -> bool:
    try:
        get_format(name)
    except ValueError:
        return False
    return True


def listed(names: Iterable[str]) -> str:
    """Join names: a, b and c; "none" where there are none."""
    every = list(names)
    return " and ".join(", ".join(every).rsplit(", ", 1)) if every else "none"


def losers(facts: Facts, kind: str) -> str:
    """Name the formats that rotation by the own block costs 0.05 dB or more, with how much."""
    found: list[tuple[float, Format]] = []
    for format in summary.formats_of(facts):
        gain = summary.rotation_gain(facts, kind, format)
        if gain is not None and gain <= -0.05:
            found.append((gain, format))
    found.sort(key=lambda item: item[0])
    return listed(f"`{format.name}` ({gain:+.2f} dB)" for gain, format in found)


def training_table(record: Facts) -> Sheet:
    sheet = Sheet(
        "", ["recipe", "seeds", "held-out loss", "spread", "over bf16, %", "lowest .. highest"]
    )
    for name, row in record["summary"].items():
        low, high = row["percent_range"]
        over = ["", ""]
        if name != "bf16":
            over = [f"{row['percent_over_bf16']:+.3f}", f"{low:+.3f} .. {high:+.3f}"]
        figures = f"{row['held_out']:.4f}", f"{row['spread']:.4f}"
        sheet.rows.append([f"`{name}`", str(len(row["seeds"])), *figures, *over])
    return sheet


def over(one: float, other: float) -> float:
    """By how many percent one number is larger than another."""
    return 100 * (one / other - 1)


def training(record: Facts) -> dict[str, Any]:
    """Return what the places in the section on training stand for."""
    rows, settings = record["summary"], record["settings"]
    losses = {(run["recipe"], run["seed"]): run["held_out"] for run in record["runs"]}

    def pairs(name: str, other: str) -> list[float]:
        """Distances of two recipes seed by seed, in percent of the second."""
        seeds = sorted(set(rows[name]["seeds"]) & set(rows[other]["seeds"]))
        return [over(losses[name, s], losses[other, s]) for s in seeds]

    def between(name: str, other: str) -> str:
        return f"{min(pairs(name, other)):+.2f} to {max(pairs(name, other)):+.2f}"

    def verdict(name: str, other: str) -> str:
        """Whether the first is lower: on every seed, on none, or on some."""
        lower = sum(x < 0 for x in pairs(name, other))
        every = len(pairs(name, other))
        if lower == every:
            return "lower on every seed"
        return f"lower on {lower} of {every} seeds" if lower else "higher on every seed"

    bf16 = rows["bf16"]
    apart = [pairs(name, "bf16") for name in rows if name != "bf16"]
    return {
        "training_table": training_table(record).markdown(),
        "parameters": record["parameters"] / 1e6,
        "trained": settings["steps"] * settings["batch"] * settings["shape"]["context"] / 1e6,
        "steps": settings["steps"],
        "text": record["text"]["train_bytes"] / 1e6,
        "seeds": len(bf16["seeds"]),
        "seed_spread": 100 * bf16["spread"] / bf16["held_out"],
        "dense": bf16["held_out"],
        "trained_on": record["machine"]["gpu"],
        "scatter": fmean(max(x) - min(x) for x in apart),
        "apart": Lookup(lambda *names: fmean(pairs(*names))),
        "printed_over": Lookup(lambda name: over(paper.TRAINING[name], paper.TRAINING["bf16"])),
        "printed_clip": over(paper.CLIPPING["symmetric"], paper.CLIPPING["full"]),
        "range": Lookup(between),
        "verdict": Lookup(verdict),
    }


def places(facts: Facts) -> dict[str, Any]:
    """Return what the template's places stand for."""
    settings = facts["settings"]
    low, high = summary.sigma_range(facts, get_format("mxint4"), "rceil") or (0.0, 0.0)
    crossings = {(one["integer"], one["floating"]): one for one in facts["theory"]}

    def gap(name: str, one: str, other: str) -> float:
        return drawn(facts, "gaussian", name, one) - drawn(facts, "gaussian", name, other)

    def behind(rule: str) -> float:
        """By how much MXINT4 is behind MXFP4 on Gaussian data, each at its best rule or at one."""
        own = [summary.rule_range(facts, get_format(name)) for name in ("mxint4", "mxfp4")]
        integer, floating = (max(x.values()) if rule == "best" else x[rule] for x in own)
        return floating - integer

    def win(kind: str, rotation: str, integer: str, floating: str, choice: str = "") -> str:
        pair = get_format(integer), get_format(floating)
        choice = choice or choices(pair[0])[0]
        return tables.percent(summary.win_rate(facts, kind, rotation, pair, choice))

    def loss(dataset: str, name: str) -> float:
        """What rotation by the own block costs on drawn data."""
        format = get_format(name)
        own, choice = summary.own_rotation(facts, format), choices(format)[0]
        return drawn(facts, dataset, name, choice) - drawn(facts, dataset, name, choice, own)

    return {
        "settings": settings,
        "machine": facts["machine"],
        "model": facts["model"]["name"],
        "each": settings["sigmas"] * settings["rows"] * 1024,
        "weights": len(summary.tensors_of(facts, "weight")),
        "inputs": len(summary.tensors_of(facts, "activation")),
        "formats": len(settings["formats"]),
        "rotations": listed(str(size) for size in settings["rotations"] if size),
        "freedom": FREEDOM,
        "outlier_every": OUTLIER_EVERY,
        "outlier_gain": OUTLIER_GAIN,
        "low4": low,
        "high4": high,
        "crest32": facts["data"]["gaussian"]["crest"]["0"]["32"][0],
        "printed_nv": paper.CROSSOVERS["nvint4", "nvfp4"],
        "printed": Lookup(lambda name, state: paper.QSNR[name][state]),
        "drawn": Lookup(lambda *words: drawn(facts, *words)),
        "rule_gap": Lookup(gap),
        "behind": Lookup(behind),
        "win": Lookup(win),
        "loss": Lookup(loss),
        "losers": Lookup(lambda kind: losers(facts, kind)),
        "lead": Lookup(lambda kind, a, b: mean(facts, kind, "0", a) - mean(facts, kind, "0", b)),
        "meet": Lookup(lambda what, *pair: crossings[pair][what]),
        "wins_table": named(tables.wins(facts)),
        "rules_table": rules(facts).markdown(),
        "crossovers_table": paper_crossovers(facts).markdown(),
        "paper_crest_table": paper_crest(facts).markdown(),
        "crest_table": tables.crest(facts).markdown(),
        "paper_qsnr_table": paper_qsnr(facts).markdown(),
        "model_table": named(tables.model(facts)),
        "rotation_table": rotation_effects(facts).markdown(),
        "drawn_table": named(tables.drawn(facts)),
    }


def page(facts: Facts) -> str:
    """Return the whole page."""
    record = json.loads(TRAINING.read_text(encoding="utf-8"))
    return TEMPLATE.read_text(encoding="utf-8").format_map(places(facts) | training(record))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python bench/study_page.py")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when stale")
    parser.add_argument("--figures", action="store_true", help="draw the figures again as well")
    args = parser.parse_args(argv)
    facts = json.loads(SOURCE.read_text(encoding="utf-8"))
    text = page(facts)
    if args.figures and not args.check:
        for name, data in charts(facts).items():
            (PAGE.parent / name).write_bytes(data)
            print(f"docs/{name}: written")
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if args.check:
        print("docs/int-vs-fp.md: stale; run python bench/study_page.py")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    print("docs/int-vs-fp.md: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
