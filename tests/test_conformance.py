# SPDX-License-Identifier: Apache-2.0
"""Conformance to other libraries, bit for bit, as a table.

Each row of CONFORMANCE names a peer's call, the options of pyfmt that equal it, and the
differences that are known, with the reason. The test behind a row predicts the peer's bits: equal
to pyfmt's wherever no difference is listed, and exactly what the listed reason gives elsewhere.
`python -m tests.test_conformance` prints the table for the README.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pyfmt import reference
from pyfmt.formats import FORMATS, SCALE_RULES, Format, get_element, get_format
from pyfmt.reference import codec
from pyfmt.reference.layout import pack, unpack
from tests import grids, mismatch, oracle
from tests.grids import BF16, FP32
from tests.rooms import to_torch


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


CHECKS: dict[str, Callable[[], None]] = {}


def check(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        CHECKS[name] = function
        return function

    return register


@pytest.mark.parametrize("row", CONFORMANCE, ids=lambda row: row.check)
def test_conformance(row: Row) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CHECKS[row.check]()


def test_every_check_stands_in_the_table() -> None:
    assert [row.check for row in CONFORMANCE] == list(dict.fromkeys(r.check for r in CONFORMANCE))
    assert {row.check for row in CONFORMANCE} == set(CHECKS)
    assert table().count("\n") == len(CONFORMANCE) + 2


def inputs(fmt: Format, dtype: np.dtype = FP32, finite: bool = False) -> np.ndarray:
    """One block a row: the grid of maxima, and the special blocks."""
    special = grids.special_blocks(fmt, dtype)
    if finite:
        special = special[np.isfinite(special.astype(np.float32)).all(axis=1)]
    return np.concatenate([grids.blocks_of(fmt, grids.amax_grid(fmt, dtype)), special])


def ours(x: np.ndarray, fmt: Format, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Unpacked codes and the scale of each row's only block."""
    codes, scales, _ = reference.quantize(x, fmt, **options)
    return unpack(codes, fmt.bits, x.shape[1]), scales[:, 0]


