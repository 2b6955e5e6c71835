# SPDX-License-Identifier: Apache-2.0
"""Tensors on a GPU that is not the current one: every verb works where its tensors are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pyfmt  # noqa: E402
import pyfmt.nn  # noqa: E402
from pyfmt import _matmul_paths as paths  # noqa: E402
from pyfmt import _torch_matmul, backends  # noqa: E402
from pyfmt.backends import cuda  # noqa: E402
from pyfmt.formats import FORMATS, get_format  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

FAR = "cuda:1"


@pytest.fixture(autouse=True)
def first_device_current() -> Any:
    """cuda:0 is current before a test, and still after it."""
    reason = cuda.load()
    assert reason is None, reason
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


def calls(x: Any) -> dict[str, Callable[[], Any]]:
    """Every verb of the codec on x's device, as functions without arguments that return tensors."""
    ops: Any = torch.ops.pyfmt
    given = torch.tensor(0.01, device=x.device)
    signs = torch.where(torch.arange(128) % 3 == 0, -1.0, 1.0).to(x.device)
    found: dict[str, Callable[[], Any]] = {}
    for name in [*FORMATS, "e2m1-b16x16-e8m0", "int8-brow-bf16", "e3m2-b8-fp32"]:
        found[f"quantize {name}"] = lambda f=name: ops.quantize(x, f)
        found[f"fake {name}"] = lambda f=name: [ops.fake_quantize(x, f)]
        found[f"stochastic {name}"] = lambda f=name: ops.quantize(
            x, f, rounding="stochastic", seed=3
        )
        parts = ops.quantize(x, name)
        scale = parts[2] if parts[2].numel() else None
        found[f"dequantize {name}"] = lambda f=name, p=parts, s=scale: [
            ops.dequantize(*p[:2], s, f, x.shape, -1, x.dtype)
        ]
    found["given"] = lambda: ops.quantize(x, "nvfp4", tensor_scale=given)
    found["across"] = lambda: ops.quantize(x, "nvint4", 0)
    for name in ("mxfp4", "nvfp4"):
        found[f"dual {name}"] = lambda f=name: ops.quantize_dual(x, f)
        found[f"dual rotated {name}"] = lambda f=name: ops.quantize_dual(x, f, rotation=32)
        for size in (16, 128, 1024):
            found[f"rotated {size} {name}"] = lambda f=name, n=size: ops.quantize(x, f, rotation=n)
        found[f"signs {name}"] = lambda f=name: ops.quantize(x, f, rotation=128, signs=signs)
    for size in (2, 64, 512):
        found[f"hadamard {size}"] = lambda n=size: [ops.hadamard(x, n)]
    found["amax"] = lambda: [ops.amax(x), ops.amax(x, 32)]
    codes = ops.quantize(x, "mxint8")[0] & 63
    found["pack"] = lambda: [ops.pack(codes, 6), ops.unpack(ops.pack(codes, 6), 6, 100)]
    found["pyfmt"] = lambda: [
        (q := pyfmt.quantize(x, "nvfp4")).codes,
        q.scales,
        q.tensor_scale,
        q.dequantize(torch.bfloat16),
        pyfmt.fake_quantize(x, "mxint4"),
        pyfmt.hadamard(x, 32),
    ]
    return found


def same(what: str, got: Any, want: Any) -> None:
    for g, w in zip(got, want, strict=True):
        if w is None:
            assert g is None, what
            continue
        assert g.device == torch.device(FAR), f"{what}: on {g.device}"
        assert torch.equal(g.cpu(), w.cpu()), what


@pytest.fixture
def both() -> tuple[Any, Any]:
    """The same numbers on the current device and on the other."""
    x = (torch.randn(256, 1024, device="cuda:0") * 3).bfloat16()
    return x, x.to(FAR)


def test_every_verb_on_the_other_device(both: tuple[Any, Any]) -> None:
    near, far = both
    here, there = calls(near), calls(far)
    for what in here:
        same(what, there[what](), here[what]())


def test_on_a_stream_of_the_other_device(both: tuple[Any, Any]) -> None:
    near, far = both
    here = calls(near)
    stream = torch.cuda.Stream(FAR)
    later = torch.zeros_like(far)
    there = calls(later)
    torch.cuda.synchronize(FAR)
    for what in [w for w in here if not w.startswith(("dequantize", "pack"))]:
        with torch.cuda.stream(stream):
            later.zero_()
            torch.cuda._sleep(2_000_000)
            later.copy_(far)
            # The other device's stream is this one though its device is not current: wrong unless
            # the kernels queue behind the copy.
            with torch.cuda.device(0):
                got = there[what]()
                assert torch.cuda.current_device() == 0
        stream.synchronize()
        same(what, got, here[what]())


def test_inside_a_graph_of_the_other_device(both: tuple[Any, Any]) -> None:
    near, far = both
    here, there = calls(near), calls(far)
    for what in ("quantize mxfp4", "quantize nvfp4", "fake nvint4", "dual nvfp4", "signs nvfp4"):
        there[what]()
        with torch.cuda.device(FAR):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = there[what]()
        graph.replay()
        torch.cuda.synchronize(FAR)
        same(what, got, here[what]())


