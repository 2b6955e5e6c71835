# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of a Llama-shaped decoder with quantized linear layers, against bfloat16.

    python bench/decode.py [--layers 32] [--only NAMES] [--json PATH]

transformers' LlamaForCausalLM with the shapes of the 8B model and random weights; quantize_model
replaces all linear layers but lm_head (where the name says head, that too), and fuses q, k and v,
and gate and up, but where the name says apart. Every model runs in the same process, bfloat16 first
and last, with the same attention, the same options of torch.compile and the same graphs.

Decode: greedy generation after a prompt of 64 tokens, replays of one CUDA graph, at batch 1 and 16,
with keys and values of 256 positions. Prefill: 8192 tokens of one sequence, also a CUDA graph.
Keys and values are in buffers of the attention modules, by way of transformers' attention
interface, so that all layers share one compiled program. Generated logits are checked against a
pass over the whole sequence, and those of replays, in every bit, against those of single launches.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from harness import machine
from torch.nn.functional import scaled_dot_product_attention

import pyfmt.nn

CONTEXT, PROMPT = 256, 64
FUSED = {"fuse": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]}
W4A4 = {"weight": "mxfp4", "activation": "mxfp4", "rotation": 32}
MODELS: dict[str, dict[str, Any]] = {
    "mxfp4": {"weight": "mxfp4"} | FUSED,
    "mxfp4-apart": {"weight": "mxfp4"},
    "mxfp4-head": {"weight": "mxfp4", "skip": ()} | FUSED,
    "nvfp4": {"weight": "nvfp4"} | FUSED,
    "nvfp4-head": {"weight": "nvfp4", "skip": ()} | FUSED,
    "int4": {"weight": "int4"} | FUSED,
    "mxint8": {"weight": "mxint8"} | FUSED,
    "mxfp4-w4a4": W4A4 | FUSED,
    "mxfp4-w4a4-kept": W4A4 | FUSED | {"expanded": "keep"},
}
# Together with bfloat16 a few minutes, most of them compiling.
USUAL = ["mxfp4", "mxfp4-head", "nvfp4", "nvfp4-head", "mxfp4-w4a4"]


def attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, scaling: float,
    position: Any = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention; with a position, keys and values are kept in the module's buffers.

    That of one token is two products and a softmax, as transformers' own eager attention has it:
    torch's kernel with a mask (cuDNN's) takes twice as long for so few places.
    """
    if position is not None:
        module.keys.index_copy_(2, position, key)
        module.values.index_copy_(2, position, value)
    if position is None or query.shape[2] > 1:
        y = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return y.transpose(1, 2).contiguous(), None
    # Heads that share keys and values stand where other tokens would: nothing is repeated.
    batch, heads, _, size = key.shape
    grouped = query.view(batch, heads, -1, size)
    later = torch.arange(CONTEXT, device=key.device) > position
    scores = (grouped @ module.keys.mT).float() * scaling
    weights = scores.masked_fill(later, -torch.inf).softmax(-1).to(query.dtype)
    return (weights @ module.values).view(batch, 1, -1, size), None


def decoder(layers: int, small: bool, device: str) -> Any:
    """A decoder with random weights; `small` for trying this program out."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("buffers", attention)
    shape: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 16384,
    }  # fmt: skip
    if small:
        shape |= {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "vocab_size": 512}
    config = LlamaConfig(
        num_hidden_layers=layers, attn_implementation="buffers", dtype=torch.bfloat16, **shape
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


def advance(logits: torch.Tensor, token: torch.Tensor, position: torch.Tensor) -> None:
    """The next token is the likeliest one, at the next position."""
    # In two steps: one block of threads would go through all of them.
    best, index = logits.view(len(logits), -1, 256).max(-1)
    row = best.argmax(-1, keepdim=True)
    token.copy_(256 * row + index.gather(-1, row))
    position.add_(1)


def compiled(model: Any, backend: str) -> Callable[..., None]:
    """Compile each decoder layer; those of a model share one program for each shape.

    Inductor's kernels start before the one ahead ends, where it can have them so. Returns
    `advance`, compiled too.
    """
    torch._dynamo.config.recompile_limit = 64
    if hasattr(inductor.triton, "enable_pdl"):
        inductor.triton.enable_pdl = True
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    for part in (*model.model.layers, model.model.norm, model.model.rotary_emb):
        part.compile(**how)
    return torch.compile(advance, **how)


class Graph:
    """A call as a captured CUDA graph, and what it gives; on the CPU the call itself."""

    def __init__(self, call: Callable[[], Any], warm: int = 2) -> None:
        self.call, self.result = call, None
        if not torch.cuda.is_available():
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = call()
        self.call = graph.replay


class Generation:
    """Greedy generation for `batch` sequences, token by token."""

    def __init__(self, model: Any, batch: int, advance: Callable[..., None]) -> None:
        config, device = model.config, model.device
        size = (batch, config.num_key_value_heads, CONTEXT, config.head_dim)
        for layer in model.model.layers:
            for name in ("keys", "values"):
                empty = torch.zeros(size, dtype=torch.bfloat16, device=device)
                layer.self_attn.register_buffer(name, empty, persistent=False)
        self.model, self.advance = model, advance
        self.places = torch.arange(CONTEXT, device=device)
        generator = torch.Generator(device).manual_seed(1)
        self.prompt = torch.randint(
            0, config.vocab_size, (batch, PROMPT), device=device, generator=generator
        )
        self.token = self.prompt[:, -1:].clone()
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def restart(self) -> None:
        """Fill keys and values with the prompt's but the last, which is the first token to go."""
        with torch.compiler.set_stance("force_eager"):
            self.model(
                self.prompt, use_cache=False, logits_to_keep=1, position=self.places[:PROMPT],
                position_ids=self.places[None, :PROMPT],
            )  # fmt: skip
        self.token.copy_(self.prompt[:, -1:])
        self.position.fill_(PROMPT - 1)

    def step(self) -> torch.Tensor:
        """Generate a token; returns its logits."""
        out = self.model(
            self.token, use_cache=False, position_ids=self.position[None], position=self.position
        )
        self.logits = out.logits[:, -1]
        self.advance(self.logits, self.token, self.position)
        return self.logits

    def check(self) -> None:
        """Compare the logits after three tokens with those of a pass over the sequence.

        By two layers alone: quantized activations make large differences of small ones, for a code
        is another when a number crosses its border, and that in every layer anew. Logits that have
        nothing in common differ by 1.4.
        """
        config, layers = self.model.config, self.model.config.num_hidden_layers
        config.num_hidden_layers = min(2, layers)
        self.restart()
        tokens = [self.prompt]
        for _ in range(3):
            self.step()
            tokens.append(self.token.clone())
        with torch.compiler.set_stance("force_eager"):
            whole = self.model(torch.cat(tokens[:-1], 1), use_cache=False, logits_to_keep=1).logits
        config.num_hidden_layers = layers
        error = (self.logits - whole[:, -1]).float().norm() / whole.float().norm()
        layer = self.model.model.layers[0].mlp.down_proj
        if not error < (0.15 if getattr(layer, "activation_format", None) is None else 0.7):
            raise SystemExit(f"decode: logits differ from those of a whole pass by {error:.3f}")


def seconds(call: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def check_graph(generation: Generation, graph: Graph, steps: int = 8) -> None:
    """Compare logits of replays with those of the same kernels launched one by one.

    Python launches them more slowly than most of them run, so that few overlap as in a graph.
    """
    for call in (generation.step, graph.call):
        generation.restart()
        for _ in range(steps):
            call()
    if graph.result is not None and not torch.equal(generation.logits, graph.result):
        raise SystemExit("decode: replays of the graph give other logits than single launches")


def decode_rate(model: Any, batch: int, advance: Callable[..., None]) -> float:
    """Tokens a second of greedy generation."""
    generation = Generation(model, batch, advance)
    generation.check()
    generation.restart()
    graph = Graph(generation.step)
    check_graph(generation, graph)
    generation.restart()
    tokens = CONTEXT - PROMPT - 8

    def many() -> None:
        for _ in range(tokens // 3):
            graph.call()

    return batch * (tokens // 3) / seconds(many, 3)


def prefill_rate(model: Any, tokens: int) -> float:
    prompt = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    graph = Graph(lambda: model(prompt, use_cache=False, logits_to_keep=1), warm=1)
    graph.call()
    return tokens / seconds(graph.call, 3)


def measure(model: Any, options: Any) -> dict[str, float]:
    """Tokens a second at each batch, and of a prefill."""
    advance = compiled(model, options.backend)
    found = {}
    with torch.no_grad():
        for batch in options.batch:
            found[f"decode {batch}"] = decode_rate(model, batch, advance)
        if options.tokens:
            found["prefill"] = prefill_rate(model, options.tokens)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=8192, help="of the prefill; 0: none")
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=USUAL)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        parser.error("no GPU is visible, which this measures; pass --small to try it on the CPU")
    if importlib.util.find_spec("transformers") is None:
        parser.error("the decoder is transformers' own, which is missing; pip install transformers")
    facts = machine() | {"layers": options.layers, "prefill_tokens": options.tokens}
    facts |= {"context": CONTEXT, "prompt": PROMPT, "backend": options.backend}
    print(json.dumps(facts))
    results: dict[str, dict[str, float]] = {}

    def show(name: str, found: dict[str, float]) -> None:
        results[name] = found
        base = results["bfloat16"]
        words = (f"{k} {v:9.1f} tok/s {v / base[k]:5.2f}x" for k, v in found.items())
        print(f"{name:18} " + "   ".join(words), flush=True)
        if options.json:
            record = {"machine": facts, "lines": results}
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    dense = decoder(options.layers, options.small, device)
    show("bfloat16", measure(dense, options))
    for name in options.only:
        model = decoder(options.layers, options.small, device)
        report = pyfmt.nn.quantize_model(model, progress=False, **MODELS[name])
        head = "skip" in MODELS[name]
        assert len(report.replaced) == 7 * options.layers + head, report
        show(name, measure(model, options))
        del model, report
    show("bfloat16, again", measure(dense, options))


if __name__ == "__main__":
    main()
