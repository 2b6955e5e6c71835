# SPDX-License-Identifier: Apache-2.0
"""A study's figures of formats: theory beside measured blocks, single sigmas, scale rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfmt import theory
from pyfmt._chart import (
    COLOURS,
    GREY,
    INK,
    LABELS,
    bare,
    legend,
    line,
    look,
    panels,
    png,
    title,
    words,
)
from pyfmt.formats import Format
from pyfmt.study import charts_model, summary
from pyfmt.study.data import DATASETS, sigmas
from pyfmt.study.measure import choices
from pyfmt.study.summary import Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = {"gaussian": "o", "laplace": "s", "student_t": "^", "outliers": "D"}
# The rivals of one integer format, in order.
STYLES: list[tuple[Any, float]] = [("-", 1.0), ((0, (5, 2)), 0.55), ((0, (1, 1.5)), 0.55)]
RULE_STYLES: dict[str, Any] = {"rceil": "-", "floor": (0, (5, 1.5)), "even": (0, (1, 1.2))}
STRENGTH = {"rceil": 1.0, "floor": 0.72, "even": 0.46, "ceil": 0.22}  # by what they cost


def charts(facts: Facts) -> dict[str, bytes]:
    """Return every figure that the facts have something for: PNG bytes by file name.

    Raises ImportError where matplotlib is missing.
    """
    draw: dict[str, Callable[[Facts], Figure | None]] = {
        "study_theory.png": theory_chart,
        "study_sigma.png": sigma_chart,
        "study_rules.png": rules_chart,
        "study_crest.png": charts_model.crest_chart,
        "study_tensors.png": charts_model.tensors_chart,
        "study_wins.png": charts_model.wins_chart,
    }
    made = {}
    with look():
        for name, one in draw.items():
            figure = one(facts)
            if figure is not None:
                made[name] = png(figure)
    return made


def theory_chart(facts: Facts) -> Figure | None:
    """Draw QSNR against crest factor: theory's curves, and the blocks of drawn data on them."""
    groups = summary.by_integer(facts)
    if not groups:
        return None
    figure, axes = panels(len(groups), 3.5, right=1.25)
    for panel, (integer, rivals) in zip(axes, groups.items(), strict=True):
        _theory_panel(panel, facts, integer, rivals)
    words(
        figure,
        "QSNR against crest factor: theory and measured blocks",
        "Lines: theory (arXiv 2510.25602), at its scale overheads of 1.5 (E8M0) and 1.05 (E4M3). "
        "Marks: measured blocks of drawn data, gathered by crest factor.\n"
        "Fine line: the same theory with the integer's own largest code, 2^(b-1) - 1.",
    )
    shapes = [
        line(INK, DATASETS[name].label, linestyle="none", marker=mark, markersize=6)
        for name, mark in MARKS.items()
    ]
    kinds = [line(COLOURS[kind], LABELS[kind]) for kind in COLOURS]
    legend(figure, [*kinds, *shapes])
    return figure


