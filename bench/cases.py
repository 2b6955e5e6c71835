# SPDX-License-Identifier: Apache-2.0
"""What bench/quantize.py times: every verb in every room, with its bytes, its aim and its check.

Bytes count what a call must read and write: input, codes and scales. A check compares some rows of
what the call returns with the reference, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from harness import Case

import pyfmt
import pyfmt.ops
from pyfmt import _arrays, backends, reference
from pyfmt.formats import ROTATION_SIZES, SCALES, get_format

ROTATIONS = (16, 32, 64, 128)
GIVEN = 0.002  # a tensor scale for inputs of about unit size
# Fractions of the copy's rate aimed at on a GPU; 0.92 where nothing else is said.
QUANTIZE_AIMS = {"mxfp4": 0.95, "mxfp6_e2m3": 0.85, "mxfp6_e3m2": 0.85, "mxint6": 0.85}
TRITON_AIM = 0.75
# On the CPU: of a copy into memory that is there, with tensors larger than the last-level cache.
CPU_AIM, CPU_AIMED = 2 / 3, ("quantize", "dequantize", "rotate + quantize")


class Turns:
    """Inputs taken in turn, so that no call finds its input in a cache."""

    def __init__(self, xs: Sequence[torch.Tensor]) -> None:
        self.xs, self.last = xs, 0

    def next(self) -> int:
        self.last = (self.last + 1) % len(self.xs)
        return self.last

    @property
    def x(self) -> torch.Tensor:
        """The input of the next call."""
        return self.xs[self.next()]

    @property
    def taken(self) -> torch.Tensor:
        """The input of the latest call."""
        return self.xs[self.last]


class Ops:
    """A room by way of torch's operators."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.quantize: Any = torch.ops.pyfmt.quantize
        self.dequantize: Any = torch.ops.pyfmt.dequantize
        self.fake_quantize: Any = torch.ops.pyfmt.fake_quantize
        self.hadamard: Any = torch.ops.pyfmt.hadamard
        self.amax: Any = torch.ops.pyfmt.amax


class Direct:
    """A room that is called directly, beside the one that serves the operators."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.room: ModuleType = backends.get(name)
        self.hadamard, self.amax = self.room.hadamard, self.room.amax

    def quantize(self, x: Any, fmt: str, axis: int = -1, **options: Any) -> Any:
        return self.room.quantize(x, get_format(fmt), axis=axis, **options)

    def fake_quantize(self, x: Any, fmt: str, axis: int = -1, **options: Any) -> Any:
        return self.room.fake_quantize(x, get_format(fmt), axis=axis, **options)

    def dequantize(
        self, codes: Any, scales: Any, scale: Any, fmt: str, shape: Any, axis: int, dtype: Any
    ) -> Any:
        fmt = get_format(fmt)
        return self.room.dequantize(codes, scales, scale, fmt, shape, axis=axis, dtype=dtype)


def rooms(device: str) -> list[Ops | Direct]:
    """Return the rooms that serve tensors on `device`, the one behind torch's operators first."""
    if device == "cpu":
        return [Ops("cpu")]
    found: list[Ops | Direct] = []
    served = pyfmt.ops.cuda_kernels()
    if served is not None:
        found.append(Ops(served))
    if served != "triton" and backends.get("triton").available() is None:
        found.append(Direct("triton"))
    return found


# ---- checks -----------------------------------------------------------------------------------


def same(what: str, got: Any, want: Any) -> None:
    """Assert that a tensor has the bits of a NumPy array; an empty one stands for None."""
    if want is None:
        assert got is None or not got.numel(), f"{what}: expected none"
        return
    ours = _arrays.to_numpy(got)
    want = np.asarray(want)
    assert ours.shape == want.shape, f"{what}: shape {ours.shape}, the reference's is {want.shape}"
    differ = int((np.frombuffer(ours.tobytes(), "u1") != np.frombuffer(want.tobytes(), "u1")).sum())
    assert not differ, f"{what}: {differ} bytes of {want.nbytes} differ from the reference"


