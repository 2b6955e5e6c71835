# SPDX-License-Identifier: Apache-2.0
"""Time every GEMM path that can serve a call, and make the table of paths from that.

    python bench/paths.py [--write] [--json PATH] [--rows M ...]

For each row of the table (what operands allow) and each size of a weight, its paths are timed over
the number of rows M, by replays of CUDA graphs in turn with weights rotated among copies. The
limits chosen are those for which the table's path takes the least time over the best one's where
that is worst. --write puts them into pyfmt/_matmul_table.py. Takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch
from graphs import in_turn
from harness import machine
from matmul import Weights, randn

import pyfmt
from pyfmt import _matmul_paths as paths
from pyfmt import _matmul_table, _torch_matmul

ROWS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
# Weights that stand for the sizes up to SIZES[0], SIZES[1], and beyond.
SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192))
# Left and right formats, and what the weight is kept expanded for, that stand for a row.
PAIRS: dict[str, tuple[tuple[str | None, str, str], ...]] = {
    "fold-4": (("mxfp4", "mxfp4", ""),),
    "fold-6": (("mxfp6_e2m3", "mxfp6_e2m3", ""),),
    "fold-4 kept": (("mxfp4", "mxfp4", "fold"),),
    "fold-6 kept": (("mxfp6_e2m3", "mxfp6_e2m3", "fold"),),
    "bf16-4": ((None, "mxfp4", ""), (None, "nvfp4", "")),
    "bf16-6": ((None, "mxfp6_e2m3", ""),),
    "bf16-8": ((None, "mxint8", ""), (None, "mxfp8_e4m3", "")),
    "bf16-4 kept": ((None, "mxfp4", "exact"),),
    "bf16-6 kept": ((None, "mxfp6_e2m3", "exact"),),
    "bf16-8 kept": ((None, "mxint8", "exact"),),
    "groups-4": ((None, "int4", ""),),
    "groups-8": ((None, "int8", ""),),
    "any": ((None, "mxfp4", ""),),
}
# Rows between which a path is worth its time here, and the paths in the order of the table.
SPAN = {"skinny": (1, 64), "wide": (8, 4096), "fold": (24, 4096), "exact": (24, 4096)}
ORDER = ("skinny", "wide", "fold", "exact", "portable")

Times = dict[tuple[str, int], dict[int, dict[str, float]]]  # (row, size): M: path: seconds


def cases(w: Weights, m: int) -> dict[tuple[str, int, str], Callable[[int], Any]]:
    """Calls by row of the table, which pair of it, and path."""
    device = _torch_matmul.machine_of(torch.device("cuda", 0))
    assert device is not None
    found: dict[tuple[str, int, str], Callable[[int], Any]] = {}
    for row, pairs in PAIRS.items():
        x = randn(m, w.k).half() if row == "any" else randn(m, w.k)
        for i, (left, right, keep) in enumerate(pairs):
            fmt = None if left is None else pyfmt.get_format(left)
            dtype = "float16" if row == "any" else "bfloat16"
            call = paths.Call(fmt, dtype, pyfmt.get_format(right), m, w.n, w.k, keep)
            assert paths.row_of(call) == row, (paths.row_of(call), row)
            kept = w.kept(right, keep) if keep else None
            for path in ORDER:
                low, high = SPAN.get(path, (1, 64) if row == "any" else (1, 0))
                if not low <= m <= high or paths.cannot(path, call, device) is not None:
                    continue
                if keep and path != keep and m > 256:
                    continue  # a kept weight is faster there
                found[row, i, path] = w.linear(x, right, left, expanded=kept, path=path)
    return found


def limits(times: dict[int, list[dict[str, float]]]) -> tuple[dict[str, int | None], float, int]:
    """The limit of each path that loses least, how much it loses where it is worst, and that M."""
    names = [p for p in ORDER if any(p in one for some in times.values() for one in some)]
    rows = sorted(times)
    best: tuple[float, float, int, dict[str, int | None]] | None = None
    for ends in combinations_with_replacement([0, *rows], len(names) - 1):
        worst, total, where = 0.0, 0.0, 0
        for m in rows:
            order = [n for n, end in zip(names, (*ends, rows[-1]), strict=True) if m <= end]
            for one in times[m]:
                taken = next((n for n in order if n in one), None)
                loss = 9.0 if taken is None else one[taken] / min(one.values()) - 1
                total += loss
                if loss > worst:
                    worst, where = loss, m
        if best is None or (round(worst, 2), total) < best[:2]:
            found: dict[str, int | None] = {n: e for n, e in zip(names, ends, strict=False) if e}
            whole = [n for n, e in found.items() if e == rows[-1]]
            if whole:  # what serves the most rows that were timed serves all beyond
                found = {n: e for n, e in found.items() if e != rows[-1]} | {whole[0]: None}
            else:
                found[names[-1]] = None
            best = (round(worst, 2), total, where, found)
    assert best is not None
    return best[3], best[0], best[2]


def text_of(table: dict[str, tuple[tuple[str, Any], ...]]) -> str:
    """The text of pyfmt/_matmul_table.py with other limits."""
    path = Path(_matmul_table.__file__)
    head = path.read_text(encoding="utf-8").partition("TABLE: ")[0]
    lines = []
    for row, entries in table.items():
        lines.append(f'    "{row}": (')
        for name, limit in entries:
            lines.append(f'        ("{name}", {limit!r}),')
        lines.append("    ),")
    return (
        f"{head}TABLE: dict[str, tuple[tuple[str, Limit], ...]] = {{\n" + "\n".join(lines) + "\n}\n"
    )


def table_of(found: dict[str, list[dict[str, int | None]]]) -> dict[str, Any]:
    """Rows of the table from each row's limits by size; native stands first where it may serve."""
    table: dict[str, Any] = {}
    for row, by_size in found.items():
        entries: list[tuple[str, Any]] = [] if "kept" in row else [("native", None)]
        last = by_size[-1]
        for name in (n for n in ORDER if any(n in one for one in by_size)):
            sizes = tuple(one.get(name, 0) for one in by_size)
            entries.append((name, None if all(s is None for s in sizes) else sizes))
        assert last
        table[row] = tuple(entries)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write pyfmt/_matmul_table.py")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no GPU is visible, which this measures")
    facts = machine()
    print(json.dumps(facts), flush=True)
    lines: list[dict[str, Any]] = []
    found: dict[str, list[dict[str, int | None]]] = defaultdict(list)
    with torch.no_grad():
        for n, k in SHAPES:
            # Few copies: only the cheapest calls would find a weight of this size in the cache.
            w = Weights(n, k, 4 if n * k < 1 << 27 else 2)
            times: dict[str, dict[int, list[dict[str, float]]]] = defaultdict(dict)
            for m in options.rows:
                mine = cases(w, m)
                calls = {f"{row}|{i}|{path}": call for (row, i, path), call in mine.items()}
                timed = in_turn(calls, seconds=0.0, rotate=len(w.dense), least=3, yardstick=False)
                by_pair: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
                for (row, i, path), (median, _, _) in zip(mine, timed.values(), strict=True):
                    by_pair[row, i][path] = median
                    lines.append(
                        {
                            "row": row, "pair": PAIRS[row][i], "shape": (m, n, k), "path": path,
                            "median": median,
                        }
                    )  # fmt: skip
                for (row, _), one in by_pair.items():
                    times[row].setdefault(m, []).append(one)
            for row in PAIRS:
                best, loss, where = limits(times[row])
                found[row].append(best)
                print(
                    f"{n:5} x {k:5} {row:12} {best}  at most {loss:.0%} over the best (M={where})"
                )
            del w
            torch.cuda.empty_cache()
    table = table_of(found)
    if options.json:
        record = {"machine": facts, "sizes": _matmul_table.SIZES, "lines": lines, "table": table}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.write:
        Path(_matmul_table.__file__).write_text(text_of(table), encoding="utf-8")
        print(f"{_matmul_table.__file__}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
