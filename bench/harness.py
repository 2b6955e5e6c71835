# SPDX-License-Identifier: Apache-2.0
"""Timing that can be believed: interleaved runs, medians with p20/p80, one machine record.

Every line carries the bytes it must move, so that it can be put beside a copy of the same run, and
may carry the fraction of the copy's rate that is aimed at.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Case:
    """One thing to time: a call, what it is, and the bytes it reads and writes."""

    name: str
    call: Callable[[], Any]
    bytes: int
    elements: int
    group: str = ""
    rival_of: str | None = None  # the name of the cases, of any room, that this is the rival of
    room: str = ""
    aim: float | None = None  # fraction of the copy's rate
    check: Callable[[Any], None] | None = None  # raises AssertionError on a wrong result


@dataclass
class Line:
    """One measured case: seconds as median, p20, p80."""

    name: str
    group: str
    median: float
    p20: float
    p80: float
    gbytes_per_s: float
    gelements_per_s: float
    of_copy: float | None = None
    rivals: dict[str, float] = field(default_factory=dict)
    room: str = ""
    aim: float | None = None

    @property
    def missed(self) -> bool:
        """Whether the line stays below its aim."""
        return self.aim is not None and (self.of_copy or 0.0) < self.aim


PACKAGES = ("torch", "torchao", "numpy", "triton", "gemlite", "transformers")


def machine() -> dict[str, Any]:
    """Return what was measured on: processor, threads, versions, commit."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu

    def said(*command: str) -> str:
        try:
            run = subprocess.run(
                command, cwd=RESULTS.parent, capture_output=True, text=True, check=False
            )
        except OSError:
            return ""
        return run.stdout.strip()

    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        # A copy without its history is told what it is a copy of.
        "commit": os.environ.get("PYFMT_COMMIT") or said("git", "describe", "--always", "--dirty"),
        "versions": {n: installed(n) for n in PACKAGES},
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        record["driver"] = said(*query).partition("\n")[0]
    return record


def measure(cases: Sequence[Case], *, seconds: float = 0.5, rounds: int = 15) -> list[Line]:
    """Time the cases in turn, round by round, so that drift of the machine hits all alike.

    Each round runs a case often enough to fill `seconds / rounds`; a case slower than that runs
    once, and one slower than `seconds` only in the first three rounds, or in the first if it
    takes more than twice as long.
    """
    counts, timers = [], []
    for case in cases:
        timer = Timer("f()", globals={"f": case.call}, num_threads=torch.get_num_threads())
        once = timer.timeit(1).mean
        if once < 2 * seconds:
            once = timer.timeit(1).mean
        timers.append(timer)
        counts.append((max(1, int(seconds / rounds / once)), once))
    times: list[list[float]] = [[] for _ in cases]
    for i in range(rounds):
        for samples, timer, (count, once) in zip(times, timers, counts, strict=True):
            if once < seconds or i < (3 if once < 2 * seconds else 1):
                samples.append(timer.timeit(count).mean)
    return lines_of(cases, times)


def lines_of(cases: Sequence[Case], times: Sequence[Sequence[float]]) -> list[Line]:
    """Return the measured line of each case, its rivals' times in terms of its own beside it."""
    lines = []
    for case, samples in zip(cases, times, strict=True):
        p20, median, p80 = _quantiles(samples)
        lines.append(
            Line(
                case.name,
                case.group,
                median,
                p20,
                p80,
                case.bytes / median / 1e9,
                case.elements / median / 1e9,
                room=case.room,
                aim=case.aim,
            )
        )
    for case, line in zip(cases, lines, strict=True):
        for mine in lines:
            if case.rival_of is not None and mine.name == case.rival_of:
                mine.rivals[case.name] = line.median / mine.median
    return lines


def verify(cases: Sequence[Case]) -> int:
    """Call every case once and check what it returns; AssertionError where a bit is wrong."""
    checked = 0
    for case in cases:
        if case.check is None:
            continue
        try:
            case.check(case.call())
        except AssertionError as error:
            where = f" in the {case.room} room" if case.room else ""
            raise AssertionError(f"{case.name}{where}: {error}; nothing was timed") from None
        checked += 1
    return checked


def _quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


def against_copy(lines: Sequence[Line], copy: Line) -> None:
    """Fill in each line's rate as a fraction of the copy rate measured in the same run."""
    for line in lines:
        if line.gbytes_per_s:
            line.of_copy = line.gbytes_per_s / copy.gbytes_per_s


def report(title: str, lines: Sequence[Line]) -> None:
    """Print the lines as one aligned table."""
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    for column in (
        "room",
        "median",
        "p20",
        "p80",
        "GB/s",
        "G elem/s",
        "of copy",
        "aim",
        "faster than",
    ):
        left = column in ("room", "faster than")
        table.add_column(column, justify="left" if left else "right")
    group = None
    for line in lines:
        if group is not None and line.group != group:
            table.add_section()
        group = line.group
        rivals = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in line.rivals.items())
        table.add_row(
            line.name,
            line.room,
            *(_time(t) for t in (line.median, line.p20, line.p80)),
            f"{line.gbytes_per_s:.2f}" if line.gbytes_per_s else "",
            f"{line.gelements_per_s:.3g}" if line.gelements_per_s else "",
            "" if line.of_copy is None else f"{line.of_copy:.2f}",
            "" if line.aim is None else f"{line.aim:.2f} {'missed' if line.missed else 'reached'}",
            rivals,
        )
    Console(width=None if Console().is_terminal else 150).print(table)


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def save(name: str, lines: Sequence[Line], **facts: Any) -> Path:
    """Write the lines with their machine to bench/results/<name>.json, or to a path *.json."""
    return write(name, [asdict(line) for line in lines], **facts)


def write(name: str, lines: Sequence[dict[str, Any]], **facts: Any) -> Path:
    """The same for lines that are plain data."""
    path = Path(name) if name.endswith(".json") else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), **facts, "lines": list(lines)}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each case")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--save", metavar="NAME", help="write bench/results/NAME.json (or a path *.json)"
    )
    return parser
