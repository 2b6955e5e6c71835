# SPDX-License-Identifier: Apache-2.0
"""The native path: what Triton compiles it to for Blackwell, and its results in the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch

from pyfmt import _matmul_paths as paths
from pyfmt import _torch_native, reference
from pyfmt._torch_operands import Left, Out, Right
from pyfmt.formats import get_format
from tests import grids
from tests.rooms import to_torch

MXF8 = ("mxfp8_e4m3", "mxfp8_e5m2")
# The instruction that a pair of formats must become on a compute capability.
INSTRUCTIONS = {
    (100, "mxfp4", "mxfp4"): r"tcgen05\.mma\S*kind::mxf4\.block_scale",
    (100, "nvfp4", "nvfp4"): r"tcgen05\.mma\S*kind::mxf4nvf4\.block_scale\.block16",
    (100, "mxfp8_e4m3", "mxfp8_e5m2"): r"tcgen05\.mma\S*kind::mxf8f6f4\.block_scale",
    (100, "mxfp8_e4m3", "mxfp4"): r"tcgen05\.mma\S*kind::mxf8f6f4\.block_scale",
    (120, "mxfp4", "mxfp4"): r"mma\.sync\S*kind::mxf4nvf4\.block_scale\S*ue8m0",
    (120, "nvfp4", "nvfp4"): r"mma\.sync\S*kind::mxf4nvf4\.block_scale\S*ue4m3",
    (120, "mxfp8_e5m2", "mxfp8_e4m3"): r"mma\.sync\S*kind::mxf8f6f4\.block_scale",
}


@pytest.mark.parametrize("m", [16, 4096])
@pytest.mark.parametrize(("capability", "left", "right"), INSTRUCTIONS)
def test_it_becomes_block_scaled_instructions(
    capability: int, left: str, right: str, m: int
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pyfmt.triton_kernels.matmul import matmul_scaled

    a, b = get_format(left), get_format(right)
    assert paths.native_reason(
        paths.Call(a, "float32", b, m, 4096, 4096), paths.Machine((capability // 10, 0))
    ) is None  # fmt: skip
    facts = _torch_native.constants(a, b, m)
    options = {name: facts.pop(name) for name in ("num_warps", "num_stages")}
    facts |= {"HAS_BIAS": True, "HAS_FACTORS": a.tensor_scale}
    types = ["*u8"] * 4 + ["*bf16", "*fp32", "*fp32", "*fp32"] + ["i32"] * 3
    names = matmul_scaled.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(facts, "constexpr")
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(matmul_scaled, signature, facts, attrs)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert re.search(INSTRUCTIONS[capability, left, right], compiled.asm["ptx"])
    assert compiled.metadata.shared <= (99 if capability == 120 else 227) * 1024


def test_results_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_matmul_native"]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def interpreted(left: str, right: str, m: int, n: int, k: int) -> None:
    a, w = grids.noise(m, k, seed=1), grids.noise(n, k, seed=2)
    sides = []
    for x, name in ((a, left), (w, right)):
        fmt = get_format(name)
        parts = reference.quantize(x, fmt)
        values = reference.dequantize(*parts, fmt, x.shape).astype(np.float64)
        tensors = [None if p is None else to_torch(np.asarray(p)) for p in parts]
        sides.append((tensors, values))
    (a_parts, a_values), (w_parts, w_values) = sides
    bias = torch.linspace(-1, 1, n)
    # The interpreter truncates to bfloat16, so float32 alone is compared.
    y = _torch_native.native(
        Left(m, k, paths.facts(left), None, *a_parts),
        Right(*w_parts, paths.facts(right), n),
        Out(bias, torch.float32),
    )
    exact = a_values @ w_values.T + bias.double().numpy()
    weight = np.abs(a_values) @ np.abs(w_values).T + 1
    bound = (k + 2) * 2.0**-24 * weight
    assert (np.abs(y.double().numpy() - exact) <= bound).all(), (left, right, m, n, k)


if __name__ == "__main__":
    # The interpreter reads every scale byte as a power of two: NVFP4 shows in instructions alone.
    for pair in (("mxfp4", "mxfp4"), MXF8, ("mxfp8_e4m3", "mxfp4")):
        interpreted(*pair, 9, 21, 160)
        interpreted(*pair, 130, 70, 320)
