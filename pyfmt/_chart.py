# SPDX-License-Identifier: Apache-2.0
"""The look that every figure shares: colours, type, bare axes, words above, one way to a PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"int": "#0b7285", "float": "#d9480f"}
LABELS = {"int": "integer elements", "float": "floating-point elements"}
INK, GREY, RULE = "#212529", "#6c757d", "#e9ecef"


def require_matplotlib() -> None:
    """Raise ImportError with a sentence where matplotlib is missing; imports nothing."""
    if find_spec("matplotlib") is None:
        raise ImportError("the chart needs matplotlib; pip install 'pyfmt-kernels[demo]'")


@contextmanager
def look() -> Iterator[None]:
    """Draw with the shared type; raises ImportError where matplotlib is missing."""
    require_matplotlib()
    import matplotlib as mpl

    style = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK}
    with mpl.rc_context(style):
        yield


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file's bytes, without a date or a version inside."""
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor="white", metadata={"Software": None})
    return out.getvalue()


def words(figure: Figure, title: str, below: str) -> None:
    """Write a figure's title and the grey lines under it, at the upper left corner."""
    inches, left = figure.get_figheight(), 0.35 / figure.get_figwidth()
    figure.text(
        left, 1 - 0.38 / inches, title, fontsize=15, fontweight="bold", va="center", color=INK
    )
    figure.text(left, 1 - 0.60 / inches, below, color=GREY, va="top", linespacing=1.35)


def bare(
    panel: Axes, *, grid: Literal["x", "y", "both"], keep: tuple[str, ...] = ("bottom",)
) -> None:
    """Leave of the frame only the edges `keep`, and draw light rules along `grid` ("x", "y")."""
    panel.grid(axis=grid, color=RULE, lw=1, zorder=0)
    panel.set_axisbelow(True)
    for edge, spine in panel.spines.items():
        spine.set_visible(edge in keep)
        spine.set_color(GREY)
    panel.tick_params(which="both", colors=GREY)


def legend(figure: Figure, handles: list[Any], **options: Any) -> None:
    """Put one legend along the lower edge of the figure."""
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.30 / figure.get_figwidth(), 0.0),
        frameon=False,
        handletextpad=0.5,
        columnspacing=1.8,
        **({"ncols": len(handles), "handlelength": 1.2} | options),
    )


def panels(
    count: int, high: float, *, wide: float = 6.6, columns: int = 2, right: float = 0.45
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels, in inches, with room for words above and a legend below."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(wide * columns + 0.6, high * rows + 1.9), dpi=160)
    grid = figure.subplots(rows, columns, squeeze=False)
    width, inches = figure.get_figwidth(), figure.get_figheight()
    figure.subplots_adjust(
        left=0.85 / width,
        right=1 - right / width,
        top=1 - 1.6 / inches,
        bottom=1.15 / inches,
        wspace=(0.55 + right) / (wide - 0.85),
        hspace=0.38,
    )
    flat = list(grid.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]


def line(colour: str, label: str, **style: Any) -> Any:
    """Return a legend's entry: a line or, with linestyle "none", a mark."""
    from matplotlib.lines import Line2D

    given: dict[str, Any] = {"color": colour, "label": label, "lw": 2.2} | style
    return Line2D([], [], **given)


def title(panel: Axes, text: str) -> None:
    """Write a panel's name above its left corner."""
    panel.set_title(text, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
