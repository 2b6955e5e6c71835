# SPDX-License-Identifier: Apache-2.0
"""torchao: MX by every rule, NVFP4, and the blocked scale layout."""

from __future__ import annotations

import numpy as np

from pyfmt import reference
from pyfmt.formats import FORMATS, SCALE_RULES
from pyfmt.reference import codec
from pyfmt.reference.layout import unpack
from tests import mismatch
from tests.grids import BF16, FP32
from tests.peers.common import CHECKS, check, float32_log2_is, inputs, nvfp4_inputs, ours, scaled
from tests.rooms import to_torch


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
