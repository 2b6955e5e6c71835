# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of one layer by every recipe, against bfloat16 in the same run.

    python bench/train_layer.py [--tokens 8192] [--sizes 4096 14336] [--recipes mxint8 ...]
        [--json PATH]

Times are replays of CUDA graphs of y = layer(x) and the gradients of x, weight and bias, all in
bfloat16, in turn with nn.Linear's; memory is what autograd keeps for backward beside the
parameters, and the most that a step allocates. Each recipe's results are compared with nn.Linear's
first, and nothing is timed where one is further off than quantization explains.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graphs import in_turn
from harness import machine
from torch import Tensor, nn

from pyfmt.nn import RECIPES, TrainLinear

# Times bfloat16's speed, and fractions of its memory, that are aimed at.
SPEED = {"mxfp4": 1.25, "mxint8": 0.75, "mxint8_full": 0.75, "mxfp8": 0.75}
MEMORY = {8: 0.6, 4: 0.33}
# The largest relative error, in norm, of y and gradients of Gaussian operands.
ERROR = {8: 0.08, 4: 0.35}


def bits(recipe: str) -> int:
    return 8 if "8" in recipe else 4


class Step:
    """A layer with its x and the gradient of its y."""

    def __init__(self, layer: nn.Linear, x: Tensor, g: Tensor) -> None:
        self.layer, self.x, self.g = layer, x, g
        self.wanted = (x, *layer.parameters())

    def __call__(self, _: int = 0) -> tuple[Tensor, ...]:
        y = self.layer(self.x)
        return (y.detach(), *torch.autograd.grad(y, self.wanted, self.g))

    def kept(self) -> int:
        """Bytes that autograd keeps for backward, parameters left out."""
        own = {p.untyped_storage().data_ptr() for p in self.layer.parameters()}
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.layer(self.x)
        return sum(found.values())

    def most(self) -> int:
        """Bytes that a step allocates at most, its results included."""
        if not self.x.is_cuda:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def distances(step: Step, dense: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative errors, in norm, of y, dx, dw and dbias."""
    names = ("y", "dx", "dw", "dbias")
    return {
        name: ((a.float() - b.float()).norm() / b.float().norm()).item()
        for name, a, b in zip(names, step(), dense, strict=True)
    }


def cpu_times(cases: dict[str, Callable[[int], Any]]) -> dict[str, tuple[float, float, float]]:
    """As in_turn, without a GPU: for trying this program out."""
    import time

    found = {}
    for name, call in cases.items():
        began = time.perf_counter()
        call(0)
        found[name] = (time.perf_counter() - began,) * 3
    return found


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sizes", type=int, nargs=2, default=[4096, 14336], metavar=("IN", "OUT"))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each recipe")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(given)
    torch.manual_seed(0)
    k, n = options.sizes
    how = {"device": options.device, "dtype": torch.bfloat16}
    dense = nn.Linear(k, n, **how)
    x = torch.randn(options.tokens, k, **how).requires_grad_()
    g = torch.randn(options.tokens, n, **how)
    steps = {"bf16": Step(dense, x, g)}
    for name in options.recipes:
        steps[name] = Step(TrainLinear.from_linear(dense, name), x, g)

    facts = {"tokens": options.tokens, "in": k, "out": n}
    print(json.dumps(machine() | facts), flush=True)
    want = steps["bf16"]()
    errors, wrong = {}, []
    for name in options.recipes:
        errors[name] = distances(steps[name], want)
        if max(errors[name].values()) > ERROR[bits(name)]:
            wrong.append(name)
            print(f"{name}: further from bfloat16 than it may be: {errors[name]}")
    if wrong:
        return 1
    del want
    memory = {name: {"kept": step.kept(), "most": step.most()} for name, step in steps.items()}
    measure = cpu_times if options.device == "cpu" else in_turn
    more = {} if options.device == "cpu" else {"seconds": options.seconds}
    times = measure(dict(steps), **more)

    flops = 6 * options.tokens * k * n
    lines = {}
    print(f"{'recipe':12} {'ms':>8} {'p20':>8} {'p80':>8} {'TFLOP/s':>8} {'x bf16':>7} "
          f"{'kept MB':>8} {'of bf16':>8} {'most MB':>8}")  # fmt: skip
    for name, (median, p20, p80) in times.items():
        line = {
            "seconds": median, "p20": p20, "p80": p80, "tflops": flops / median / 1e12,
            "speed": times["bf16"][0] / median, **memory[name],
            "of_bf16": memory[name]["kept"] / memory["bf16"]["kept"],
            "errors": errors.get(name, {}),
        }  # fmt: skip
        missed = name != "bf16" and (
            line["speed"] < SPEED.get(name, 0.0) or line["of_bf16"] > MEMORY[bits(name)]
        )
        lines[name] = line | {"missed": missed}
        note = "  missed" if missed else ""
        print(f"{name:12} {median * 1e3:8.3f} {p20 * 1e3:8.3f} {p80 * 1e3:8.3f} "
              f"{line['tflops']:8.1f} {line['speed']:7.2f} {line['kept'] / 1e6:8.1f} "
              f"{line['of_bf16']:8.3f} {line['most'] / 1e6:8.1f}{note}")  # fmt: skip
    if options.json:
        record = {"machine": machine(), **facts, "lines": lines}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
