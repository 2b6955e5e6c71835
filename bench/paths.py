# SPDX-License-Identifier: Apache-2.0
"""Time every GEMM path that can serve a call, and make the table of paths from that.

    python bench/paths.py [--write] [--json PATH] [--rows M ...]

For each row of the table (what operands allow) and each size of a weight, its paths are timed over
the number of rows M, by replays of CUDA graphs in turn with weights rotated among copies; a table
that loses least against the best path at each M is printed. --write puts it into
pyfmt/_matmul_table.py. Takes half a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
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
# Weights that stand for those of up to SIZES[0] rows, up to SIZES[1], and more.
SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192))
# Left and right formats, and what the weight is kept expanded for, that stand for a row.
PAIRS: dict[str, tuple[tuple[str | None, str, str], ...]] = {
    "codes-4": (("mxfp4", "mxfp4", ""),),
    "codes-int-4": (("mxint4", "mxint4", ""),),
    "fold-4": (("mxfp6_e2m3", "mxfp4", ""),),
    "fold-6": (("mxfp6_e2m3", "mxfp6_e2m3", ""),),
    "codes-4 kept": (("mxfp4", "mxfp4", "fold"),),
    "codes-int-4 kept": (("mxint4", "mxint4", "fold"),),
    "fold-4 kept": (("mxfp6_e2m3", "mxfp4", "fold"),),
    "fold-6 kept": (("mxfp6_e2m3", "mxfp6_e2m3", "fold"),),
    "bf16-4": ((None, "mxfp4", ""), (None, "nvfp4", ""), ("nvfp4", "nvfp4", "")),
    "bf16-6": ((None, "mxfp6_e2m3", ""),),
    "bf16-8": ((None, "mxint8", ""), (None, "mxfp8_e4m3", "")),
    "bf16-4 kept": ((None, "mxfp4", "exact"),),
    "bf16-6 kept": ((None, "mxfp6_e2m3", "exact"),),
    "bf16-8 kept": ((None, "mxint8", "exact"),),
    "groups-4": ((None, "int4", ""),),
    "groups-8": ((None, "int8", ""),),
    "small groups-4": ((None, "int4-b32-bf16", ""), (None, "int4-b64-bf16", "")),
    "small groups-8": ((None, "int8-b32-bf16", ""), (None, "int8-b64-bf16", "")),
    "any": ((None, "mxfp4", ""),),
}
# Rows between which a path is worth its time here, and the paths in the order of the table.
SPAN = {"skinny": (1, 64), "wide": (8, 4096), "fold": (8, 4096), "exact": (24, 4096)}
ORDER = ("skinny", "wide", "fold", "exact", "portable")
# What a change of path from one M to the next must bring, as a fraction of the time.
SWITCH = 0.03


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
                if path == "wide" and row.startswith("small"):
                    low = 1
                if not low <= m <= high or paths.cannot(path, call, device) is not None:
                    continue
                if keep and path != keep and m > 256:
                    continue  # a kept weight is faster there
                found[row, i, path] = w.linear(x, right, left, expanded=kept, path=path)
    return found


def limits(times: dict[int, list[dict[str, float]]]) -> tuple[list[Any], float, int]:
    """Entries (path, limit) of one size, what they lose where that is worst, and the M of it.

    A path's loss at M is the largest over the pairs. Of all ways through the paths from few rows to
    many, that with the least sum of losses, where a change of path counts as much as SWITCH.
    """
    rows = sorted(times)
    names = [p for p in ORDER if any(p in one for one in times[rows[0]] + times[rows[-1]])]
    names += [p for p in ORDER if p not in names and any(p in o for m in rows for o in times[m])]

    def loss(path: str, m: int) -> float:
        return max(
            one.get(path, 10 * max(one.values())) / min(one.values()) - 1 for one in times[m]
        )

    # The least sum up to a row that ends with a path, and the paths taken.
    sums: dict[str, tuple[float, tuple[str, ...]]] = dict.fromkeys(names, (0.0, ()))
    for m in rows:
        sums = {
            n: min(
                (s + (SWITCH if taken and taken[-1] != n else 0) + loss(n, m), (*taken, n))
                for s, taken in sums.values()
            )
            for n in names
        }
    _, taken = min(sums.values())
    ends = [i for i in range(len(rows)) if i + 1 == len(rows) or taken[i] != taken[i + 1]]
    entries: list[Any] = [(taken[i], rows[i]) for i in ends]
    entries[-1] = (entries[-1][0], None)
    worst, where = max((loss(n, m), m) for n, m in zip(taken, rows, strict=True))
    return entries, worst, where


def text_of(table: dict[str, list[list[Any]]]) -> str:
    """The text of pyfmt/_matmul_table.py with another table; what stands around it stays."""
    text = Path(_matmul_table.__file__).read_text(encoding="utf-8")
    head, _, rest = text.partition("TABLE: ")
    lines = []
    for row, by_size in table.items():
        lines.append(f'    "{row}": (')
        for entries in by_size:
            words = [f'("{path}", {limit})' for path, limit in entries]
            line = f"        ({', '.join(words)}{',' * (len(words) == 1)}),"
            # As the formatter has it.
            many = ["        (", *(f"            {word}," for word in words), "        ),"]
            lines += [line] if len(line) <= 100 else many
        lines.append("    ),")
    mine = "TABLE: dict[str, tuple[Entries, ...]] = {\n" + "\n".join(lines) + "\n}\n"
    return head + mine + rest.partition("\n}\n")[2]


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
    table: dict[str, list[list[Any]]] = defaultdict(list)
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
                entries, loss, where = limits(times[row])
                if row == "any":
                    entries = [*entries[:-1], ("skinny", 64), ("portable", None)]
                if entries[0][0] == "wide":
                    entries = [*entries, ("skinny", 64)]  # devices without it
                table[row].append(entries)
                words = ", ".join(f"{path} {limit or ''}".strip() for path, limit in entries)
                print(
                    f"{n:5} x {k:5} {row:12} {words}; at most {loss:.0%} over the best, M = {where}"
                )
            del w
            torch.cuda.empty_cache()
    if options.json:
        record = {"machine": facts, "sizes": _matmul_table.SIZES, "lines": lines, "table": table}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.write:
        Path(_matmul_table.__file__).write_text(text_of(table), encoding="utf-8")
        print(f"{_matmul_table.__file__}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
