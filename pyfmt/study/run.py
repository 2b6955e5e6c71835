# SPDX-License-Identifier: Apache-2.0
"""The job of `pyfmt study`: measure part by part, keep what is done, go on from what was kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyfmt import theory
from pyfmt._machine import machine
from pyfmt.formats import Format
from pyfmt.study import measure
from pyfmt.study.data import DATASETS, Dataset, octave
from pyfmt.study.source import Source, Tensor

SCHEMA = 1
FULL = {"sigmas": 64, "rows": 128}  # 2^23 elements of each kind of data
QUICK = {"sigmas": 32, "rows": 16}
LEAST_BLOCKS = 100  # fewer make no point

Facts = dict[str, Any]


def study(
    formats: Sequence[Format],
    *,
    source: Source | None = None,
    quick: bool = False,
    elements: int | None = None,
    seed: int = 0,
    earlier: Facts | None = None,
    keep: Callable[[Facts], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Facts:
    """Measure `formats` on drawn data and on the tensors of `source`; return plain data.

    `keep(facts)` is called after each part with all that is known, "complete" being false until
    the end. `earlier`, such facts of an interrupted run, saves the parts that it holds, if its
    settings are the same. `progress(what, done, total)` is called before each part. `elements`
    is noted among the settings.
    """
    size = QUICK if quick else FULL
    facts: Facts = {
        "schema": SCHEMA,
        "complete": False,
        "settings": {
            "formats": [format.key for format in formats],
            "quick": quick,
            "rotations": list(measure.ROTATIONS),
            "datasets": list(DATASETS),
            "sigmas": size["sigmas"],
            "rows": size["rows"],
            "seed": seed,
            "model": source.name if source else None,
            "fingerprint": source.fingerprint if source else None,
            "elements": elements,
        },
        "machine": machine(),
        "theory": [_crossing(*pair) for pair in theory.rivals(formats)],
        "data": {},
        "model": None,
    }
    if not resumable(earlier, facts):
        earlier = None
    tell = progress or (lambda what, done, total: None)
    total = len(DATASETS) + (source.count if source else 0)
    keep = keep or (lambda facts: None)
    if earlier:
        facts |= {"data": earlier["data"], "model": earlier["model"]}
    for done, dataset in enumerate(DATASETS.values()):
        if dataset.name not in facts["data"]:
            tell(dataset.label, done, total)
            facts["data"][dataset.name] = _drawn(dataset, formats, size, seed)
        keep(facts)
    if source:
        model = facts["model"] = facts["model"] or {
            "name": source.name,
            "tensors": [],
            "left_out": dict(source.left_out),
        }
        held = {one["name"] for one in model["tensors"]} | set(model["left_out"])
        for done, tensor in enumerate(source.read(), start=len(DATASETS)):
            if tensor.name in held:
                continue
            tell(tensor.name, done, max(total, done))
            why = _unfit(tensor)
            if why:
                model["left_out"][tensor.name] = why
            else:
                model["tensors"].append(_real(tensor, formats))
            keep(facts)
        if not model["tensors"]:
            raise ValueError(
                f"{source.name}: nothing to measure; every tensor is all zero or has "
                "NaN or infinity"
            )
    facts["complete"] = True
    keep(facts)
    tell("done", total, total)
    return facts


def resumable(earlier: Facts | None, facts: Facts) -> bool:
    """Whether an interrupted run had the same settings, so that its parts can be taken over."""
    return bool(
        earlier
        and earlier.get("schema") == SCHEMA
        and earlier.get("complete") is False
        and earlier.get("settings") == json.loads(json.dumps(facts["settings"]))
        and isinstance(earlier.get("data"), dict)
    )


def _crossing(integer: Format, floating: Format) -> Facts:
    reach = theory.largest_kappa(integer)
    return {
        "integer": integer.key,
        "floating": floating.key,
        "rho": theory.default_rho(integer),
        "crossover": _rounded(theory.crossover(integer, floating)),
        "crossover_exact": _rounded(theory.crossover(integer, floating, exact=True)),
        "crossover_rho_1": _rounded(theory.crossover(integer, floating, rho=1.0)),
        "largest_kappa": _rounded(reach) if math.isfinite(reach) else None,
    }


def _drawn(dataset: Dataset, formats: Sequence[Format], size: dict[str, int], seed: int) -> Facts:
    """Average the noise-to-signal ratio over the sigmas: each of them counts the same."""
    ratios: dict[str, Any] = {
        str(rotation): measure.table(formats, lambda format, choice: [])
        for rotation in measure.ROTATIONS
    }
    kappas: dict[str, dict[str, list[np.ndarray]]] = {
        str(rotation): {} for rotation in measure.ROTATIONS
    }
    blocks = measure.Blocks(_in_pairs(formats))
    for x in octave(dataset, count=size["sigmas"], rows=size["rows"], seed=seed):
        for rotation in measure.ROTATIONS:
            y = measure.rotated(x, rotation)
            for block, kappa in measure.crest_factors(y).items():
                kappas[str(rotation)].setdefault(block, []).append(kappa)
            for format in formats:
                for choice in measure.choices(format):
                    one = measure.noise(y, format, choice)
                    ratios[str(rotation)][format.key][choice].append(one.noise / one.signal)
        blocks.add(x)

    def decibels(ratio: float) -> float:
        return float(-10 * np.log10(ratio)) if ratio > 0 else math.inf

    facts: Facts = {
        "qsnr": _each(ratios, lambda ratio: decibels(float(np.mean(ratio)))),
        "crest": {
            rotation: {block: measure.crest_summary(parts) for block, parts in one.items()}
            for rotation, one in kappas.items()
        },
        "points": blocks.points(LEAST_BLOCKS),
    }
    if dataset.name == "gaussian":
        facts["by_sigma"] = _each(ratios["0"], lambda ratio: [decibels(one) for one in ratio])
    return _rounded(facts)


def _real(tensor: Tensor, formats: Sequence[Format]) -> Facts:
    turned = {
        str(rotation): measure.rotated(tensor.rows, rotation)
        for rotation in measure.ROTATIONS
        if not rotation or tensor.rows.shape[1] % rotation == 0
    }
    return _rounded(
        {
            "name": tensor.name,
            "kind": tensor.kind,
            "shape": list(tensor.shape),
            "rows": len(tensor.rows),
            "crest": {name: measure.crest_table(rows) for name, rows in turned.items()},
            "qsnr": {name: measure.qsnr_table(rows, formats) for name, rows in turned.items()},
        }
    )


def _unfit(tensor: Tensor) -> str:
    """Say why a tensor cannot be measured, or ""."""
    if not np.isfinite(tensor.rows).all():
        return "it holds NaN or infinity"
    return "" if tensor.rows.any() else "it is all zero"


def _in_pairs(formats: Sequence[Format]) -> list[Format]:
    return list(dict.fromkeys(one for pair in theory.rivals(formats) for one in pair))


def _each(tree: Any, turn: Callable[[Any], Any]) -> Any:
    return {k: _each(v, turn) for k, v in tree.items()} if isinstance(tree, dict) else turn(tree)


def _rounded(data: Any) -> Any:
    """Keep three decimals, below what sampling leaves certain; None where nothing was lost."""
    if isinstance(data, float):
        return round(data, 3) if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return [_rounded(value) for value in data] if isinstance(data, list) else data


def written(facts: Facts) -> str:
    """Return the JSON text: as many things on a line as fit in 120 columns."""
    return _lines(facts, "") + "\n"


def _lines(data: Any, indent: str) -> str:
    flat = json.dumps(data)
    if not isinstance(data, dict | list) or not data or len(indent) + len(flat) <= 120:
        return flat
    deeper = indent + " "
    if isinstance(data, dict):
        inside = [f"{json.dumps(key)}: {_lines(value, deeper)}" for key, value in data.items()]
    else:
        inside = [_lines(value, deeper) for value in data]
    left, right = "{}" if isinstance(data, dict) else "[]"
    return f"{left}\n{deeper}" + f",\n{deeper}".join(inside) + f"\n{indent}{right}"
