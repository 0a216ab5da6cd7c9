"""Low-rank gradients of Linear: against the dense gradient, with every kind of loop, and over a refresh."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import memfit
from memfit.gradients.basis import random_basis
from memfit.gradients.low_rank_product import low_rank_linear

sizes = st.integers(1, 9)


def converted(model: nn.Module, **settings: Any) -> nn.Module:
    return memfit.convert_(model, memfit.LowRankGradient(**settings))


@settings(deadline=None, max_examples=40)
@given(batch=st.lists(sizes, max_size=2), m=sizes, n=sizes, data=st.data(), bias=st.booleans(), seed=st.integers(0, 99))
def test_factor_gradients_are_products_of_the_dense_gradient(
    batch: list[int], m: int, n: int, data: Any, bias: bool, seed: int
) -> None:
    """dU = G V^T and dV = U^T G, with G from autograd through the dense layer; the input's gradient is as there."""
    torch.manual_seed(seed)
    rank = data.draw(st.integers(1, min(m, n)))
    dense = nn.Linear(n, m, bias=bias).double()
    layer = converted(copy.deepcopy(dense), rank=rank, seed=seed)
    factors = layer.matrix("weight")
    factors.left.data.normal_()
    dense.load_state_dict(memfit.state_dict(layer))
    x = torch.randn(*batch, n, dtype=torch.float64)
    x_dense, x_low = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_dense, y_low = dense(x_dense), layer(x_low)
    torch.testing.assert_close(y_low, y_dense)
    d = torch.randn_like(y_dense)
    y_dense.backward(d)
    y_low.backward(d)
    gradient = dense.weight.grad
    torch.testing.assert_close(factors.left.grad, gradient @ factors.right.detach().t())
    torch.testing.assert_close(factors.right.grad, factors.left.detach().t() @ gradient)
    torch.testing.assert_close(x_low.grad, x_dense.grad)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_low_rank_linear_passes_gradcheck() -> None:
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    base = torch.randn(5, 4, dtype=torch.float64)
    inputs = (make(3, 2, 4), make(5), make(5, 2), make(2, 4))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, bias, left, right: low_rank_linear(x, base, bias, left, right), inputs)


def test_second_derivatives_are_refused_where_the_input_is_not_kept() -> None:
    layer = memfit.convert_(nn.Linear(6, 5), memfit.LowRankGradient(rank=2, sides="left"))
    x = torch.randn(3, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match='sides="both"'):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


def test_float64_stays_float64_under_autocast() -> None:
    layer = memfit.convert_(nn.Linear(6, 5).double(), memfit.LowRankGradient(rank=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 6, dtype=torch.float64)).dtype == torch.float64


def test_the_random_basis_is_the_identity_on_average() -> None:
    """E[V^T V] = I: the mean of 4,000 draws within 5 standard errors, elementwise."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([(v := random_basis(3, 6, generator)).t() @ v for _ in range(4000)])
    standard_error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - torch.eye(6)).abs() < 5 * standard_error).all()


class Products(TorchDispatchMode):
    """Notes the result's shape and the summed length of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            first = args[1] if func.overloadpacket.__name__.startswith(("add", "badd")) else args[0]
            self.seen.append((tuple(out.shape), first.shape[-1]))
        return out


