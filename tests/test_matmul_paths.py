# SPDX-License-Identifier: Apache-2.0
"""The dense GEMM paths without a GPU: their kernels run on the CPU, torch's GEMMs do too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pyfmt.ops
from pyfmt import _matmul_paths as paths
from pyfmt import _torch_dense, _torch_matmul, _torch_operands, reference
from pyfmt.formats import FORMATS, get_format
from tests import grids
from tests.cuda_rooms import emulated_ops
from tests.grids import BF16
from tests.rooms import to_torch


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


# ---- whole paths ------------------------------------------------------------------------------

HOPPER = paths.Machine((9, 0), skinny=False, wide=False, native=False)
FOLDING = ["mxfp4", "mxint4", "mxfp6_e3m2", "mxfp6_e2m3"]
EXACT = ["mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "mxint6", "nvfp4", "nvint4", "e2m1-b16x16-e4m3-ts"]
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, ops: Any) -> None:
    """CPU tensors take the paths of a GPU, with emulated kernels and torch's GEMMs for the CPU."""
    monkeypatch.setattr(_torch_operands.Parts, "ops", ops)
    monkeypatch.setattr(_torch_matmul, "machine_of", lambda device: HOPPER)
    monkeypatch.setattr(paths, "PACKED", {})  # test_matmul_fold.py has the packed form
    _torch_matmul._choices.clear()
    yield  # type: ignore[misc]
    _torch_matmul._choices.clear()


