# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of a Llama-shaped decoder with quantized linear layers, against bfloat16.

    python bench/decode.py [--layers 32] [--json PATH]

transformers' LlamaForCausalLM with the shapes of the 8B model and random weights; quantize_model
replaces all linear layers but lm_head. Decode: one token for each sequence by replays of a CUDA
graph, at batch 1 and 16, with a static cache of 512 positions. Prefill: 8192 tokens of one
sequence. Every model runs in the same process, bfloat16 first and last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import machine

import pyfmt.nn

CONTEXT = 512
MODELS: dict[str, dict[str, Any]] = {
    "mxfp4 weight-only": {"weight": "mxfp4"},
    "nvfp4 weight-only": {"weight": "nvfp4"},
    "int4 weight-only": {"weight": "int4"},
    "mxint8 weight-only": {"weight": "mxint8"},
    "mxfp4 x mxfp4, rotated 32": {"weight": "mxfp4", "activation": "mxfp4", "rotation": 32},
    "mxfp4 x mxfp4, rotated 32, kept": {
        "weight": "mxfp4", "activation": "mxfp4", "rotation": 32, "expanded": "keep",
    },
}  # fmt: skip


def decoder(layers: int, small: bool, device: str) -> Any:
    """A decoder with random weights; `small` for trying this program out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 16384,
    }  # fmt: skip
    if small:
        shape |= {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "vocab_size": 512}
    config = LlamaConfig(
        num_hidden_layers=layers, attn_implementation="sdpa", dtype=torch.bfloat16, **shape
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
    # What to_empty left without values: the rotary embedding's frequencies.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    return model


class Step:
    """One token for each of `batch` sequences: a captured graph."""

    def __init__(self, model: Any, batch: int) -> None:
        from transformers import StaticCache

        device = model.device
        self.cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        self.model, self.batch = model, batch
        prompt = torch.randint(0, model.config.vocab_size, (batch, 64), device=device)
        with torch.no_grad():
            model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = prompt[:, -1:].clone()
        self.position = torch.full((batch, 1), 64, device=device)
        self.mask = torch.zeros((batch, 1, 1, CONTEXT), dtype=torch.bfloat16, device=device)
        self.mask[..., 65:] = torch.finfo(torch.bfloat16).min
        self.logits = self.run()

    def run(self) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = self.model(
                self.token, past_key_values=self.cache, use_cache=True,
                position_ids=self.position, attention_mask=self.mask,
            ).logits  # fmt: skip
        return out

    def capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.run()


def seconds(call: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(model: Any, tokens: int) -> dict[str, float]:
    """Tokens a second at batch 1 and 16, and of a prefill."""
    found = {}
    for batch in (1, 16):
        step = Step(model, batch)
        step.capture()
        found[f"decode {batch}"] = batch / seconds(step.graph.replay, 15)
        del step
    prompt = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)

    def prefill() -> None:
        with torch.no_grad():
            model(prompt, use_cache=False, logits_to_keep=1)

    found["prefill"] = tokens / seconds(prefill, 3)
    torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="+", default=list(MODELS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = machine() | {"layers": options.layers, "prefill_tokens": options.tokens}
    print(json.dumps(facts))
    dense = decoder(options.layers, False, "cuda")
    results = {"bfloat16": measure(dense, options.tokens)}
    for name in options.only:
        model = decoder(options.layers, False, "cuda")
        report = pyfmt.nn.quantize_model(model, progress=False, **MODELS[name])
        assert len(report.replaced) == 7 * options.layers, report
        results[name] = measure(model, options.tokens)
        del model, report
        torch.cuda.empty_cache()
    results["bfloat16, again"] = measure(dense, options.tokens)
    base = results["bfloat16"]
    for name, found in results.items():
        words = (f"{k} {v:9.1f} tok/s {v / base[k]:5.2f}x" for k, v in found.items())
        print(f"{name:34} " + "   ".join(words))
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "lines": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
