# SPDX-License-Identifier: Apache-2.0
"""A real transformer, small enough to make on the spot."""

from __future__ import annotations

from pathlib import Path


def tiny_encoder(path: Path, kind: str = "Bert") -> Path:
    """Write a model of one layer with random weights and a tokenizer of single letters."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Llama's have a token for the end, and none for padding.
    special = {"pad_token": "[PAD]"} if kind == "Bert" else {"eos_token": "[PAD]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", **special
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        initializer_range=0.2,
    )
    getattr(transformers, f"{kind}Model")(config).save_pretrained(path)
    return path
