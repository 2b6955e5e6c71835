# SPDX-License-Identifier: Apache-2.0
"""Products in several processes that share one GPU: every call gives the same bits.

When the device changes from one process to another between a read of shared memory and the arrival
that frees the place, the copy that follows may come first. A kernel in which arrivals do not wait
for reads is wrong in one call of a hundred here, and right whenever it runs alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 4

FEW = ["mxfp4", "nvfp4", "mxint4", "nvint4", "int4", "mxfp6_e2m3", "mxint6", "mxfp8_e4m3"]
FEW += ["mxint8", "int8", "int4-b32-bf16"]
PROCESSES = [
    # Plans are tile, share, split, and 1 to write the weight out; zeros let the kernel choose.
    ["wide:mxfp8_e4m3:300x130x2001", "wide:mxfp8_e4m3:64x1400x2048:64,4,1"],
    ["wide:int8-b32-fp32:200x700x2048:64,1,1", "wide:int4:200x700x2048:128,1,1"],
    ["wide:int4:300x700x2048:192,1,1", "wide:int8-b64-bf16:300x700x2048:192,1,1"],
    ["wide:int8:600x2500x2048:256,1,1,1", "wide:int4-b32-fp16:300x700x2048:192,1,1,1"],
    ["wide:mxfp4:64x2800x4096:64,4,4", "wide:nvfp4:64x1400x2048:64,2,2"],
    ["wide:mxint8:200x700x2048:256,1,1", "wide:mxint8:300x700x2048:128,1,1"],
    ["wide:mxfp4:16x1400x2048", "wide:mxint8:16x700x2048:16,1,2", "wide:nvfp4:32x1400x2048"],
    ["wide:mxfp4:16x1400x8192:16,2,2", "wide:mxint8:16x1400x2048:16,2,2"],
    ["wide:int4:16x1400x8192:16,2,2", "wide:int8-b128-fp16:64x1400x2048:64,4,4"],
    ["wide:int8:16x1400x2048", "wide:int4-b256-fp32:32x1400x2048:32,4,1"],
    ["wide:int4:64x1400x2048:64,4,1", "wide:int8:32x700x2048:32,1,2"],
    ["wide:int4-b32-fp16:16x1400x2048:16,2,2", "wide:int8-b64-bf16:32x1400x2048"],
    ["wide:nvfp4:16x1400x2048:16,2,2", "wide:mxfp6_e2m3:16x2800x4096:16,4,1"],
    ["fold:mxfp4:200x700x2048:64,1,1", "fold:mxfp6_e3m2:200x700x2048:128,2,1"],
    [
        "fold:mxfp4:300x700x2048:256,1,1",
        "fold:mxfp4:300x700x2048:144,1,2",
        "fold:mxfp6_e3m2:200x700x2048:192,1,2",
    ],
    [f"skinny:{name}:1x1400x2048" for name in FEW],
    [f"skinny:{name}:{m}x6000x1024" for name in FEW for m in (4, 8)],
    [f"skinny:{name}:16x1400x2048" for name in FEW],
    [f"skinny:{name}:{m}x4224x8192" for name in FEW[:4] for m in (1, 8)],
    [f"codes:{name}:{m}x4224x8192" for name in ("mxfp4", "mxint4") for m in (1, 8, 16)],
    [f"codes:{name}:{m}x4224x8192" for name in ("nvfp4", "nvint4") for m in (1, 4)],
    ["codes:nvfp4:4x6400x1024", "codes:nvfp4:3x1280x14336", "codes:nvint4:2x2816x3840"],
    ["codes:mxfp4:16x6400x1024", "codes:mxfp4:5x1280x14336", "codes:mxint4:3x2816x3840"],
    [f"skinny:{name}:8x4224x8192" for name in ("mxfp6_e3m2", "mxfp8_e5m2", "int4")],
    [f"skinny:{name}:3x1280x14336" for name in (*FEW[:4], "mxint6", "mxint8")],
    [f"rounded:{name}:16x4224x8192" for name in ("mxfp4", "nvfp4", "mxfp6_e2m3", "mxint8")],
    ["rounded:mxfp4:9x1280x14336", "rounded:nvint4:12x6400x1024", "rounded:nvfp4:30x1400x4096"],
    [f"skinny:{name}:{shape}" for name in FEW[:4] for shape in ("1x4096x14336", "8x2128x5120")],
    ["linear:mxfp4:1x4096x2048", "linear:nvfp4:4x4096x2048", "linear:mxint4:16x4096x2048"],
    ["linear:nvfp4:8x4224x8192", "linear:nvint4:6x4096x2048", "linear:nvfp4:5x1280x14336"],
]


def run(processes: list[list[str]], seconds: float) -> dict[str, list[int]]:
    """Calls and wrong ones of each case."""
    command = [sys.executable, "-m", "tests.beside_worker", str(seconds)]
    started = [
        subprocess.Popen([*command, *cases], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for cases in processes
    ]
    found: dict[str, list[int]] = {}
    for process, cases in zip(started, processes, strict=True):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{cases}: exit {process.returncode}"
        found.update(json.loads(out.splitlines()[-1]))
    return found


def test_bits_do_not_depend_on_other_processes() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels under test are those of compute capability 9.0")
    found = run(PROCESSES, SECONDS)
    assert set(found) == {case for cases in PROCESSES for case in cases}
    wrong = {case: counts for case, counts in found.items() if counts[1]}
    assert not wrong, f"wrong of calls: {wrong}"
    assert min(calls for calls, _ in found.values()) >= 30
