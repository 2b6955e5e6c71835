# SPDX-License-Identifier: Apache-2.0
"""What a study's numbers come to: means over tensors, win rates, effects of rotation, findings."""

from __future__ import annotations

import statistics
from typing import Any

from pyfmt.formats import Format, get_format
from pyfmt.study.measure import choices
from pyfmt.theory import rivals

Facts = dict[str, Any]
BEST = "best"  # in the place of a choice: each format with the choice that suits the tensor best


def formats_of(facts: Facts) -> list[Format]:
    """Return the formats that were measured, in their order."""
    return [get_format(key) for key in facts["settings"]["formats"]]


def pairs_of(facts: Facts) -> list[tuple[Format, Format]]:
    """Return the (integer, float) pairs among the formats."""
    return rivals(formats_of(facts))


def by_integer(facts: Facts) -> dict[Format, list[Format]]:
    """Return the float rivals of each integer format that has some."""
    found: dict[Format, list[Format]] = {}
    for integer, floating in pairs_of(facts):
        found.setdefault(integer, []).append(floating)
    return found


def rotations_of(facts: Facts) -> list[str]:
    """Return "0" and the rotations' sizes."""
    return [str(rotation) for rotation in facts["settings"]["rotations"]]


def kinds_of(facts: Facts) -> list[str]:
    """Return "weight" and "activation", as far as the model's tensors have them."""
    held = {tensor["kind"] for tensor in facts["model"]["tensors"]} if facts["model"] else set()
    return [kind for kind in ("weight", "activation") if kind in held]


def tensors_of(facts: Facts, kind: str, rotation: str = "0") -> list[Facts]:
    """Return the tensors of a kind that a rotation fits."""
    if not facts["model"]:
        return []
    return [
        tensor
        for tensor in facts["model"]["tensors"]
        if tensor["kind"] == kind and rotation in tensor["qsnr"]
    ]


def decibels(qsnr: Facts, format: Format, choice: str) -> float | None:
    """Return one QSNR of a table [format][choice]; None where it is no number."""
    own: dict[str, float | None] = qsnr[format.key]
    if choice != BEST:
        return own[choice]
    finite = [one for one in own.values() if one is not None]
    return max(finite) if finite else None


def mean_qsnr(facts: Facts, kind: str, rotation: str, format: Format, choice: str) -> float | None:
    """Return the mean over tensors of their QSNR in dB, as the paper averages."""
    found = [
        decibels(tensor["qsnr"][rotation], format, choice)
        for tensor in tensors_of(facts, kind, rotation)
    ]
    finite = [one for one in found if one is not None]
    return statistics.fmean(finite) if finite else None


def win_rate(
    facts: Facts, kind: str, rotation: str, pair: tuple[Format, Format], choice: str
) -> float | None:
    """Return the share of tensors whose QSNR is higher in the integer format; ties count half."""
    won = []
    for tensor in tensors_of(facts, kind, rotation):
        ours, theirs = (decibels(tensor["qsnr"][rotation], one, choice) for one in pair)
        if ours is not None and theirs is not None:
            won.append(0.5 if ours == theirs else float(ours > theirs))
    return statistics.fmean(won) if won else None


def crest_quartiles(
    facts: Facts, kind: str, rotation: str, block: str
) -> tuple[float, float, float] | None:
    """Return the quartiles over tensors of a tensor's mean crest factor, as the paper has them."""
    means = [
        tensor["crest"][rotation][block][0]
        for tensor in tensors_of(facts, kind, rotation)
        if block in tensor["crest"][rotation]
    ]
    means = [mean for mean in means if mean is not None]
    if len(means) < 2:
        return (means[0],) * 3 if means else None
    low, middle, high = statistics.quantiles(means, n=4, method="inclusive")
    return (low, middle, high)


def own_rotation(facts: Facts, format: Format) -> str:
    """Return the measured rotation nearest to a format's block: rotated within blocks."""
    block = format.block_columns(128)
    sizes = [int(size) for size in rotations_of(facts) if size != "0"]
    return str(min(sizes, key=lambda size: abs(size - block)))


def rotation_gain(facts: Facts, kind: str, format: Format) -> float | None:
    """Return what rotation by the own block adds to the mean QSNR in dB, default choice."""
    choice, rotation = choices(format)[0], own_rotation(facts, format)
    plain = mean_qsnr(facts, kind, "0", format, choice)
    turned = mean_qsnr(facts, kind, rotation, format, choice)
    return None if plain is None or turned is None else turned - plain


def sigma_range(facts: Facts, format: Format, choice: str) -> tuple[float, float] | None:
    """Return the lowest and highest QSNR that Gaussian data have at one sigma of the octave."""
    found = facts["data"]["gaussian"]["by_sigma"][format.key][choice]
    return None if None in found else (min(found), max(found))


def rule_range(facts: Facts, format: Format, dataset: str = "gaussian") -> dict[str, float]:
    """Return the QSNR of every choice on drawn data, the best first."""
    own = facts["data"][dataset]["qsnr"]["0"][format.key]
    known = {choice: db for choice, db in own.items() if db is not None}
    return dict(sorted(known.items(), key=lambda item: -item[1]))