def product(
    a: np.ndarray, w: np.ndarray, formats: tuple[str | None, str], **options: Any
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The product by torch.ops.pyfmt.matmul, the exact one, and sum|a||b|."""
    left: list[Any] = [to_torch(a), None, None, None]
    a_values = a.astype(np.float64)
    if formats[0] is not None:
        fmt = get_format(formats[0])
        parts = reference.quantize(a, fmt)
        left = [to_torch(None if p is None else np.asarray(p)) for p in parts] + [formats[0]]
        a_values = reference.dequantize(*parts, fmt, a.shape).astype(np.float64)
    fmt = get_format(formats[1])
    parts = reference.quantize(w, fmt)
    right = [to_torch(None if p is None else np.asarray(p)) for p in parts]
    w_values = reference.dequantize(*parts, fmt, w.shape).astype(np.float64)
    y = torch.ops.pyfmt.matmul(*left, *right, formats[1], a.shape[-1], **options)
    bias = options.get("bias")
    exact = a_values @ w_values.T + (0 if bias is None else bias.double().numpy())
    weight = np.abs(a_values) @ np.abs(w_values).T + (
        0 if bias is None else bias.double().abs().numpy()
    )
    return y, exact, weight


def within(y: torch.Tensor, exact: np.ndarray, weight: np.ndarray, k: int, c: float = 0.0) -> None:
    bound = (c or k * 2.0**-24) * weight + HALF_ULP[y.dtype] * 1.01 * np.abs(exact) + TINY[y.dtype]
    excess = np.abs(y.double().numpy() - exact) / bound
    assert excess.max() <= 1, f"{excess.max()} of the bound"


PAIRS = [(p, n, n) for p, names in (("fold", FOLDING), ("exact", FOLDING + EXACT)) for n in names]
PAIRS += [("fold", "mxfp4", "mxfp6_e2m3"), ("fold", "mxfp6_e2m3", "mxint4")]
PAIRS += [("exact", None, n) for n in ("mxfp4", "nvfp4", "mxint8")]
PAIRS += [
    ("exact", "nvfp4", "mxfp8_e4m3"),
    ("portable", "int4", "int8"),
    ("portable", None, "int4"),
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("path", "left", "right"), PAIRS)
def test_a_path_keeps_its_bound(path: str, left: str | None, right: str) -> None:
    for m, n, k in ((7, 32, 128), (33, 21, 100), (1, 16, 416)):
        a, w = grids.noise(m, k, BF16, seed=1), grids.noise(n, k, seed=2)
        for dtype, bias_dtype in (
            (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
            (torch.float32, None), (torch.float16, torch.float32),
        ):  # fmt: skip
            bias = None if bias_dtype is None else torch.linspace(-2, 2, n, dtype=bias_dtype)
            if dtype == torch.float16:
                w = (w / 64).astype(np.float32)  # float16 holds the sums
            y, exact, weight = product(a, w, (left, right), bias=bias, dtype=dtype, path=path)
            assert y.shape == (m, n) and y.dtype == dtype and y.is_contiguous()
            within(y, exact, weight, k)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", FOLDING)
def test_fold_never_rounds_wild_rows(name: str) -> None:
    a, w = grids.noise(20, 256, seed=1), grids.noise(35, 256, seed=2)
    a[3, 64:96] *= np.float32(2.0**-45)
    a[9] *= np.float32(2.0**75)
    w[7, :32] *= np.float32(2.0**40)
    w[34, 100:] *= np.float32(2.0**-60)
    before = int(_torch_operands.total_of(torch.device("cpu")) or 0)
    bias = torch.linspace(-1, 1, 35)
    y, exact, weight = product(a, w, (name, name), bias=bias, dtype=torch.bfloat16, path="fold")
    within(y, exact, weight, 256)
    after = int(_torch_operands.total_of(torch.device("cpu")) or 0)
    assert after - before == 4


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kept", [False, True])
def test_fold_by_packed_weights(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a, w = torch.from_numpy(grids.noise(9, 128)), torch.from_numpy(grids.noise(40, 128))
    codes, scales, _ = torch.ops.pyfmt.quantize(w, "mxfp4")
    expanded = _torch_dense.expand_weight(codes, scales, "mxfp4", 128, "fold") if kept else None
    bias = torch.linspace(-1, 1, 40)
    for x, rotation in ((a.bfloat16(), 32), (a, 0)):
        args = (x, codes, scales, None, "mxfp4", bias, "mxfp4", rotation)
        monkeypatch.setattr(paths, "PACKED", {})
        want = torch.ops.pyfmt.linear(*args, expanded=expanded, path="fold")
        monkeypatch.setattr(paths, "PACKED", {"fold-4": (9, 9, 9), "fold-4 kept": (9, 9, 9)})
        got = torch.ops.pyfmt.linear(*args, expanded=expanded, path="fold")
        assert torch.equal(got, want)
        monkeypatch.setattr(paths, "PACKED", {"fold-4": (8, 8, 8), "fold-4 kept": (8, 8, 8)})
        assert torch.equal(torch.ops.pyfmt.linear(*args, expanded=expanded, path="fold"), want)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("path", ["fold", "exact", "portable"])
def test_weights_in_panels_and_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, w = torch.from_numpy(grids.noise(9, 128)), torch.from_numpy(grids.noise(300, 128))
    codes, scales, _ = torch.ops.pyfmt.quantize(w, "mxfp4")
    options = {"activation": "mxfp4", "rotation": 32}
    args = (a.bfloat16(), codes, scales, None, "mxfp4", torch.linspace(-1, 1, 300))
    want = torch.ops.pyfmt.linear(*args, **options, path=path)
    monkeypatch.setattr(_torch_operands, "PANEL_BYTES", 128 * 128)
    monkeypatch.setattr(_torch_matmul, "PANEL_ELEMENTS", 128 * 128)
    assert torch.equal(torch.ops.pyfmt.linear(*args, **options, path=path), want)
    if path != "portable":
        kept = _torch_dense.expand_weight(codes, scales, "mxfp4", 128, path)
        y = torch.ops.pyfmt.linear(*args, **options, expanded=kept, path=path)
        assert torch.equal(y, want)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("path", ["fold", "exact", "portable"])
@pytest.mark.parametrize("activation", ["mxfp4", "nvfp4", None])
def test_linear_is_matmul_of_quantized_rows(path: str, activation: str | None) -> None:
    if path == "fold" and activation != "mxfp4":
        pytest.skip("does not fold")
    for dtype in (torch.bfloat16, torch.float32):
        if path == "exact" and activation is None and dtype == torch.float32:
            continue
        x = torch.from_numpy(grids.noise(6, 96)).view(2, 3, 96).to(dtype)
        codes, scales, stored = torch.ops.pyfmt.quantize(
            torch.from_numpy(grids.noise(17, 96, seed=5)), "mxfp4"
        )
        signs = torch.where(torch.arange(96) % 5 == 0, -1, 1)
        rotation = {"rotation": 32, "signs": signs}
        y = torch.ops.pyfmt.linear(
            x, codes, scales, stored, "mxfp4", None, activation, **rotation, path=path
        )
        if activation is None:
            left = [torch.ops.pyfmt.hadamard(x, 32, signs), None, None, None]
        else:
            left = [*torch.ops.pyfmt.quantize(x, activation, **rotation), activation]
        want = torch.ops.pyfmt.matmul(
            *left, codes, scales, stored, "mxfp4", 96, dtype=dtype, path=path
        )
        assert y.shape == (2, 3, 17) and torch.equal(y, want)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("activation", [None, "mxfp4", "mxint8"])
def test_batch_invariant_rows_do_not_see_each_other(activation: str | None) -> None:
    x = torch.from_numpy(grids.noise(300, 128)).bfloat16()
    codes, scales, stored = torch.ops.pyfmt.quantize(
        torch.from_numpy(grids.noise(40, 128, seed=5)), "nvfp4"
    )
    args = (codes, scales, stored, "nvfp4", None, activation)
    whole = torch.ops.pyfmt.linear(x, *args, batch_invariant=True)
    for first, last in ((0, 1), (17, 50), (299, 300), (0, 0)):
        part = torch.ops.pyfmt.linear(x[first:last], *args, batch_invariant=True)
        assert torch.equal(part, whole[first:last])
    with pytest.raises(RuntimeError, match="single_level"):
        torch.ops.pyfmt.linear(x, *args[:5], "nvfp4", batch_invariant=True)


# ---- the choice -------------------------------------------------------------------------------

FULL = paths.Machine((9, 0))


def call(a: str | None, w: str, m: int, **rest: Any) -> paths.Call:
    left = None if a is None else get_format(a)
    return paths.Call(left, "bfloat16", get_format(w), m, 4096, 4096, **rest)


def test_which_formats_fold_and_which_are_exact_in_bf16() -> None:
    assert [f for f in FORMATS if paths.folds(FORMATS[f])] == [
        "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint4",
    ]  # fmt: skip
    assert [f for f in FORMATS if not paths.exact_in_bf16(FORMATS[f])] == ["int4", "int8"]


@pytest.mark.parametrize("name", [*FORMATS, "e4m3-b32-e4m3", "int6-b32-e4m3", "int8-b32-e8m0"])
def test_exact_in_bf16_is_what_it_says(name: str) -> None:
    fmt = get_format(name)
    element = reference.decode(np.arange(2**fmt.bits, dtype=np.uint8), fmt.element)
    scales = {
        "e4m3": reference.decode(np.arange(256, dtype=np.uint8), get_format("mxfp8_e4m3").element)
    }
    scale = scales.get(fmt.scale, np.array([1.0]) if fmt.scale == "e8m0" else np.array([1 + 2**-7]))
    values = np.outer(element[np.isfinite(element)], scale[np.isfinite(scale)]).astype(np.float32)
    exact = bool((values.astype(BF16).astype(np.float32) == values).all())
    assert paths.exact_in_bf16(fmt) == exact


def test_the_table_chooses_by_rows_and_says_why() -> None:
    assert paths.choose(call(None, "mxfp4", 1), FULL) == "skinny"
    assert paths.choose(call(None, "mxfp4", 128), FULL) == "wide"
    assert paths.choose(call(None, "mxfp4", 8192), FULL) == "exact"
    both = get_format("mxfp4")
    for m, want in ((100, "fold"), (8192, "fold")):
        assert paths.choose(paths.Call(both, "bfloat16", both, m, 8192, 8192), FULL) == want
    assert paths.choose(call("mxfp4", "mxfp4", 128, kept="fold"), FULL) == "fold"
    assert paths.choose(call("mxfp4", "mxfp4", 8192), paths.Machine((10, 0))) == "native"
    assert paths.choose(call("mxfp4", "mxfp4", 8192), paths.Machine((8, 0))) == "exact"
    assert paths.choose(call("mxfp4", "mxfp4", 8192), paths.Machine((7, 5), False)) == "portable"
    assert paths.choose(call(None, "int4", 1), HOPPER) == "portable"
    for name, m, want in (("int4", 8, "skinny"), ("int4", 9, "wide"), ("int8", 16, "wide")):
        assert paths.choose(call(None, name, m), FULL) == want
    # Groups of less than 128 columns: the one that takes all rows on this device, else the other.
    for m in (1, 64, 4096):
        assert paths.choose(call(None, "int4-b32-bf16", m), FULL) == "wide"
    assert paths.choose(call(None, "int8-b64-fp16", 64), paths.Machine((8, 0))) == "skinny"
    assert paths.choose(call("mxfp4", "mxfp4", 8192, batch_invariant=True), FULL) == "skinny"
    why = paths.explain(call("mxint8", "mxfp4", 8192), FULL)
    assert why["exact"] == "chosen: table row 'bf16-4', any number of rows, 8192 here"
    assert why["skinny"] == "it takes up to 64 rows of a, got 8192"
    assert why["fold"].startswith("an operand does not fold") and why["portable"] == "able"
    assert paths.explain(call(None, "int4", 9), HOPPER)["exact"] == "int4 is not exact in bfloat16"


@pytest.mark.usefixtures("hopper")
def test_a_path_by_name_never_falls_back() -> None:
    codes, scales, _ = torch.ops.pyfmt.quantize(torch.randn(4, 64), "mxint8")
    x = torch.randn(3, 64)
    for options, words in (
        ({"path": "fold"}, "does not fold"),
        ({"path": "skinny"}, "no such kernel"),
        ({"path": "quick"}, "path: unknown 'quick'"),
        ({"precision": "half"}, "precision: unknown 'half'"),
        ({"path": "fold", "batch_invariant": True}, "how many rows"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.pyfmt.linear(x, codes, scales, None, "mxint8", **options)


def test_cpu_tensors_have_the_packed_and_the_portable_path() -> None:
    codes, scales, _ = torch.ops.pyfmt.quantize(torch.randn(4, 64), "mxfp4")
    x = torch.randint(-9, 10, (3, 64)).float()  # all sums are exact, in whatever order
    want = torch.ops.pyfmt.linear(x, codes, scales, None, "mxfp4")
    for path in ("packed", "portable"):
        got = torch.ops.pyfmt.linear(x, codes, scales, None, "mxfp4", path=path)
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="packed and the portable path"):
        torch.ops.pyfmt.linear(x, codes, scales, None, "mxfp4", path="exact")
    with pytest.raises(RuntimeError, match="how many rows"):
        torch.ops.pyfmt.linear(x, codes, scales, None, "mxfp4", path="packed", batch_invariant=True)


def test_the_cpu_says_which_kernels_serve() -> None:
    for x in (torch.randn(4, 64), np.ones((4, 64), np.float32)):
        q = pyfmt.quantize(x, "mxfp4")
        found = pyfmt.backends.explain_matmul(x, q)
        best = pyfmt.backends.cpu.matmul_levels(torch.ops.pyfmt)[1][-1]
        assert found["packed"].startswith(f"chosen: kernels for {best} of baseline")
        assert "none for AMX" in found["packed"] and found["portable"] == "able"
        found = pyfmt.backends.explain_matmul(x, q, batch_invariant=True)
        assert found["portable"].startswith("chosen") and "how many rows" in found["packed"]


# ---- the public functions ---------------------------------------------------------------------


def test_paths_belong_to_the_cuda_room() -> None:
    q = pyfmt.quantize(np.ones((4, 32), np.float32), "mxfp4")
    for options in ({"path": "exact"}, {"precision": "fast"}, {"batch_invariant": True}):
        with pytest.raises(ValueError, match="belong to the cuda room"):
            pyfmt.matmul(q, q, **options)
    with pytest.raises(ValueError, match="path: unknown"):
        pyfmt.matmul(q, q, path="exakt")
    with pytest.raises(ValueError, match="precision: unknown"):
        pyfmt.matmul(q, q, precision="quick")


def linear_layer() -> torch.nn.Linear:
    return torch.nn.Linear(64, 48)


def test_layers_say_what_they_keep_and_how() -> None:
    from pyfmt.nn import QuantLinear

    kept = QuantLinear.from_linear(linear_layer(), "mxfp4", "mxfp4", expanded="keep")
    assert kept.keeps == "fold" and kept.expanded_weight is None  # on a GPU alone
    assert not [name for name in kept.state_dict() if "expanded" in name]
    assert QuantLinear.from_linear(linear_layer(), "mxint8", expanded="keep").keeps == "exact"
    with pytest.raises(ValueError, match="int4 is not exact in bfloat16"):
        QuantLinear.from_linear(linear_layer(), "int4", expanded="keep")
    with pytest.raises(ValueError, match="expected None or 'keep'"):
        QuantLinear.from_linear(linear_layer(), "mxfp4", expanded="yes")
    with pytest.raises(ValueError, match="path: unknown"):
        QuantLinear.from_linear(linear_layer(), "mxfp4", path="none")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("weight", "kind"), [("mxfp6_e2m3", "fold"), ("mxint8", "exact")])
def test_a_layer_with_an_expanded_weight_gives_the_same(weight: str, kind: str) -> None:
    from pyfmt.nn import QuantLinear
    from pyfmt.nn_linear import KEPT

    layer = QuantLinear.from_linear(linear_layer(), weight, weight, rotation=32, path=kind)
    x = torch.from_numpy(grids.noise(5, 64)).bfloat16()
    with torch.no_grad():
        want = layer(x)
        parts = _torch_dense.expand_weight(
            layer.weight_codes, layer.weight_scales, weight, 64, kind
        )
        for name, part in zip(KEPT, parts, strict=False):
            setattr(layer, name, part)
        assert torch.equal(layer(x), want)
    assert "expanded_weight" not in layer.state_dict()
    layer.to(torch.float64)  # codes stay, what is expanded is made anew on a GPU alone
    assert layer.expanded_weight is None and layer.weight_codes.dtype == torch.uint8
