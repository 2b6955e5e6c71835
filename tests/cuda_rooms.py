# SPDX-License-Identifier: Apache-2.0
"""The CUDA room under test: on a device, and its kernels run on the CPU by tests/emulation."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pyfmt import reference
from pyfmt.formats import get_format
from tests import grids
from tests.grids import BF16
from tests.mismatch import same_floats
from tests.rooms import Room, same_quantized, to_numpy, to_torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emulation"
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wno-unknown-pragmas".split()
FLAGS += ["-Wno-attributes", f"-I{ROOT / 'tests' / 'emulation'}", f"-I{ROOT / 'csrc'}"]


class DeviceRoom(Room):
    """The CUDA room on device 0: NumPy in, NumPy out by way of the device."""

    def _in(self, x: np.ndarray | None) -> Any:
        return None if x is None else to_torch(x).cuda()

    def _call(self, verb: str, *args: Any, **options: Any) -> Any:
        poison_device()
        result = getattr(self.module, verb)(*args, **options)
        return tuple(map(_home, result)) if isinstance(result, tuple) else _home(result)


def _home(x: Any) -> Any:
    return x.cpu() if hasattr(x, "cpu") else x


def poison_device(sizes: Iterable[int] = (512, 2048, 8192, 65536, 1 << 20, 1 << 22)) -> None:
    """Fill blocks that the caching allocator will hand out next, so that gaps are seen."""
    import torch

    dirty = [
        torch.full((n,), 0xA5, dtype=torch.uint8, device="cuda") for n in sizes for _ in range(4)
    ]
    del dirty


def device_room() -> DeviceRoom:
    from pyfmt.backends import cuda

    reason = cuda.available()
    assert reason is None, f"room cuda: {reason}"
    return DeviceRoom("cuda", cuda, torch=True)


def dual_equals_two_calls(ops: Any, to_device: Any, name: str, dtype: np.dtype) -> None:
    """quantize_dual, and quantize along the axis before the last, against the reference."""
    fmt = get_format(name)
    shapes = ((32, 32), (128, 64), (160, 224), (2, 64, 96), (40, 64), (0, 32), (256, 384))
    for shape in shapes:
        x = grids.noise(1, int(np.prod(shape)), dtype).reshape(shape)
        if x.size:
            x.flat[7], x.flat[-3] = np.nan, -np.inf
            # Next to the largest float32, where integers' scales are cut.
            largest = ml_dtypes.finfo(dtype).max
            x[..., 5, 3], x[..., 5, 9] = largest, -largest
        signs = np.sign(0.5 - np.arange(8) % 3).astype(np.float32)
        given: list[dict[str, Any]] = [{}, {"rotation": 32}, {"rotation": 8, "signs": signs}]
        if shape == (160, 224):
            given += [{"scale_rule": r} for r in ("floor", "even")] if fmt.scale == "e8m0" else []
            given += [{"clip": "full"}, {"rotation": 2, "clip": "full"}]
            if fmt.tensor_scale:
                ts = np.float32(0.01)
                given += [{"tensor_scale": ts}, {"tensor_scale": ts, "rotation": 16}]
                given += [{"recipe": r, **o} for r in fmt.recipes for o in ({}, {"rotation": 4})]
        if shape in ((40, 64), (160, 224), (2, 64, 96)):
            given += [{"rounding": "stochastic", "seed": 2**40 + 5, "clip": "full"}]
        for options in given:
            if options.get("rotation") and shape[-2] % options["rotation"]:
                continue
            ours = {
                k: to_device(np.asarray(v)) if k in ("signs", "tensor_scale") else v
                for k, v in options.items()
            }
            along = reference.quantize(x, fmt, **options)
            across = reference.quantize(x, fmt, axis=-2, **options)
            got = ops.quantize_dual(to_device(x), name, **ours)
            alone = ops.quantize(to_device(x), name, -2, **ours)
            for which, part, want in (
                ("along", got[:3], along),
                ("across", got[3:], across),
                ("across alone", alone, across),
            ):
                same_parts(f"{name} {dtype} {shape} {options} {which}", part, want)


def turned_equals_two_calls(ops: Any, to_device: Any, name: str) -> None:
    """Rows as they are and rotated columns in one call, and the columns alone: the reference's."""
    fmt, dtype = get_format(name), grids.BF16
    plus = np.sign(0.5 - np.arange(32) % 3).astype(np.float32)
    for shape in ((32, 32), (160, 224), (2, 64, 96), (40, 64), (128, 128), (256, 384)):
        x = grids.noise(1, int(np.prod(shape)), dtype).reshape(shape)
        x.flat[7], x.flat[-3] = np.nan, -np.inf
        x[..., 5, 3] = ml_dtypes.finfo(dtype).max
        for size, clip in ((16, "symmetric"), (32, "full"), (2, "symmetric")):
            if shape[-2] % size:
                continue
            for rounding, seed in (("nearest", None), ("stochastic", 2**40 + 5)):
                plain = {"rounding": rounding, "seed": seed, "clip": clip}
                turn = plain | {"rotation": size, "signs": plus[:size]}
                bits = to_device(plus[:size])
                got = ops._quantize_turned(
                    to_device(x), name, None, None, rounding, seed, clip, size, bits
                )
                alone = ops.quantize(to_device(x), name, -2, **plain, rotation=size, signs=bits)
                across = reference.quantize(x, fmt, axis=-2, **turn)
                for which, part, want in (
                    ("along", got[:3], reference.quantize(x, fmt, **plain)),
                    ("across", got[3:], across),
                    ("across alone", alone, across),
                ):
                    same_parts(f"{name} {shape} {size} {rounding} {which}", part, want)


