# SPDX-License-Identifier: Apache-2.0
"""Low-bit training: gradients against exact sums of rounded operands, memory, seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyfmt.ops", exc_type=ImportError)

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import pyfmt  # noqa: E402
from pyfmt import _matmul_paths  # noqa: E402
from pyfmt._torch_train import rows_format  # noqa: E402
from pyfmt.nn import RECIPES, Quantizer, Recipe, TrainLinear  # noqa: E402
from pyfmt.nn_train import draw_seed  # noqa: E402
from tests.rooms import to_numpy  # noqa: E402
from tests.training import ALL, STOCHASTIC, grads, layer_of, randn, same, spread, stack  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


# Gradients against exact sums.


def decoded(t: torch.Tensor, q: Quantizer, axis: int, seed: int, signs: Any) -> np.ndarray:
    """The reference's rounding of a matrix, the summed axis last, in float64."""
    x = to_numpy(t.detach().cpu())
    if axis == 0 and q.rotation:
        x = np.pad(x, [(0, -len(x) % q.rotation), (0, 0)])
    signs = None if signs is None else signs.cpu().numpy()
    rounding = {"rounding": q.rounding, "seed": seed if q.stochastic else None}
    options = {"scale_rule": q.scale_rule, "recipe": q.recipe, "clip": q.clip, **rounding}
    given = {"rotation": q.rotation, "signs": signs, "backend": "reference"}
    values = pyfmt.quantize(x, q.format, axis=axis, **options, **given).dequantize()
    return np.moveaxis(values.astype(np.float64), axis, -1)


def close(
    what: str, got: torch.Tensor, a: np.ndarray, b: np.ndarray, bias: Any = None, c: float = 0.0
) -> None:
    """|err| <= c * (sum|a||b| + |bias|) + half an ulp of the result."""
    size = np.abs(a) @ np.abs(b).T
    want = a @ b.T
    if bias is not None:
        bias = bias.detach().double().cpu().numpy()
        want, size = want + bias, size + np.abs(bias)
    c = c or (a.shape[1] + 3) * 2.0**-24
    half = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    error = np.abs(got.detach().double().cpu().numpy().reshape(want.shape) - want)
    bound = c * size + half * (np.abs(want) + c * size) + 2.0**-24
    worst = np.unravel_index(np.argmax(error - bound), error.shape) if error.size else ()
    assert (error <= bound).all(), f"{what}{worst}: {error[worst]} > {bound[worst]}"


def constant(device: str, *quantizers: Quantizer) -> float:
    """docs/matmul.md: fp8 tensor cores cut sums, by 10^-5 on such data; other paths are float32."""
    folds = all(_matmul_paths.folds(rows_format(q.format)) for q in quantizers)
    return 2.0**-10 if device == "cuda" and folds else 0.0