def _rows(x: torch.Tensor, fmt: Any, options: dict[str, Any]) -> list[int]:
    """Return rows to compare: both ends, and the tensor's largest number where it sets a scale."""
    if options.get("rounding") == "stochastic":
        return list(range(8))  # draws go by index: of the first rows it is the same alone
    if fmt.block_rows > 1:
        return list(range(fmt.block_rows))
    n = x.shape[0]
    some = [*range(4), *range(n - 4, n)]
    if fmt.tensor_scale and options.get("tensor_scale") is None:
        size = x if not options.get("rotation") else pyfmt.hadamard(x.float(), options["rotation"])
        some.insert(4, int(size.abs().amax(1).argmax()))
    return some


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as the reference takes them."""
    return {k: _arrays.to_numpy(v) if _arrays.is_torch(v) else v for k, v in options.items()}


def check_quantize(turns: Turns, name: str, axis: int = -1, **options: Any) -> Any:
    fmt, plain = get_format(name), _plain(options)

    def check(result: Any) -> None:
        x, codes, scales, stored = turns.taken, *result[:3]
        if axis == -2:
            x = x.t()  # codes have the quantized axis last anyway
        rows = _rows(x, fmt, options)
        want = reference.quantize(_arrays.to_numpy(x[rows]), fmt, **plain)
        same("codes", codes[rows], want[0])
        same("scales", scales[: len(want[1])] if fmt.block_rows > 1 else scales[rows], want[1])
        same("tensor scale", stored, want[2])

    return check


def check_dual(turns: Turns, name: str, **options: Any) -> Any:
    along = check_quantize(turns, name, **options)
    across = check_quantize(turns, name, -2, **options)

    names = [r.name for r in torch.ops.pyfmt.quantize_dual.default._schema.returns]

    def check(result: Any) -> None:
        parts = dict(zip(names, result, strict=True))
        stored = parts["tensor_scale"]
        along((parts["codes"], parts["scales"], stored))
        across((parts["codes_t"], parts["scales_t"], parts.get("tensor_scale_t", stored)))

    return check


def check_values(turns: Turns, name: str, **options: Any) -> Any:
    fmt, plain = get_format(name), _plain(options)

    def check(result: Any) -> None:
        rows = _rows(turns.taken, fmt, options)
        part = _arrays.to_numpy(turns.taken[rows])
        same("values", result[rows], reference.fake_quantize(part, fmt, **plain))

    return check


def check_hadamard(turns: Turns, size: int) -> Any:
    def check(result: Any) -> None:
        rows = [0, 1, turns.taken.shape[0] - 1]
        part = _arrays.to_numpy(turns.taken[rows])
        same("values", result[rows], reference.hadamard(part, size))

    return check


def check_amax(turns: Turns) -> Any:
    return lambda result: same("amax", result, _arrays.to_numpy(turns.taken.float().abs().amax()))


# ---- cases ------------------------------------------------------------------------------------


def stored_bytes(name: str, rows: int, columns: int) -> int:
    """Bytes of codes and scales."""
    fmt = get_format(name)
    blocks = -(-rows // fmt.block_rows) * fmt.blocks(columns)
    return rows * fmt.row_bytes(columns) + blocks * SCALES[fmt.scale].bits // 8


def of_formats(room: Any, turns: Turns, device: str) -> list[Case]:
    """quantize, dequantize and fake_quantize of every named format."""
    x, found = turns.xs[0], []
    n, size = x.numel(), x.nbytes
    gpu = device == "cuda"

    def add(group: str, name: str, call: Any, count: int, aim: float, check: Any) -> None:
        if gpu and room.name == "triton":
            aim = TRITON_AIM
        wanted = aim if gpu else CPU_AIM if group in CPU_AIMED else None
        found.append(Case(name, call, count, n, group, room=room.name, aim=wanted, check=check))

    for name, fmt in pyfmt.FORMATS.items():
        aim = QUANTIZE_AIMS.get(name, 0.92)
        options: dict[str, Any] = {}
        if fmt.tensor_scale:
            options["tensor_scale"] = torch.tensor(GIVEN, device=device)
        both = size + stored_bytes(name, *x.shape)

        def quantize(f: str = name, o: Any = options) -> Any:
            return room.quantize(turns.x, f, **o)

        check = check_quantize(turns, name, **options)
        add("quantize", f"quantize {name}", quantize, both, aim, check)
        if options:
            dynamic: Callable[..., Any] = lambda f=name: room.quantize(turns.x, f)  # noqa: E731
            check = check_quantize(turns, name)
            add("quantize", f"quantize {name} dynamic", dynamic, both + size, 0.88, check)

        @cache
        def parts(i: int, f: str = name, o: Any = options) -> Any:
            codes, scales, stored = room.quantize(turns.xs[i], f, **o)
            return codes, scales, None if stored is None or not stored.numel() else stored

        def dequantize(f: str = name, parts: Any = parts) -> Any:
            return room.dequantize(*parts(turns.next()), f, x.shape, -1, x.dtype)

        check = check_values(turns, name, **options)
        add("dequantize", f"dequantize {name}", dequantize, both, aim, check)

        def fake(f: str = name, o: Any = options) -> Any:
            return room.fake_quantize(turns.x, f, **o)

        add("fake_quantize", f"fake_quantize {name}", fake, 2 * size, 0.92, check)
    return found


def of_rotations(room: Any, turns: Turns, device: str) -> list[Case]:
    """Rotation alone and fused with quantize."""
    x, found = turns.xs[0], []
    n, size = x.numel(), x.nbytes
    gpu, triton = device == "cuda", room.name == "triton"

    def add(name: str, fmt: str, aim: float | None, **options: Any) -> None:
        def call() -> Any:
            return room.quantize(turns.x, fmt, **options)

        both = size + stored_bytes(fmt, *x.shape)
        check = check_quantize(turns, fmt, **options)
        group = "rotate + quantize"
        found.append(Case(name, call, both, n, group, room=room.name, aim=aim, check=check))

    aim = CPU_AIM if not gpu else TRITON_AIM if triton else 0.85
    for r in ROTATIONS:
        add(f"rotate {r} + quantize mxfp4", "mxfp4", aim, rotation=r)
    if gpu:
        for r in (256, 1024):
            add(f"rotate {r} + quantize mxfp4", "mxfp4", None, rotation=r)
        for r in (32, 128):
            signs = torch.randn(r, device=device).sign()
            more = {"rotation": r, "signs": signs}
            add(f"rotate {r} with signs + quantize mxfp4", "mxfp4", None, **more)
        add("rotate 32 + quantize mxint8", "mxint8", aim, rotation=32)
    for r in ROTATION_SIZES if gpu else ROTATIONS:
        aim = None if not gpu else TRITON_AIM if triton else 0.92 if r <= 256 else 0.85
        found.append(
            Case(
                f"hadamard {r}",
                lambda r=r: room.hadamard(turns.x, r),
                2 * size,
                n,
                "hadamard",
                room=room.name,
                aim=aim,
                check=check_hadamard(turns, r),
            )
        )
    return found


def of_other_shapes(room: Any, turns: Turns) -> list[Case]:
    """Both axes at once, the other axis, whole rows, squares, stochastic rounding; on a GPU."""
    x, found = turns.xs[0], []
    n, size, transposed = x.numel(), x.nbytes, x.shape[::-1]
    ops: Any = torch.ops.pyfmt

    def add(name: str, fmt: str, axis: int = -1, **options: Any) -> None:
        def call() -> Any:
            return room.quantize(turns.x, fmt, axis, **options)

        both = size + stored_bytes(fmt, *(transposed if axis == -2 else x.shape))
        check = check_quantize(turns, fmt, axis, **options)
        found.append(Case(name, call, both, n, "other shapes", room=room.name, check=check))

    def dual(name: str, aim: float | None, how: str = "", reads: int = 1, **options: Any) -> None:
        def call() -> Any:
            return ops.quantize_dual(turns.x, name, **options)

        both = reads * size + stored_bytes(name, *x.shape) + stored_bytes(name, *transposed)
        check = check_dual(turns, name, **options)
        label = f"quantize_dual {name}{how}"
        found.append(Case(label, call, both, n, "dual", room=room.name, aim=aim, check=check))

    if isinstance(room, Ops):
        for name in ("mxfp4", "mxfp8_e4m3", "mxint8"):
            dual(name, 0.75 if room.name == "cuda" else None)
        dual("mxfp4", None, " rotated 32", rotation=32)
        for name in ("nvfp4", "nvint4"):
            dual(name, None, tensor_scale=torch.tensor(GIVEN, device=x.device))
            dual(name, None, " dynamic", 2)
    add("quantize mxfp4 along axis -2", "mxfp4", -2)
    for name in ("int8-brow-bf16", "e2m1-b32x32-e8m0", "e2m1-b16x16-e4m3"):
        add(f"quantize {name}", name)
    add("quantize mxfp4 stochastic", "mxfp4", rounding="stochastic", seed=1)
    call = lambda: room.amax(turns.x)  # noqa: E731
    check = check_amax(turns)
    amax = Case("amax of the tensor", call, size, n, "other shapes", room=room.name, check=check)
    return [*found, amax]


def cases(turns: Turns, device: str) -> list[Case]:
    """Return everything to time, the copy first."""
    x = turns.xs[0]
    out = torch.empty_like(x)
    found = [Case("copy", lambda: out.copy_(turns.x), 2 * x.nbytes, x.numel(), "copy")]
    if device == "cpu":
        found.append(Case("clone", lambda: turns.x.clone(), 2 * x.nbytes, x.numel(), "copy"))
    for room in rooms(device):
        found += of_formats(room, turns, device) + of_rotations(room, turns, device)
        if device == "cuda":
            found += of_other_shapes(room, turns)
    return found
