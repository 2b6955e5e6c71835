# SPDX-License-Identifier: Apache-2.0
"""The Python API: arrays in, the same kind out; rooms that agree; a sentence for every misuse."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import pyfmt
from pyfmt import backends, reference
from pyfmt.formats import FORMATS, get_format
from tests import mismatch
from tests.grids import BF16, DTYPES, noise, options_of
from tests.rooms import to_numpy, to_torch

ROOMS = ("reference", "cpu")
LIBRARIES = {"numpy": lambda x: x, "torch": to_torch}


@pytest.fixture(params=LIBRARIES)
def give(request: pytest.FixtureRequest) -> Any:
    """A function that hands an array over as NumPy's or torch's."""
    return LIBRARIES[request.param]


def same_q(q: pyfmt.QTensor, want: tuple[Any, Any, Any]) -> None:
    mismatch.same_floats("codes", to_numpy(q.codes), want[0])
    mismatch.same_floats("scales", to_numpy(q.scales), want[1])
    assert (q.tensor_scale is None) == (want[2] is None)
    if want[2] is not None:
        mismatch.same_floats("tensor scale", np.asarray(to_numpy(q.tensor_scale)), want[2])


@pytest.mark.parametrize("name", FORMATS)
def test_same_kind_out_and_same_bits(give: Any, name: str) -> None:
    for dtype in DTYPES.values():
        x = noise(6, 130, dtype)
        for options in options_of(FORMATS[name]):
            q = pyfmt.quantize(give(x), name, **options)
            assert type(q.codes) is type(give(x)) and type(q.scales) is type(give(x))
            assert (q.format, q.shape, q.axis, q.layout) == (FORMATS[name], (6, 130), 1, "rows")
            want = reference.quantize(x, FORMATS[name], **options)
            same_q(q, want)
            y = q.dequantize(dtype)
            assert type(y) is type(give(x)) and tuple(y.shape) == (6, 130)
            decoded = reference.dequantize(*want, FORMATS[name], x.shape, dtype=dtype)
            mismatch.same_floats("dequantize", to_numpy(y), decoded)
            fake = pyfmt.fake_quantize(give(x), name, **options)
            mismatch.same_floats("fake_quantize", to_numpy(fake), decoded, x)
    assert q.dequantize().dtype in (np.float32, torch.float32)
    rotated = pyfmt.hadamard(give(x), 2)
    mismatch.same_floats("hadamard", to_numpy(rotated), reference.hadamard(x, 2))


def test_dtypes_of_any_library_name_the_output(give: Any) -> None:
    q = pyfmt.quantize(give(noise(2, 32)), "mxint8")
    for dtype in ("bfloat16", torch.bfloat16, ml_dtypes.bfloat16, BF16):
        assert to_numpy(q.dequantize(dtype)).dtype == BF16
    for dtype in (np.float16, torch.float16, "float16"):
        assert to_numpy(q.dequantize(dtype)).dtype == np.float16


@pytest.mark.parametrize("scale", [0.02, np.float32(0.02), np.array(0.02, np.float32)])
def test_tensor_scale_may_be_any_number(give: Any, scale: Any) -> None:
    x = noise(3, 48)
    want = reference.quantize(x, FORMATS["nvfp4"], tensor_scale=np.float32(0.02))
    same_q(pyfmt.quantize(give(x), "nvfp4", tensor_scale=scale), want)
    tensor = torch.tensor(np.float32(0.02), dtype=torch.float64)
    same_q(pyfmt.quantize(to_torch(x), "nvfp4", tensor_scale=tensor), want)
    tensor = torch.tensor(0.02)
    same_q(pyfmt.quantize(to_torch(x), "nvfp4", tensor_scale=tensor), want)
    same_q(pyfmt.quantize(to_torch(x), "nvfp4", tensor_scale=tensor.reshape(1)), want)


def test_a_qtensor_moves_copies_and_prints(give: Any) -> None:
    x = noise(4, 60)
    for name in ("mxfp6_e2m3", "nvfp4", "int4"):
        q = pyfmt.quantize(give(x), name)
        parts = reference.quantize(x, FORMATS[name])
        same_q(q.numpy(), parts)
        same_q(q.torch(), parts)
        assert isinstance(q.numpy().codes, np.ndarray)
        assert isinstance(q.torch().codes, torch.Tensor)
        for twin in (copy.copy(q), copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
            same_q(twin, parts)
            assert (twin.format, twin.shape, twin.axis) == (q.format, q.shape, q.axis)
        assert q.nbytes == parts[0].nbytes + parts[1].nbytes + (4 if parts[2] is not None else 0)
        assert (q.size, q.ndim) == (240, 2)
        assert repr(q).startswith(f"QTensor({name}, shape=(4, 60), ")
    assert "axis=0" in repr(pyfmt.quantize(give(x), "mxfp4", axis=0))


def test_a_rotation_matrix_is_a_product(give: Any) -> None:
    x = noise(5, 96)
    matrix = reference.hadamard(np.eye(32, dtype=np.float32), 32)
    q = pyfmt.quantize(give(x), "mxint8", rotation=give(matrix))
    exact = x.reshape(5, 3, 32).astype(np.float64) @ matrix.T.astype(np.float64)
    step = np.abs(exact).max(axis=-1, keepdims=True) / 63
    assert (np.abs(to_numpy(q.dequantize()).reshape(5, 3, 32) - exact) <= step).all()


@pytest.mark.parametrize("name", [*FORMATS, "e2m1-b16x16-e4m3-ts"])
def test_quantize_dual_is_quantize_along_both_axes(give: Any, name: str) -> None:
    for shape in ((32, 64), (2, 40, 32)):
        x = noise(1, int(np.prod(shape)), BF16).reshape(shape)
        signs = np.where(np.arange(8) % 3 == 1, -1, 1).astype(np.float32)
        for options in ({}, {"rotation": 8}, {"rounding": "stochastic", "seed": 9}):
            ours, theirs = dict(options), dict(options)
            if "rotation" in options:
                ours["signs"], theirs["signs"] = give(signs), signs
            both = pyfmt.quantize_dual(give(x), name, **ours)
            for q, axis in zip(both, (-1, -2), strict=True):
                assert (q.shape, q.axis) == (shape, len(shape) + axis)
                same_q(q, reference.quantize(x, q.format, axis=axis, **theirs))
    matrix = reference.hadamard(np.eye(8, dtype=np.float32), 8)
    both = pyfmt.quantize_dual(give(noise(16, 24)), name, rotation=give(matrix))
    alone = pyfmt.quantize(give(noise(16, 24)), name, rotation=give(matrix), axis=0)
    assert np.array_equal(to_numpy(both[1].codes), to_numpy(alone.codes))


def test_quantize_dual_says_what_it_wants(give: Any) -> None:
    with pytest.raises(ValueError, match="x: expected at least two dimensions, got 1"):
        pyfmt.quantize_dual(give(noise(1, 32)[0]), "mxfp4")
    with pytest.raises(ValueError, match=r"size|multiple"):
        pyfmt.quantize_dual(give(noise(24, 32)), "mxfp4", rotation=32)
    with pytest.raises(ValueError, match="signs: they belong to a rotation"):
        pyfmt.quantize_dual(give(noise(32, 32)), "mxfp4", signs=give(np.ones(32, np.float32)))
    x = torch.zeros(32, 32, requires_grad=True)
    with pytest.raises(ValueError, match="quantize_dual has no gradient: use fake_quantize"):
        pyfmt.quantize_dual(x, "mxfp4")


# ---- rooms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", backends.VERBS)
def test_rooms_have_the_same_signatures(verb: str) -> None:
    wanted = inspect.signature(getattr(backends.get("reference"), verb))
    for name in backends.NAMES:
        room = backends.get(name)
        assert inspect.signature(getattr(room, verb)) == wanted, f"{name}.{verb}"
        for question, arguments in (("available", []), ("supports", ["verb", "fmt", "x"])):
            assert list(inspect.signature(getattr(room, question)).parameters) == arguments


def test_rooms_can_be_named_and_explained(give: Any) -> None:
    x = give(noise(2, 64))
    for room in ROOMS:
        same_q(
            pyfmt.quantize(x, "mxint4", backend=room),
            reference.quantize(noise(2, 64), FORMATS["mxint4"]),
        )
    told = backends.explain("quantize", "mxint4", x)
    assert set(told) == set(backends.NAMES)
    assert told["cpu"] == "chosen" and told["reference"] == "able"
    assert backends.available()["cpu"] is None and backends.available()["reference"] is None


def test_a_named_room_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = backends.get("cpu")
    monkeypatch.setattr(cpu, "supports", lambda verb, fmt, x: "it is closed today")
    with pytest.raises(ValueError, match="'cpu' cannot quantize: it is closed today"):
        pyfmt.quantize(noise(1, 32), "mxfp4", backend="cpu")
    told = backends.explain("quantize", "mxfp4", noise(1, 32))
    assert told["cpu"] == "it is closed today" and told["reference"] == "chosen"


# ---- misuse -----------------------------------------------------------------------------------

X = noise(4, 64)
NVFP4, MXFP4 = FORMATS["nvfp4"], FORMATS["mxfp4"]
# (what is called with a converter, the error, words of its sentence)
# fmt: off
MISUSE: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("float64", lambda f: pyfmt.quantize(f(X.astype(np.float64)), "mxfp4"),
     TypeError, ["float64", "float32"]),
    ("int32", lambda f: pyfmt.quantize(f(X.astype(np.int32)), "mxfp4"), TypeError, ["int32"]),
    ("complex", lambda f: pyfmt.quantize(f(X.astype(np.complex64)), "mxfp4"),
     TypeError, ["complex64"]),
    ("bool", lambda f: pyfmt.quantize(f(X > 0), "mxfp4"), TypeError, ["bool"]),
    ("0-dim", lambda f: pyfmt.quantize(f(np.array(1, np.float32)), "mxfp4"),
     ValueError, ["one dimension", "0-dim"]),
    ("format", lambda f: pyfmt.quantize(f(X), "mxpf4"), ValueError, ["'mxpf4'", "'mxfp4'"]),
    ("format type", lambda f: pyfmt.quantize(f(X), 4), TypeError, ["pyfmt.Format", "int"]),
    ("axis", lambda f: pyfmt.quantize(f(X), "mxfp4", axis=2), ValueError, ["-2 to 1", "got 2"]),
    ("axis type", lambda f: pyfmt.quantize(f(X), "mxfp4", axis=1.0), TypeError, ["an int", "1.0"]),
    ("rule", lambda f: pyfmt.quantize(f(X), "mxfp4", scale_rule="ciel"),
     ValueError, ["'ciel'", "'ceil'"]),
    ("rule not for it", lambda f: pyfmt.quantize(f(X), "nvfp4", scale_rule="ceil"),
     ValueError, ["takes none", "e4m3"]),
    ("recipe", lambda f: pyfmt.quantize(f(X), "nvfp4", recipe="nvida"),
     ValueError, ["'nvida'", "'nvidia'"]),
    ("recipe not for it", lambda f: pyfmt.quantize(f(X), "int4", recipe="nvidia"),
     ValueError, ["takes none", "bf16"]),
    ("rounding", lambda f: pyfmt.quantize(f(X), "mxfp4", rounding="stochstic"),
     ValueError, ["'stochastic'"]),
    ("no seed", lambda f: pyfmt.quantize(f(X), "mxfp4", rounding="stochastic"),
     ValueError, ["seed"]),
    ("seed type", lambda f: pyfmt.quantize(f(X), "mxfp4", rounding="stochastic", seed=1.0),
     TypeError, ["seed", "float"]),
    ("seed range", lambda f: pyfmt.quantize(f(X), "mxfp4", rounding="stochastic", seed=2**64),
     ValueError, ["64 bits"]),
    ("clip", lambda f: pyfmt.quantize(f(X), "mxint8", clip="ful"), ValueError, ["'full'"]),
    ("NaN tensor scale", lambda f: pyfmt.quantize(f(X), "nvfp4", tensor_scale=float("nan")),
     ValueError, ["positive finite", "nan"]),
    ("negative tensor scale", lambda f: pyfmt.quantize(f(X), "nvfp4", tensor_scale=-1.0),
     ValueError, ["positive finite", "-1"]),
    ("zero tensor scale", lambda f: pyfmt.quantize(f(X), "nvfp4", tensor_scale=0.0),
     ValueError, ["positive finite", "0.0"]),
    ("two tensor scales",
     lambda f: pyfmt.quantize(f(X), "nvfp4", tensor_scale=f(np.float32([1, 2]))),
     ValueError, ["one number", "(2,)"]),
    ("tensor scale not for it", lambda f: pyfmt.quantize(f(X), "mxfp4", tensor_scale=1.0),
     ValueError, ["mxfp4 has none"]),
    ("tensor scale, single level",
     lambda f: pyfmt.quantize(f(X), "nvfp4", recipe="single_level", tensor_scale=1.0),
     ValueError, ["single_level"]),
    ("rotation size", lambda f: pyfmt.quantize(f(X), "mxfp4", rotation=48),
     ValueError, ["power of two", "48"]),
    ("rotation too long", lambda f: pyfmt.quantize(f(X), "mxfp4", rotation=128),
     ValueError, ["64 elements", "128"]),
    ("signs alone", lambda f: pyfmt.quantize(f(X), "mxfp4", signs=f(np.ones(32, np.float32))),
     ValueError, ["rotation"]),
    ("signs length", lambda f: pyfmt.hadamard(f(X), 32, f(np.ones(16, np.float32))),
     ValueError, ["(32,)", "(16,)"]),
    ("hadamard dtype", lambda f: pyfmt.hadamard(f(X.astype(np.int64)), 32), TypeError, ["int64"]),
    ("backend", lambda f: pyfmt.quantize(f(X), "mxfp4", backend="cup"), ValueError, ["'cpu'"]),
    ("dequantize what", lambda f: pyfmt.dequantize(f(X)), TypeError, ["QTensor", "quantize"]),
    ("dequantize dtype", lambda f: pyfmt.quantize(f(X), "mxfp4").dequantize("float64"),
     TypeError, ["float64"]),
    ("fake_quantize dtype", lambda f: pyfmt.fake_quantize(f(X.astype(np.float64)), "mxfp4"),
     TypeError, ["float64"]),
    ("matmul dense right", lambda f: pyfmt.matmul(f(X), f(X)), TypeError, ["QTensor", "quantize"]),
    ("matmul lengths", lambda f: pyfmt.matmul(f(X[:, :32]), pyfmt.quantize(f(X), "mxfp4")),
     ValueError, ["32", "64"]),
    ("matmul axis", lambda f: pyfmt.matmul(f(X), pyfmt.quantize(f(X.T.copy()), "mxfp4", axis=0)),
     ValueError, ["axis"]),
    ("explain verb", lambda f: backends.explain("quantise", "mxfp4", f(X)),
     ValueError, ["'quantize'"]),
]
# fmt: on


@pytest.mark.parametrize("case", MISUSE, ids=lambda case: case[0])
def test_misuse_gets_a_sentence(give: Any, case: Any) -> None:
    _, call, error, words = case
    with pytest.raises(error) as caught:
        call(give)
    text = str(caught.value)
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    assert "\n" not in text and len(text) < 400


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4"])
def test_parts_that_do_not_belong_together(give: Any, room: str, name: str) -> None:
    fmt, module = FORMATS[name], backends.get(room)
    q = pyfmt.quantize(give(X), name)
    parts = {"codes": q.codes, "scales": q.scales, "tensor_scale": q.tensor_scale}
    wrong = {
        "short codes": {"codes": q.codes[:, :-1]},
        "fewer rows": {"codes": q.codes[:-1]},
        "one scale too few": {"scales": q.scales[:-1]},
        "scales of another dtype": {"scales": give(np.zeros(tuple(q.scales.shape), np.int32))},
        "codes of another dtype": {"codes": give(np.zeros(tuple(q.codes.shape), np.int16))},
    }
    for what, change in wrong.items():
        with pytest.raises((ValueError, TypeError, RuntimeError), match="expected") as caught:
            module.dequantize(*(parts | change).values(), fmt, X.shape)
        assert "got" in str(caught.value), f"{what}: {caught.value}"


def test_other_objects_are_no_arrays() -> None:
    for x in ([1.0, 2.0], 3.0, None, "x"):
        with pytest.raises(TypeError, match=r"expected a NumPy array.*got"):
            pyfmt.quantize(x, "mxfp4")


def test_a_tensor_that_needs_a_gradient() -> None:
    x = torch.randn(2, 64, requires_grad=True)
    y = pyfmt.fake_quantize(x, "mxfp4")
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with pytest.raises((ValueError, RuntimeError), match=r"fake_quantize|detach"):
        pyfmt.quantize(x, "mxfp4")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_signs_come_from_any_library(backend: str) -> None:
    x, signs = torch.randn(4, 64), np.where(np.arange(32) % 3 == 0, -1, 1).astype(np.int8)
    same = torch.from_numpy(signs)
    for call in (
        lambda s: pyfmt.hadamard(x, 32, s, backend=backend),
        lambda s: pyfmt.quantize(x, "mxfp4", rotation=32, signs=s, backend=backend).codes,
        lambda s: pyfmt.quantize_dual(x, "mxint8", rotation=4, signs=s[:4])[1].codes,
    ):
        assert torch.equal(call(signs), call(same))


def test_formats_made_at_run_time_are_served_everywhere(give: Any) -> None:
    fmt = pyfmt.Format(
        pyfmt.Element.fp(3, 1, bias=5), block=(3, 7), scale="e4m3", tensor_scale=True
    )
    x = noise(8, 30)
    for room in ROOMS:
        same_q(pyfmt.quantize(give(x), fmt, backend=room), reference.quantize(x, fmt))
        same_q(pyfmt.quantize(give(x), fmt.spec, backend=room), reference.quantize(x, fmt))
    assert get_format(fmt.spec) == fmt
