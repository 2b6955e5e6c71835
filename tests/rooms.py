# SPDX-License-Identifier: Apache-2.0
"""The rooms under test: NumPy in, NumPy out, whatever library and instruction set lie between."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pyfmt import backends, reference
from pyfmt.formats import Format
from pyfmt.reference.layout import unpack
from tests.grids import BF16
from tests.mismatch import same_codes, same_floats, same_scales


def to_torch(x: np.ndarray | None) -> Any:
    """A torch tensor on the same memory, with the same strides and offset."""
    import torch

    if x is None:
        return None
    if not x.flags.writeable:
        x = x.copy()
    if x.dtype == BF16:
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def to_numpy(x: Any) -> Any:
    """Back to NumPy, bit for bit."""
    import torch

    if not isinstance(x, torch.Tensor):
        return x
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view(BF16)
    return x.numpy()


def poison(*sizes: int) -> None:
    """Fill freshly freed heap blocks, so that output bytes nobody wrote are seen."""
    dirty = [np.full(max(size, 1), 0xA5, np.uint8) for size in sizes for _ in range(2)]
    del dirty


@dataclass
class Room:
    """One room and one kind of array; every verb takes and returns NumPy arrays.

    level: the instruction set that the NumPy module is told to use.
    """

    name: str
    module: ModuleType
    torch: bool = False
    level: str | None = None

    def _in(self, x: np.ndarray | None) -> Any:
        return to_torch(x) if self.torch else x

    def _call(self, verb: str, *args: Any, **options: Any) -> Any:
        if self.level is not None:
            native().set_level(self.level)
        return getattr(self.module, verb)(*args, **options)

    def quantize(self, x: np.ndarray, fmt: Format, **options: Any) -> tuple[Any, Any, Any]:
        rows = x.size // max(x.shape[options.get("axis", -1)], 1)
        width = x.shape[options.get("axis", -1)]
        poison(rows * fmt.row_bytes(width), rows * fmt.blocks(width), x.size * 4)
        for name in ("tensor_scale", "signs"):
            if isinstance(options.get(name), np.ndarray | np.generic):
                options[name] = self._in(np.asarray(options[name]))
        before = x.copy()
        codes, scales, tensor_scale = map(
            to_numpy, self._call("quantize", self._in(x), fmt, **options)
        )
        same_floats(f"{self.name}: the input after quantize", np.asarray(x), before)
        return codes, scales, tensor_scale

    def dequantize(
        self, codes: Any, scales: Any, tensor_scale: Any, fmt: Format, shape: Any, **options: Any
    ) -> np.ndarray:
        poison(4 * int(np.prod(shape)), 2 * int(np.prod(shape)))
        parts = [self._in(codes), self._in(scales), self._in(tensor_scale)]
        return to_numpy(self._call("dequantize", *parts, fmt, shape, **options))

    def fake_quantize(self, x: np.ndarray, fmt: Format, **options: Any) -> np.ndarray:
        poison(x.nbytes)
        if isinstance(options.get("tensor_scale"), np.ndarray | np.generic):
            options["tensor_scale"] = self._in(np.asarray(options["tensor_scale"]))
        return to_numpy(self._call("fake_quantize", self._in(x), fmt, **options))

    def hadamard(self, x: np.ndarray, size: int, signs: Any = None, **options: Any) -> np.ndarray:
        poison(x.nbytes)
        return to_numpy(self._call("hadamard", self._in(x), size, self._in(signs), **options))

    def pack(self, codes: np.ndarray, bits: int) -> np.ndarray:
        poison(codes.size * bits // 8)
        return to_numpy(self._call("pack", self._in(codes), bits))

    def unpack(self, packed: np.ndarray, bits: int, length: int) -> np.ndarray:
        poison(packed.size * 8 // bits)
        return to_numpy(self._call("unpack", self._in(packed), bits, length))

    def amax(self, x: np.ndarray, block: int | None = None, **options: Any) -> np.ndarray:
        return np.asarray(to_numpy(self._call("amax", self._in(x), block, **options)))


REFERENCE = Room("reference", backends.get("reference"))


def native() -> Any:
    """The compiled NumPy module."""
    from pyfmt import _native

    return _native


def every_room() -> list[Room]:
    """Every room that computes on this machine, less the reference.

    A library that is not built is a failure, not a reason to skip: `make test` builds it.
    """
    cpu = backends.get("cpu")
    for x in (np.zeros(1, np.float32), to_torch(np.zeros(1, np.float32))):
        reason = cpu.available() or cpu.supports("quantize", None, x)
        if reason is not None:
            pytest.fail(f"room cpu: {reason}")
    levels = native().levels().split(",")
    found = [Room(f"numpy-cpu-{level}", cpu, level=level) for level in levels]
    return [*found, Room("torch-cpu", cpu, torch=True)]


def same_quantized(
    rooms: list[Room], x: np.ndarray, fmt: Format, what: str = "", **options: Any
) -> tuple[Any, Any, Any]:
    """Assert that every room quantizes `x` to the reference's bits; returns the reference's."""
    axis = options.get("axis", -1)
    want = reference.quantize(x, fmt, **options)
    padded = fmt.padded(x.shape[axis])
    wanted = unpack(want[0], fmt.bits, padded)
    last = axis in (-1, x.ndim - 1) and not options.get("rotation")
    for room in rooms:
        where = f"{room.name} {fmt.name} {x.dtype} {x.shape} {options} {what}"
        got = room.quantize(x, fmt, **dict(options))
        same_scales(f"{where} scales", got[1], want[1], fmt, x if last else None)
        codes = unpack(got[0], fmt.bits, padded)
        moved = None if options.get("rotation") else x
        same_codes(f"{where} codes", codes, wanted, fmt.element, moved, axis)
        assert np.array_equal(got[0], want[0]), f"{where}: spare bits of the last byte"
        assert (got[2] is None) == (want[2] is None), f"{where}: tensor scale {got[2]}, {want[2]}"
        if want[2] is not None:
            same_floats(f"{where} tensor scale", np.asarray(got[2]), np.asarray(want[2]))
    return want


def same_everywhere(rooms: list[Room], want: np.ndarray, verb: str, *args: Any, **options: Any):
    """Assert that a verb gives the bits of `want` in every room."""
    x = args[0] if verb in ("hadamard", "fake_quantize") else None
    for room in rooms:
        got = getattr(room, verb)(*args, **dict(options))
        shape = getattr(args[0], "shape", ())
        same_floats(f"{room.name} {verb} {shape} {args[1:]} {options}", got, want, x)