def fake_across_equals_reference(ops: Any, to_device: Any, name: str, dtype: np.dtype) -> None:
    """fake_quantize along the axis before the last, of whole and ragged matrices."""
    fmt = get_format(name)
    for shape in ((32, 32), (160, 224), (2, 64, 96), (40, 33), (256, 384)):
        x = grids.noise(1, int(np.prod(shape)), dtype).reshape(shape)
        x.flat[7], x.flat[-3] = np.nan, -np.inf
        for options in grids.options_of(fmt) if shape == (160, 224) else [{}]:
            ours = {
                k: to_device(np.asarray(v)) if k == "tensor_scale" else v
                for k, v in options.items()
            }
            got = ops.fake_quantize(to_device(x), name, -2, **ours)
            want = reference.fake_quantize(x, fmt, axis=-2, **options)
            same_floats(f"{name} {dtype} {shape} {options}", to_numpy(got.cpu()), want, x)


def squares_equal_reference(room: Room, name: str, dtype: np.dtype) -> None:
    """Square blocks of whole and ragged matrices."""
    fmt = get_format(name)
    for shape in ((32, 32), (70, 96), (3, 40, 160), (129, 256), (1, 64), (33, 40)):
        x = grids.noise(1, int(np.prod(shape)), dtype).reshape(shape)
        x.flat[7], x.flat[-3] = np.nan, -np.inf
        for options in grids.options_of(fmt) if shape == (70, 96) else [{}]:
            same_quantized([room], x, fmt, **options)


# Every kind of scale, blocks of one half of a unit and of several units.
SCALED = ["b32-e8m0", "b16-e4m3-ts", "b64-e4m3", "b128-bf16", "b16-fp16", "b32-fp32"]


def random_bytes_decode_like_the_reference(room: Room, element: str, shape: Any) -> None:
    """Codes and scales of random bytes, NaN and infinity among them, to every dtype."""
    rng = np.random.default_rng(0)
    for facts in SCALED:
        fmt = get_format(f"{element}-{facts}")
        rows, columns = shape
        codes = rng.integers(0, 256, (rows, fmt.row_bytes(columns)), dtype=np.uint8)
        scale = {"bf16": BF16, "fp16": np.dtype("f2"), "fp32": np.dtype("f4")}.get(
            fmt.scale, np.dtype("u1")
        )
        size = rows * fmt.blocks(columns)
        scales = rng.integers(0, 256, size * scale.itemsize, dtype=np.uint8).view(scale)
        parts = (
            codes,
            scales.reshape(rows, -1),
            np.array(3e-3, "f4") if fmt.tensor_scale else None,
        )
        for dtype in (BF16, np.dtype("float16"), np.dtype("float32")):
            with np.errstate(all="ignore"):
                want = reference.dequantize(*parts, fmt, shape, dtype=dtype)
            got = room.dequantize(*parts, fmt, shape, dtype=dtype)
            same_floats(f"{fmt.name} to {dtype}", got, want)


SQUARES = [
    "e2m1-b32x32-e8m0",
    "e2m1-b16x16-e4m3-ts",
    "e4m3fn-b32x32-e8m0",
    "e2m3-b16x32-e8m0",
    "int8-b32x16-bf16",
]


def bits_of(x: Any) -> np.ndarray:
    """The numbers' bits, as unsigned integers."""
    x = np.ascontiguousarray(x)
    return x.view(np.dtype(f"uint{8 * x.dtype.itemsize}"))


