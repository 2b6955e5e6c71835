# SPDX-License-Identifier: Apache-2.0
"""A study's figures of a model: crest factors, INT's lead tensor by tensor, win rates."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from pyfmt import theory
from pyfmt._chart import COLOURS, GREY, INK, RULE, bare, legend, line, panels, title, words
from pyfmt.formats import Format
from pyfmt.study import summary
from pyfmt.study.measure import choices
from pyfmt.study.summary import BEST, Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS = {"weight": "Weights", "activation": "Activations"}
BLOCKS = ("16", "32", "64", "128")
TICKS = (1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12)
SHADES = {"0": "#212529", "16": "#c2255c", "32": "#7048e8", "128": "#1971c2"}


def _shade(rotation: str) -> str:
    return SHADES.get(rotation, GREY)


def _turned(rotation: str) -> str:
    return "plain" if rotation == "0" else f"rotated by {rotation}"


def crest_chart(facts: Facts) -> Figure | None:
    """Draw quantiles of crest factors by block size, with theory's crossovers across them."""
    from matplotlib.figure import Figure

    kinds = summary.kinds_of(facts)
    if not kinds:
        return None
    rotations = summary.rotations_of(facts)
    figure = Figure(figsize=(6.6 * len(kinds) + 0.6, 6.6), dpi=160)
    axes = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    width, inches = figure.get_figwidth(), figure.get_figheight()
    figure.subplots_adjust(
        left=0.95 / width,
        right=1 - 0.35 / width,
        top=1 - 1.6 / inches,
        bottom=1.15 / inches,
        wspace=0.07,
    )
    gaussian = facts["data"]["gaussian"]["crest"]["0"]
    for panel, kind in zip(axes, kinds, strict=True):
        panel.set_title(HEADS[kind], loc="left", fontsize=12, fontweight="bold", color=INK, pad=8)
        for y, block in enumerate(BLOCKS):
            for i, rotation in enumerate(rotations):
                at = y + (i - (len(rotations) - 1) / 2) * 0.19
                _range(panel, facts, kind, rotation, block, at)
            if block in gaussian:
                panel.plot(
                    [gaussian[block][3]] * 2, [y - 0.37, y + 0.37], color="#fab005", lw=3, zorder=1
                )
        _crossings(panel, facts)
        panel.set_xscale("log")
        panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        panel.minorticks_off()
        panel.set_ylim(len(BLOCKS) - 0.45, -0.55)
        panel.set_yticks(range(len(BLOCKS)), [f"block {block}" for block in BLOCKS])
        bare(panel, grid="x")
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel("crest factor of a block, max |x| / rms", color=GREY)
    axes[0].set_xlim(*_limits(axes[0]))
    words(
        figure,
        f"Crest factors in {facts['model']['name']}, plain and rotated",
        "Crest factors of blocks, the median over tensors of each tensor's quantiles: dot 50 %, "
        "thick 25 to 75 %, thin 5 to 95 %.\n"
        "Dashed: where theory has floats overtake the integer, for blocks of its size.",
    )
    handles = [line(_shade(r), _turned(r), marker="o", markersize=5, lw=4) for r in rotations]
    handles.append(line("#fab005", "median of Gaussian blocks", lw=3))
    legend(figure, handles)
    return figure


def _limits(panel: Axes) -> tuple[float, float]:
    """Return the ends of what was drawn, with a little room (ticks had widened the axis)."""
    low, high = panel.dataLim.intervalx
    for other in panel.get_shared_x_axes().get_siblings(panel):
        ends = other.dataLim.intervalx
        low, high = min(low, ends[0]), max(high, ends[1])
    return low / 1.06, high * 1.04


def _range(panel: Axes, facts: Facts, kind: str, rotation: str, block: str, at: float) -> None:
    """Draw one thin and thick line with a dot, of the typical tensor."""
    rows = [
        tensor["crest"][rotation][block]
        for tensor in summary.tensors_of(facts, kind, rotation)
        if block in tensor["crest"][rotation]
    ]
    rows = [row for row in rows if None not in row]
    if not rows:
        return
    p5, p25, p50, p75, p95 = (statistics.median(row[i] for row in rows) for i in range(1, 6))
    colour = _shade(rotation)
    panel.plot([p5, p95], [at, at], color=colour, lw=1.2, zorder=2)
    panel.plot([p25, p75], [at, at], color=colour, lw=5, zorder=3, solid_capstyle="butt")
    panel.plot(
        p50, at, "o", color="white", markeredgecolor=colour, markersize=5.5, mew=1.5, zorder=4
    )


