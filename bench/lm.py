# SPDX-License-Identifier: Apache-2.0
"""What train_lm.py trains: a Llama-shaped decoder on bytes, and the text that Python comes with."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

# One file of so many is kept for validation.
HELD_OUT = 20
TEXT = {".py", ".rst", ".txt"}


@dataclass(frozen=True)
class Shape:
    """A decoder; 7 layers of 768 are 50M parameters."""

    width: int = 768
    layers: int = 7
    heads: int = 12
    hidden: int = 2048
    context: int = 512


# What happens between the products. compile_pieces has each of them become one kernel forward and
# one backward: eager they are half of a step.


def add_norm(x: Tensor, y: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual stream with y added, and its norm in a dtype."""
    x = x + y
    return x, functional.rms_norm(x, x.shape[-1:], weight, 1e-5).to(dtype)


def rotary(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (batch, heads, tokens, width); queries and keys with the halves of
    each head turned by the position's angles."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    return turned(q), turned(k), v


def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def compile_pieces() -> None:
    """Compile them, for all models of this process; same arithmetic, fewer roundings in between."""
    for name in ("add_norm", "rotary", "gated"):
        globals()[name] = torch.compile(globals()[name], dynamic=False)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = rotary(self.qkv(x), self.heads, *turn)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.ones(shape.width))
        self.attention = Attention(shape)
        self.between = nn.Parameter(torch.ones(shape.width))
        self.gate_up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(
        self, x: Tensor, y: Tensor, turn: tuple[Tensor, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """x: the residual stream, y: what is to be added to it; returns the next of both."""
        x, y = add_norm(x, y, self.before, dtype)
        x, y = add_norm(x, self.attention(y, turn), self.between, dtype)
        return x, self.down(gated(self.gate_up(y)))


class Decoder(nn.Module):
    """RMSNorm, rotary positions, SwiGLU, no biases; one token a byte."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.lm_head = nn.Linear(shape.width, 256, bias=False)
        half = shape.width // shape.heads // 2
        rates = 10000.0 ** (-torch.arange(half) / half)
        angles = torch.arange(shape.context)[:, None] * rates
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                scale = (2 * shape.layers) ** -0.5 if deep else 1.0
                nn.init.normal_(parameter, 0, 0.02 * scale)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        tokens, dtype = ids.shape[1], x.dtype
        if torch.is_autocast_enabled(ids.device.type):
            dtype = torch.get_autocast_dtype(ids.device.type)
        turn = (self.cos[:tokens].to(dtype), self.sin[:tokens].to(dtype))
        y = torch.zeros_like(x, dtype=dtype)
        for block in self.blocks:
            x, y = block(x, y, turn, dtype)
        return self.lm_head(add_norm(x, y, self.norm, dtype)[1])


@dataclass
class Corpus:
    """Bytes to train on and to validate with, and what they are."""

    train: Tensor
    held_out: Tensor
    facts: dict[str, int | str]

    def to(self, device: str) -> Corpus:
        return Corpus(self.train.to(device), self.held_out.to(device), self.facts)


def standard_library() -> Iterator[Path]:
    """The files of Python's standard library, installed packages left out, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root).parts
        if path.suffix in TEXT and not {"site-packages", "dist-packages"} & set(inside):
            yield path


def corpus(paths: Iterable[Path] | None = None, most: int = 1 << 27) -> Corpus:
    """Read the texts, one after the other, each ended by a zero byte."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    digest, size = hashlib.sha256(), 0
    for i, path in enumerate(standard_library() if paths is None else paths):
        data = path.read_bytes() + b"\0"
        digest.update(data)
        parts[i % HELD_OUT == HELD_OUT - 1].append(data)
        size += len(data)
        if size > most:
            break
    train, held_out = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts
    )
    facts: dict[str, int | str] = {
        "source": "Python's standard library" if paths is None else "files given",
        "files": sum(map(len, parts)),
        "train_bytes": len(train),
        "held_out_bytes": len(held_out),
        "sha256": digest.hexdigest(),
    }
    return Corpus(train, held_out, facts)


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets that begin at `starts`."""
    at = starts.to(text.device)[:, None] + torch.arange(context + 1, device=text.device)
    ids = text[at].long()
    return ids[:, :-1], ids[:, 1:]
