# SPDX-License-Identifier: Apache-2.0
"""gemlite's W4A16 in groups of 128 as a rival, with configurations that were tuned before.

    python bench/gemlite_rival.py [--rows M ...]

times gemlite's own candidates ("fast" autotuning) for N = K = 8192, a process for each number of
rows, and keeps what won in bench/results, so that a benchmark need not search.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).resolve().parent / "results" / "gemlite_h200.json"
ROWS = (1, 4, 16, 32, 64, 256, 1024, 4096)
SIZE = 8192


def layer(w: torch.Tensor) -> Any:
    """A layer of gemlite with symmetric 4-bit codes of w in groups of 128."""
    from gemlite.core import DType, GemLiteLinear

    groups = w.float().view(-1, 128)
    scale = groups.abs().amax(1, keepdim=True) / 7
    codes = (groups / scale).round().clamp(-7, 7) + 8
    made = GemLiteLinear(
        4, group_size=128, in_features=w.shape[1], out_features=w.shape[0], input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )  # fmt: skip
    zeros = torch.full_like(scale, 8)
    made.pack(codes.to(torch.uint8).view(w.shape), scale.bfloat16(), zeros.bfloat16(), None)
    return made


def rival(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> Callable[[int], Any] | None:
    """Calls on copies of a weight; None, and a sentence, where gemlite would first have to tune."""
    try:
        from gemlite.core import GemLiteLinear
    except ImportError:
        return None
    gpu = torch.cuda.get_device_name(0)
    if not TUNED.exists() or gpu != json.loads(TUNED.read_text(encoding="utf-8"))["gpu"]:
        print(f"gemlite: no configurations for {gpu}; run python bench/gemlite_rival.py")
        return None
    if tuple(weights[0].shape) != (SIZE, SIZE):
        return None
    configs = json.loads(TUNED.read_text(encoding="utf-8"))["configs"]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(configs))
        file.flush()
        GemLiteLinear.load_config(file.name)
    try:
        layers = [layer(w) for w in weights]
        with torch.no_grad():
            y = layers[0](x).float()
    except Exception as error:  # a rival's failure is its own
        print(f"gemlite: {type(error).__name__}: {error}")
        return None
    want = x.float() @ weights[0].float().t()
    assert (y - want).norm() < 0.2 * want.norm(), "gemlite: wrong results"
    return lambda i: layers[i % len(layers)](x)


def tune_one(rows: int, to: str) -> None:
    from gemlite.core import GemLiteLinear

    torch.manual_seed(0)
    w = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, SIZE, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(w)(x)
    torch.cuda.synchronize()
    GemLiteLinear.cache_config(to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--one", help="tune one number of rows, and write here")
    options = parser.parse_args()
    if options.one:
        tune_one(options.rows[0], options.one)
        return
    merged: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for m in options.rows:
            to = str(Path(folder) / f"{m}.json")
            command = [sys.executable, __file__, "--rows", str(m), "--one", to]
            started.append((m, to, subprocess.Popen(command)))
        for m, to, process in started:
            if process.wait():
                raise SystemExit(f"gemlite: tuning for {m} rows failed")
            for kernel, found in json.loads(Path(to).read_text(encoding="utf-8")).items():
                merged.setdefault(kernel, {}).update(found)
    record = {"gpu": torch.cuda.get_device_name(0), "configs": merged}
    TUNED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{TUNED}: {sum(map(len, merged.values()))} configurations")


if __name__ == "__main__":
    main()