def findings(facts: Facts) -> list[str]:
    """Return what the numbers say, one sentence or two each, every figure from the facts."""
    said = [*_rules(facts), *_sigmas(facts), *_input_dtype(facts), *_codes(facts)]
    for kind in kinds_of(facts):
        said += _wins(facts, kind)
        said += _hurt(facts, kind)
    return said


def _spread(own: dict[str, float]) -> tuple[str, float, str, float]:
    """Best and worst choice; `ceil` is left out where others are there, it is never meant."""
    meant = {name: db for name, db in own.items() if name != "ceil"} or own
    names = list(meant)
    return names[0], meant[names[0]], names[-1], meant[names[-1]]


def _rules(facts: Facts) -> list[str]:
    said = []
    for integer, floating in pairs_of(facts):
        if integer.scale != "e8m0":
            continue
        a, b = rule_range(facts, integer), rule_range(facts, floating)
        default = choices(integer)[0]
        if default not in a or default not in b:
            continue
        best, high, worst, low = _spread(a)
        best_f, high_f, worst_f, low_f = _spread(b)
        gap, gap_best = a[default] - b[default], high - high_f
        if max(high - low, high_f - low_f) < 0.25:
            continue
        said.append(
            f"{integer.name} on Gaussian data: {high:.2f} dB by {best}, {low:.2f} by {worst}; "
            f"{floating.name}: {high_f:.2f} by {best_f}, {low_f:.2f} by {worst_f}. With {default} "
            f"for both, the integer is {abs(gap):.2f} dB {_ahead(gap)}; each at its best rule "
            f"{abs(gap_best):.2f} dB {_ahead(gap_best)}."
        )
    return said


def _ahead(gap: float) -> str:
    return "ahead" if gap > 0 else "behind"


def _sigmas(facts: Facts) -> list[str]:
    ranges = [
        (high - low, format.name, choice, low, high)
        for format in formats_of(facts)
        if format.scale == "e8m0"
        for choice in choices(format)[:2]
        for low, high in [sigma_range(facts, format, choice) or (0.0, 0.0)]
    ]
    if not ranges:
        return []
    _, name, choice, low, high = max(ranges)
    return [
        f"At a single sigma {name} ({choice}) reads anything from {low:.2f} to {high:.2f} dB: "
        "formats with power-of-two scales can only be compared over an octave of sigma."
    ]


def _input_dtype(facts: Facts) -> list[str]:
    said = []
    for format in formats_of(facts):
        choice = choices(format)[0]
        short, full = (
            facts["data"][name]["qsnr"]["0"][format.key][choice]
            for name in ("gaussian", "gaussian_float32")
        )
        if None not in (full, short) and abs(full - short) >= 0.1:
            said.append(
                f"{format.name} resolves its input's dtype: Gaussian data stored in bfloat16 give "
                f"{short:.2f} dB, in float32 {full:.2f}."
            )
    return said


def _codes(facts: Facts) -> list[str]:
    """Where the theory's 2^(b-1) for the largest code moves a crossover."""
    said = []
    for one in facts["theory"]:
        as_is, exact = one["crossover"], one["crossover_exact"]
        reach = one["largest_kappa"]
        if as_is and exact and abs(as_is - exact) >= 0.1 and (reach is None or as_is < reach):
            names = [get_format(one[side]).name for side in ("integer", "floating")]
            said.append(
                f"Theory gives {names[0]} the code 2^(b-1), which it does not have; with its own "
                f"largest it meets {names[1]} at a crest factor of {exact:.2f}, not {as_is:.2f}."
            )
    return said


def _wins(facts: Facts, kind: str) -> list[str]:
    parts = []
    for pair in pairs_of(facts):
        choice, rotation = choices(pair[0])[0], own_rotation(facts, pair[0])
        plain = win_rate(facts, kind, "0", pair, choice)
        turned = win_rate(facts, kind, rotation, pair, choice)
        if plain is not None:
            after = "" if turned is None else f" ({100 * turned:.0f}% rotated by {rotation})"
            parts.append(f"{pair[0].name} over {pair[1].name} {100 * plain:.0f}%{after}")
    head = f"INT wins over FP in {len(tensors_of(facts, kind))} {plural(kind)}: "
    return [head + ", ".join(parts) + "."] if parts else []


def _hurt(facts: Facts, kind: str) -> list[str]:
    gains = [(rotation_gain(facts, kind, format), format) for format in formats_of(facts)]
    known = sorted(((gain, format.name) for gain, format in gains if gain is not None))
    worse = [f"{name} {gain:+.2f}" for gain, name in known if gain <= -0.05]
    better = [f"{name} {gain:+.2f}" for gain, name in reversed(known) if gain >= 0.05]
    if not known:
        return []
    return [
        f"Rotation by the own block, {plural(kind)}, mean dB: "
        + (f"hurts {', '.join(worse)}" if worse else "hurts no format")
        + "; "
        + (f"helps {', '.join(better)}" if better else "helps no format")
        + "."
    ]


def plural(kind: str) -> str:
    return {"weight": "weights", "activation": "activations"}[kind]


def said(choice: str) -> str:
    """Return a choice as it is printed."""
    return "each its best" if choice == BEST else choice
