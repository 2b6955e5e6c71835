# SPDX-License-Identifier: Apache-2.0
"""The Triton room with NumPy in and NumPy out: in Triton's interpreter, or on a CUDA device.

TRITON_INTERPRET is read when kernels are imported, so the interpreter runs in a process of its own:
`python -m tests.triton_room` answers pickled calls. Strides and offsets survive the way, and fresh
outputs are full of 0xA5, so that what no kernel wrote is seen.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


class Strided:
    """An array as the memory of its owner, with its offset, shape and strides."""

    def __init__(self, x: np.ndarray) -> None:
        owner = x
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        self.memory = owner.ravel(order="K").view(np.uint8).tobytes()
        self.offset = x.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        self.dtype, self.shape, self.strides = x.dtype, x.shape, x.strides

    def array(self) -> np.ndarray:
        memory = bytearray(self.memory)
        return np.ndarray(self.shape, self.dtype, memory, self.offset, self.strides)


def _wrap(x: Any) -> Any:
    strided = isinstance(x, np.ndarray) and x.size and not x.flags.c_contiguous
    return Strided(x) if strided else x


class Interpreted:
    """The room in another process, whose kernels run in Triton's interpreter."""

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.triton_room"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __getattr__(self, verb: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            options = {name: _wrap(value) for name, value in options.items()}
            assert self.process.stdin is not None and self.process.stdout is not None
            pickle.dump((verb, tuple(map(_wrap, args)), options), self.process.stdin)
            self.process.stdin.flush()
            good, answer = pickle.load(self.process.stdout)
            if not good:
                raise answer
            return answer

        return call

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


class OnDevice:
    """The room in this process, on a device: arrays go there and back."""

    def __init__(self, device: str) -> None:
        from pyfmt.backends import triton

        self.room, self.device = triton, device

    def _to(self, x: Any) -> Any:
        from tests.rooms import to_torch

        if isinstance(x, Strided):
            memory = to_torch(np.frombuffer(x.memory, np.uint8)).to(self.device)
            own = to_torch(np.zeros(0, x.dtype)).dtype
            steps = [stride // x.dtype.itemsize for stride in x.strides]
            offset = x.offset // x.dtype.itemsize
            return memory.view(own).as_strided(x.shape, steps, offset)
        if isinstance(x, np.ndarray | np.generic):
            return to_torch(np.array(x)).to(self.device)
        if hasattr(x, "codes"):
            return x.torch(self.device)
        return x

    def __getattr__(self, verb: str) -> Any:
        from tests.rooms import to_numpy

        def back(y: Any) -> Any:
            if isinstance(y, tuple):
                return tuple(map(back, y))
            return None if y is None else to_numpy(y.detach().cpu())

        def call(*args: Any, **options: Any) -> Any:
            options = {name: self._to(_wrap(value)) for name, value in options.items()}
            return back(getattr(self.room, verb)(*(self._to(_wrap(x)) for x in args), **options))

        return call


def poisoned_empty() -> Any:
    """Return a torch.empty whose memory is full of 0xA5."""
    import torch

    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> Any:
        y = empty(*args, **options)
        if y.numel():
            y.reshape(-1).view(torch.uint8).fill_(0xA5)
        return y

    return poisoned


def _serve() -> None:
    """Answer calls on standard input until it ends."""
    import torch

    torch.empty = poisoned_empty()
    room = OnDevice("cpu")
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while True:
        try:
            verb, args, options = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = (True, getattr(room, verb)(*args, **options))
        except (TypeError, ValueError) as error:
            answer = (False, error)
        except Exception:
            answer = (False, RuntimeError(traceback.format_exc()))
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # The module under its own name: pickled classes are of that one.
    from tests import triton_room

    triton_room._serve()
