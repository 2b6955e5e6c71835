# SPDX-License-Identifier: Apache-2.0
"""The table and the sentences that `pyfmt compare` prints about its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from pyfmt.compare import Result, Row
from pyfmt.formats import get_format

SIDES = {False: "weights", True: "weights + activations"}


def wins(rows: Iterable[Row]) -> set[int]:
    """Return the ids of the rows with the highest cosine of their width and side."""
    best: dict[tuple[int, bool], Row] = {}
    for row in rows:
        key = (get_format(row.format).bits, row.activations)
        if key not in best or row.cosine > best[key].cosine:
            best[key] = row
    return {id(row) for row in best.values()}


def tables(result: Result, width: int) -> list[Table]:
    """Return one wide table, or one for each side where the terminal is narrower than 112."""
    sides = sorted({row.activations for row in result.rows})
    if width >= 112:
        return [_table(result, sides)]
    return [_table(result, [side]) for side in sides]


def _table(result: Result, sides: Sequence[bool]) -> Table:
    title = " and ".join(SIDES[side] for side in sides) + " quantized"
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("format", no_wrap=True)
    for heading in ("rot.", "bits", "MB", "weight\ndB", "input\ndB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for side in sides:
        short = "W+A" if side else "W"
        for heading in ("cosine", "top-1", "top-10", "sent/s"):
            table.add_column(f"{short}\n{heading}", justify="right", no_wrap=True)
    found = {(row.format, row.rotation, row.activations): row for row in result.rows}
    lines = list(dict.fromkeys((row.format, row.rotation) for row in result.rows))
    best = wins(result.rows)
    for i, (name, rotation) in enumerate(lines):
        cells = [found[name, rotation, side] for side in sides]
        one = cells[0]
        decibels = [cell.activation_qsnr for cell in cells if cell.activation_qsnr is not None]
        texts = [
            f"[cyan]{name}[/]" if i == 0 or lines[i - 1][0] != name else "",
            str(rotation or "-"),
            f"{one.bits_per_weight:.4g}",
            f"{one.weights_mb:.1f}",
            f"{one.weight_qsnr:.1f}",
            f"{decibels[0]:.1f}" if decibels else "-",
        ]
        for cell in cells:
            style = "[green]{}[/]" if id(cell) in best else "{}"
            texts += [
                style.format(f"{cell.cosine:.5f}"),
                f"{100 * cell.top1:.1f}%",
                f"{100 * cell.top10:.1f}%",
                f"{cell.sentences_per_s:.0f}",
            ]
        last = i + 1 == len(lines) or lines[i + 1][0] != name
        table.add_row(*texts, end_section=last)
    return table


LEGEND = (
    "rot.: size of the block Hadamard rotation; bits: per weight, scales included; MB: replaced "
    "weights; dB: QSNR of the weights and of the layers' inputs; cosine, top-1, top-10: embeddings "
    "and nearest neighbours against float32; W: weights quantized, W+A: inputs too."
)


def heading(result: Result) -> str:
    """One paragraph: which model, which text, which machine."""
    settings, machine, baseline = result.settings, result.machine, result.baseline
    quick = " (quick: fewer sentences and rotations)" if settings["quick"] else ""
    return (
        f"{result.model}, {settings['sentences']:,} sentences of {settings['tokens']:,} tokens"
        f"{quick}; {settings['layers']} linear layers, "
        f"{baseline['weights_mb']:.1f} MB in float32, beside {baseline['rest_mb']:.1f} MB that "
        f"stay; {machine['threads']} threads on {machine['cpu']}; unquantized "
        f"{baseline['sentences_per_s']:.0f} sentences/s in float32, "
        f"{baseline['bfloat16_sentences_per_s']:.0f} in bfloat16; quantized models compute in "
        f"{settings['dtype']}."
    )


def findings(rows: Sequence[Row]) -> list[str]:
    """Return what the rows say, in a few sentences."""
    said = []
    widths = sorted({get_format(row.format).bits for row in rows})
    for width in widths:
        ranked = sorted(
            (row for row in rows if row.activations and get_format(row.format).bits == width),
            key=lambda row: -row.cosine,
        )
        if ranked:
            top = ranked[0]
            rotated = f" rotated by {top.rotation}" if top.rotation else ", not rotated,"
            said.append(
                f"{width} bits, weights and activations: {top.format}{rotated} is closest to "
                f"float32 (cosine {top.cosine:.5f}, {100 * top.top1:.1f}% of nearest neighbours "
                "kept)."
            )
    for kind, label in (("int", "integer"), ("float", "floating-point")):
        gains = _rotation_gains(rows, kind)
        if gains:
            helped = sum(gain > 0 for gain in gains.values())
            said.append(
                f"Rotation by the own block: brings {helped} of {len(gains)} {label} formats "
                f"closer to float32 ({_extremes(gains)} in cosine distance)."
            )
    return said


def _rotation_gains(rows: Sequence[Row], kind: str) -> dict[str, float]:
    """Share of the cosine distance that rotation by the own block takes away, by format."""
    distance = {(row.format, row.rotation): 1 - row.cosine for row in rows if row.activations}
    gains = {}
    for (name, rotation), plain in distance.items():
        format = get_format(name)
        rotated = distance.get((name, format.block_columns(128)))
        if rotation == 0 and rotated is not None and plain > 0 and format.element.kind == kind:
            gains[name] = 1 - rotated / plain
    return gains


def _extremes(gains: dict[str, float]) -> str:
    low, high = min(gains, key=lambda n: gains[n]), max(gains, key=lambda n: gains[n])
    parts = [f"{name} {-100 * gains[name]:+.0f}%" for name in dict.fromkeys((high, low))]
    return " to ".join(parts)
