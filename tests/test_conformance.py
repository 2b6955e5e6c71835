# SPDX-License-Identifier: Apache-2.0
"""Conformance to other libraries, bit for bit, as a table.

Each row of CONFORMANCE names a peer's call, the options of pyfmt that equal it, and the
differences that are known, with the reason. The check behind a row predicts the peer's bits: equal
to pyfmt's wherever no difference is listed, and exactly what the listed reason gives elsewhere.
tests/peers holds the checks; `python -m tests.test_conformance` prints the table for the README.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest

from pyfmt.formats import get_element
from pyfmt.reference import codec
from tests import grids, oracle
from tests.peers import compressed, elements, gguf, torchao
from tests.peers.common import CHECKS

PEERS = (elements, torchao, compressed, gguf)  # importing them filled CHECKS


@dataclass(frozen=True)
class Row:
    """One claim of conformance and the name of the check that holds it."""

    library: str
    call: str
    pyfmt: str
    differences: tuple[str, ...]
    check: str


_TOP = "an infinity gives a finite scale (byte 255 - emax) instead of NaN"
_LOW = "blocks whose byte is 0 divide by 2^-126 instead of 2^-127"
_OVER = "undefined for NaN, infinity, and maxima that round up beyond their dtype"

CONFORMANCE = (
    Row("ml_dtypes", "casts to float8, float6, float4", "elements, any rule",
        ("overflow saturates instead of becoming NaN or infinity",), "ml_dtypes"),
    *(Row("torchao 0.18", f"to_mx, {rule.upper()}: MXFP8, MXFP6, MXFP4",
          f'scale_rule="{rule}"', (_TOP, _LOW), f"torchao_{rule}")
      for rule in ("floor", "ceil", "even")),
    Row("torchao 0.18", "to_mx, RCEIL: MXFP8, MXFP6, MXFP4", 'scale_rule="rceil"',
        ("an infinity gives byte 254 instead of NaN",
         "blocks whose byte is 0 are not scaled at all",
         "log2 in float32 misses maxima an ulp or so above Qmax * 2^E: byte one lower"),
        "torchao_rceil"),
    Row("torchao 0.18", "nvfp4_quantize with per_tensor_scale", 'nvfp4, recipe="torchao"',
        ("a tensor of zeros (or below 448 * 6 * 2^-150) has tensor scale 0 instead of 1",
         "NaN and infinity spoil the tensor's scale instead of their block"), "torchao_nvfp4"),
    Row("torchao 0.18", "nvfp4_quantize, single level", 'nvfp4, recipe="single_level"',
        ("scales below 2^-6 become 2^-6", "amax / 6 instead of amax * (1 / 6)"),
        "torchao_nvfp4_single"),
    Row("torchao 0.18", "to_blocked", 'to_layout("blocked_128x4")', (), "torchao_blocked"),
    Row("compressed-tensors", "mxfp4-pack-quantized", 'mxfp4, scale_rule="even"',
        ("-0.0 becomes +0", _OVER), "compressed_mxfp4"),
    Row("compressed-tensors", "generate_mx_scales, MXFP6 E2M3", 'mxfp6_e2m3, scale_rule="even"',
        (_OVER,), "compressed_mxfp6"),
    Row("compressed-tensors", "generate_mx_scales, MXFP8", 'mxfp8_e4m3, scale_rule="even"',
        ("rounds to a 1-bit mantissa: one byte higher for mantissas from 1.75 to 1.9375", _OVER),
        "compressed_mxfp8"),
    Row("compressed-tensors", "nvfp4-pack-quantized", 'nvfp4, recipe="nvidia"',
        ("stores S = 1 / tensor_scale", "S = 2688 * (1 / amax) instead of 2688 / amax",
         "(amax / 6) * S instead of amax * (S * (1 / 6))",
         "x / (s / S) instead of x * (1 / (s / S))", "a scale of 0 becomes 0.125",
         "-0.0 becomes +0", "NaN and infinity are not handled"), "compressed_nvfp4"),
    Row("gguf", "MXFP4 quantize", 'mxfp4, scale_rule="floor"',
        ("nibbles: element j low, j + 16 high", "ties go toward zero", "never -0",
         "log2 in float32 misses maxima just below a power of two: byte one higher",
         "undefined below 2^-125, next to 2^128, for NaN and infinity"), "gguf_mxfp4"),
    Row("gguf", "MXFP4 dequantize", "mxfp4",
        ("nibbles: element j low, j + 16 high", "code 8 is +0", "byte 255 is 2^128, not NaN"),
        "gguf_mxfp4_decode"),
    Row("gguf", "NVFP4 dequantize", "e2m1-b16-e4m3",
        ("nibbles: element j low, j + 8 high", "code 8 is +0", "scales have no sign",
         "scale 0x7F is 0 and 0xFF is 480, not NaN"), "gguf_nvfp4_decode"),
)  # fmt: skip


def table() -> str:
    """The rows as Markdown."""
    lines = ["| library | call | pyfmt | known differences |", "|---|---|---|---|"]
    for row in CONFORMANCE:
        differences = "; ".join(row.differences) or "none"
        lines.append(f"| {row.library} | {row.call} | `{row.pyfmt}` | {differences} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("row", CONFORMANCE, ids=lambda row: row.check)
def test_conformance(row: Row) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CHECKS[row.check]()


def test_every_check_stands_in_the_table() -> None:
    assert [row.check for row in CONFORMANCE] == list(dict.fromkeys(r.check for r in CONFORMANCE))
    assert {row.check for row in CONFORMANCE} == set(CHECKS)
    assert table().count("\n") == len(CONFORMANCE) + 2


def test_predictions_lean_on_the_oracle() -> None:
    # The encoder that the predictions above use is itself checked against exact arithmetic.
    element = get_element("e2m1")
    y = grids.element_grid(element)
    wanted = [oracle.nearest_magnitude(abs(oracle.fraction(v)[0]), element) for v in y[:, None]]
    assert np.array_equal(codec.encode(np.abs(y), element), np.array(wanted))


if __name__ == "__main__":
    print(table(), end="")
