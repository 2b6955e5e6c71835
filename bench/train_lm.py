# SPDX-License-Identifier: Apache-2.0
"""Train one small language model by every recipe: same seed, same data, same order.

    python bench/train_lm.py [--recipes bf16 mxint8 ...] [--seeds 3] [--steps 400]
        [--device cuda:0 cuda:1] [--seconds 80] [--json PATH] [--checkpoints FOLDER]
        [--figure PATH] [--draw]

A Llama-shaped decoder of 50M parameters learns the bytes of the Python standard library's sources
and documentation (bench/lm.py). float32 master weights, bfloat16 autocast, AdamW; a recipe
quantizes all linear layers but the last, bf16 none.

Every finished run is written to the JSON at once; runs that are there are not repeated, those of
other settings are refused. --seconds ends a visit: the run under way leaves a checkpoint and goes
on from it next time, on the same curve (bit for bit where the device's own kernels are
deterministic). Seeds go round by round, so that all recipes have the first one early. A process for
each device that is named takes the next run as it gets free; one device may be named twice.
"""

from __future__ import annotations

import argparse
import json
import queue
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm
import torch
from harness import machine
from lm import Corpus, Decoder, corpus
from torch import multiprocessing
from train_lm_chart import chart
from train_lm_run import TINY, Run, Settings

from pyfmt import _atomic
from pyfmt.nn import RECIPES

NAMES = ("bf16", *RECIPES)


# The record of finished runs.


def read_record(path: Path, settings: Settings, text: Corpus) -> dict[str, Any]:
    """What is finished; SystemExit where the file holds runs of other settings or another text."""
    if not path.exists():
        facts = {"settings": settings.record(), "text": text.facts}
        return {"machine": machine(), **facts, "parameters": parameters(settings), "runs": []}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["settings"] != settings.record() or record["text"] != text.facts:
        sys.exit(f"{path} holds runs of other settings or another text; pass another --json")
    return record


def parameters(settings: Settings) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(settings.shape).parameters())


