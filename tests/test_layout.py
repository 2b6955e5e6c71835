# SPDX-License-Identifier: Apache-2.0
"""Packed codes and scale layouts, against one big integer and the published formula."""

from __future__ import annotations

import numpy as np
import pytest

import pyfmt
from pyfmt import reference
from tests import oracle
from tests.grids import noise
from tests.rooms import Room, same_everywhere

BITS = range(2, 9)
LENGTHS = [*range(18), 31, 32, 33, 63, 64, 65, 100, 129, 1000]


@pytest.mark.parametrize("bits", BITS)
def test_pack_is_a_little_endian_bit_stream(implementations: list[Room], bits: int) -> None:
    rng = np.random.default_rng(bits)
    for length in LENGTHS:
        codes = rng.integers(0, 2**bits, (3, length), dtype=np.uint8)
        want = np.stack([oracle.pack(row, bits) for row in codes])
        same_everywhere(implementations, want, "pack", codes, bits)
        same_everywhere(implementations, codes, "unpack", want, bits, length)


def test_nibbles_by_hand() -> None:
    assert reference.pack(np.array([1, 2, 15], np.uint8), 4).tolist() == [0x21, 0x0F]
    assert reference.pack(np.array([1, 2, 3, 4], np.uint8), 6).tolist() == [0x81, 0x30, 0x10]
    assert reference.unpack(np.array([0x81, 0x30, 0x10], np.uint8), 6, 4).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("bits", BITS)
def test_pack_of_any_shape_and_stride(implementations: list[Room], bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (6, 5, 50), dtype=np.uint8)
    for view in (codes, codes[::2, 1:], codes[..., ::3], codes.transpose(2, 0, 1), codes[:, :0]):
        flat = view.reshape(-1, view.shape[-1])
        rows = [oracle.pack(row, bits) for row in flat]
        width = -(-view.shape[-1] * bits // 8)
        want = np.array(rows, np.uint8).reshape(*view.shape[:-1], width)
        same_everywhere(implementations, want, "pack", view, bits)
        same_everywhere(
            implementations, np.ascontiguousarray(view), "unpack", want, bits, view.shape[-1]
        )
    vector = codes[0, 0]
    same_everywhere(implementations, oracle.pack(vector, bits), "pack", vector, bits)


@pytest.mark.parametrize("bits", BITS)
def test_unpack_takes_the_first_codes_of_longer_rows(
    implementations: list[Room], bits: int
) -> None:
    packed = np.random.default_rng(bits).integers(0, 256, (4, 40), dtype=np.uint8)
    for length in (0, 1, 7, 8, 9, 40 * 8 // bits):
        stream = [int.from_bytes(row.tobytes(), "little") for row in packed]
        want = [[s >> bits * i & 2**bits - 1 for i in range(length)] for s in stream]
        want = np.array(want, np.uint8).reshape(4, length)
        same_everywhere(implementations, want, "unpack", packed, bits, length)
        same_everywhere(implementations, want[::2], "unpack", packed[::2], bits, length)


@pytest.mark.parametrize("rows, columns", [(1, 1), (31, 3), (128, 4), (129, 5), (300, 17), (0, 4)])
def test_blocked_scales(rows: int, columns: int) -> None:
    scales = np.random.default_rng(rows).integers(0, 256, (rows, columns), dtype=np.uint8)
    blocked = reference.to_blocked(scales)
    tiles_across = -(-columns // 4)
    assert blocked.shape == (-(-rows // 128) * tiles_across * 512,)
    want = np.zeros(blocked.shape, np.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * tiles_across + c // 4
            i, j = r % 128, c % 4
            want[tile * 512 + (i % 32) * 16 + (i // 32) * 4 + j] = scales[r, c]
    assert np.array_equal(blocked, want)
    assert np.array_equal(reference.from_blocked(blocked, rows, columns), scales)


@pytest.mark.parametrize("shape", [(200, 96), (3, 130, 64), (64,)])
def test_a_qtensor_changes_layout_and_back(shape: tuple[int, ...]) -> None:
    x = noise(1, int(np.prod(shape))).reshape(shape)
    q = pyfmt.quantize(x, "nvfp4", backend="reference")
    blocked = q.to_layout("blocked_128x4")
    assert blocked.layout == "blocked_128x4" and blocked.scales.shape[-1] % 512 == 0
    back = blocked.to_layout("rows")
    assert back.layout == "rows" and np.array_equal(back.scales, q.scales)
    values = blocked.dequantize(backend="reference")
    assert np.array_equal(values, q.dequantize(backend="reference"))
    with pytest.raises(ValueError, match="one-byte scales"):
        pyfmt.quantize(x, "int4", backend="reference").to_layout("blocked_128x4")
    with pytest.raises(ValueError, match="did you mean 'rows'"):
        q.to_layout("row")
