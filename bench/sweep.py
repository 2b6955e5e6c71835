# SPDX-License-Identifier: Apache-2.0
"""Time over size on a GPU: quantize to mxfp4 and a copy from 2^12 to 2^31 elements."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import Turns, rooms
from device import event_time, graph_time
from harness import machine

# Up to 2^this elements calls are timed within a graph: launched one by one they would show the
# host's time. Larger ones outside: a copy of 2^28 elements or more that a graph holds is another
# kernel of the driver (memcpy32_post), 1.5 times slower than what copies outside.
GRAPH = 25
LABELS = {
    "copy_us": "copy of the input",
    "cuda_us": "quantize to mxfp4, CUDA room",
    "triton_us": "quantize to mxfp4, Triton room",
}


def points(smallest: int = 12, largest: int = 31, columns: int = 1024) -> list[dict[str, Any]]:
    """Return a record of microseconds a size."""
    found = []
    for power in range(smallest, largest + 1):
        n = 1 << power
        # Small inputs alternate among copies beyond the L2 cache, as larger ones do by themselves.
        copies = max(1, min(64, (1 << 27) // n))
        xs = torch.randn(copies, min(n, 1 << 24), device="cuda").bfloat16()
        xs = xs.repeat(1, n // xs.shape[1]).view(copies, -1, columns)
        out, turns = torch.empty_like(xs[0]), Turns(list(xs))
        calls: dict[str, Callable[[], Any]] = {
            f"{room.name}_us": lambda r=room, t=turns: r.quantize(t.x, "mxfp4")
            for room in rooms("cuda")
        }
        calls["copy_us"] = lambda o=out, t=turns: o.copy_(t.x)
        record: dict[str, Any] = {"elements": n}
        for what, call in calls.items():
            call()
            torch.cuda.synchronize()
            if power <= GRAPH:
                count = max(8, min(64, (1 << 29) // n))
                seconds = graph_time([call] * count, repeats=2, rounds=7)
            else:
                seconds = statistics.median(event_time(call, 5) for _ in range(5))
            record[what] = seconds * 1e6
        found.append(record)
        words = ", ".join(f"{LABELS[what]} {record[what]:.2f} us" for what in calls)
        print(f"2^{power:<3} {words}")
        del xs, out, turns, calls, call
        torch.cuda.empty_cache()
    return found


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "pyfmt"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    sizes = [point["elements"] for point in found]
    for (what, label), style in zip(LABELS.items(), ("s--", "o-", "^-"), strict=True):
        if what in found[0]:
            axes.loglog(sizes, [point[what] for point in found], style, label=label, markersize=4)
    axes.set(xlabel="elements (bfloat16)", ylabel="microseconds", title="Time over size")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=120)
    plt.close(figure)


def sweep(path: Path) -> None:
    """Write the JSON, and the plot beside it as SVG and PNG."""
    found = points()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "points": found}, indent=1) + "\n")
    plot(found, path)
