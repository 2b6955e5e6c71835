# SPDX-License-Identifier: Apache-2.0
"""What a call costs beside its arithmetic: small eager ops, and `import pyfmt`.

    python bench/overhead.py [--save NAME] [--grad]

Calls in inference mode, or in grad mode with --grad. The aim is 20 us for each op on an (8, 64)
tensor and 0.15 s for the import.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch
from harness import Case, arguments, machine, measure, report, save

import pyfmt
import pyfmt.nn
import pyfmt.ops


def cases(x: torch.Tensor) -> list[Case]:
    """Return one small call of each op, and of the Python functions around them."""
    ops = torch.ops.pyfmt
    w = pyfmt.quantize(torch.randn(64, 64), "mxfp4")
    q = pyfmt.quantize(x, "mxfp4")
    dense = torch.randn(64, 64).to(torch.bfloat16)
    linear = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    from_linear = pyfmt.nn.QuantLinear.from_linear
    layers = {
        "mxfp4": from_linear(linear, weight="mxfp4"),
        "mxfp4 x mxfp4": from_linear(linear, weight="mxfp4", activation="mxfp4", rotation=32),
    }
    calls = {
        "torch linear, for comparison": lambda: torch.nn.functional.linear(x, dense),
        **{f"quantize {f}": lambda f=f: ops.quantize(x, f) for f in ("mxfp4", "nvfp4", "int4")},
        "dequantize mxfp4": lambda: ops.dequantize(q.codes, q.scales, None, "mxfp4", x.shape),
        "fake_quantize mxfp4": lambda: ops.fake_quantize(x, "mxfp4"),
        "hadamard 32": lambda: ops.hadamard(x, 32),
        "pack": lambda: ops.pack(q.codes, 4),
        "unpack": lambda: ops.unpack(q.codes, 4, 64),
        "amax": lambda: ops.amax(x),
        "matmul dense x mxfp4": lambda: ops.matmul(
            x, None, None, None, w.codes, w.scales, None, "mxfp4", 64
        ),
        "matmul mxfp4 x mxfp4": lambda: ops.matmul(
            q.codes, q.scales, None, "mxfp4", w.codes, w.scales, None, "mxfp4", 64
        ),
        "linear mxfp4": lambda: ops.linear(x, w.codes, w.scales, None, "mxfp4"),
        "linear mxfp4 x mxfp4": lambda: ops.linear(
            x, w.codes, w.scales, None, "mxfp4", None, "mxfp4", 32
        ),
        "pyfmt.quantize mxfp4": lambda: pyfmt.quantize(x, "mxfp4"),
        "pyfmt.fake_quantize mxfp4": lambda: pyfmt.fake_quantize(x, "mxfp4"),
        "pyfmt.dequantize mxfp4": lambda: pyfmt.dequantize(q, torch.bfloat16),
        "pyfmt.matmul dense x mxfp4": lambda: pyfmt.matmul(x, w),
        "nn.Linear, for comparison": lambda: linear(x),
        **{f"QuantLinear {name}": lambda m=layer: m(x) for name, layer in layers.items()},
    }
    return [Case(name, call, 0, 0, "ops") for name, call in calls.items()]


def import_seconds(runs: int = 9) -> float:
    """Return the median wall time of `import pyfmt` in a fresh interpreter, NumPy's included."""
    code = "import time; t = time.perf_counter(); import pyfmt; print(time.perf_counter() - t)"
    times = []
    for _ in range(runs):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        times.append(float(done.stdout))
        time.sleep(0.01)
    return statistics.median(times)


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--grad", action="store_true", help="in grad mode, torch's default")
    args = parser.parse_args()
    x = torch.randn(8, 64).to(torch.bfloat16)
    seconds = import_seconds()
    with torch.inference_mode(not args.grad):
        lines = measure(cases(x), seconds=min(args.seconds, 0.3), rounds=args.rounds)
    print(machine())
    report("calls on (8, 64) bfloat16", lines)
    print(f"import pyfmt: {seconds:.3f} s")
    if args.save:
        print(save(args.save, lines, import_seconds=seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
