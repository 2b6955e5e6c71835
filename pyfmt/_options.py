# SPDX-License-Identifier: Apache-2.0
"""Options that several commands take, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from pyfmt.formats import FORMATS, Format, get_format

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Include = Annotated[
    list[str] | None,
    typer.Option(
        help="Take only tensors whose name fits this pattern (* and ?); may be repeated.",
        metavar="PATTERN",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave out tensors whose name fits this pattern; may be repeated.", metavar="PATTERN"
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        help="Formats, separated by commas, instead of every row of the table: names or "
        "spellings such as e3m2-b32-e8m0.",
        metavar="F,F,...",
    ),
]


def chosen_formats(names: str | None) -> list[Format]:
    """Return the formats of a comma-separated list, or every row of the table."""
    if names is None:
        return list(FORMATS.values())
    return list(dict.fromkeys(get_format(name.strip()) for name in names.split(",")))