def check_gradients(
    recipe: Any, lead: tuple[int, ...], k: int, n: int, device: str = "cpu", dtype: Any = None
) -> None:
    dtype = dtype or torch.float32
    layer = layer_of(recipe, k, n).to(device)
    m = int(np.prod(lead))
    x = spread(m, k, seed=1).view(*lead, k).to(device, dtype).requires_grad_()
    g = spread(m, n, seed=2).view(*lead, n).to(device, dtype)
    torch.manual_seed(7)
    y = layer(x)
    y.backward(g)
    assert y.dtype == dtype and x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32

    torch.manual_seed(7)
    r, seed = layer.recipe, int(draw_seed())
    flat, w, flat_g = x.detach().reshape(m, k), layer.weight, g.reshape(m, n)
    a = decoded(flat, r.x, 1, seed, layer.signs_y)
    b = decoded(w, r.w, 1, seed + 1, layer.signs_y)
    close("y", y, a, b, layer.bias, constant(device, r.x, r.w))
    a = decoded(flat_g, r.dy, 1, seed + 2, layer.signs_dx)
    b = decoded(w, r.w_t, 0, seed + 1, layer.signs_dx)
    close("dx", x.grad, a, b, c=constant(device, r.dy, r.w_t))
    a = decoded(flat_g, r.dy_t, 0, seed + 2, layer.signs_dw)
    b = decoded(flat, r.x_t, 0, seed, layer.signs_dw)
    close("dw", layer.weight.grad, a, b, c=constant(device, r.dy_t, r.x_t))
    torch.testing.assert_close(layer.bias.grad, flat_g.float().sum(0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_gradients_are_exact_sums_of_rounded_operands(name: str, device: str) -> None:
    check_gradients(ALL[name], (2, 3, 16), 64, 48, device)
    check_gradients(ALL[name], (96,), 96, 80, device, torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_ragged_sizes(name: str, device: str) -> None:
    even = name == "all rotated"
    for lead in ((1,), (5, 7), (67,)):
        check_gradients(ALL[name], lead, 64 if even else 70, 48 if even else 37, device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_large_products_on_a_gpu(name: str) -> None:
    check_gradients(ALL[name], (4, 512), 1024, 768, "cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_a_captured_step_is_the_eager_one(name: str) -> None:
    layer = layer_of(name, 256, 128).to("cuda", torch.bfloat16)
    x = randn(64, 256).to("cuda", torch.bfloat16).requires_grad_()
    g = randn(64, 128, seed=1).to("cuda", torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), g))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.manual_seed(3)
        want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    torch.manual_seed(3)
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_tokens_and_one() -> None:
    for name, recipe in ALL.items():
        layer = layer_of(recipe)
        x = randn(0, 64).requires_grad_()
        layer(x).sum().backward()
        assert x.grad.shape == (0, 64), name
        assert not layer.weight.grad.any() and not layer.bias.grad.any()
        assert layer(randn(64)).shape == (48,)


def test_only_what_is_asked_for() -> None:
    x, g = randn(5, 64), randn(5, 48, seed=1)
    whole = layer_of(STOCHASTIC)
    given = x.clone().requires_grad_()
    torch.manual_seed(7)
    whole(given).backward(g)
    for names in (["x"], ["weight"], ["bias"], ["x", "bias"], ["weight", "bias"]):
        layer = layer_of(STOCHASTIC)
        mine = x.clone().requires_grad_("x" in names)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in names)
        torch.manual_seed(7)
        layer(mine).backward(g)
        for got, want, name in (
            (mine.grad, given.grad, "x"),
            (layer.weight.grad, whole.weight.grad, "weight"),
            (layer.bias.grad, whole.bias.grad, "bias"),
        ):
            assert torch.equal(got, want) if name in names else got is None
    plain = layer_of("mxint8", bias=False)
    y = plain(given)
    with torch.no_grad():
        assert torch.equal(plain(given), y)


def test_square_blocks_share_codes() -> None:
    w = randn(40, 72)
    for key in ("e2m1-b16x16-e4m3-ts", "e2m1-b32x32-e8m0", "int8q6-b32x32-e8m0"):
        along, across = pyfmt.quantize(w, key), pyfmt.quantize(w, key, axis=0)
        assert torch.equal(along.dequantize(), across.dequantize())
    recipe = RECIPES["nvfp4"]
    assert recipe.w == recipe.w_t and recipe.w.format == "e2m1-b16x16-e4m3-ts"
    assert rows_format(recipe.w.format).key == "nvfp4"
    assert rows_format("e2m1-b32x32-e8m0").key == "mxfp4"


def test_full_clipping_reaches_its_lowest_code() -> None:
    x = torch.full((1, 32), -255.9 / 128)
    full, symmetric = RECIPES["mxint8_full"].x, RECIPES["mxint8"].x
    codes = {
        q: pyfmt.quantize(x, q.format, scale_rule=q.scale_rule, clip=q.clip).codes.view(torch.int8)
        for q in (full, symmetric)
    }
    assert codes[full].min() == -128 and codes[symmetric].min() == -64


# Memory.


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes kept for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(found.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RECIPES)
def test_memory_kept_for_backward(name: str, device: str) -> None:
    x = randn(256, 128).to(device, torch.bfloat16).requires_grad_()
    dense = saved_bytes(nn.Linear(128, 64, device=device, dtype=torch.bfloat16), x)
    layer = TrainLinear(128, 64, recipe=name, device=device, dtype=torch.bfloat16)
    limit = 0.6 if "8" in name else 0.33
    assert dense == 256 * 128 * 2
    assert saved_bytes(layer, x) <= limit * dense
    layer.weight.requires_grad_(False)
    assert saved_bytes(layer, x) <= 64


# Seeds.


def test_seeds_advance_and_repeat() -> None:
    model = stack()
    assert same(grads(model, model), grads(model, model))
    assert not same(grads(model, model, 5), grads(model, model, 6))
    x = randn(6, 64)

    def twice() -> list[torch.Tensor]:
        out = []
        for _ in range(2):
            model.zero_grad()
            model[0](x).square().sum().backward()
            out.append(model[0].weight.grad.clone())
        return out

    first, second = twice()
    assert not torch.equal(first, second)
    nearest, state = layer_of("mxint8"), torch.get_rng_state()
    nearest(x)  # draws nothing
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", [STOCHASTIC, "mxint8"])
def test_checkpointing_gives_the_same_bits(recipe: str, reentrant: bool) -> None:
    model = stack(recipe)
    want = grads(model, model)
    got = grads(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert same(got, want)


def test_stochastic_gradients_are_unbiased() -> None:
    layer = layer_of("mxfp4", bias=False)
    x, g = randn(64, 64), randn(64, 48, seed=1)
    nearest = layer_of(Recipe(RECIPES["mxfp4"].x, x_t=Quantizer("mxfp4")), bias=False)
    mean = torch.zeros(64, 64)
    for _ in range(64):
        given = x.clone().requires_grad_()
        layer(given).backward(g)
        mean += given.grad / 64
    quantized = pyfmt.quantize(layer.weight.detach(), "mxfp4", axis=0).dequantize()
    given = x.clone().requires_grad_()
    nearest(given).backward(g)
    exact = g @ quantized
    assert (mean - exact).norm() < 0.5 * (given.grad - exact).norm()