def _crossings(panel: Axes, facts: Facts) -> None:
    """Mark where each integer meets its nearest rival, beside the blocks of its size."""
    rows: dict[str, dict[str, float]] = {}
    for integer, rivals in summary.by_integer(facts).items():
        found = theory.crossover(integer, rivals[0])
        if found is not None and found < theory.largest_kappa(integer):
            rows.setdefault(str(integer.block), {})[integer.name] = found
    for block, met in rows.items():
        if block not in BLOCKS:
            continue
        y = BLOCKS.index(block)
        for i, (name, kappa) in enumerate(sorted(met.items(), key=lambda item: item[1])):
            panel.plot(
                [kappa] * 2, [y - 0.42, y + 0.5], color=COLOURS["int"], lw=1.2, ls=(0, (3, 2))
            )
            left = i == 0 and len(met) > 1
            panel.annotate(
                f"{name} {kappa:.2f}",
                (kappa, y + 0.5),
                xytext=(-3 if left else 3, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=8,
                color=COLOURS["int"],
            )


def tensors_chart(facts: Facts) -> Figure | None:
    """Draw, for every tensor, by how much the integer leads over its first rival."""
    kinds = summary.kinds_of(facts)
    groups = summary.by_integer(facts)
    groups = {one: rivals for one, rivals in groups.items() if one.block in (16, 32, 64, 128)}
    if not kinds or not groups:
        return None
    figure, axes = panels(len(groups), 3.3)
    shapes = {"weight": "o", "activation": "s"}
    for panel, (integer, rivals) in zip(axes, groups.items(), strict=True):
        floating = rivals[0]
        own = summary.own_rotation(facts, integer)
        choice = choices(integer)[0]
        seen: list[float] = []
        for kind in kinds:
            for rotation in ("0", own):
                points = _leads(facts, integer, floating, kind, rotation)
                seen += [kappa for kappa, _ in points]
                panel.scatter(
                    [kappa for kappa, _ in points],
                    [lead for _, lead in points],
                    marker=shapes[kind],
                    s=26,
                    facecolor="white" if rotation == "0" else INK,
                    edgecolor=INK,
                    linewidth=1.1,
                    alpha=0.75,
                    zorder=3,
                )
        title(panel, f"{integer.name} against {floating.name}, {choice}")
        _lead(panel, integer, floating, seen)
    words(
        figure,
        f"Where integers lead in {facts['model']['name']}: above the line",
        "Each mark is a tensor: QSNR of the integer format less that of its rival, over the "
        "tensor's mean crest factor in blocks of the format's size.\n"
        "Curve: theory for a single block of that crest factor, with the integer's own largest "
        "code. Rotated: by the format's own block.",
    )
    handles = [
        line(
            INK,
            f"{summary.plural(kind)}, {turned}",
            linestyle="none",
            marker=shapes[kind],
            markersize=6,
            markerfacecolor=face,
        )
        for kind in kinds
        for turned, face in (("plain", "white"), ("rotated", INK))
    ]
    handles.append(line(COLOURS["int"], "theory"))
    legend(figure, handles)
    return figure


def _leads(
    facts: Facts, integer: Format, floating: Format, kind: str, rotation: str
) -> list[tuple[float, float]]:
    """Return (mean crest factor, INT less FP in dB) of every tensor, by the default choice."""
    found = []
    for tensor in summary.tensors_of(facts, kind, rotation):
        crest = tensor["crest"][rotation].get(str(integer.block), [None])[0]
        ours, theirs = (
            summary.decibels(tensor["qsnr"][rotation], format, choices(format)[0])
            for format in (integer, floating)
        )
        if crest is not None and ours is not None and theirs is not None:
            found.append((crest, ours - theirs))
    return found


def _lead(panel: Axes, integer: Format, floating: Format, seen: list[float]) -> None:
    """Draw theory's lead, the line of a draw, and colour who wins on either side of it."""
    import numpy as np

    low, high = min(seen, default=2.0) - 0.1, max(seen, default=3.0) + 0.1
    kappa = np.linspace(max(low, 1.0), min(high, theory.largest_kappa(integer) - 0.01), 200)
    lead = theory.qsnr(integer, kappa, exact=True) - theory.qsnr(floating, kappa)
    panel.plot(kappa, lead, color=COLOURS["int"], lw=2, zorder=2)
    panel.set_xlim(low, high)
    bottom, top = panel.get_ylim()
    bottom, top = min(bottom, -0.5), max(top, 0.5)
    panel.axhspan(0, top, color=COLOURS["int"], alpha=0.06, lw=0)
    panel.axhspan(bottom, 0, color=COLOURS["float"], alpha=0.06, lw=0)
    panel.axhline(0, color=GREY, lw=1)
    panel.set_ylim(bottom, top)
    bare(panel, grid="both", keep=("bottom", "left"))
    panel.set_xlabel("mean crest factor of the tensor's blocks", color=GREY)
    panel.set_ylabel("INT less FP, dB", color=GREY)


def wins_chart(facts: Facts) -> Figure | None:
    """Draw the share of tensors that the integer wins: pairs and rules down, rotations across."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    kinds = summary.kinds_of(facts)
    lines = [
        (pair, choice) for pair in summary.pairs_of(facts) for choice in (*choices(pair[0]), BEST)
    ]
    if not kinds or not lines:
        return None
    rotations = summary.rotations_of(facts)
    figure = Figure(figsize=(3.6 * len(kinds) + 4.0, 0.27 * len(lines) + 2.9), dpi=160)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    width, inches = figure.get_figwidth(), figure.get_figheight()
    figure.subplots_adjust(
        left=3.35 / width,
        right=1 - 0.35 / width,
        top=1 - 1.65 / inches,
        bottom=0.75 / inches,
        wspace=0.08,
    )
    colours = LinearSegmentedColormap.from_list(
        "wins", [COLOURS["float"], "#f8f9fa", COLOURS["int"]]
    )
    for panel, kind in zip(axes, kinds, strict=True):
        count = len(summary.tensors_of(facts, kind))
        panel.set_title(
            f"{HEADS[kind]}, {count} tensors", loc="left", fontsize=12, fontweight="bold", pad=8
        )
        y = 0.0
        for i, (pair, choice) in enumerate(lines):
            new = i == 0 or lines[i - 1][0] != pair
            y += 0.5 if new and i else 0.0
            for x, rotation in enumerate(rotations):
                share = summary.win_rate(facts, kind, rotation, pair, choice)
                _cell(panel, x, y, share, colours)
            if panel is axes[0]:
                _label(
                    panel,
                    y,
                    f"{pair[0].name} : {pair[1].name}" if new else "",
                    summary.said(choice),
                )
            y += 1
        panel.set_xlim(-0.5, len(rotations) - 0.5)
        panel.set_ylim(y - 0.5, -0.5)
        panel.xaxis.tick_top()
        panel.set_xticks(range(len(rotations)), ["plain", *(f"rot. {r}" for r in rotations[1:])])
        panel.set_yticks([])
        bare(panel, grid="x", keep=())
        panel.grid(visible=False)
        panel.tick_params(axis="x", length=0, pad=1)
    words(
        figure,
        f"INT or FP for the tensors of {facts['model']['name']}",
        "Share of tensors whose QSNR is higher in the integer format, by scale rule or recipe.",
    )
    handles = [
        line(COLOURS["int"], "the integer wins everywhere", lw=7),
        line(RULE, "half and half", lw=7),
        line(COLOURS["float"], "the float wins everywhere", lw=7),
    ]
    legend(figure, handles)
    return figure


def _cell(panel: Axes, x: float, y: float, share: float | None, colours: Any) -> None:
    from matplotlib.patches import Rectangle

    if share is None:
        return
    box = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=colours(share), lw=0)
    panel.add_patch(box)
    dark = abs(share - 0.5) > 0.3
    panel.text(
        x,
        y,
        f"{100 * share:.0f}%",
        ha="center",
        va="center",
        fontsize=8.5,
        color="white" if dark else INK,
    )


def _label(panel: Axes, y: float, pair: str, choice: str) -> None:
    for x, text, weight, colour in (
        (-0.28, pair, "bold", INK),
        (-0.03, choice, "normal", GREY),
    ):
        panel.annotate(
            text,
            (x, y),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            fontsize=9,
            fontweight=weight,
            color=colour,
            annotation_clip=False,
        )
