# SPDX-License-Identifier: Apache-2.0
"""How commands speak: results on standard output, progress and complaints on standard error."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

Command = TypeVar("Command", bound=Callable[..., None])


def console() -> Console:
    """A console for results: no colours and no folding of tables off a terminal."""
    out = Console(highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = 250
    return out


def fail(message: str, code: int) -> NoReturn:
    """End the command with one sentence on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]pyfmt:[/] {escape(' '.join(message.split()))}"
    )
    raise typer.Exit(code)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        # The name comes first, as in other tools, unless the sentence holds it already.
        name = error.filename if isinstance(error.filename, str) else None
        return f"{name}: {error.strerror}" if name else error.strerror
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return str(error) or type(error).__name__


def guarded(command: Command) -> Command:
    """Turn what goes wrong inside a command into a sentence and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            fail(str(stop) or "interrupted; nothing was left half done", 130)
        except BrokenPipeError:
            raise
        except (ValueError, TypeError, KeyError, FileNotFoundError, FileExistsError) as error:
            fail(_sentence(error), 2)
        except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
            fail(_sentence(error), 2)
        except MemoryError:
            fail("out of memory; the largest tensor and its quantized copy must fit", 1)
        except (OSError, RuntimeError, ImportError) as error:
            fail(_sentence(error), 1)

    return run  # type: ignore[return-value]


def counted(reasons: Iterable[str]) -> str:
    """Return each reason once, with how often it came: "3 (excluded); 1 (empty)"."""
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return "; ".join(f"{count} ({reason})" for reason, count in counts.items())


def print_json(data: object) -> None:
    """Print data as JSON; numbers that JSON does not have (inf, NaN) become null."""
    print(json.dumps(plain(data), indent=2))


def plain(data: Any) -> Any:
    """Return data with only what JSON has: finite numbers, lists, string keys."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    return data


@contextmanager
def bytes_progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar over bytes on standard error; silent where that is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    err = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda name, size: bar.update(task, advance=size, description=escape(name[-40:]))


@contextmanager
def steps_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar over steps on standard error; silent where that is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    err = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as bar:
        task = bar.add_task("")
        yield lambda what, done, total: bar.update(
            task, description=escape(what), completed=done, total=total
        )
