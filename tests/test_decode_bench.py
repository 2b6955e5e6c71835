# SPDX-License-Identifier: Apache-2.0
"""bench/decode.py: its attention and its choice of a token, and a tiny run of all of it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyfmt.ops", exc_type=ImportError)

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("decode")
    with module.inductor.patch({"triton.enable_pdl": False}):  # restored after its own models
        yield module


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("place", [0, 5, 255])
def test_attention_of_one_token_is_attention_to_it_and_those_before(
    decode: Any, place: int, batch: int
) -> None:
    torch.manual_seed(place)
    heads, kept, size, context = 4, 2, 16, decode.CONTEXT
    keys, values = torch.randn(2, batch, kept, context, size, dtype=torch.bfloat16)
    query = torch.randn(batch, heads, 1, size, dtype=torch.bfloat16)
    key, value = torch.randn(2, batch, kept, 1, size, dtype=torch.bfloat16)
    # What lies beyond the position belongs to nobody.
    module = SimpleNamespace(keys=keys.clone(), values=values.clone())
    position = torch.tensor([place])
    y, _ = decode.attention(module, query, key, value, None, scaling=0.25, position=position)
    keys[:, :, place], values[:, :, place] = key[:, :, 0], value[:, :, 0]
    assert torch.equal(module.keys, keys) and torch.equal(module.values, values)
    want = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys[:, :, : place + 1].double(), values[:, :, : place + 1].double(),
        scale=0.25, enable_gqa=True,
    )  # fmt: skip
    assert y.shape == (batch, 1, heads, size)
    torch.testing.assert_close(y.double(), want.transpose(1, 2), rtol=2**-7, atol=2**-8)


def test_the_next_token_is_the_first_of_the_likeliest(decode: Any) -> None:
    logits = torch.randn(3, 1024, dtype=torch.bfloat16)
    logits[0, [700, 300]], logits[1, [5, 3]], logits[2, 1023] = 9, 9, 9
    token, position = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([4])
    decode.advance(logits, token, position)
    assert token.tolist() == [[300], [3], [1023]] and position.tolist() == [5]


def test_a_tiny_run(decode: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    words = ["--small", "--layers", "2", "--tokens", "32", "--batch", "1", "--backend", "eager"]
    decode.main([*words, "--only", "mxfp4", "mxfp4-head", "--json", str(tmp_path / "x.json")])
    lines = json.loads((tmp_path / "x.json").read_text())["lines"]
    assert list(lines) == ["bfloat16", "mxfp4", "mxfp4-head", "bfloat16, again"]
    assert all(set(v) == {"decode 1", "prefill"} and min(v.values()) > 0 for v in lines.values())
    assert capsys.readouterr().out.count(" tok/s ") == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_to_do(decode: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decode.main([])
    assert "pass --small to try it on the CPU" in capsys.readouterr().err


def test_without_transformers_it_says_what_to_do(
    decode: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        decode.main(["--small"])
    assert "pip install transformers" in capsys.readouterr().err
