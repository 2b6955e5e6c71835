# SPDX-License-Identifier: Apache-2.0
"""The machine code of the GPU library, as the assembler left it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyfmt.backends import cuda


def disassembler() -> str | None:
    """cuobjdump: CUDA's own, or the one in Triton's package."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(inside) if inside.exists() else None
    return found


def instructions(library: Path) -> Iterator[tuple[str, str]]:
    """Kernel and instruction, one after the other, as compiled for Hopper."""
    program = disassembler()
    if program is None:
        pytest.skip("there is no cuobjdump")
    command = [program, "-arch=sm_90a", "--dump-sass", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        kernel = ""
        for line in process.stdout:
            if "Function : " in line:
                kernel = line.partition("Function : ")[2].strip()
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                yield kernel, match[1]
        assert process.wait() == 0


@pytest.mark.skipif(cuda.torch_library_path() is None, reason="there was no nvcc")
def test_nothing_is_read_as_constant_before_the_launch_ahead_has_ended() -> None:
    # ld.global.nc promises that nobody writes while the kernel runs: the assembler moves such loads
    # above the wait for the launch ahead (ACQBULK), which may be what writes them.
    library = cuda.torch_library_path()
    assert library is not None
    early: dict[str, int] = {}
    waited: set[str] = set()
    wrong: list[str] = []
    for kernel, text in instructions(library):
        if "ACQBULK" in text:
            waited.add(kernel)
            if early.pop(kernel, 0):
                wrong.append(kernel)
        elif "LDG" in text and "CONSTANT" in text and kernel not in waited:
            early[kernel] = early.get(kernel, 0) + 1
    assert len(waited) > 100, "few kernels wait for the launch ahead: is this Hopper's code?"
    assert not wrong, wrong
