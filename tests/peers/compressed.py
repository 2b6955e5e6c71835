# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: MX scales and codes, NVFP4."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from pyfmt import reference
from pyfmt.formats import FORMATS, Format
from pyfmt.reference import codec
from pyfmt.reference.layout import pack, unpack
from tests import mismatch
from tests.grids import BF16, FP32
from tests.peers.common import check, inputs, nvfp4_inputs, ours, scaled
from tests.rooms import to_torch


def compressed_scales(amax: np.ndarray, bits: int) -> np.ndarray:
    """The scale bytes of compressed-tensors, by the path that its observers take."""
    import torch
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=bits, type="float", symmetric=True, strategy="group", group_size=32,
        scale_dtype=torch.uint8, zp_dtype=torch.uint8,
    )  # fmt: skip
    top = to_torch(amax)
    scale, _ = calculate_qparams(-top, top, args)
    return compress_mx_scale(scale, torch.uint8).numpy()


def compressed_inputs(fmt: Format, dtype: np.dtype, width: int) -> np.ndarray:
    """Finite blocks whose maximum, rounded to `width` fraction bits, its dtype still holds."""
    x = inputs(fmt, dtype, finite=True)
    amax = np.abs(x).max(axis=1).astype(np.float64)
    limit = 2.0 ** (np.frexp(float(ml_dtypes.finfo(dtype).max))[1] - 1) * (2 - 2.0 ** -(width + 1))
    above = amax >= limit
    assert above.any()
    scales = compressed_scales(np.abs(x[above]).max(axis=1), fmt.bits)
    assert (scales != ours(x[above], fmt, scale_rule="even")[1]).all()
    return x[~above]


@check("compressed_mxfp4")
def _() -> None:
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4

    fmt = FORMATS["mxfp4"]
    for dtype in (FP32, BF16):
        x = compressed_inputs(fmt, dtype, 1)
        amax = np.abs(x).max(axis=1)
        codes, scales = ours(x, fmt, scale_rule="even")
        theirs = compressed_scales(amax, 4)
        mismatch.same_scales(f"scales {dtype}", theirs[:, None], scales[:, None], fmt, x)
        # Their elements, under the same scales.
        values = codec.from_float32(codec.decode_scale(scales, "e8m0"), dtype)[:, None]
        packed = quantize_and_pack_fp4(to_torch(x), to_torch(values), group_size=32)
        wanted = np.where((x == 0) & np.signbit(x), 0, codes)
        assert (wanted != codes).any()
        # bfloat16 quotients are exact: the scale is a power of two.
        got = unpack(packed.view(torch.uint8).numpy(), 4, 32)
        mismatch.same_codes(f"codes {dtype}", got, wanted, fmt.element, x)


@check("compressed_mxfp6")
def _() -> None:
    from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8
    from compressed_tensors.quantization.utils.fp6_utils import cast_to_fp6

    fmt = FORMATS["mxfp6_e2m3"]
    for dtype in (FP32, BF16):
        x = compressed_inputs(fmt, dtype, 3)
        codes, scales = ours(x, fmt, scale_rule="even")
        theirs = compressed_scales(np.abs(x).max(axis=1), 6)
        mismatch.same_scales(f"scales {dtype}", theirs[:, None], scales[:, None], fmt, x)
        y = scaled(x, 127 - scales.astype(np.int32)).astype(np.float32)
        packed = pack_fp6_to_uint8(cast_to_fp6(to_torch(y))).numpy()
        assert np.array_equal(packed, pack(codes, 6))


@check("compressed_mxfp8")
def _() -> None:
    fmt = FORMATS["mxfp8_e4m3"]
    x = compressed_inputs(fmt, FP32, 1)
    amax = np.abs(x).max(axis=1)
    scales = ours(x, fmt, scale_rule="even")[1]
    mantissa = np.frexp(amax.astype(np.float64))[0] * 2
    higher = (mantissa >= 1.75) & (mantissa < 1.9375)
    # E is clamped at the bottom, where both rules give byte 0.
    exponent = np.frexp(amax.astype(np.float64))[1] - 1 - 8 + higher
    predicted = np.where(higher & (exponent > -127), scales + 1, scales).astype(np.uint8)
    mismatch.same_scales("scales", compressed_scales(amax, 8)[:, None], predicted[:, None], fmt, x)
    assert (predicted != scales).sum() > 100


@check("compressed_nvfp4")
def _() -> None:
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    fmt, six = FORMATS["nvfp4"], np.float32(6)
    args = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16,
        scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    differing = agreeing = 0
    for largest in (1.0, 2688.0, 77.0, 1e-3, 3.3):
        x = nvfp4_inputs(largest)
        x[0, :] = -0.0
        amax = np.abs(x).max(axis=1)
        codes, scales, tensor_scale = reference.quantize(x, fmt)
        codes, scales = unpack(codes, 4, 16), scales[:, 0]
        whole = amax.max(keepdims=True)
        their_s = generate_gparam(to_torch(-whole), to_torch(whole))
        big_s = np.float32(their_s.numpy()[0])
        assert big_s == np.float32(1) / whole * np.float32(2688)
        top = to_torch(amax)
        scale, _ = calculate_qparams(-top, top, args, global_scale=their_s)

        # The scale: another order of the same two operations.
        wanted = codec.round_scale(np.minimum(big_s * (amax / six), np.float32(448)), "e4m3")
        zero = wanted == 0
        wanted = np.where(zero, 0x20, wanted).astype(np.uint8)  # 0.125
        got = scale.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        mismatch.same_scales("scales", got[:, None], wanted[:, None], fmt, x)

        # The elements: x / (s / S) for x * (1 / (s * (1 / S))).
        value = codec.decode_scale(wanted, "e4m3")
        y = x / (value / big_s)[:, None]
        negative_zero = (x == 0) & np.signbit(x)
        wanted_codes = np.where(negative_zero, 0, codec.encode(y, fmt.element)).astype(np.uint8)
        packed = quantize_and_pack_fp4(
            to_torch(x), to_torch(value[:, None]), global_scale=their_s, group_size=16
        )
        got_codes = unpack(packed.numpy(), 4, 16)
        mismatch.same_codes("codes", got_codes, wanted_codes, fmt.element, x)

        # Where no listed difference applies, the bits are pyfmt's.
        if big_s != np.float32(2688) / whole:
            differing += 1
            continue
        assert np.float32(1) / big_s == tensor_scale
        reordered = (wanted != scales) & ~zero
        differing += reordered.sum()
        assert (np.abs(wanted.astype(int) - scales)[reordered] == 1).all()
        product = x * (np.float32(1) / (value * tensor_scale))[:, None]
        same = (wanted == scales)[:, None] & ~negative_zero
        same &= codec.encode(product, fmt.element) == codec.encode(y, fmt.element)
        mismatch.same_codes("codes", got_codes[same], codes[same], fmt.element, x[same])
        agreeing += same.mean() > 0.5
    assert differing > 5, "the grid must show that the order of operations matters"
    assert agreeing > 1, "most of pyfmt's bits must be theirs"
