# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels compile to, ahead of time and without a device, as the room launches.

No spills, no flushing of subnormals, no approximate division, no contraction; wide loads and
stores; and for the main formats a bound on the instructions for an element.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from pyfmt.formats import FORMATS, Format, get_format

SEED = {"rounding": "stochastic", "seed": 0x9E3779B97F4A7C15}

Compiled = tuple[str, Any, int]  # kernel name, compiled kernel, elements a thread


def compile_call(monkeypatch: pytest.MonkeyPatch, capability: int, call: Any) -> list[Compiled]:
    """Compile the kernels that `call(room)` would launch, as it would launch them."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pyfmt.backends import _triton_launch, triton

    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    names |= {torch.uint8: "u8", torch.int8: "i8"}
    found = []

    def launch(kernel: Any, grid: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        signature, constexprs, attrs = {}, {}, {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            plain = name in ("key_low", "key_high")
            if value is None or (type(value) is int and value == 1 and not plain):
                signature[name], constexprs[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name], even = "*" + names[value.dtype], value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[name], even = "fp32", False
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                even = value % 16 == 0 and not plain
            if even:
                attrs[(i,)] = [["tt.divisibility", 16]]
        options = {name: constants[name] for name in ("num_warps", "enable_fp_fusion")}
        for name in kernel.arg_names[len(args) :]:
            signature[name], constexprs[name] = "constexpr", constants[name]
        source = ASTSource(kernel, signature, constexprs, attrs)
        target = GPUTarget("cuda", capability, 32)
        elements = constants.get("N") or constants.get("NB", 1) * constants.get("BLOCK", 0)
        per_thread = (elements or 0) // (32 * constants["num_warps"])
        compiled = compile(source, target=target, options=options)
        found.append((kernel.fn.__name__, compiled, per_thread))

    monkeypatch.setattr(_triton_launch, "launch", launch)
    call(triton)
    return found


def tool(name: str, compiled: Any, *flags: str, tmp_path: Any) -> str:
    """Run a tool of Triton's package over the machine code."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    return subprocess.run(
        [str(program), *flags, str(file)], capture_output=True, text=True, check=True
    ).stdout


def big(dtype: str = "bfloat16", rows: int = 4096, columns: int = 4096) -> Any:
    """A tensor large enough for full tiles, whose memory nobody touches."""
    import torch

    return torch.empty((rows, columns), dtype=getattr(torch, dtype))


def stored(fmt: Format, rows: int = 4096, columns: int = 4096) -> tuple[Any, ...]:
    import torch

    codes = torch.empty((rows, fmt.row_bytes(columns)), dtype=torch.uint8)
    kind = {"e8m0": "uint8", "e4m3": "uint8", "bf16": "bfloat16"}[fmt.scale]
    scales = torch.empty((rows, fmt.blocks(columns)), dtype=getattr(torch, kind))
    scale = torch.empty((), dtype=torch.float32) if fmt.tensor_scale else None
    return codes, scales, scale, fmt, (rows, columns)


def quantize(spec: str, **options: Any) -> Any:
    return lambda room: room.quantize(big(), get_format(spec), **options)


def dequantize(spec: str) -> Any:
    return lambda room: room.dequantize(*stored(get_format(spec)), dtype="bfloat16")


def fake(spec: str, **options: Any) -> Any:
    return lambda room: room.fake_quantize(big(), get_format(spec), **options)


# What, the widest load and store in PTX ("" for any), instructions an element at most (0 for any).
WIDE = "v4.b32"
HOPPER: dict[str, tuple[Any, str, str, float]] = {
    "quantize mxfp4": (quantize("mxfp4"), WIDE, WIDE, 11.5),
    "quantize mxfp8_e4m3": (quantize("mxfp8_e4m3"), WIDE, WIDE, 16),
    "quantize mxfp6_e2m3": (quantize("mxfp6_e2m3"), WIDE, "b32", 16),
    "quantize mxint8": (quantize("mxint8"), WIDE, WIDE, 14),
    "quantize nvint4": (quantize("nvint4", tensor_scale=0.5), WIDE, WIDE, 20),
    "quantize nvfp4 of its amax": (quantize("nvfp4"), WIDE, WIDE, 22),
    "quantize int4": (quantize("int4"), WIDE, WIDE, 17),
    "quantize floor": (quantize("mxfp4", scale_rule="floor"), WIDE, WIDE, 12.5),
    "quantize stochastic": (quantize("mxfp4", **SEED), WIDE, WIDE, 45),
    "rotate 32 and quantize": (quantize("mxfp4", rotation=32), WIDE, WIDE, 17.5),
    "rotate 64 and quantize": (quantize("mxfp4", rotation=64), WIDE, WIDE, 19.5),
    "rotate 128 and quantize": (quantize("mxfp4", rotation=128), WIDE, WIDE, 21),
    "quantize float32": (
        lambda room: room.quantize(big("float32"), FORMATS["mxfp4"]), WIDE, "v2.b32", 17
    ),
    "quantize transposed": (quantize("mxfp4", axis=0), "b32", "b32", 0),
    "quantize squares": (quantize("e2m1-b16x16-e8m0"), WIDE, "b32", 0),
    "quantize rows": (quantize("int4-brow-bf16"), WIDE, "", 0),
    "quantize odd blocks": (quantize("e3m2-b7-e8m0"), "", "", 0),
    "fake_quantize mxfp4": (fake("mxfp4"), WIDE, WIDE, 16),
    "fake_quantize nvfp4": (fake("nvfp4", tensor_scale=0.5), WIDE, WIDE, 26),
    "dequantize mxfp4": (dequantize("mxfp4"), WIDE, WIDE, 13),
    "dequantize mxfp6_e3m2": (dequantize("mxfp6_e3m2"), "b32", WIDE, 15),
    "dequantize mxfp8_e5m2": (dequantize("mxfp8_e5m2"), WIDE, WIDE, 12),
    "dequantize nvfp4": (dequantize("nvfp4"), WIDE, WIDE, 15),
    "dequantize transposed": (
        lambda room: room.dequantize(*stored(FORMATS["mxfp4"]), axis=0, dtype="bfloat16"),
        "b32",
        "b32",
        0,
    ),
    "hadamard 32": (lambda room: room.hadamard(big(), 32), WIDE, WIDE, 18),
    "hadamard 1024": (lambda room: room.hadamard(big(), 1024), WIDE, WIDE, 26),
    "amax": (lambda room: room.amax(big()), WIDE, "", 0),
    "pack": (lambda room: room.pack(big("uint8"), 6), WIDE, "b32", 0),
    "unpack": (lambda room: room.unpack(big("uint8", columns=3072), 6, 4096), "b32", WIDE, 0),
}  # fmt: skip


