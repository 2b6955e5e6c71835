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


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (rotary(part, *turn) for part in parts[:2])
        y = functional.scaled_dot_product_attention(q, k, parts[2], is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of each head by the position's angles."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.before = nn.RMSNorm(shape.width, eps=1e-5)
        self.attention = Attention(shape)
        self.between = nn.RMSNorm(shape.width, eps=1e-5)
        self.gate_up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.before(x), turn)
        gate, up = self.gate_up(self.between(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class Decoder(nn.Module):
    """RMSNorm, rotary positions, SwiGLU, no biases; one token a byte."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
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
        for block in self.blocks:
            x = block(x, turn)
        return self.lm_head(self.norm(x))


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