def write_record(path: Path, record: dict[str, Any]) -> None:
    record["summary"] = summary(record["runs"])
    _atomic.write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each recipe: held-out loss over seeds, and its distance from bf16 on the same seeds."""
    lost = {(run["recipe"], run["seed"]): run["held_out"] for run in runs}
    found: dict[str, Any] = {}
    for name in NAMES:
        mine = {seed: loss for (recipe, seed), loss in lost.items() if recipe == name}
        if not mine:
            continue
        apart = [
            100 * (loss / lost["bf16", seed] - 1)
            for seed, loss in mine.items()
            if ("bf16", seed) in lost
        ]
        found[name] = {
            "seeds": sorted(mine),
            "held_out": statistics.mean(mine.values()),
            "spread": max(mine.values()) - min(mine.values()),
            "percent_over_bf16": statistics.mean(apart) if apart else None,
            "percent_range": [min(apart), max(apart)] if apart else None,
        }
    return found


def table(record: dict[str, Any]) -> str:
    lines = [f"{'recipe':12} {'seeds':>5} {'held out':>9} {'spread':>8}  over bf16 (range)"]
    for name, row in record["summary"].items():
        over = ""
        if row["percent_range"]:
            low, high = row["percent_range"]
            over = f"{row['percent_over_bf16']:+.3f}% ({low:+.3f} to {high:+.3f})"
        lines.append(
            f"{name:12} {len(row['seeds']):5} {row['held_out']:9.4f} {row['spread']:8.4f}  {over}"
        )
    return "\n".join(lines)


# The visit.

Job = tuple[str, int]  # recipe, seed
Result = tuple[str, int, Any]  # and what Worker.work returned


def plan(recipes: list[str], seeds: int, record: dict[str, Any]) -> list[Job]:
    done = {(run["recipe"], run["seed"]) for run in record["runs"]}
    return [(r, s) for s in range(seeds) for r in recipes if (r, s) not in done]


@dataclass
class Worker:
    """Trains what it is given on one device, in a process of its own or in this one."""

    settings: Settings
    text: Corpus
    device: str
    compiled: bool
    checkpoints: Path
    every: int
    stop_at: int | None
    ends: float | None  # by time.time()
    asked: Callable[[], bool]  # whether a signal wants the visit to end

    def start(self) -> None:
        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        self.text = self.text.to(self.device)
        if self.compiled:
            lm.compile_pieces()
            warm = Run("bf16", 0, self.settings, self.text, self.device)
            warm.loss(self.text.train, warm.starts(self.text.train, 0)).backward()
            warm.finish()

    def over(self) -> bool:
        return self.asked() or (self.ends is not None and time.time() > self.ends)

    def stop(self, run: Run) -> bool:
        if self.over() or run.step == self.stop_at:
            return True
        if run.step % self.every == 0:
            run.save(self.checkpoints)
        return False

    def work(self, recipe: str, seed: int) -> dict[str, Any] | None:
        """The result of a run; None where it was stopped before its end."""
        run = Run(recipe, seed, self.settings, self.text, self.device)
        run.load(self.checkpoints)
        if not run.train(self.stop):
            run.save(self.checkpoints)
            print(f"{run.name}: stopped at step {run.step}, {run.seconds:.1f} s", flush=True)
            return None
        result = run.result()
        print(f"{run.name}: {result['held_out']:.4f}, {run.seconds:.1f} s", flush=True)
        return result


def here(worker: Worker, jobs: Iterator[Job]) -> Iterator[Result]:
    """Run after run in this process, until the visit is over."""
    started = False
    for recipe, seed in jobs:
        if worker.over():
            return
        if not started:
            worker.start()
            started = True
        result = worker.work(recipe, seed)
        yield recipe, seed, result
        if result is None:
            return


def _serve(worker: Worker, jobs: list[Job], taken: Any, results: Any, asked: Any) -> None:
    for number in (2, 15):  # the first process is told, and tells
        signal.signal(number, signal.SIG_IGN)
    worker.asked = asked.is_set

    def next_ones() -> Iterator[Job]:
        while True:
            with taken.get_lock():
                at, taken.value = taken.value, taken.value + 1
            if at >= len(jobs):
                return
            yield jobs[at]

    try:
        for result in here(worker, next_ones()):
            results.put(result)
    except BaseException:
        results.put(traceback.format_exc())
    results.put(None)


def beside(worker: Worker, devices: list[str], jobs: list[Job]) -> Iterator[Result]:
    """Runs by a process for each device, each taking the next one that is left."""
    context = multiprocessing.get_context("spawn")
    taken, results, told = context.Value("i", 0), context.Queue(), context.Event()
    asked, worker.asked = worker.asked, bool
    processes = []
    try:
        for device in devices:
            worker.device = device
            args = (worker, jobs, taken, results, told)
            processes.append(context.Process(target=_serve, args=args))
            processes[-1].start()
        left = len(devices)
        while left:
            if asked():
                told.set()
            try:
                result = results.get(timeout=0.5)
            except queue.Empty:
                if not any(process.is_alive() for process in processes):
                    raise RuntimeError("a process ended without a word") from None
                continue
            if isinstance(result, str):
                raise RuntimeError(f"a process failed:\n{result}")
            left -= result is None
            if result is not None:
                yield result
    finally:
        told.set()
        for process in processes:
            process.join(60)
            process.kill()


def report(record: dict[str, Any], figure: Path | None) -> None:
    print(table(record))
    if figure:
        _atomic.write_bytes(figure, chart(record))


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each recipe")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seconds", type=float, help="end the visit after so many")
    parser.add_argument("--stop-at", type=int, help="end the visit after this step of a run")
    parser.add_argument(
        "--every", type=int, default=400, help="steps from checkpoint to checkpoint"
    )
    parser.add_argument("--json", type=Path, default=Path("out/train_lm.json"))
    parser.add_argument("--checkpoints", type=Path, default=Path("out/train_lm"))
    parser.add_argument("--figure", type=Path, help="draw what is finished into this PNG")
    parser.add_argument("--draw", action="store_true", help="only print and draw the JSON")
    parser.add_argument("--text", type=Path, nargs="+", help="files instead of Python's library")
    parser.add_argument("--tiny", action="store_true", help="a model to try this program out with")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", nargs="+", default=[device], help="a process for each")
    parser.add_argument(
        "--eager", action="store_true", help="do not compile what is between the products"
    )
    options = parser.parse_args(given)
    if options.draw:
        report(json.loads(options.json.read_text(encoding="utf-8")), options.figure)
        return 0
    ends = None if options.seconds is None else time.time() + options.seconds
    base = TINY if options.tiny else Settings()
    named = {"steps": options.steps, "batch": options.batch, "rate": options.rate}
    settings = Settings(**base.__dict__ | {k: v for k, v in named.items() if v is not None})
    for folder in (options.json.parent, options.checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    text = corpus(options.text, 1 << 20 if options.tiny else 1 << 27)
    record = read_record(options.json, settings, text)
    asked: list[int] = []  # signals
    before = {s: signal.signal(s, lambda n, _: asked.append(n)) for s in (2, 15)}
    first, *others = options.device
    worker = Worker(
        settings, text, first, first != "cpu" and not options.eager, options.checkpoints,
        options.every, options.stop_at, ends, lambda: bool(asked),
    )  # fmt: skip
    left = plan(options.recipes, options.seeds, record)
    try:
        for recipe, seed, result in (
            beside(worker, options.device, left) if others else here(worker, iter(left))
        ):
            if result is None:
                continue
            record["runs"].append(result)
            write_record(options.json, record)
            (options.checkpoints / f"{recipe}-{seed}.pt").unlink(missing_ok=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    unfinished = bool(plan(options.recipes, options.seeds, record))
    if record["runs"]:
        report(record, options.figure)
    print("unfinished: call again" if unfinished else "all runs are finished")
    return 0


if __name__ == "__main__":
    sys.exit(main())