@pytest.mark.parametrize("sides", ["both", "left"])
@pytest.mark.parametrize("rematerialize", [False, True])
def test_the_dense_gradient_is_never_formed(sides: str, rematerialize: bool) -> None:
    """No product over the rows of the batch has a weight's shape, for Linear and LSTM alike."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(12, 10, 2, bidirectional=True, proj_size=7), "out": nn.Linear(14, 9)})
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    converted(model, rank=3, sides=sides, rematerialize=rematerialize)
    with Products() as products:
        model["out"](model["lstm"](torch.randn(6, 5, 12, requires_grad=True))[0]).square().sum().backward()
    assert len(products.seen) > 20
    assert [seen for seen in products.seen if seen[0] in shapes and seen[1] != 3] == []


def saved_elements(layer: nn.Module, x: Tensor) -> int:
    """Elements that autograd keeps for backward, the layer's parameters excepted."""
    own = {p.data_ptr() for p in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def test_the_left_side_keeps_a_projection_in_place_of_the_input() -> None:
    x = torch.randn(50, 40)
    assert saved_elements(nn.Linear(40, 30), x) == 50 * 40
    assert saved_elements(converted(nn.Linear(40, 30), rank=3), x) == 50 * 40 + 50 * 3
    assert saved_elements(converted(nn.Linear(40, 30), rank=3, sides="left"), x) == 50 * 3


def regression(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(64, 12)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    return model, x, torch.tanh(x @ torch.randn(12, 8))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.3),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=2e-2),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, lr=2e-2, fused=True),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, lr=2e-2, foreach=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=2e-2),
    "LBFGS": lambda ps: torch.optim.LBFGS(ps, lr=1, max_iter=10, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("sides", ["both", "left"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_learns_through_a_closure(name: str, sides: str) -> None:
    model, x, y = regression()
    converted(model, rank=4, sides=sides)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    before = loss_of(model, x, y).item()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    for _ in range(60):
        optimizer.step(closure)
    assert loss_of(model, x, y).item() < 0.5 * before
    trained = model(x)
    torch.testing.assert_close(memfit.restore_(model)(x), trained, atol=1e-4, rtol=1e-4)


def test_accumulated_micro_batches_give_the_whole_batchs_gradient() -> None:
    model, x, y = regression()
    converted(model.double(), rank=4)
    x, y = x.double(), y.double()
    for matrix in (model[0].matrix("weight"), model[2].matrix("weight")):
        matrix.left.data.normal_(std=0.1)
    loss_of(model, x, y).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
        (loss_of(model, part_x, part_y) / 4).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, whole[name])
    assert set(whole) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_clipping_and_schedules_and_several_optimizers_work() -> None:
    model, x, y = regression()
    converted(model, rank=4)
    optimizers = [
        torch.optim.Adam(model[0].parameters(), lr=2e-2),
        torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9),
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80) for optimizer in optimizers]
    before = loss_of(model, x, y).item()
    for _ in range(80):
        model.zero_grad()
        loss_of(model, x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert loss_of(model, x, y).item() < 0.5 * before


@pytest.mark.parametrize("sides", ["both", "left"])
def test_autocast_bfloat16_trains(sides: str) -> None:
    model, x, y = regression()
    converted(model, rank=4, sides=sides)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    before = loss_of(model, x, y).item()
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
            assert out.dtype == torch.bfloat16
            loss = nn.functional.mse_loss(out.float(), y)
        loss.backward()
        optimizer.step()
    assert loss_of(model, x, y).item() < 0.5 * before


def test_factors_of_a_bfloat16_weight_are_float32_and_learn() -> None:
    model, x, y = regression()
    converted(model.bfloat16(), rank=4)
    assert model[0].matrix("weight").left.dtype == torch.float32
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    before = loss_of(model, x.bfloat16(), y.bfloat16()).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model, x.bfloat16(), y.bfloat16()).backward()
        optimizer.step()
    assert loss_of(model, x.bfloat16(), y.bfloat16()).item() < 0.5 * before
    assert memfit.restore_(model)[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, x, y = regression()
    converted(model, rank=4)
    x.requires_grad_()
    loss_of(model, x, y).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    nn.functional.mse_loss(checkpoint(model, x, use_reentrant=reentrant), y).backward()
    for p, gradient in zip([p for p in model.parameters() if p.grad is not None], expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_weight_decay_pulls_towards_the_weight_it_started_from() -> None:
    model, x, y = regression()
    start = copy.deepcopy(model.state_dict())
    converted(model, rank=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    away = (memfit.state_dict(model)["0.weight"] - start["0.weight"]).norm()
    decay = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for _ in range(20):
        decay.step()
    assert (memfit.state_dict(model)["0.weight"] - start["0.weight"]).norm() < 0.2 * away


@pytest.mark.parametrize("sides", ["both", "left"])
def test_a_refresh_keeps_the_weight_draws_a_new_basis_and_resets_the_moments(sides: str) -> None:
    model, x, y = regression()
    converted(model, rank=4, sides=sides, refresh=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    matrix = model[0].matrix("weight")
    bases = [matrix.right.detach().clone()]
    for step in range(1, 8):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        weight = model[0].weight.detach() if step % 3 else None
        optimizer.step()
        assert optimizer.state[model[0].bias]["step"] == step  # dense parameters are left alone
        if step % 3 == 0:
            assert not matrix.left.any()
            assert matrix.left not in optimizer.state
            bases.append(matrix.right.detach().clone())
        else:
            assert matrix.left.any()
            assert optimizer.state[matrix.left]["step"] == step % 3
            assert not torch.equal(model[0].weight, weight)
    assert len({tuple(basis.flatten().tolist()) for basis in bases}) == 3
    assert torch.linalg.matrix_rank(memfit.restore_(model)[0].weight.detach() - regression()[0][0].weight.detach()) > 4


def test_the_refreshed_weight_is_the_weight_before_it() -> None:
    layer = converted(nn.Linear(9, 7), rank=3, refresh=1)
    matrix = layer.matrix("weight")
    matrix.left.data.normal_()
    layer(torch.randn(2, 9)).sum().backward()
    before = layer.weight.detach()
    matrix.after_step(torch.optim.SGD([matrix.left], lr=0.0))
    torch.testing.assert_close(layer.weight.detach(), before)


def test_a_layer_that_trains_in_eval_mode_is_refreshed_too() -> None:
    model, x, y = regression()
    converted(model.eval(), rank=4, refresh=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, x, y).backward()
    optimizer.step()
    assert model[0].matrix("weight").steps == 1
    assert not model[0].matrix("weight").left.any()


@pytest.mark.parametrize("name", ["Adagrad", "NAdam", "momentum", "AdamW fused", "LBFGS"])
def test_a_refresh_suits_every_optimizer(name: str) -> None:
    model, x, y = regression()
    converted(model, rank=4, refresh=5)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    before = loss_of(model, x, y).item()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    for _ in range(40):
        optimizer.step(closure)
    assert loss_of(model, x, y).item() < 0.5 * before


def test_bases_depend_on_the_seed_and_the_layer_alone() -> None:
    basis = lambda seed: converted(regression()[0], rank=4, seed=seed)[0].matrix("weight").right  # noqa: E731
    torch.manual_seed(1)
    first = basis(0)
    torch.manual_seed(2)
    assert torch.equal(first, basis(0))
    assert not torch.equal(first, basis(1))


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"rank": 2.5}, {"rank": True}, {"sides": "right"}, {"basis": "svd"}, {"refresh": 0}, {"seed": -1}],
)
def test_a_wrong_setting_is_refused_with_its_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(memfit.ConversionError, match=str(next(iter(wrong.values())))):
        memfit.LowRankGradient(**{"rank": 4, **wrong})


def test_a_technique_is_a_value() -> None:
    technique = memfit.LowRankGradient(rank=4, sides="left")
    assert technique == memfit.LowRankGradient(**dataclasses.asdict(technique))
    assert hash(technique) == hash(memfit.LowRankGradient(rank=4, sides="left"))
    assert repr(technique).startswith("LowRankGradient(rank=4, sides='left'")
