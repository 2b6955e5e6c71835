# SPDX-License-Identifier: Apache-2.0
"""Theory's QSNR and crossovers: by hand, against the paper's figures, against measured blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyfmt import FORMATS, Format, get_format, theory
from pyfmt.formats import Element
from pyfmt.study import paper
from pyfmt.study.measure import Blocks


@pytest.mark.parametrize(
    ("name", "kappa", "rho", "expected"),
    [
        # 4.78 + 6.02 * 8 - 20 log10(2)
        ("mxint8", 2.0, 1.0, 46.919),
        ("mxint4", 2.0, 1.5, 4.78 + 24.08 - 20 * math.log10(3)),
        ("nvint4", 2.0, 1.0, 4.78 + 24.08 - 20 * math.log10(2) + 10 * math.log10(16 / 15)),
        # t = 0.5: p_sub = 0.382925, w_norm = 0.969140; noise = w_norm / 96 + 9 p_sub / 1728
        ("mxfp4", 2.0, 1.5, 19.176),
        # t = 1/3: p_sub = 0.261117, w_norm = 0.990475 - 4 / 16; noise = w / 96 + 4 p_sub / 1728
        ("nvfp4", 2.0, 1.0, 20.800),
        # Nothing is subnormal: alpha = 1 / (24 * 4^3) alone, 13.80 + 18.06 dB.
        ("mxfp8_e4m3", 2.0, 1.5, 31.865),
    ],
)
def test_qsnr_by_hand(name: str, kappa: float, rho: float, expected: float) -> None:
    assert theory.qsnr(FORMATS[name], kappa, rho=rho) == pytest.approx(expected, abs=2e-3)


def test_the_paper_s_crossovers_are_roots() -> None:
    """7.55, 1.96, 2.04, 2.39: every digit that the paper prints, none of them typed in theory."""
    found = {
        (integer.name, floating.name): theory.crossover(integer, floating)
        for integer, floating in theory.rivals(FORMATS.values())
    }
    for pair, printed in paper.CROSSOVERS.items():
        assert round(found[pair], 2) == printed
    for pair, kappa in found.items():
        integer, floating = map(get_format, pair)
        below, above = (
            theory.qsnr(integer, kappa * side) - theory.qsnr(floating, kappa * side)
            for side in (0.999, 1.001)
        )
        assert below > 0 > above


def test_crossover_moves_with_rho_and_with_the_largest_code() -> None:
    int4, fp4 = FORMATS["mxint4"], FORMATS["mxfp4"]
    # Both sides know kappa only through rho * kappa.
    assert theory.crossover(int4, fp4, rho=1.0) == pytest.approx(
        1.5 * theory.crossover(int4, fp4), rel=1e-6
    )
    assert theory.crossover(int4, fp4, exact=True) == pytest.approx(1.735, abs=1e-3)
    assert theory.qsnr(int4, 2.0) - theory.qsnr(int4, 2.0, exact=True) == pytest.approx(
        20 * math.log10(8 / 7), abs=0.01
    )


def test_no_crossover_where_one_always_wins() -> None:
    wide = Format(Element.fp(5, 2), block=32, scale="e8m0")
    assert theory.crossover(Format(Element.integer(3), block=32, scale="e8m0"), wide) is None


def test_every_row_and_user_made_formats_have_a_curve() -> None:
    kappa = np.linspace(1, 5.6, 50)
    made = ["e3m2-b16-e4m3-ts", "e0m3-b32-e8m0", "e3m0-b24-fp32", "int5-brow-bf16"]
    made += ["e2m1-b16x16-e4m3", "int8-b32x32-e8m0"]
    for format in [*FORMATS.values(), *map(get_format, made)]:
        if format.scale == "e4m3":
            curve = theory.qsnr(format, kappa[kappa < theory.largest_kappa(format)])
        else:
            curve = theory.qsnr(format, kappa)
        assert np.isfinite(curve).all()
        if format.element.kind == "int":
            assert (np.diff(curve) < 0).all()
        assert isinstance(theory.qsnr(format, 2.0), float)
    # Without an exponent all numbers are subnormal: an integer in sign and magnitude.
    flat, integer = get_format("e0m3-b32-e8m0"), get_format("int4-b32-e8m0")
    np.testing.assert_allclose(theory.qsnr(flat, kappa), theory.qsnr(integer, kappa, exact=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.qsnr(FORMATS["mxfp4"], 0.5), "crest factors of 1 or more"),
        (lambda: theory.qsnr(FORMATS["mxfp4"], [2.0, math.nan]), "crest factors of 1 or more"),
        (lambda: theory.qsnr(FORMATS["mxfp4"], 2.0, rho=0.5), "overhead of 1 or more"),
        (lambda: theory.qsnr(get_format("ue4m3-b32-e8m0"), 2.0), "expected signed"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_rivals_are_found_in_the_table() -> None:
    names = [(a.name, b.name) for a, b in theory.rivals(FORMATS.values())]
    assert names == [
        ("mxint8", "mxfp8_e4m3"),
        ("mxint8", "mxfp8_e5m2"),
        ("mxint6", "mxfp6_e2m3"),
        ("mxint6", "mxfp6_e3m2"),
        ("mxint4", "mxfp4"),
        ("nvint4", "nvfp4"),
    ]
    made = [get_format(name) for name in ("e2m2-b8-e8m0", "int5-b8-e8m0", "int5-b16-e8m0")]
    assert theory.rivals(made) == [(made[1], made[0])]


def test_measured_blocks_lie_on_the_curves() -> None:
    """Gaussian blocks with crest factors from 2 to 3, over an octave of sigma, default rules."""
    rng = np.random.default_rng(5)
    sigma = np.exp2(rng.random((4096, 1)))
    blocks = Blocks([format for pair in theory.rivals(FORMATS.values()) for format in pair])
    blocks.add((rng.standard_normal((4096, 256)) * sigma).astype(np.float32))
    for name, points in blocks.points(200).items():
        format = FORMATS[name]
        near = [point for point in points if 2 <= point[0] <= 3]
        assert len(near) >= 4
        for kappa, measured, _ in near:
            expected = theory.qsnr(format, kappa, exact=True)
            off = 0.35 if format.element.kind == "int" else 0.6
            if format.scale == "e4m3":  # the scale's own rounding clips or wastes a little
                off = 0.9
            assert measured == pytest.approx(expected, abs=off), (name, kappa)
