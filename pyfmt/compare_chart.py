# SPDX-License-Identifier: Apache-2.0
"""The chart of a comparison: how far each format moves the embeddings, at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyfmt._chart import COLOURS, GREY, INK, LABELS, RULE, bare, legend, look, png, words
from pyfmt.compare import Result, Row
from pyfmt.formats import get_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {False: "Weights only", True: "Weights and activations"}


def chart(result: Result) -> bytes:
    """Return a PNG: a line for every format, a panel for weights alone and one for both.

    Raises ImportError where matplotlib is missing.
    """
    with look():
        from matplotlib.figure import Figure

        lines = _lines(result.rows)
        sides = sorted({row.activations for row in result.rows})
        figure = Figure(figsize=(6.8 * len(sides) + 0.6, 2.9 + 0.45 * len(lines)), dpi=160)
        panels = figure.subplots(1, len(sides), sharex=True, squeeze=False)[0]
        for panel, side in zip(panels, sides, strict=True):
            rows = [row for row in result.rows if row.activations == side]
            _panel(panel, rows, lines, PANELS[side], named=side == sides[0])
        inches = figure.get_figheight()
        figure.subplots_adjust(
            left=2.0 / figure.get_figwidth(),
            right=1 - 0.75 / figure.get_figwidth(),
            top=1 - 1.55 / inches,
            bottom=0.95 / inches,
            wspace=0.19,
        )
        _words(figure, result)
        return png(figure)


def _lines(rows: Sequence[Row]) -> dict[str, float]:
    """Place every format on a line: widest elements on top, a gap between the widths."""
    names = list(dict.fromkeys(row.format for row in rows))
    names.sort(
        key=lambda name: (
            -get_format(name).bits,
            min(1 - row.cosine for row in rows if row.format == name),
        )
    )
    lines, y = {}, 0.0
    for i, name in enumerate(names):
        if i and get_format(name).bits != get_format(names[i - 1]).bits:
            y += 0.7
        lines[name] = y
        y += 1
    return lines


def _panel(
    panel: Axes, rows: Sequence[Row], lines: dict[str, float], title: str, *, named: bool
) -> None:
    panel.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=24)
    panel.set_xscale("log")
    for name, y in lines.items():
        own = sorted((row for row in rows if row.format == name), key=lambda row: row.rotation)
        if not own:
            continue
        colour = COLOURS[get_format(name).element.kind]
        far = [_distance(row) for row in own]
        panel.plot(
            [min(far), max(far)],
            [y, y],
            color=colour,
            alpha=0.18,
            lw=18,
            ls="-",
            solid_capstyle="round",
            zorder=2,
        )
        for row in own:
            panel.plot(_distance(row), y + _shift(row), zorder=3, **_mark(row, colour))
        best = max(own, key=lambda row: row.cosine)
        panel.annotate(
            f"{100 * best.top1:.1f}%",
            (1.015, y),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            annotation_clip=False,
        )
        if named:
            panel.annotate(
                name,
                (-0.125, y),
                xycoords=("axes fraction", "data"),
                va="center",
                ha="right",
                color=colour,
                fontweight="bold",
                annotation_clip=False,
            )
            panel.annotate(
                f"{own[0].bits_per_weight:.4g}",
                (-0.025, y),
                xycoords=("axes fraction", "data"),
                va="center",
                ha="right",
                color=GREY,
                annotation_clip=False,
            )
    top = -0.95
    heads = [(1.015, "top-1\nkept", "left")]
    if named:
        heads += [(-0.125, "format", "right"), (-0.025, "bits per\nweight", "right")]
    for x, text, side in heads:
        panel.annotate(
            text,
            (x, top),
            xycoords=("axes fraction", "data"),
            va="bottom",
            ha=side,
            color=GREY,
            fontsize=8.5,
            annotation_clip=False,
        )
    panel.set_ylim(max(lines.values()) + 0.8, -0.8)
    panel.set_yticks([])
    bare(panel, grid="x")
    for y in lines.values():
        panel.axhline(y, color=RULE, lw=0.8, zorder=1)
    panel.set_xlabel("distance from the float32 embeddings, 1 - cosine", color=GREY)


def _distance(row: Row) -> float:
    """1 - cosine, kept visible on a logarithmic axis."""
    return max(1 - row.cosine, 1e-9)


def _shift(row: Row) -> float:
    """Marks that nearly coincide stand one above the other: plain, own block, 128."""
    if not row.rotation:
        return -0.16
    return 0.0 if row.rotation == get_format(row.format).block_columns(128) else 0.16


def _mark(row: Row, colour: str) -> dict[str, Any]:
    """Hollow: not rotated; filled circle: rotated by the own block; diamond: by 128."""
    if not row.rotation:
        face = "white"
    else:
        face = colour
    own = row.rotation in (0, get_format(row.format).block_columns(128))
    return {
        "marker": "o" if own else "D",
        "markersize": 7.5 if own else 6,
        "markerfacecolor": face,
        "markeredgecolor": colour if face == "white" else "white",
        "markeredgewidth": 1.8 if face == "white" else 0.8,
        "linestyle": "none",
    }


def _words(figure: Any, result: Result) -> None:
    from matplotlib.lines import Line2D

    settings = result.settings
    quick = ", quick run" if settings["quick"] else ""
    words(
        figure,
        f"{result.model} in every format: left is closer to float32",
        f"Mean over {settings['sentences']:,} sentence embeddings{quick}; "
        f"{settings['layers']} linear layers replaced. top-1 kept: sentences whose "
        "nearest neighbour stays, at the format's best rotation.",
    )
    kinds = {get_format(row.format).element.kind for row in result.rows}
    handles = [
        Line2D([], [], color=COLOURS[kind], lw=6, label=LABELS[kind]) for kind in sorted(kinds)
    ]
    marks = {
        "plain": ("o", "white"),
        "rotated, the format's own block": ("o", INK),
        "rotated, blocks of 128": ("D", INK),
    }
    handles += [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=shape,
            markersize=8 if shape == "o" else 6,
            markerfacecolor=face,
            markeredgecolor=INK,
            label=label,
        )
        for label, (shape, face) in marks.items()
    ]
    legend(figure, handles)