def check_code(name: str, compiled: Any, tmp_path: Any) -> str:
    """Assert what must hold of every kernel's code; return the machine code."""
    ptx = compiled.asm["ptx"]
    for wrong in (".ftz", "div.full", "div.approx", "rcp.approx", "ld.local", "st.local"):
        assert wrong not in ptx, f"{name}: {wrong}"
    used = tool("cuobjdump", compiled, "-res-usage", tmp_path=tmp_path)
    assert re.search(r"STACK:0 .*LOCAL:0 ", used), f"{name} spills: {used}"
    sass = tool("cuobjdump", compiled, "-sass", tmp_path=tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} spills"
    assert compiled.metadata.enable_fp_fusion is False, f"{name} may contract"
    if compiled.metadata.target.arch == 90 and "div.rn" not in ptx:
        # Only what is written as fma is one: products and sums were kept apart.
        written, made = ptx.count("fma.rn.f32"), len(re.findall(r"\bFFMA", sass))
        assert made == written, f"{name}: {made} fused operations of {written}"
    return sass


@pytest.mark.parametrize("case", HOPPER)
def test_code_for_hopper(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    call, load, store, budget = HOPPER[case]
    found = compile_call(monkeypatch, 90, call)
    assert found
    for name, compiled, _ in found:
        sass = check_code(name, compiled, tmp_path)
    # The last launch is the verb itself; what went before is its tensor's amax.
    name, compiled, per_thread = found[-1] if case != "amax" else found[0]
    ptx = compiled.asm["ptx"]
    assert not load or f"ld.global.{load}" in ptx, f"{name}: no load of {load}"
    assert not store or f"st.global.{store}" in ptx, f"{name}: no store of {store}"
    if budget:
        code = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", sass)
        count = sum(op != "NOP" for op in code) / per_thread
        assert count <= budget, f"{name}: {count:.1f} instructions an element"


BLACKWELL = ["quantize mxfp4", "quantize nvfp4 of its amax", "quantize transposed"]
BLACKWELL += ["dequantize mxfp6_e3m2", "rotate 128 and quantize", "quantize odd blocks"]


@pytest.mark.parametrize("capability", [100, 120])
@pytest.mark.parametrize("case", BLACKWELL)
def test_code_for_blackwell(
    case: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name, compiled, _ in compile_call(monkeypatch, capability, HOPPER[case][0]):
        check_code(name, compiled, tmp_path)


def test_one_launch_with_a_tensor_scale_and_two_without(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pyfmt.backends import _triton_launch, triton

    launched = []
    monkeypatch.setattr(_triton_launch, "launch", lambda *args: launched.append(args[0].__name__))
    for fmt, options, count in [
        (FORMATS["mxfp4"], {"rotation": 32}, 1),
        (FORMATS["nvfp4"], {}, 2),
        (FORMATS["nvint4"], {"rotation": 64}, 2),
        (FORMATS["nvfp4"], {"tensor_scale": 0.5}, 1),
        (FORMATS["nvfp4"], {"recipe": "single_level"}, 1),
    ]:
        launched.clear()
        triton.quantize(torch.empty(8, 256), fmt, **options)
        assert len(launched) == count, (fmt.name, options, launched)


def test_launches_find_their_kernels_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Triton's own launcher, less the launch: compiled once, found again, never refused."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from pyfmt.backends import _triton_launch, triton

    class Device:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 90

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    found: list[Any] = []

    def launch(kernel: Any, grid: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        found.append(kernel.run(*args, grid=(grid,), warmup=True, **constants))

    monkeypatch.setattr(_triton_launch, "launch", launch)
    monkeypatch.setattr(driver, "_active", Device())
    x = torch.empty((64, 4096), dtype=torch.bfloat16)
    for spec, options in [
        ("nvfp4", {}),
        ("nvfp4", {"tensor_scale": 0.3}),
        ("mxfp4", SEED),
        ("mxfp4", {"axis": 0}),
        ("e2m1-b5-e8m0", {}),
        ("int4", {"rotation": 64, "signs": torch.ones(64)}),
    ]:
        kernels = []
        for values in (x, torch.empty_like(x)):
            found.clear()
            triton.quantize(values, get_format(spec), **options)
            assert found and all(kernel.metadata.enable_fp_fusion is False for kernel in found)
            kernels.append(list(found))
        assert all(a is b for a, b in zip(*kernels, strict=True)), spec
