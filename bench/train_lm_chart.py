# SPDX-License-Identifier: Apache-2.0
"""The figure of train_lm.py: loss curves, and every run's distance from bfloat16."""

from __future__ import annotations

import statistics
from typing import Any

from pyfmt import _chart

# The shared look's colours: integers blue-green, floats orange; lines tell recipes of a kind apart.
STYLE = {
    "bf16": (_chart.INK, "-"),
    "mxint8": (_chart.COLOURS["int"], "-"),
    "mxint8_full": (_chart.COLOURS["int"], ":"),
    "nvint4": (_chart.COLOURS["int"], "--"),
    "mxfp8": (_chart.COLOURS["float"], "-"),
    "nvfp4": (_chart.COLOURS["float"], "--"),
    "mxfp4": (_chart.COLOURS["float"], "-."),
}


def chart(record: dict[str, Any]) -> bytes:
    """Loss curves of the first seed, and the distance of every run from bf16 on its seed."""
    with _chart.look():
        figure, (curves, ends) = _chart.panels(2, 4.6)
        shape, text = record["settings"]["shape"], record["text"]
        _chart.words(
            figure,
            "Training in low bits: loss by recipe",
            f"{record['parameters'] / 1e6:.0f}M parameters, Llama-shaped; "
            f"{text['train_bytes'] / 1e6:.0f} MB of text ({text['source']}), a byte a token; "
            f"{record['settings']['steps']} steps of {record['settings']['batch']} x "
            f"{shape['context']} tokens; same seed and data order",
        )
        runs = {(run["recipe"], run["seed"]): run for run in record["runs"]}
        _draw_curves(curves, runs)
        _draw_ends(ends, runs)
        names = [n for n in STYLE if any(recipe == n for recipe, _ in runs)]
        handles = [_chart.line(STYLE[n][0], n, linestyle=STYLE[n][1]) for n in names]
        _chart.legend(figure, handles, handlelength=2.4)
        return _chart.png(figure)


def _draw_curves(panel: Any, runs: dict[tuple[str, int], dict[str, Any]]) -> None:
    first = min((seed for _, seed in runs), default=0)
    for name, (colour, style) in STYLE.items():
        if (name, first) in runs:
            steps, losses = zip(*runs[name, first]["losses"], strict=True)
            panel.plot(steps, losses, color=colour, ls=style, lw=1.6)
    _chart.bare(panel, grid="y", keep=("bottom", "left"))
    _chart.title(panel, "Training loss, nats a byte")
    panel.set_xlabel("step", color=_chart.GREY)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")


def _draw_ends(panel: Any, runs: dict[tuple[str, int], dict[str, Any]]) -> None:
    names = [n for n in STYLE if n != "bf16" and any(recipe == n for recipe, _ in runs)]
    for at, name in enumerate(names):
        apart = [
            100 * (run["held_out"] / runs["bf16", seed]["held_out"] - 1)
            for (recipe, seed), run in runs.items()
            if recipe == name and ("bf16", seed) in runs
        ]
        colour = STYLE[name][0]
        panel.plot(apart, [at] * len(apart), "o", color=colour, ms=6, alpha=0.75, mec="white")
        if apart:
            panel.plot([statistics.mean(apart)] * 2, [at - 0.3, at + 0.3], color=colour, lw=2.2)
    panel.axvline(0, color=_chart.INK, lw=1)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.4, -0.6)
    _chart.bare(panel, grid="x")
    panel.tick_params(axis="y", length=0)
    _chart.title(panel, "Held-out loss over bf16's, % (a point a seed)")
