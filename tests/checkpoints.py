# SPDX-License-Identifier: Apache-2.0
"""What the tests of quantized files share: files of any content, and how they compare."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pyfmt
from pyfmt import container
from pyfmt.container import Entry, Writer

BF16 = ml_dtypes.bfloat16


def write_raw(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    """Write a file with any header at all, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def same(a: Any, b: Any) -> None:
    """Two arrays, or two QTensors, of the same bits."""
    if isinstance(a, pyfmt.QTensor):
        assert (a.format, a.shape, a.axis, a.layout) == (b.format, b.shape, b.axis, b.layout)
        same(a.codes, b.codes)
        same(a.scales, b.scales)
        assert (a.tensor_scale is None) == (b.tensor_scale is None)
        if a.tensor_scale is not None:
            same(np.asarray(a.tensor_scale), np.asarray(b.tensor_scale))
        return
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with every kind of tensor that a model's checkpoint holds."""
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((6, 70)).astype(np.float32),
        "b.weight": rng.standard_normal((4, 64)).astype(np.float16),
        "c.weight": rng.standard_normal((2, 3, 64)).astype(BF16),
        "a.bias": np.arange(6, dtype=np.float32),
        "ids": np.arange(5, dtype=np.int64),
        "table": np.arange(6, dtype=np.float64).reshape(2, 3),
        "eight": np.arange(4, dtype=np.float32).reshape(2, 2).astype(ml_dtypes.float8_e4m3fn),
        "none": np.zeros((0, 4), np.float32),
        "one": np.float32(3).reshape(()),
    }
    path = tmp_path / "model.safetensors"
    entries = {name: Entry(container.type_name(a.dtype), a.shape) for name, a in tensors.items()}
    with Writer(path, entries, {"format": "pt"}) as out:
        for name, array in tensors.items():
            out.write(name, array)
    return path