def _theory_panel(panel: Axes, facts: Facts, integer: Format, rivals: Sequence[Format]) -> None:
    end = min(6.0, theory.largest_kappa(integer))
    kappa = np.linspace(1.05, end - 0.01, 300)
    title(panel, f"{integer.name} and its rivals")
    curves: list[tuple[Format, Any, float]] = [(integer, "-", 1.0)]
    curves += [(one, *style) for one, style in zip(rivals, STYLES, strict=False)]
    for format, style, alpha in curves:
        colour = COLOURS[format.element.kind]
        values = theory.qsnr(format, kappa)
        panel.plot(kappa, values, color=colour, ls=style, alpha=alpha, lw=2.2, zorder=2)
        _points(panel, facts, format, alpha)
    exact = theory.qsnr(integer, kappa, exact=True)
    panel.plot(kappa, exact, color=COLOURS["int"], lw=0.9, alpha=0.8, zorder=2)
    floor = min(theory.qsnr(one, end - 0.01) for one in (integer, *rivals))
    low = min(floor, float(exact.min())) - 1.5
    high = float(theory.qsnr(integer, 1.3))
    panel.set_ylim(low, high)
    panel.set_xlim(1, end)
    for one in rivals:
        crossing = theory.crossover(integer, one)
        if crossing is not None and crossing < end:
            panel.plot([crossing] * 2, [low, theory.qsnr(one, crossing)], color=INK, lw=1, ls=":")
            panel.annotate(
                f"{crossing:.2f}",
                (crossing, low),
                xytext=(4, 5),
                textcoords="offset points",
                color=INK,
                fontsize=9,
            )
    for format, _, alpha in curves:
        panel.annotate(
            format.name,
            (end, theory.qsnr(format, end - 0.01)),
            xytext=(6, 0),
            textcoords="offset points",
            color=COLOURS[format.element.kind],
            alpha=max(alpha, 0.75),
            fontweight="bold",
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    bare(panel, grid="both", keep=("bottom", "left"))
    panel.set_xlabel("crest factor of a block, max |x| / rms", color=GREY)
    panel.set_ylabel("QSNR, dB", color=GREY)


def _points(panel: Axes, facts: Facts, format: Format, alpha: float) -> None:
    for name, mark in MARKS.items():
        found = facts["data"].get(name, {}).get("points", {}).get(format.key, [])
        if found:
            panel.plot(
                [one[0] for one in found],
                [one[1] for one in found],
                linestyle="none",
                marker=mark,
                markersize=4.6,
                markerfacecolor="white",
                markeredgecolor=COLOURS[format.element.kind],
                alpha=max(alpha, 0.6),
                zorder=3,
            )


def sigma_chart(facts: Facts) -> Figure | None:
    """Draw QSNR against sigma: what a comparison at a single sigma would have seen."""
    groups = {
        integer: rivals
        for integer, rivals in summary.by_integer(facts).items()
        if integer.scale == "e8m0"
    }
    if not groups:
        return None
    rules = list(RULE_STYLES)
    figure, axes = panels(len(groups), 3.4, wide=4.9, columns=3)
    x = sigmas(facts["settings"]["sigmas"])
    for panel, (integer, rivals) in zip(axes, groups.items(), strict=True):
        title(panel, f"{integer.name} and {rivals[0].name}")
        for format in (integer, rivals[0]):
            for rule in rules:
                panel.plot(
                    x,
                    facts["data"]["gaussian"]["by_sigma"][format.key][rule],
                    color=COLOURS[format.element.kind],
                    ls=RULE_STYLES[rule],
                    lw=1.8,
                )
        panel.set_xscale("log", base=2)
        panel.set_xticks([1, 1.25, 1.5, 1.75, 2], ["1", "1.25", "1.5", "1.75", "2"])
        panel.minorticks_off()
        panel.set_xlim(1, 2)
        bare(panel, grid="both", keep=("bottom", "left"))
        panel.set_xlabel("sigma of Gaussian data", color=GREY)
        panel.set_ylabel("QSNR, dB", color=GREY)
    words(
        figure,
        "QSNR at every sigma of an octave",
        "QSNR of Gaussian bfloat16 data under power-of-two scales, which fit worse and better "
        "within every octave of sigma.\nOnly a mean over the octave compares formats, and it "
        "compares them for one scale rule.",
    )
    kinds = [line(COLOURS[kind], LABELS[kind]) for kind in COLOURS]
    legend(figure, [*kinds, *(line(INK, rule, ls=RULE_STYLES[rule], lw=1.8) for rule in rules)])
    return figure


def rules_chart(facts: Facts) -> Figure | None:
    """Draw what each scale rule loses against the format's best one."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    formats = [one for one in summary.formats_of(facts) if one.scale == "e8m0"]
    if not formats:
        return None
    sides = ["gaussian", *summary.kinds_of(facts)]
    heads = {"gaussian": "Gaussian data", "weight": "Weights", "activation": "Activations"}
    figure = Figure(figsize=(4.5 * len(sides) + 1.6, 0.86 * len(formats) + 2.5), dpi=160)
    axes = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    width, inches = figure.get_figwidth(), figure.get_figheight()
    figure.subplots_adjust(
        left=1.45 / width,
        right=1 - 0.35 / width,
        top=1 - 1.6 / inches,
        bottom=0.95 / inches,
        wspace=0.1,
    )
    lost = {(side, one.key): _lost(facts, side, one) for side in sides for one in formats}
    most = max((max(own.values()) for own in lost.values() if own), default=1.0)
    for panel, side in zip(axes, sides, strict=True):
        title(panel, heads[side])
        for y, format in enumerate(formats):
            _bars(panel, y, format, lost[side, format.key], most)
        panel.set_xlim(0, most * 1.14)
        panel.set_ylim(len(formats) - 0.45, -0.55)
        panel.set_yticks(range(len(formats)), [one.name for one in formats])
        bare(panel, grid="x", keep=("bottom",))
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel("dB below the format's best rule", color=GREY)
    for text, format in zip(axes[0].get_yticklabels(), formats, strict=True):
        text.set_color(COLOURS[format.element.kind])
        text.set_fontweight("bold")
    name = f" and on {facts['model']['name']}, means over its tensors" if len(sides) > 1 else ""
    words(
        figure,
        "What the choice of a scale rule costs",
        "What each rule loses against the best rule of the same format: on Gaussian data over an "
        f"octave of sigma{name}.\n0.00 marks the best.",
    )
    legend(
        figure,
        [Patch(color=INK, alpha=alpha, lw=0, label=rule) for rule, alpha in STRENGTH.items()],
    )
    return figure


def _lost(facts: Facts, side: str, format: Format) -> dict[str, float]:
    """Decibels that each rule stays below the best; empty where nothing was measured."""
    if side == "gaussian":
        own: dict[str, float | None] = dict(facts["data"]["gaussian"]["qsnr"]["0"][format.key])
    else:
        own = {rule: summary.mean_qsnr(facts, side, "0", format, rule) for rule in choices(format)}
    known = {rule: db for rule, db in own.items() if db is not None}
    return {rule: max(known.values()) - db for rule, db in known.items()}


def _bars(panel: Axes, y: float, format: Format, lost: dict[str, float], most: float) -> None:
    for i, rule in enumerate(STRENGTH):
        if rule not in lost:
            continue
        at = y + (i - 1.5) * 0.2
        colour = COLOURS[format.element.kind]
        panel.barh(at, lost[rule], 0.18, color=colour, alpha=STRENGTH[rule], lw=0, zorder=2)
        panel.text(
            lost[rule] + 0.012 * most, at, f"{lost[rule]:.2f}", va="center", fontsize=7, color=GREY
        )
