# SPDX-License-Identifier: Apache-2.0
"""The rooms: one module for each way to compute, all with the same functions.

A room has `available()` and `supports(verb, fmt, x)`, which return None for yes or the reason why
not, and the verbs. A room asked for by name never falls back; `explain` says why a room is chosen.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from pyfmt import _arrays
from pyfmt.backends import cpu, cuda, reference, triton
from pyfmt.formats import Format, closest, get_format

# In order of preference: the first room that serves the call is chosen. They are imported here and
# not when first asked for, so that torch.compile traces a call through; none imports torch, and
# pyfmt.backends.triton is the room, not the package, which its kernels import.
_ROOMS: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "reference": reference,
}
NAMES = tuple(_ROOMS)

VERBS = (
    "quantize",
    "quantize_dual",
    "dequantize",
    "fake_quantize",
    "hadamard",
    "pack",
    "unpack",
    "amax",
    "matmul",
)


def get(name: str) -> ModuleType:
    """Return a room by name; ValueError with the closest names for an unknown one."""
    if name not in _ROOMS:
        raise ValueError(f"backend: unknown {name!r}{closest(name, NAMES)}")
    return _ROOMS[name]


def available() -> dict[str, str | None]:
    """Return each room with None where it can be used here, else the reason why not."""
    return {name: get(name).available() for name in NAMES}


def _reason(name: str, verb: str, fmt: Format | None, x: Any) -> str | None:
    room = get(name)
    reason: str | None = room.available() or room.supports(verb, fmt, x)
    return reason


def choose(verb: str, fmt: Format | None, x: Any, backend: str | None = None) -> ModuleType:
    """Return the room that serves `verb` on `x`: the one named, or the first that can.

    Raises ValueError with the reason where a named room cannot, or with every room's reason.
    """
    if backend is not None:
        room = get(backend)
        reason = _reason(backend, verb, fmt, x)
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot {verb}: {reason}")
        return room
    reasons = []
    for name in NAMES:
        reason = _reason(name, verb, fmt, x)
        if reason is None:
            return get(name)
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no backend can {verb} a {_arrays.where(x)} ({'; '.join(reasons)})")


def explain(verb: str, fmt: str | Format | None, x: Any) -> dict[str, str]:
    """Return for each room "chosen", "able", or the reason why it cannot serve the call."""
    if verb not in VERBS:
        raise ValueError(f"verb: unknown {verb!r}{closest(verb, VERBS)}")
    fmt = None if fmt is None else get_format(fmt)
    answer: dict[str, str] = {}
    for name in NAMES:
        reason = _reason(name, verb, fmt, x)
        first = reason is None and "chosen" not in answer.values()
        answer[name] = "chosen" if first else reason or "able"
    return answer


def explain_matmul(a: Any, b: Any, *, batch_invariant: bool = False) -> dict[str, str]:
    """Return for each GEMM path of b's device "chosen" and why, "able", or why it cannot serve.

    a: a QTensor or a dense array; b: a QTensor. On the CPU the words name the instruction set.
    """
    where = _arrays.kind(b.codes)
    on_cpu = where == "numpy" or (where == "torch" and b.codes.device.type == "cpu")
    return (cpu if on_cpu else cuda).explain_matmul(a, b, batch_invariant)