def scaled(x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """x * 2^exponent, exactly."""
    return np.ldexp(x.astype(np.float64), exponent[:, None])


def float32_log2_is(amax: np.ndarray) -> np.ndarray:
    """log2 rounded to float32: what a library sees that takes it in floating point."""
    return np.log2(amax.astype(np.float64)).astype(np.float32)


# ---- ml_dtypes --------------------------------------------------------------------------------


@check("ml_dtypes")
def _() -> None:
    peers = {
        "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
        "mxfp8_e5m2": ml_dtypes.float8_e5m2,
        "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
        "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
        "mxfp4": ml_dtypes.float4_e2m1fn,
    }
    for name, peer in peers.items():
        fmt = FORMATS[name]
        # Blocks led by Qmax itself have the scale 1, so that codes are plain casts.
        y = grids.element_grid(fmt.element)
        y = np.resize(y[np.abs(y) <= fmt.max], (len(y) // 31 + 1, 31))
        x = np.concatenate([np.full((len(y), 1), fmt.max, np.float32), y], axis=1)
        for rule in ("floor", "rceil"):
            codes, scales = ours(x, fmt, scale_rule=rule)
            assert (scales == 127).all()
            mismatch.same_codes(name, codes, x.astype(peer).view(np.uint8), fmt.element, x)
        e8m0 = np.arange(255, dtype=np.uint8)
        theirs = e8m0.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        mismatch.same_floats("e8m0", codec.decode_scale(e8m0, "e8m0"), theirs)


# ---- torchao ----------------------------------------------------------------------------------


def to_mx(x: np.ndarray, name: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """torchao's codes, unpacked, and scale bytes."""
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    element = {
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp6_e2m3": "fp6_e2m3",
        "mxfp6_e3m2": "fp6_e3m2",
        "mxfp4": torch.float4_e2m1fn_x2,
    }[name]
    scales, codes = to_mx(to_torch(x), element, 32, ScaleCalculationMode[rule.upper()])
    codes = codes.view(torch.uint8).numpy()
    return (unpack(codes, 4, 32) if name == "mxfp4" else codes), scales.view(torch.uint8).numpy()


def check_torchao(rule: str) -> None:
    for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"):
        for dtype in (FP32, BF16):
            fmt, element = FORMATS[name], FORMATS[name].element
            x = inputs(fmt, dtype)
            codes, scales = ours(x, fmt, scale_rule=rule)
            amax = np.abs(x.astype(np.float32)).max(axis=1)
            numbers = np.isfinite(amax)

            # What the listed differences make of pyfmt's scales and codes.
            predicted, multiplier = scales.copy(), 127 - scales.astype(np.int32)
            predicted[np.isinf(amax)] = 254 if rule == "rceil" else 255 - element.emax
            bottom = scales == 0
            if rule == "rceil":
                quotient = amax / np.float32(fmt.max)
                seen = np.ceil(float32_log2_is(np.where(amax > 0, quotient, 1)))
                missed = numbers & (amax > 0) & (np.clip(seen, -127, 127) + 127 < scales)
                exact = scaled(amax[:, None], multiplier + 1)[:, 0] / fmt.max
                # Only maxima a few ulps above Qmax * 2^E are missed, and only downwards by one.
                assert (exact[missed] > 1).all() and (exact[missed] < 1 + 2.0**-16).all()
                assert missed.any() == (dtype == FP32)
                predicted[missed] -= 1
                multiplier[missed] += 1
                bottom = predicted == 0
            multiplier[bottom] = 0 if rule == "rceil" else 126
            with np.errstate(over="ignore", invalid="ignore"):
                y = scaled(np.where(numbers[:, None], x.astype(np.float32), 0), multiplier)
            wanted = codec.encode(y, element)
            assert (wanted != codes)[bottom].any(), "no block shows the difference at byte 0"

            got_codes, got_scales = to_mx(x, name, rule)
            what = f"torchao {name} {rule} {dtype}"
            mismatch.same_scales(f"{what} scales", got_scales, predicted[:, None], fmt, x)
            mismatch.same_codes(
                f"{what} codes", got_codes[numbers], wanted[numbers], element, x[numbers]
            )


for _rule in SCALE_RULES:
    CHECKS[f"torchao_{_rule}"] = lambda rule=_rule: check_torchao(rule)


def nvfp4_inputs(largest: float, dtype: np.dtype = FP32) -> np.ndarray:
    """Blocks over the range that scales under one tensor scale cover, ties of the scale, zeros."""
    rng = np.random.default_rng(5)
    spread = largest * np.exp2(-rng.uniform(0, 24, 3000))
    # Where a block's scale is a tie of E4M3, and the numbers around: order of operations shows.
    ties = np.array(get_element("e4m3fn").midpoints) / 448 * largest
    near = [ties.astype(dtype)]
    for _ in range(3):
        near += [np.nextafter(near[-1], dtype.type(np.inf))]
        near.insert(0, np.nextafter(near[0], dtype.type(-np.inf)))
    maxima = np.concatenate([spread.astype(dtype), *near, np.array([largest, 0], dtype)])
    x = grids.blocks_of(FORMATS["nvfp4"], np.abs(maxima))
    return np.where(np.abs(x.astype(np.float64)) <= largest, x, dtype.type(0))


@check("torchao_nvfp4")
def _() -> None:
    import torch
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    fmt = FORMATS["nvfp4"]
    for dtype in (FP32, BF16):
        for largest in (1.0, 6.0 * 448, 77.0, 1e-3, 3e38, 1e-30):
            x = nvfp4_inputs(largest, dtype)
            tensor = to_torch(x)
            amax = torch.max(torch.abs(tensor))
            theirs = per_tensor_amax_to_scale(amax)
            scales, codes = nvfp4_quantize(tensor, 16, theirs)
            got = reference.quantize(x, fmt, recipe="torchao")
            mismatch.same_floats("tensor scale", np.asarray(got[2]), theirs.numpy())
            mismatch.same_scales("scales", got[1], scales.view(torch.uint8).numpy(), fmt, x)
            theirs_codes = unpack(codes.numpy(), 4, 16)
            mismatch.same_codes("codes", unpack(got[0], 4, 16), theirs_codes, fmt.element, x)
            # A calibrated tensor scale is used as given.
            given = np.float32(largest / 1000)
            scales, codes = nvfp4_quantize(tensor, 16, torch.tensor(given))
            got = reference.quantize(x, fmt, recipe="torchao", tensor_scale=given)
            assert np.array_equal(got[0], codes.numpy())
            assert np.array_equal(got[1][:, 0], scales.view(torch.uint8).numpy()[:, 0])
    for tiny in (0.0, 2.0**-149, 448 * 6 * 2.0**-150):
        x = np.full((1, 16), tiny, np.float32)
        assert per_tensor_amax_to_scale(torch.tensor(tiny)) == 0
        assert reference.quantize(x, fmt, recipe="torchao")[2] == 1
    x = np.ones((2, 16), np.float32)
    x[1, 3] = np.nan
    theirs = per_tensor_amax_to_scale(torch.max(torch.abs(to_torch(x))))
    assert torch.isnan(theirs)
    got = reference.quantize(x, fmt, recipe="torchao")
    assert got[2] == np.float32(1) / np.float32(2688) and got[1].tolist() == [[0x7E], [0x7F]]


@check("torchao_nvfp4_single")
def _() -> None:
    import torch
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    fmt = FORMATS["nvfp4"]
    x = np.concatenate([nvfp4_inputs(2688.0), inputs(fmt, finite=True)])
    amax = np.abs(x).max(axis=1)
    codes, scales = ours(x, fmt, recipe="single_level")
    # Their steps, from our parts: the quotient instead of the product, no scale below 2^-6.
    quotient = np.clip(amax / np.float32(6), np.float32(2.0**-6), np.float32(448))
    wanted = codec.round_scale(quotient, "e4m3")
    y = x * (np.float32(1) / codec.decode_scale(wanted, "e4m3"))[:, None]
    theirs_scales, theirs_codes = nvfp4_quantize(to_torch(x), 16)
    theirs_scales = theirs_scales.view(torch.uint8).numpy()
    mismatch.same_scales("scales", theirs_scales, wanted[:, None], fmt, x)
    theirs_codes = unpack(theirs_codes.numpy(), 4, 16)
    mismatch.same_codes("codes", theirs_codes, codec.encode(y, fmt.element), fmt.element, x)
    # Where neither reason applies, the bits are pyfmt's.
    product = np.minimum(amax * np.float32(1 / np.float32(6)), np.float32(448))
    same = (amax >= 6 * 2.0**-6) & (codec.round_scale(product, "e4m3") == wanted)
    assert np.array_equal(theirs_scales[same, 0], scales[same])
    mismatch.same_codes("codes", theirs_codes[same], codes[same], fmt.element, x[same])
    assert same.sum() > 1000 and (theirs_scales[~same, 0] != scales[~same]).any()


@check("torchao_blocked")
def _() -> None:
    from torchao.prototype.mx_formats.utils import to_blocked

    for rows, columns in ((128, 4), (1, 1), (200, 7), (384, 16)):
        scales = np.random.default_rng(rows).integers(0, 256, (rows, columns), dtype=np.uint8)
        theirs = to_blocked(to_torch(scales)).numpy().reshape(-1)
        assert np.array_equal(reference.to_blocked(scales), theirs)


# ---- compressed-tensors -----------------------------------------------------------------------


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


# ---- gguf -------------------------------------------------------------------------------------


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


def test_predictions_lean_on_the_oracle() -> None:
    # The encoder that the predictions above use is itself checked against exact arithmetic.
    element = get_element("e2m1")
    y = grids.element_grid(element)
    wanted = [oracle.nearest_magnitude(abs(oracle.fraction(v)[0]), element) for v in y[:, None]]
    assert np.array_equal(codec.encode(np.abs(y), element), np.array(wanted))


if __name__ == "__main__":
    print(table(), end="")
