# SPDX-License-Identifier: Apache-2.0
"""A study's tables: built once, printed to the terminal by rich and into the page as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from pyfmt.study import summary
from pyfmt.study.data import DATASETS
from pyfmt.study.measure import choices
from pyfmt.study.summary import BEST, Facts


@dataclass
class Sheet:
    """One table: a title, columns (the first `left` hold words, the rest numbers) and rows."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    left: int = 1

    def rich(self) -> Table:
        """Return the table for a terminal; a name that repeats is shown once."""
        table = Table(
            title=self.title, title_justify="left", header_style="bold", box=None, pad_edge=False
        )
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.left else "right", no_wrap=True)
        for i, row in enumerate(self.rows):
            first = i == 0 or self.rows[i - 1][0] != row[0]
            table.add_row(f"[cyan]{row[0]}[/]" if first else "", *row[1:])
        return table

    def markdown(self) -> str:
        """Return the rows as a Markdown table, without the title."""
        heads = [column.replace("\n", " ") for column in self.columns]
        align = ["---" if i < self.left else "--:" for i in range(len(heads))]
        lines = [heads, align, *self.rows]
        return "\n".join(
            "|" + "|".join(align) + "|" if cells is align else f"| {' | '.join(cells)} |"
            for cells in lines
        )


def every(facts: Facts) -> list[Sheet]:
    """Return all tables that the facts have something for."""
    sheets = [crossovers(facts), drawn(facts), drawn_rotated(facts)]
    if summary.kinds_of(facts):
        sheets += [crest(facts), model(facts), wins(facts)]
    return [sheet for sheet in sheets if sheet.rows]


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def crossovers(facts: Facts) -> Sheet:
    """Where theory has the float overtake the integer, and what blocks have."""
    sheet = Sheet(
        "Theory: INT has the higher QSNR below this crest factor",
        [
            "integer",
            "float",
            "rho",
            "crossover",
            "largest\ncode",
            "block\nreaches",
            "Gaussian\nmean",
        ],
        left=2,
    )
    names = [(one.name, two.name, one) for one, two in summary.pairs_of(facts)]
    crest_of = facts["data"]["gaussian"]["crest"]["0"]
    for (integer, floating, format), one in zip(names, facts["theory"], strict=True):
        mean = crest_of.get(str(format.block))
        sheet.rows.append(
            [
                integer,
                floating,
                f"{one['rho']:g}",
                number(one["crossover"]),
                number(one["crossover_exact"]),
                number(one["largest_kappa"]),
                number(mean[0] if mean else None),
            ]
        )
    return sheet


def drawn(facts: Facts) -> Sheet:
    """QSNR of drawn data, not rotated."""
    names = list(facts["data"])
    heads = [DATASETS[name].label.replace(" ", "\n", 1) for name in names]
    sheet = Sheet(
        "Drawn data, QSNR in dB over an octave of sigma",
        ["format", "scale rule", *heads, "at one sigma"],
        left=2,
    )
    for format in summary.formats_of(facts):
        for choice in choices(format):
            cells = [facts["data"][name]["qsnr"]["0"][format.key][choice] for name in names]
            ends = summary.sigma_range(facts, format, choice)
            reach = f"{ends[0]:.2f} .. {ends[1]:.2f}" if ends else "-"
            sheet.rows.append([format.name, choice, *map(number, cells), reach])
    return sheet


def drawn_rotated(facts: Facts) -> Sheet:
    """What rotation does to drawn data, with the default rule or recipe."""
    names = ["gaussian", "laplace", "outliers"]
    sizes = [size for size in summary.rotations_of(facts) if size != "0"]
    heads = [f"{DATASETS[name].label.split()[0]}\nrot. {size}" for name in names for size in sizes]
    sheet = Sheet("Drawn data, dB gained by rotation", ["format", "scale rule", *heads], left=2)
    for format in summary.formats_of(facts):
        choice = choices(format)[0]
        cells = []
        for name in names:
            tables = facts["data"][name]["qsnr"]
            plain = tables["0"][format.key][choice]
            turned = [tables[size][format.key][choice] for size in sizes]
            cells += ["-" if None in (plain, db) else f"{db - plain:+.2f}" for db in turned]
        sheet.rows.append([format.name, choice, *cells])
    return sheet


def _columns(facts: Facts) -> list[tuple[str, str]]:
    return [
        (kind, size) for kind in summary.kinds_of(facts) for size in summary.rotations_of(facts)
    ]


def _heads(columns: Sequence[tuple[str, str]]) -> list[str]:
    return [
        f"{summary.plural(kind)}\n" + ("plain" if size == "0" else f"rot. {size}")
        for kind, size in columns
    ]


def crest(facts: Facts) -> Sheet:
    """Quartiles over tensors of their mean crest factor."""
    sizes = ["16", "32", "64", "128", "row"]
    sheet = Sheet(
        f"{facts['model']['name']}, quartiles over tensors of the mean crest factor of blocks",
        ["tensors", "rotation", *(f"{size}" for size in sizes)],
        left=2,
    )
    for kind, rotation in _columns(facts):
        found = [summary.crest_quartiles(facts, kind, rotation, size) for size in sizes]
        cells = ["-" if one is None else " / ".join(f"{x:.2f}" for x in one) for one in found]
        sheet.rows.append([summary.plural(kind), "-" if rotation == "0" else rotation, *cells])
    return sheet


def model(facts: Facts) -> Sheet:
    """Mean QSNR over a model's tensors."""
    columns = _columns(facts)
    sheet = Sheet(
        f"{facts['model']['name']}, mean QSNR of its tensors in dB",
        ["format", "scale rule", *_heads(columns)],
        left=2,
    )
    for format in summary.formats_of(facts):
        for choice in choices(format):
            cells = [
                number(summary.mean_qsnr(facts, kind, size, format, choice))
                for kind, size in columns
            ]
            sheet.rows.append([format.name, choice, *cells])
    return sheet


def wins(facts: Facts) -> Sheet:
    """Share of a model's tensors that the integer format holds better."""
    columns = _columns(facts)
    sheet = Sheet(
        f"{facts['model']['name']}, share of tensors whose QSNR is higher in INT than in FP",
        ["INT against FP", "scale rule", *_heads(columns)],
        left=2,
    )
    for pair in summary.pairs_of(facts):
        for choice in (*choices(pair[0]), BEST):
            cells = [
                percent(summary.win_rate(facts, kind, size, pair, choice)) for kind, size in columns
            ]
            sheet.rows.append([f"{pair[0].name} : {pair[1].name}", summary.said(choice), *cells])
    return sheet