def test_layers_on_the_other_device() -> None:
    linear = torch.nn.Linear(256, 128, device=FAR, dtype=torch.bfloat16)
    for options in ({}, {"activation": "mxfp4", "rotation": 32}):
        layer = pyfmt.nn.QuantLinear.from_linear(linear, weight="mxfp4", **options)
        near = copy.deepcopy(layer).to("cuda:0")  # layers share the bias of what they are made of
        for rows in (1, 40, 300):
            x = torch.randn(rows, 256, device=FAR, dtype=torch.bfloat16)
            with torch.no_grad():
                y = layer(x)
                assert y.device == torch.device(FAR)
                assert torch.equal(y.cpu(), near(x.to("cuda:0")).cpu())
            assert torch.equal(layer(x), y)


PRODUCTS = [(None, "mxfp4"), (None, "nvfp4"), (None, "int4"), (None, "mxint8")]
PRODUCTS += [("mxfp4", "mxfp4"), ("nvfp4", "nvfp4"), ("mxint8", "mxfp8_e4m3"), ("int8", "int8")]


@pytest.mark.parametrize(("left", "right"), PRODUCTS)
def test_every_path_of_matmul_on_the_other_device(left: str | None, right: str) -> None:
    w = torch.randn(300, 512, device="cuda:0")
    bias = torch.randn(300, device="cuda:0")
    machine = _torch_matmul.machine_of(torch.device(FAR))
    assert machine is not None
    for rows in (1, 9, 70, 300):
        x = torch.randn(rows, 512, device="cuda:0", dtype=torch.bfloat16)
        fmt = None if left is None else get_format(left)
        call = paths.Call(fmt, "bfloat16", get_format(right), rows, 300, 512)
        for path in [p for p in paths.PATHS if paths.cannot(p, call, machine) is None]:
            products = []
            for device in ("cuda:0", FAR):
                qw = pyfmt.quantize(w.to(device), right)
                a = x.to(device) if left is None else pyfmt.quantize(x.to(device), left)
                b = bias.to(device)
                products.append(pyfmt.matmul(a, qw, b, dtype=torch.bfloat16, path=path))
            same(f"{path}, {rows} rows", products[1:], products[:1])


def test_training_on_the_other_device() -> None:
    for name in ("mxfp4", "nvfp4", "mxint8"):
        found = []
        for device in ("cuda:0", FAR):
            torch.manual_seed(4)
            linear = torch.nn.Linear(256, 128).to(device, torch.bfloat16)
            layer = pyfmt.nn.TrainLinear.from_linear(linear, pyfmt.nn.RECIPES[name])
            x = torch.randn(64, 256).to(device, torch.bfloat16).requires_grad_()
            y = layer(x)
            y.float().square().sum().backward()
            found.append([y.detach(), x.grad, layer.weight.grad, layer.bias.grad])
        same(f"training by {name}", found[1], found[0])


def test_the_triton_room_on_the_other_device(both: tuple[Any, Any]) -> None:
    room: Any = backends.get("triton")
    if (reason := room.available()) is not None:
        pytest.skip(reason)
    for name in ("mxfp4", "nvfp4"):
        fmt = get_format(name)
        near, far = (room.quantize(x, fmt, rotation=32) for x in both)
        same(f"quantize {name}", far, near)
        near, far = ([room.fake_quantize(x, fmt), room.hadamard(x, 64)] for x in both)
        same(f"fake_quantize {name}", far, near)


def test_cupy_arrays_of_the_other_device() -> None:
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Device(1):
        x = cupy.random.standard_normal((64, 256), dtype=cupy.float32)
    host = x.get()
    q = pyfmt.quantize(x, "mxfp4", backend="cuda")
    want = pyfmt.quantize(host, "mxfp4", backend="reference")
    assert q.codes.device.id == q.scales.device.id == 1
    assert (q.codes.get() == want.codes).all() and (q.scales.get() == want.scales).all()
    back = q.dequantize("float32", backend="cuda")
    assert back.device.id == 1
    assert (back.get() == want.dequantize("float32", backend="reference")).all()


def test_operands_on_two_devices_are_refused(both: tuple[Any, Any]) -> None:
    far = both[1]
    q, scale = pyfmt.quantize(far, "mxfp4"), torch.tensor(0.01, device="cuda:0")
    with pytest.raises(RuntimeError, match="on the device of the others"):
        torch.ops.pyfmt.dequantize(q.codes, q.scales.to("cuda:0"), None, "mxfp4", far.shape)
    with pytest.raises(RuntimeError, match="on the device of the others"):
        torch.ops.pyfmt.quantize(far, "nvfp4", tensor_scale=scale)
    for call in (
        lambda: torch.ops.pyfmt.hadamard(far, 32, torch.ones(32, device="cuda:0")),
        lambda: torch.ops.pyfmt.quantize(far, "mxfp4", rotation=32, signs=torch.ones(32)),
        lambda: pyfmt.matmul(both[0], q),
        lambda: pyfmt.matmul(far, q, torch.zeros(256, device="cuda:0")),
        lambda: pyfmt.matmul(pyfmt.quantize(both[0], "mxfp4"), q),
    ):
        with pytest.raises((RuntimeError, ValueError), match="device"):
            call()
