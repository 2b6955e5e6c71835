# SPDX-License-Identifier: Apache-2.0
"""The figure of matmul.py on a GPU: times faster than cuBLAS bfloat16 against rows of x."""

from __future__ import annotations

from typing import Any

from pyfmt import _chart

SIDE = 8192
BASE = "cuBLAS bf16"
Names = dict[str, tuple[str, str, str]]
Found = dict[tuple[str, int], dict[str, Any]]

# Floats orange, integers blue-green, rivals grey; lines tell formats of a kind apart.
FEW: Names = {
    "dense x mxfp4": ("mxfp4", "float", "-"),
    "dense x nvfp4": ("nvfp4", "float", "--"),
    "dense x mxfp6_e2m3": ("mxfp6_e2m3", "float", ":"),
    "dense x int4": ("int4", "int", "-"),
    "dense x mxint4": ("mxint4", "int", "--"),
    "dense x mxint8": ("mxint8", "int", ":"),
    "rival: gemlite int4 g128": ("gemlite int4", "", "--"),
}
MANY: Names = {
    "mxfp4 x mxfp4": ("mxfp4", "float", "-"),
    "mxfp4 x kept": ("mxfp4, w kept as fp8", "float", "-."),
    "rotate 32, mxfp4 x mxfp4": ("rotate + quantize x, mxfp4", "float", "--"),
    "mxint4 x mxint4": ("mxint4", "int", "-"),
    "mxint8 x mxint8": ("mxint8 (exact path)", "int", ":"),
    "rival: torch fp8, prequantized": ("torch fp8", "", "-"),
    "rival: gemlite int4 g128": ("gemlite int4", "", "--"),
}


def chart(record: dict[str, Any]) -> bytes:
    """Few rows with dense activations on the left, many with quantized ones on the right."""
    found: Found = {
        (line["name"], line["shape"][0]): line
        for line in record["lines"]
        if line.get("shape", [])[1:] == [SIDE, SIDE]
    }
    machine = record["machine"]
    with _chart.look():
        figure, (few, many) = _chart.panels(2, 4.8, right=1.95)
        _chart.words(
            figure,
            "Packed products against bfloat16",
            f"y = x w^T, w {SIDE} x {SIDE}; times faster than cuBLAS bfloat16 on the unquantized "
            f"tensors in the same run; {machine['gpu']}, torch {machine['versions']['torch']}, "
            "CUDA graphs, weights not in the cache",
        )
        _draw(few, found, FEW, 1, 64)
        _draw(many, found, MANY, 256, SIDE)
        _chart.title(few, "bfloat16 x, packed weight")
        _chart.title(many, "Both packed")
        bound = [
            (m, found[BASE, m]["median"] / line["bound"])
            for m, line in _line(found, "dense x mxfp4", 1, 64)
        ]
        few.plot(*zip(*bound, strict=True), color=_chart.GREY, lw=1, ls=(0, (1, 2)))
        highest = max(speed for _, speed in bound)
        few.set_ylim(0, 1.1 * highest)
        few.annotate(
            "mxfp4's bytes at a copy's rate", (bound[0][0], highest), xytext=(0, 4),
            textcoords="offset points", color=_chart.GREY, fontsize=8.5,
        )  # fmt: skip
        for panel, ends in ((few, FEW), (many, MANY)):
            _label(panel, found, ends)
        handles = [
            _chart.line(_chart.COLOURS[kind], _chart.LABELS[kind]) for kind in ("float", "int")
        ]
        _chart.legend(figure, [*handles, _chart.line(_chart.GREY, "other libraries")])
        return _chart.png(figure)


def _line(found: Found, name: str, first: float, last: float) -> list[tuple[int, dict[str, Any]]]:
    return sorted((m, line) for (n, m), line in found.items() if n == name and first <= m <= last)


def _draw(panel: Any, found: Found, names: Names, first: int, last: int) -> None:
    counts = set()
    for name, (_, kind, style) in names.items():
        points = [(m, line["of_bf16"]) for m, line in _line(found, name, first, last)]
        colour = _chart.COLOURS.get(kind, _chart.GREY)
        panel.plot(*zip(*points, strict=True), color=colour, ls=style, lw=1.8, marker=".", ms=7)
        counts |= {m for m, _ in points}
    panel.axhline(1, color=_chart.INK, lw=1)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted(counts), [str(m) for m in sorted(counts)])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("rows of x", color=_chart.GREY)
    panel.yaxis.set_major_formatter("{x:g}x")
    _chart.bare(panel, grid="y", keep=("bottom",))


def _label(panel: Any, found: Found, names: Names) -> None:
    """Names at the lines' right ends; those that would meet share the height around their mean."""
    first, last = panel.get_xlim()
    ends = sorted((_line(found, name, first, last)[-1][1]["of_bf16"], name) for name in names)
    gap = 0.048 * panel.get_ylim()[1]
    groups = [[end] for end in ends]
    at = 0
    while at + 1 < len(groups):
        below, above = (_places(group, gap) for group in groups[at : at + 2])
        if above[0] - below[-1] < gap:
            groups[at : at + 2] = [groups[at] + groups[at + 1]]
            at = max(at - 1, 0)
        else:
            at += 1
    for group in groups:
        for place, (_, name) in zip(_places(group, gap), group, strict=True):
            m = _line(found, name, first, last)[-1][0]
            panel.add_artist(_tag((m, place), *names[name]))


def _tag(at: tuple[float, float], label: str, kind: str, style: str) -> Any:
    """A piece of the line and its name, right of a point."""
    from matplotlib.lines import Line2D
    from matplotlib.offsetbox import AnnotationBbox, DrawingArea, HPacker, TextArea

    colour = _chart.COLOURS.get(kind, _chart.GREY)
    piece = DrawingArea(20, 8, 0, 0)
    piece.add_artist(Line2D([0, 20], [4, 4], color=colour, ls=style, lw=1.6))
    text = TextArea(label, textprops={"color": colour, "fontsize": 8.5})
    return AnnotationBbox(
        HPacker(children=[piece, text], pad=0, sep=4, align="center"), at,
        xybox=(9, 0), boxcoords="offset points", box_alignment=(0, 0.5), frameon=False,
        pad=0, annotation_clip=False,
    )  # fmt: skip


def _places(group: list[tuple[float, str]], gap: float) -> list[float]:
    middle = sum(end[0] for end in group) / len(group)
    return [middle + gap * (i - (len(group) - 1) / 2) for i in range(len(group))]
