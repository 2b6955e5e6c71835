# SPDX-License-Identifier: Apache-2.0
"""TrainLinear in models: as nn.Linear, compiled, distributed; recipes; misuse."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyfmt.ops", exc_type=ImportError)

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import pyfmt  # noqa: E402
from pyfmt.nn import (  # noqa: E402
    RECIPES,
    Quantizer,
    QuantLinear,
    Recipe,
    TrainLinear,
    finish_training,
    get_recipe,
    prepare_for_training,
    quantize_model,
)
from pyfmt.recipes import from_spec  # noqa: E402
from tests.training import ALL, OURS, STOCHASTIC, grads, layer_of, randn, same, stack  # noqa: E402

# As nn.Linear.


def test_state_dict_goes_back_and_forth() -> None:
    dense = nn.Linear(64, 48)
    layer = TrainLinear(64, 48, recipe=STOCHASTIC)
    assert list(layer.state_dict()) == list(dense.state_dict())
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.weight, dense.weight)
    nn.Linear(64, 48).load_state_dict(layer.state_dict())
    shared = TrainLinear.from_linear(dense, "mxfp8")
    assert shared.weight is dense.weight and shared.bias is dense.bias
    assert shared.dense().weight is dense.weight and type(shared.dense()) is nn.Linear
    assert [name for name, _ in shared.named_parameters()] == ["weight", "bias"]


def test_copies_moves_and_casts() -> None:
    layer = layer_of(STOCHASTIC)
    x = randn(5, 64)
    torch.manual_seed(1)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.recipe == layer.recipe and torch.equal(other.signs_dw, layer.signs_dw)
        torch.manual_seed(1)
        assert torch.equal(other(x), want)
    half = copy.deepcopy(layer).bfloat16()
    assert half.signs_dw.dtype == torch.int8
    y = half(x.bfloat16())
    y.sum().backward()
    assert y.dtype == half.weight.grad.dtype == half.bias.grad.dtype == torch.bfloat16
    assert "recipe=nvfp4" in repr(layer)


def test_signs_after_the_meta_device() -> None:
    want = layer_of(STOCHASTIC)
    empty = TrainLinear(64, 48, recipe=STOCHASTIC, device="meta").to_empty(device="cpu")
    assigned = TrainLinear(64, 48, recipe=STOCHASTIC, device="meta")
    assigned.load_state_dict(want.state_dict(), assign=True)
    for layer in (empty, assigned):
        assert torch.equal(layer.signs_dw, want.signs_dw)


def test_autocast_casts_x_and_not_the_weight() -> None:
    layer = layer_of("mxint8")
    x = randn(5, 64).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == layer.weight.grad.dtype == torch.float32
    want = layer(x.detach().bfloat16())
    assert torch.equal(y, want)


def test_a_weight_changed_before_backward_is_an_error() -> None:
    layer = layer_of("mxint8")
    y = layer(randn(5, 64).requires_grad_())
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused() -> None:
    layer = layer_of("mxint8")
    x = randn(5, 64).requires_grad_()
    g = randn(5, 48, seed=1).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x), x, g, create_graph=True)


def test_non_finite_gradients_stay_visible() -> None:
    layer = layer_of("mxfp8")
    x = randn(5, 64).requires_grad_()
    g = randn(5, 48, seed=1)
    g[2, 3] = torch.inf
    layer(x).backward(g)
    assert not x.grad[2].isfinite().any() and x.grad[0].isfinite().all()
    assert not layer.weight.grad[3].isfinite().any() and layer.weight.grad[4].isfinite().all()


def test_gradients_of_any_stride() -> None:
    layer = layer_of("mxint8")
    x = randn(5, 64).requires_grad_()
    layer(x).sum().backward()  # an expanded gradient
    want = layer.weight.grad.clone()
    layer.zero_grad()
    layer(x).backward(torch.ones(48, 5).t())
    assert torch.equal(layer.weight.grad, want)


# torch.compile.


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", [STOCHASTIC, "mxint8", "all rotated"])
def test_compile_forward_and_backward(recipe: str, fresh_compiler: None) -> None:
    model = stack(
        ALL[recipe] if recipe != "all rotated" else Recipe(Quantizer("mxint8", rotation=16))
    )
    model[3].p = 0.0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(grads(model, compiled), grads(model, model))
    dynamic = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 9):
        torch.manual_seed(2)
        got = dynamic(randn(tokens, 64))
        torch.manual_seed(2)
        assert torch.equal(got, model(randn(tokens, 64)))


@pytest.mark.slow
def test_compile_by_inductor(fresh_compiler: None) -> None:
    model = stack("mxint8")
    model[3].p = 0.0
    compiled = torch.compile(model, fullgraph=True)
    for got, want in zip(grads(model, compiled), grads(model, model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    model = stack()
    got = grads(model, torch.compile(model, fullgraph=True))
    assert all(g.isfinite().all() for g in got)


def test_compiled_checkpointing(fresh_compiler: None) -> None:
    model = stack()
    model[3].p = 0.0

    def call(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(g.isfinite().all() for g in grads(model, compiled))


def test_operators_pass_opcheck() -> None:
    for recipe in (RECIPES["nvfp4"], OURS["square"], OURS["all rotated"]):
        layer = layer_of(recipe)
        x = randn(3, 7, 64).requires_grad_()
        signs = (layer.signs_y, layer.signs_dx, layer.signs_dw)
        args = (x, layer.weight, layer.bias, recipe.spec, torch.tensor(3), *signs)
        torch.library.opcheck(
            torch.ops.pyfmt._train_linear.default,
            args,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
        plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        for save in (True, False):
            _, *kept = torch.ops.pyfmt._train_linear(*plain, save)
            torch.library.opcheck(torch.ops.pyfmt._train_linear.default, (*plain, save))
        _, *kept = torch.ops.pyfmt._train_linear(*plain, True)
        g = randn(3, 7, 48)
        rest = (recipe.spec, torch.tensor(3), *signs[1:], torch.float32, True, True)
        torch.library.opcheck(
            torch.ops.pyfmt._train_linear_backward.default, (g, plain[1], *kept, *rest)
        )


# Two processes.


def _rank(rank: int, folder: str) -> None:
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        model = stack()
        model[3].p = 0.0
        x = randn(8, 64, seed=rank)
        torch.manual_seed(rank)
        model(x).square().sum().backward()
        want = [p.grad.clone() for p in model.parameters()]
        for g in want:
            distributed.all_reduce(g)
        model.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(rank)
        parallel(x).square().sum().backward()
        for p, g in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, g / 2, rtol=1e-6, atol=1e-6)
        Path(folder, f"done{rank}").touch()
    finally:
        distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


# Whole models.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 64)
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.odd = nn.Linear(64, 40)
        self.back = nn.Linear(40, 64)
        self.tied = nn.Linear(64, 10, bias=False)
        self.tied.weight = self.embed.weight
        self.lm_head = nn.Linear(64, 10)
        self.hooked = nn.Linear(64, 64)
        self.hooked.register_forward_hook(lambda *_: None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.again(self.first(self.embed(ids))).tanh()
        x = self.hooked(self.back(self.odd(x)).tanh())
        return self.tied(x) + self.lm_head(x)


IDS = torch.arange(10)


def test_prepare_and_finish() -> None:
    model = Model()
    before = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    rotated = Recipe(Quantizer("mxint8", rotation=16))
    report = prepare_for_training(model, rotated)
    assert report.replaced == ["first"]
    reasons = {layer.name: layer.why for layer in report.left}
    assert "out_features" in reasons["odd"] and "in_features" in reasons["back"]
    assert "out_features" in reasons["tied"]
    assert "skip has 'lm_head'" in reasons["lm_head"] and "hooks" in reasons["hooked"]
    assert "lm_head" in str(report) and "1 replaced" in str(report)
    assert model.first is model.again and isinstance(model.first, TrainLinear)
    assert finish_training(model) == report.replaced

    report = prepare_for_training(model, "nvfp4", skip=())
    assert report.replaced == ["first", "odd", "back", "tied", "lm_head"]
    assert model.tied.weight is model.embed.weight
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is p for name, p in before.items())
    assert model.state_dict().keys() == state.keys()
    again = prepare_for_training(model, "mxint8", types=(nn.Linear, TrainLinear))
    assert again.replaced == ["first", "odd", "back", "tied"]
    assert str(model.first.recipe) == "mxint8" and str(model.lm_head.recipe) == "nvfp4"
    finish_training(model)
    assert not any(isinstance(module, TrainLinear) for module in model.modules())
    model.load_state_dict(state)
    prepare_for_training(model, "mxint8", include=["odd", "fir*"])
    report = quantize_model(model, "mxfp4", types=(TrainLinear,))
    assert isinstance(model.odd, QuantLinear)


@pytest.mark.parametrize("name", ["bf16", *RECIPES])
def test_a_model_learns(name: str) -> None:
    model = Model()
    if name != "bf16":
        prepare_for_training(model, name)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(IDS)
        loss = nn.functional.cross_entropy(logits.float(), IDS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


# Recipes, and misuse.


def test_recipes() -> None:
    for name, recipe in RECIPES.items():
        assert get_recipe(name) is recipe and str(recipe) == name
        assert from_spec(recipe.spec) == recipe
        assert recipe.stochastic == name.endswith("4")
    changed = dataclasses.replace(RECIPES["nvfp4"], w=Quantizer("nvfp4"), seed=4)
    assert changed != RECIPES["nvfp4"] and changed.w_t == RECIPES["nvfp4"].w_t
    square = pyfmt.get_format("mxint8", block=(32, 32))
    recipe = Recipe("mxint8", w=square)
    assert recipe.w_t.format == square.key and recipe.x_t == recipe.dy_t == recipe.x
    assert torch.equal(
        layer_of(Recipe(Quantizer("mxint8", rotation=16, signs="random"), seed=1)).signs_y,
        layer_of(Recipe(Quantizer("mxfp4", rotation=16, signs="random"), seed=1)).signs_y,
    )


def test_misuse() -> None:
    turned = Quantizer("mxint8", rotation=16)
    apart = {"dy": turned, "dy_t": "mxint8"}
    layer = layer_of("mxint8")
    cases = [
        (ValueError, "did you mean 'mxint8'", lambda: get_recipe("mxint")),
        (TypeError, "pyfmt.nn.RECIPES", lambda: get_recipe(3)),
        (ValueError, "did you mean 'mxfp4'", lambda: Recipe("mxfp")),
        (ValueError, "takes none", lambda: Quantizer("mxint8", recipe="nvidia")),
        (ValueError, "power of two", lambda: Quantizer("mxint8", rotation=24)),
        (ValueError, "'random'", lambda: Quantizer("mxint8", rotation=16, signs="x")),
        (ValueError, "rotation", lambda: Quantizer("mxint8", signs="random")),
        (
            ValueError,
            "dy and w_t are multiplied",
            lambda: Recipe("mxint8", **apart),
        ),
        (ValueError, "in_features", lambda: TrainLinear(40, 48, recipe=Recipe(turned))),
        (ValueError, "out_features", lambda: TrainLinear(48, 40, recipe=Recipe(turned))),
        (ValueError, "Recipe.spec", lambda: from_spec("[]")),
        (TypeError, "Conv1d", lambda: TrainLinear.from_linear(nn.Conv1d(3, 3, 3))),
        (TypeError, "float64", lambda: TrainLinear.from_linear(nn.Linear(3, 3).double())),
        (RuntimeError, "last axis of 64 elements", lambda: layer(randn(3, 32))),
        (RuntimeError, "float64", lambda: layer(randn(3, 64).double())),
        (ValueError, "it is a Linear itself", lambda: prepare_for_training(nn.Linear(3, 3))),
        (ValueError, "no Linear layer", lambda: prepare_for_training(Model(), include="frist")),
        (TypeError, "types", lambda: prepare_for_training(Model(), types=nn.Conv1d)),
        (
            ValueError,
            "odd cannot be replaced",
            lambda: prepare_for_training(Model(), Recipe(turned), strict=True),
        ),
    ]
    for error, words, call in cases:
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value), str(caught.value)
