# SPDX-License-Identifier: Apache-2.0
"""gguf: MXFP4 both ways, NVFP4 decoding."""

from __future__ import annotations

import numpy as np

from pyfmt import reference
from pyfmt.formats import FORMATS, get_format
from pyfmt.reference import codec
from pyfmt.reference.layout import pack
from tests import mismatch
from tests.peers.common import check, float32_log2_is, inputs, ours, scaled


def halves(codes: np.ndarray) -> np.ndarray:
    """Nibbles as ggml stores a block: element j low, element j + half high."""
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << 4


@check("gguf_mxfp4")
def _() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    fmt, element = FORMATS["mxfp4"], FORMATS["mxfp4"].element
    x = inputs(fmt, finite=True)
    amax = np.abs(x).max(axis=1)
    x = x[(amax == 0) | ((amax >= 2.0**-125) & (amax < (2 - 2.0**-16) * 2.0**127))]
    amax = np.abs(x).max(axis=1)
    codes, scales = ours(x, fmt, scale_rule="floor")
    seen = np.floor(float32_log2_is(np.where(amax > 0, amax, 1)))
    missed = (amax > 0) & (seen - 2 + 127 > scales)
    mantissa = np.frexp(amax.astype(np.float64))[0] * 2
    assert missed.any() and (mantissa[missed] > 2 - 2.0**-16).all()
    predicted = scales + missed.astype(np.uint8)

    # Toward zero at ties: the code below, where the even code is the one above. Never -0.
    y = np.abs(scaled(x, 127 - predicted.astype(np.int32)))
    magnitude = codec.encode(y, element)
    tie = np.isin(y, np.array(element.midpoints))
    lower = np.searchsorted(np.array(element.grid), y) - 1
    magnitude = np.where(tie, lower, magnitude)
    wanted = np.where(np.signbit(x) & (magnitude > 0), magnitude + 8, magnitude).astype(np.uint8)
    assert (wanted != codes).any() and tie.any()

    theirs = quantize(x, GGMLQuantizationType.MXFP4)
    mismatch.same_scales("scales", theirs[:, :1], predicted[:, None], fmt, x)
    nibbles = theirs[:, 1:]
    got = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    mismatch.same_codes("codes", got, wanted, element, x)
    zeros = (codes & 7) == 0
    plain = ~tie & ~zeros & ~missed[:, None]
    assert np.array_equal(got[plain], codes[plain]) and plain.mean() > 0.5


@check("gguf_mxfp4_decode")
def _() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    codes = np.resize(np.arange(16, dtype=np.uint8), (256, 32))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    theirs = dequantize(np.concatenate([scales, halves(codes)], axis=1), GGMLQuantizationType.MXFP4)
    wanted = reference.dequantize(pack(codes, 4), scales, None, FORMATS["mxfp4"], codes.shape)
    with np.errstate(over="ignore"):
        values = codec.decode(codes[255], FORMATS["mxfp4"].element)
        wanted[255] = (values.astype(np.float64) * 2.0**128).astype(np.float32)
    mismatch.same_floats("values", theirs, np.where(codes == 8, np.float32(0), wanted))


@check("gguf_nvfp4_decode")
def _() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    # Superblocks of four scales, then four times eight bytes.
    fmt = get_format("e2m1-b16-e4m3")
    scales = np.arange(256, dtype=np.uint8).reshape(64, 4)
    codes = np.resize(np.arange(16, dtype=np.uint8), (64, 64))
    nibbles = halves(codes.reshape(256, 16)).reshape(64, 32)
    theirs = dequantize(np.concatenate([scales, nibbles], axis=1), GGMLQuantizationType.NVFP4)
    unsigned = scales & 0x7F
    wanted = reference.dequantize(pack(codes, 4), unsigned, None, fmt, codes.shape)
    elements = codec.decode(codes, fmt.element).reshape(64, 4, 16)
    wanted = wanted.reshape(64, 4, 16)
    wanted[scales == 0x7F] = 0 * elements[scales == 0x7F]
    wanted[scales == 0xFF] = 480 * elements[scales == 0xFF]
    wanted = np.where(codes == 8, np.float32(0), wanted.reshape(64, 64))
    mismatch.same_floats("values", theirs, wanted)