def same_parts(what: str, got: Any, want: Any) -> None:
    """Results in order (codes, scales, tensor scale; None: an empty tensor), bit for bit."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        ours = to_numpy(g.cpu())
        wanted = np.zeros(0, np.float32) if w is None else np.asarray(w)
        assert ours.shape == wanted.shape, f"{what}: part {i} of {ours.shape}, not {wanted.shape}"
        a, b = bits_of(ours).reshape(-1), bits_of(wanted).reshape(-1)
        bad = np.flatnonzero(a != b)
        if len(bad):
            at = np.unravel_index(bad[0], ours.shape)
            pytest.fail(
                f"{what}: {len(bad)} of {a.size} differ in part {i}, the first at {at}: "
                f"{a[bad[0]]:#x}, expected {b[bad[0]]:#x}"
            )


# ---- emulation --------------------------------------------------------------------------------


def _stale(target: Path, source: Path) -> bool:
    listed = target.with_suffix(".d")
    if not (target.exists() and listed.exists()):
        return True
    needed = listed.read_text().split(": ", 1)[1].replace("\\\n", " ").split()
    made = target.stat().st_mtime_ns
    return any(not Path(f).exists() or Path(f).stat().st_mtime_ns > made for f in needed)


def _compile(source: Path, flags: list[str]) -> Path:
    target = BUILD / f"{source.stem}.o"
    if _stale(target, source):
        draft = target.with_suffix(f".{os.getpid()}.o")
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        command = [*compiler, *FLAGS, *flags, "-MMD", "-MF", str(target.with_suffix(".d"))]
        subprocess.run([*command, "-c", str(source), "-o", str(draft)], check=True)
        os.replace(draft, target)
    return target


def emulated_library() -> Path:
    """Compile the kernels and their torch bindings for the CPU; returns the library."""
    import torch

    BUILD.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    binding = [
        f"-isystem{root / 'include'}",
        "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
        "-DPYFMT_NAMESPACE=pyfmt_emulated",
        "-DPYFMT_DISPATCH_KEY=CPU",
    ]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = pool.map(lambda s: _compile(s, ["-x", "c++"]), sources)
        bindings = sorted((ROOT / "csrc").glob("torch_bindings_cuda*.cpp"))
        objects = [*kernels, *pool.map(lambda s: _compile(s, binding), bindings)]
    library = BUILD / "emulated.so"
    if not library.exists() or any(_newer(o, library) for o in objects):
        draft = library.with_suffix(f".{os.getpid()}.so")
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        torch_flags = [f"-L{root / 'lib'}", "-ltorch_cpu", "-ldl"]
        command = [*compiler, "-shared", *map(str, objects), "-o", str(draft), *torch_flags]
        subprocess.run(command, check=True)
        os.replace(draft, library)
    return library


def _newer(a: Path, b: Path) -> bool:
    return a.stat().st_mtime_ns > b.stat().st_mtime_ns


_definitions: Any = None


def emulated_ops() -> Any:
    """torch.ops.pyfmt_emulated: the schemas of pyfmt.ops served by emulated kernels."""
    global _definitions
    import torch

    from pyfmt.ops import SCHEMAS

    if _definitions is None:
        _definitions = torch.library.Library("pyfmt_emulated", "DEF")
        for schema in SCHEMAS:
            _definitions.define(schema)
        torch.ops.load_library(str(emulated_library()))
    return torch.ops.pyfmt_emulated


def emulated_room() -> Room:
    """The CUDA room with its kernels run on the CPU."""
    from pyfmt.backends import cuda

    spec = importlib.util.spec_from_file_location("pyfmt.backends._cuda_emulated", cuda.__file__)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module._ops = emulated_ops  # type: ignore[attr-defined]
    return Room("cuda-emulated", module, torch=True)


def device_ops() -> Any:
    """torch.ops.pyfmt, where there is a device."""
    import torch

    import pyfmt.ops  # noqa: F401

    device_room()
    return torch.ops.pyfmt


def emulated_and_on_device(make: Callable[[Any, str], Any]) -> Any:
    """A fixture: make(ops, device) with emulated kernels, and again on a GPU where there is one."""
    on_device = pytest.param("device", marks=pytest.mark.gpu)

    @pytest.fixture(scope="module", params=["emulated", on_device])
    def op(request: pytest.FixtureRequest) -> Any:
        if request.param == "device":
            return make(device_ops(), "cuda")
        return make(emulated_ops(), "cpu")

    return op
