# SPDX-License-Identifier: Apache-2.0
"""Products over and over, their bits compared: one of the processes of test_matmul_beside.py.

    python -m tests.beside_worker SECONDS CASE...

A case is path:format:MxNxK, and for wide, rounded (wide behind the launch that rotates and rounds
x) and fold a plan of three numbers after another colon. The last line that is printed is JSON: for
each case its calls and those that differed from the first.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch

import pyfmt
import pyfmt.ops

OPS: Any = torch.ops.pyfmt
BITS = {name: pyfmt.get_format(name).bits for name in pyfmt.FORMATS}


class Case:
    """A product whose operands wait on the device, and on the host to be sent again."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.path, self.name, shape, *plan = text.split(":")
        m, n, self.k = map(int, shape.split("x"))
        self.plan: list[Any] = [int(i) for i in plan[0].split(",")] if plan else [0, 0, 0]
        self.plan[3:] = map(bool, self.plan[3:])
        rng = np.random.default_rng(m)
        dense = rng.standard_normal((m, self.k)).astype(np.float32)
        w = rng.standard_normal((n, self.k)).astype(np.float32)
        *weight, scale = OPS.quantize(torch.from_numpy(w).cuda(), self.name)
        self.scale = scale if scale.numel() else None
        x = [torch.from_numpy(dense).to(torch.bfloat16).cuda()]
        if self.path == "fold":
            x = list(OPS.quantize(x[0], self.name)[:2])
        self.device = [*x, *weight]
        self.host = [part.cpu() for part in self.device]
        self.want = self.call(self.device)
        self.calls = self.wrong = 0

    def call(self, parts: list[Any]) -> Any:
        if self.path == "fold":
            how = [self.name, None, "symmetric", 0, None, True]
            rest = [self.name, None, None, None, torch.float32, None, *self.plan]
            return OPS._matmul_fold(None, *parts[:2], *how, *parts[2:], *rest)
        x, codes, scales = parts
        if self.path == "codes":
            how = [self.name, None, None, "symmetric", 32, None]
            weight = [codes, scales, self.scale, self.name]
            return OPS._matmul_codes(x, None, None, None, *how, *weight, None, torch.float32)
        if self.path == "linear":
            how = [self.name, None, self.name, 32]
            return OPS.linear(x, codes, scales, self.scale, *how)
        rest = [self.name, self.k, None, torch.float32]
        if self.path == "rounded":
            given = [x, self.name, None, None, "symmetric", 32, None, self.scale]
            y, stored = OPS._round_values(*given, BITS[self.name])
            scale = stored if stored.numel() else None
            return OPS._matmul_wide(y, codes, scales, scale, *rest, *self.plan, ordered=True)
        if self.path == "skinny":
            return OPS._matmul_skinny(x, codes, scales, self.scale, *rest)
        return OPS._matmul_wide(x, codes, scales, self.scale, *rest, *self.plan)

    def check(self, y: Any) -> None:
        self.calls += 1
        if not torch.equal(y, self.want):
            self.wrong += int(bool(((y != self.want) & ~(y.isnan() & self.want.isnan())).any()))

    def round(self) -> None:
        """Calls one by one, then of operands that were just sent, then many in a row."""
        for _ in range(10):
            self.check(self.call(self.device))
        for _ in range(3):
            self.check(self.call([part.cuda() for part in self.host]))
        for y in [self.call(self.device) for _ in range(20)]:
            self.check(y)


def main(seconds: float, texts: list[str]) -> None:
    cases = [Case(text) for text in texts]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for case in cases:
            case.round()
    print(json.dumps({case.text: [case.calls, case.wrong] for case in cases}))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
