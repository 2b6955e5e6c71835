# SPDX-License-Identifier: Apache-2.0
"""torch.ops.pyfmt: schemas, fake shapes and misuse."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyfmt.ops", exc_type=ImportError)

from torch.library import opcheck  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402

import pyfmt.ops  # noqa: E402
from pyfmt.formats import get_format  # noqa: E402
from tests.op_cases import FORMATS, ops, quantized, randn  # noqa: E402


def test_the_schemas_are_those_of_the_design():
    verbs = [schema.partition("(")[0] for schema in pyfmt.ops.SCHEMAS]
    wanted = (
        "quantize quantize_dual dequantize fake_quantize hadamard pack unpack amax matmul linear"
    )
    assert verbs == wanted.split()
    for verb in verbs:
        schema = getattr(ops, verb).default._schema
        assert not schema.is_mutable
        assert all(value.alias_info is None for value in schema.returns)


def test_importing_again_is_harmless():
    module = importlib.reload(pyfmt.ops)
    assert module.SCHEMAS
    kept = sys.modules.pop("pyfmt.ops")
    try:
        importlib.import_module("pyfmt.ops")
    finally:
        sys.modules["pyfmt.ops"] = kept
    assert ops.amax(torch.ones(3)) == 1


def test_a_missing_library_says_how_to_build_it():
    code = (
        "from pyfmt.backends import cpu\n"
        "cpu.torch_library_path = lambda: None\n"
        "try:\n    import pyfmt.ops\n"
        "except ImportError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "make setup" in run.stdout and run.stdout.count("\n") == 1


# opcheck: schema, autograd registration, fake kernels, AOT dispatch with dynamic shapes.


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_opcheck_quantize_and_dequantize(fmt: str, axis: int):
    x = randn(5, 70, dtype=torch.bfloat16)
    opcheck(ops.quantize.default, (x, fmt, axis))
    codes, scales, tensor_scale, _ = quantized(x, fmt, axis=axis)
    args = (codes, scales, tensor_scale, fmt, x.shape, axis)
    opcheck(ops.dequantize.default, args, {"dtype": torch.float16})


@pytest.mark.parametrize("shape", [(70,), (2, 3, 33), (0, 32), (4, 0)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_fake_shapes_are_the_real_ones(fmt: str, shape: tuple[int, ...]):
    x = randn(*shape)
    for axis in range(-1, x.dim() - 1):
        real = ops.quantize(x, fmt, axis)
        fake = ops.quantize(x.to("meta"), fmt, axis)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.is_contiguous()
        tensor_scale = real[2] if real[2].numel() else None
        y = ops.dequantize(real[0], real[1], tensor_scale, fmt, x.shape, axis)
        assert y.shape == x.shape
        assert y.is_contiguous()


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("nvfp4", {"recipe": "single_level"}),
        ("nvfp4", {"tensor_scale": torch.tensor(0.25)}),
        ("mxint8", {"scale_rule": "floor", "rounding": "stochastic", "seed": 7, "clip": "full"}),
        ("int4", {"rotation": 32, "signs": torch.ones(32, dtype=torch.int8)}),
    ],
)
def test_opcheck_quantize_options(fmt: str, options: dict[str, object]):
    opcheck(ops.quantize.default, (randn(3, 64), fmt), options)


def test_opcheck_with_gradients():
    signs = torch.ones(32)
    for grad in (False, True):
        x, bias = randn(3, 64, grad=grad), randn(9, grad=grad)
        opcheck(ops.hadamard.default, (x, 32, signs))
        opcheck(
            ops.hadamard.default, (x.detach().t().contiguous().requires_grad_(grad), 64, None, 0)
        )
        opcheck(ops.fake_quantize.default, (x, "mxfp4"))
        for fmt in ("nvfp4", "int4-b16x16-bf16"):
            w = quantized(randn(9, 64, seed=1), fmt)
            opcheck(ops.linear.default, (x, *w, bias, "mxfp4", 32, signs))
            opcheck(ops.linear.default, (x, *w))
            opcheck(ops.matmul.default, (x, None, None, None, *w, 64, bias))
            opcheck(ops.matmul.default, (*quantized(x.detach(), fmt), *w, 64, bias))


def test_opcheck_pack_unpack_amax():
    codes = torch.arange(70, dtype=torch.uint8).remainder(32).repeat(3, 1)
    packed = ops.pack(codes, 5)
    opcheck(ops.pack.default, (codes, 5))
    opcheck(ops.unpack.default, (packed, 5, 70))
    assert torch.equal(ops.unpack(packed, 5, 70), codes)
    opcheck(ops.amax.default, (randn(3, 70),))
    opcheck(ops.amax.default, (randn(3, 70), 16))
    opcheck(ops.amax.default, (randn(3, 70), 2, 0))


# Misuse: one sentence each.


def test_misuse_gets_one_sentence():
    x, w = randn(3, 64), quantized(randn(9, 64), "nvfp4")
    codes, scales, tensor_scale, fmt = w
    cases = [
        ("float64", lambda: ops.quantize(x.double(), "mxfp4")),
        ("int64", lambda: ops.quantize(x.long(), "mxfp4")),
        ("bool", lambda: ops.fake_quantize(x > 0, "mxfp4")),
        ("complex", lambda: ops.hadamard(x.to(torch.complex64), 32)),
        ("unknown 'mxfp5'", lambda: ops.quantize(x, "mxfp5")),
        ("unknown 'rciel'", lambda: ops.quantize(x, "mxfp4", scale_rule="rciel")),
        ("axis", lambda: ops.quantize(x, "mxfp4", 2)),
        ("seed", lambda: ops.quantize(x, "mxfp4", rounding="stochastic")),
        ("rotation", lambda: ops.quantize(x, "mxfp4", rotation=128)),
        ("power of two", lambda: ops.hadamard(x, 48)),
        ("signs", lambda: ops.hadamard(x, 32, torch.ones(31))),
        ("codes", lambda: ops.dequantize(codes, scales, tensor_scale, fmt, (9, 80))),
        ("scales", lambda: ops.dequantize(codes, scales[:, :2], tensor_scale, fmt, (9, 64))),
        ("float64", lambda: ops.dequantize(*w, (9, 64), dtype=torch.float64)),
        ("bits", lambda: ops.pack(codes, 9)),
        ("float64", lambda: ops.linear(x.double(), *w)),
        ("codes", lambda: ops.linear(randn(3, 65), *w)),
        ("bias", lambda: ops.linear(x, *w, torch.zeros(8))),
        ("bias", lambda: ops.linear(x, *w, torch.zeros(9, dtype=torch.float64))),
        ("two dimensions", lambda: ops.linear(x, codes[0], scales[0], None, fmt)),
        ("rows of 64", lambda: ops.matmul(randn(3, 65), None, None, None, *w, 64)),
        ("a_scales", lambda: ops.matmul(codes, None, None, fmt, *w, 64)),
        ("tensor_scale", lambda: ops.quantize(x, "nvfp4", tensor_scale=torch.tensor(torch.nan))),
        ("tensor_scale", lambda: ops.quantize(x, "nvfp4", tensor_scale=torch.tensor(-1.0))),
        ("tensor_scale", lambda: ops.quantize(x, "mxfp4", tensor_scale=torch.tensor(1.0))),
        ("recipe", lambda: ops.linear(x, *w, None, "mxfp4", recipe="nvidia")),
        ("to_dense", lambda: ops.quantize(x.to_sparse(), "mxfp4")),
    ]
    for word, call in cases:
        with pytest.raises(RuntimeError) as error:
            call()
        sentence = str(error.value).partition("\nException raised from")[0]
        assert word in sentence, (word, sentence)
        assert "\n" not in sentence.strip(), sentence


# Overhead, printed and not judged: run with -s to see it.


def test_overhead_is_printed():
    x = randn(8, 64)
    w = quantized(randn(16, 64), "mxfp4")
    calls = {
        "quantize": lambda: ops.quantize(x, "mxfp4"),
        "dequantize": lambda: ops.dequantize(*w, (16, 64)),
        "fake_quantize": lambda: ops.fake_quantize(x, "mxfp4"),
        "hadamard": lambda: ops.hadamard(x, 32),
        "amax": lambda: ops.amax(x, 32),
        "linear": lambda: ops.linear(x, *w),
        "linear, quantized activations": lambda: ops.linear(x, *w, None, "mxfp4"),
    }
    for name, call in calls.items():
        measured = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.02)
        print(f"{name:32} {measured.median * 1e6:6.1f} us")
    assert get_format("mxfp4").bits == 4


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "nvint4", "int4"])
def test_quantize_dual_is_two_calls(fmt: str, rotation: int):
    x = randn(48, 64)
    options = (None, None, "nearest", None, "symmetric", None, rotation)
    got = ops.quantize_dual(x, fmt, *options)
    want = (*ops.quantize(x, fmt, -1, *options), *ops.quantize(x, fmt, -2, *options))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    opcheck(ops.quantize_dual.default, (x, fmt, *options))
    with pytest.raises(RuntimeError, match="at least two dimensions"):
        ops.quantize_dual(x[0], fmt)


def test_rotated_directions_have_tensor_scales_of_their_own():
    x = randn(64, 32)
    _, _, along, _, _, across = ops.quantize_dual(x, "nvfp4", rotation=32)
    assert along != across
    given = torch.tensor(0.01)
    for stored in ops.quantize_dual(x, "nvfp4", tensor_scale=given, rotation=32)[2::3]:
        assert stored == given and stored.data_ptr() != given.data_ptr()
