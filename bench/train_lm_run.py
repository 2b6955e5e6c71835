# SPDX-License-Identifier: Apache-2.0
"""One training run of train_lm.py: its settings, its steps, its checkpoint."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm import Corpus, Decoder, Shape, windows
from torch import Tensor
from torch.nn import functional

from pyfmt import _atomic
from pyfmt.nn import prepare_for_training


@dataclass(frozen=True)
class Settings:
    """What makes two runs comparable."""

    shape: Shape = field(default_factory=Shape)
    steps: int = 400
    batch: int = 64
    rate: float = 1e-3
    warmup: int = 60
    decay: float = 0.1
    log: int = 20
    held_out: int = 8  # batches of validation

    def record(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.rate * (0.55 + 0.45 * math.cos(math.pi * done))


TINY = Settings(Shape(64, 2, 2, 96, 32), steps=8, batch=4, warmup=2, log=2, held_out=2)


class Run:
    """One training run, from the start or from its checkpoint."""

    def __init__(self, recipe: str, seed: int, settings: Settings, text: Corpus, device: str):
        self.recipe, self.seed, self.settings, self.text = recipe, seed, settings, text
        self.device = device
        torch.manual_seed(seed)
        self.model = Decoder(settings.shape).to(device)
        if recipe != "bf16":
            replaced = prepare_for_training(self.model, recipe).replaced
            assert len(replaced) == 4 * settings.shape.layers, replaced
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.decay}, {"params": vectors}],
            weight_decay=0.0, betas=(0.9, 0.95), fused=device != "cpu",
        )  # fmt: skip
        self.step = 0
        self.seconds = 0.0
        self.losses: list[list[float]] = []
        self.pending: list[Tensor] = []

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.seed}"

    def loss(self, text: Tensor, starts: Tensor) -> Tensor:
        ids, targets = windows(text, starts, self.settings.shape.context)
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16):
            logits = self.model(ids)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def starts(self, text: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        most = len(text) - self.settings.shape.context - 1
        return torch.randint(most, (self.settings.batch,), generator=generator)

    def advance(self) -> None:
        """One step. All that is drawn depends on the seed and the number of the step alone."""
        torch.manual_seed(self.seed << 32 | self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.step)
        loss = self.loss(self.text.train, self.starts(self.text.train, self.seed << 32 | self.step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.pending.append(loss.detach())
        self.step += 1
        if self.step % self.settings.log == 0 or self.step == self.settings.steps:
            self.losses.append([self.step, torch.stack(self.pending).mean().item()])
            self.pending.clear()

    def validate(self) -> float:
        """The loss on held-out text, the same windows for every run, in nats a byte."""
        # As in training: without gradients the compiled pieces would be others.
        parts = [
            self.loss(self.text.held_out, self.starts(self.text.held_out, i)).detach()
            for i in range(self.settings.held_out)
        ]
        return torch.stack(parts).mean().item()

    def train(self, stop: Callable[[Run], bool]) -> bool:
        """Train until the end (True) or until `stop` says so after a step (False)."""
        began = time.perf_counter()
        try:
            while self.step < self.settings.steps:
                self.advance()
                if self.step < self.settings.steps and stop(self):
                    return False
            return True
        finally:
            self.finish()
            self.seconds += time.perf_counter() - began

    def finish(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def result(self) -> dict[str, Any]:
        tokens = self.step * self.settings.batch * self.settings.shape.context
        return {
            "recipe": self.recipe,
            "seed": self.seed,
            "held_out": self.validate(),
            "losses": self.losses,
            "tokens": tokens,
            "tokens_per_s": tokens / self.seconds,
        }

    def identity(self) -> dict[str, Any]:
        facts = {"recipe": self.recipe, "seed": self.seed, "text": self.text.facts["sha256"]}
        return facts | {"settings": self.settings.record()}

    def save(self, folder: Path) -> None:
        """Write the checkpoint under its name whole or not at all."""
        state = {
            "identity": json.dumps(self.identity(), sort_keys=True),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "pending": self.pending,
        }
        target = self.path(folder)
        temporary = _atomic.temporary_name(target)
        try:
            with open(temporary, "xb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, folder: Path) -> bool:
        """Go on from a checkpoint, if there is one; SystemExit where it is of another run."""
        if not self.path(folder).exists():
            return False
        state = torch.load(self.path(folder), map_location=self.device, weights_only=True)
        if state["identity"] != json.dumps(self.identity(), sort_keys=True):
            sys.exit(
                f"{self.path(folder)} is of other settings or another text; remove it, or pass "
                "another --checkpoints folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self.pending = state["losses"], state["pending"]
        return True

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.pt"
