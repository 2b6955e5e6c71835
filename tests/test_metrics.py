# SPDX-License-Identifier: Apache-2.0
"""QSNR and crest factor against values worked out by hand and by theory."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

import pyfmt
from pyfmt.metrics import Noise, crest_factor, qsnr


def test_qsnr_by_hand() -> None:
    # Error energy 1 against signal energy 100: 20 dB.
    assert qsnr(np.array([10.0, 0.0]), np.array([9.0, 0.0])) == pytest.approx(20.0)
    assert qsnr(np.array([3.0, 4.0]), np.array([0.0, 0.0])) == pytest.approx(0.0)


def test_qsnr_extremes() -> None:
    x = np.array([1.0, -2.0], np.float32)
    assert qsnr(x, x) == math.inf
    assert qsnr(np.zeros(2), np.zeros(2)) == math.inf
    assert qsnr(np.zeros(2), np.ones(2)) == -math.inf
    assert math.isnan(qsnr(x, np.array([1.0, math.nan])))


def test_qsnr_does_not_lose_small_errors() -> None:
    x = np.full(1000, 1.0, np.float32)
    xq = np.nextafter(x, np.float32(2), dtype=np.float32)
    assert qsnr(x, xq) == pytest.approx(-20 * math.log10(2.0**-23), abs=1e-9)


def test_qsnr_in_pieces_equals_the_whole() -> None:
    rng = np.random.default_rng(0)
    x, xq = rng.standard_normal((2, 64)).astype(np.float32)
    total = Noise()
    for start in range(0, 64, 10):
        total.add(x[start : start + 10], xq[start : start + 10])
    assert total.qsnr == pytest.approx(qsnr(x, xq), rel=1e-12)


def test_qsnr_refuses_two_shapes() -> None:
    with pytest.raises(ValueError, match="expected two equal shapes"):
        qsnr(np.zeros(2), np.zeros(3))


def test_torch_and_bfloat16_agree_with_numpy() -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(1).standard_normal((4, 32)).astype(ml_dtypes.bfloat16)
    t = torch.tensor(x.astype(np.float32)).bfloat16().requires_grad_()
    assert qsnr(t, t * 0.5) == pytest.approx(qsnr(x, x * x.dtype.type(0.5)))
    np.testing.assert_array_equal(crest_factor(t, 16), crest_factor(x, 16))


def test_crest_factor_by_hand() -> None:
    x = np.array([[1, 1, 1, 1, 2, 0, 0, 0], [0, 0, 0, 0, -3, 3, 3, -3]], np.float32)
    kappa = crest_factor(x, 4)
    assert kappa.shape == (2, 2)
    assert kappa[0].tolist() == [1.0, 2.0]  # equal magnitudes; one of four: sqrt(4)
    assert math.isnan(kappa[1, 0])
    assert kappa[1, 1] == 1.0


def test_crest_factor_of_a_ragged_block_ignores_padding() -> None:
    kappa = crest_factor(np.array([1, 1, 1, 1, 2, 2], np.float32), 4)
    assert kappa.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("block", "median"), [(16, 2.07), (32, 2.32), (128, 2.79)])
def test_crest_factor_of_gaussian_blocks(block: int, median: float) -> None:
    x = np.random.default_rng(2).standard_normal((4096, block)).astype(np.float32)
    assert np.median(crest_factor(x, block)) == pytest.approx(median, abs=0.02)


def test_crest_factor_refuses_no_block() -> None:
    with pytest.raises(ValueError, match="positive int"):
        crest_factor(np.ones(4), 0)


def test_qsnr_of_mxint8_is_that_of_uniform_rounding() -> None:
    """Rounding errors are uniform within a step of 2^E / 64: their mean square is step^2 / 12."""
    x = np.random.default_rng(3).standard_normal((2048, 32)).astype(np.float32)
    q = pyfmt.quantize(x, "mxint8")
    steps = np.exp2(q.scales.astype(np.float64) - 127 - 6)
    noise = float(np.sum(32 * steps**2 / 12))
    expected = -10 * math.log10(noise / float(np.sum(x.astype(np.float64) ** 2)))
    assert qsnr(x, q.dequantize()) == pytest.approx(expected, abs=0.05)
