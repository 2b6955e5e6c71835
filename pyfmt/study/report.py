# SPDX-License-Identifier: Apache-2.0
"""What `pyfmt study` prints: tables that fit the terminal, a legend, the findings."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from pyfmt._terminal import counted
from pyfmt.study import summary, tables
from pyfmt.study.summary import Facts
from pyfmt.study.tables import Sheet

LEGEND = (
    "QSNR in dB, higher is better; scale rule: how scales are chosen (of E4M3 scales: the recipe); "
    "largest code: the crossover with the integer's own largest code instead of 2^(b-1); at one "
    "sigma: lowest and highest within the octave; rot.: block Hadamard rotation of that size."
)


def show(facts: Facts, console: Console) -> None:
    """Print everything that the facts hold."""
    console.print(heading(facts))
    for sheet in tables.every(facts):
        for part in fitted(sheet, console):
            console.print()
            console.print(part.rich())
    console.print(f"[dim]{LEGEND}[/]")
    console.print()
    for sentence in summary.findings(facts):
        console.print(escape(sentence))
    left = facts["model"]["left_out"] if facts["model"] else {}
    if left:
        console.print(f"Left out: {escape(counted(left.values()))}.")


def heading(facts: Facts) -> str:
    """One paragraph: which data, which model, which machine."""
    settings, machine = facts["settings"], facts["machine"]
    each = settings["sigmas"] * settings["rows"] * 1024
    words = (
        f"{len(settings['formats'])} formats on {each:,} values of each distribution, "
        f"{settings['sigmas']} sigmas of one octave"
    )
    if facts["model"]:
        counts = [
            f"{len(summary.tensors_of(facts, kind))} {summary.plural(kind)}"
            for kind in summary.kinds_of(facts)
        ]
        words += f"; {escape(facts['model']['name'])}: {' and '.join(counts)}"
    quick = " (quick: fewer values)" if settings["quick"] else ""
    return f"{words}{quick}; {machine['cpu']}."


def fitted(sheet: Sheet, console: Console) -> list[Sheet]:
    """Return the table, or parts of it side by side where the terminal is narrower than it."""
    free = console.options.update(max_width=10_000)
    needed = console.measure(sheet.rich(), options=free).maximum
    numbers = len(sheet.columns) - sheet.left
    if needed <= console.width or numbers < 2:
        return [sheet]
    middle = sheet.left + -(-numbers // 2)
    parts = []
    for first, last in ((sheet.left, middle), (middle, len(sheet.columns))):
        rows = [[*row[: sheet.left], *row[first:last]] for row in sheet.rows]
        columns = [*sheet.columns[: sheet.left], *sheet.columns[first:last]]
        parts += fitted(Sheet(sheet.title, columns, rows, sheet.left), console)
    return parts
