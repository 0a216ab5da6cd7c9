"""The power basis: what it spans, and that the optimizer's moments follow it."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memfit
from memfit.errors import ConversionError
from memfit.gradients.basis import moved_coordinates, power_basis

ROWS, COLUMNS, RANK = 24, 32, 4


def steep_regression() -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, inputs whose directions differ a thousandfold in variance, and what another layer makes of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS))
    spread = torch.logspace(0, -1.5, COLUMNS)
    mix = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS)).Q
    x = (torch.randn(256, COLUMNS) * spread) @ mix
    return model, x, x @ torch.randn(COLUMNS, ROWS)


def converted(model: nn.Module, **settings: object) -> nn.Module:
    return memfit.convert_(model, memfit.LowRankGradient(rank=RANK, **settings))  # type: ignore[arg-type]


def train(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 5), extra=st.integers(0, 6), seed=st.integers(0, 99))
def test_rows_are_orthogonal_of_the_random_basis_norm_and_span_the_gradient(rank: int, extra: int, seed: int) -> None:
    gradient = torch.randn(rank, rank + extra, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = power_basis(gradient)
    columns = rank + extra
    torch.testing.assert_close(basis @ basis.t(), torch.eye(rank, dtype=torch.float64) * columns / rank)
    torch.testing.assert_close(gradient @ basis.t() @ basis * rank / columns, gradient)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 5), extra=st.integers(0, 6), seed=st.integers(0, 99))
def test_rows_are_the_gradients_right_singular_vectors(rank: int, extra: int, seed: int) -> None:
    gradient = torch.randn(rank, rank + extra, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cosines = torch.linalg.svd(gradient, full_matrices=False).Vh @ power_basis(gradient).t()
    torch.testing.assert_close(cosines.abs(), torch.eye(rank, dtype=torch.float64) * ((rank + extra) / rank) ** 0.5)


def test_a_gradient_that_lacks_directions_still_gives_a_whole_basis() -> None:
    gradient = torch.zeros(3, 8)
    gradient[0, 2] = 1e-30
    basis = power_basis(gradient)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(3) * 8 / 3)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 5), extra=st.integers(0, 6), seed=st.integers(0, 99))
def test_coordinates_move_as_the_gradient_does_where_the_bases_span_the_same(rank: int, extra: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = rank + extra
    before = power_basis(torch.randn(rank, columns, generator=generator, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    after = turn @ before
    dense = torch.randn(7, columns, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((dense @ before.t()) @ moved_coordinates(before, after), dense @ after.t())


def test_the_basis_turns_to_the_gradients_leading_directions() -> None:
    shares = {}
    for basis in ("random", "power"):
        model, x, y = steep_regression()
        converted(model, basis=basis, refresh=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # so slow that the gradient stays what it is
        train(model, x, y, optimizer, 60)
        dense = (model(x) - y).detach().t() @ x
        rows = torch.linalg.qr(model[0].matrix("weight").right.detach().t()).Q
        shares[basis] = float((dense @ rows).norm() / dense.norm())
        best = torch.linalg.svdvals(dense)[:RANK].norm() / dense.norm()
    assert shares["power"] > 0.9 * best
    assert shares["random"] < 0.6


def test_it_learns_through_its_refreshes() -> None:
    model, x, y = steep_regression()
    before = float((model(x) - y).square().mean())
    converted(model, basis="power", refresh=10)
    assert train(model, x, y, torch.optim.Adam(model.parameters(), lr=3e-2), 200) < 0.1 * before
    moved = memfit.restore_(model)[0].weight.detach() - steep_regression()[0][0].weight.detach()
    assert torch.linalg.matrix_rank(moved) > RANK


def test_adams_moments_of_the_left_factor_move_and_the_right_one_has_none() -> None:
    model, x, y = steep_regression()
    converted(model, basis="power", refresh=5)
    matrix = model[0].matrix("weight")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    train(model, x, y, optimizer, 4)
    seen: dict[str, Tensor] = {}

    def before_the_refresh(*_: object) -> None:
        seen.update({name: value.clone() for name, value in optimizer.state[matrix.left].items()})
        seen["basis"] = matrix.right.detach().clone()
        seen["gradient"] = matrix._seen.clone()

    original = matrix.after_step
    matrix.after_step = lambda optimizer: (before_the_refresh(), original(optimizer))  # type: ignore[method-assign, assignment]
    train(model, x, y, optimizer, 1)
    change = moved_coordinates(seen["basis"], matrix.right.detach())
    state = optimizer.state[matrix.left]
    torch.testing.assert_close(matrix.right.detach(), power_basis(seen["gradient"]))
    torch.testing.assert_close(state["exp_avg"], seen["exp_avg"] @ change)
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        torch.testing.assert_close(state[name], seen[name] @ change.square())
        assert (state[name] >= 0).all()
    assert state["step"] == 5
    assert matrix.right not in optimizer.state


def test_the_optimizer_leaves_the_basis_alone_between_refreshes() -> None:
    model, x, y = steep_regression()
    converted(model, basis="power", refresh=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    matrix = model[0].matrix("weight")
    bases = []
    for _ in range(8):
        bases.append(matrix.right.detach().clone())
        train(model, x, y, optimizer, 1)
    changes = [step for step, (old, new) in enumerate(pairwise(bases), 1) if not torch.equal(old, new)]
    assert changes == [4]
    assert matrix.right.grad is None
    assert set(optimizer.state) == {matrix.left, model[0].bias}


@pytest.mark.parametrize("name", ["SGD", "momentum", "Adagrad", "LBFGS"])
def test_every_optimizer_goes_through_its_refreshes(name: str) -> None:
    model, x, y = steep_regression()
    converted(model, basis="power", refresh=5)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = {
        "SGD": lambda: torch.optim.SGD(parameters, lr=0.3),
        "momentum": lambda: torch.optim.SGD(parameters, lr=0.03, momentum=0.9),
        "Adagrad": lambda: torch.optim.Adagrad(parameters, lr=0.1),
        "LBFGS": lambda: torch.optim.LBFGS(parameters, lr=0.3, max_iter=2),
    }[name]()
    before = float((model(x) - y).square().mean())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(40):
        optimizer.step(closure)
    assert float((model(x) - y).square().mean()) < 0.5 * before


def test_factors_in_different_optimizers_are_both_looked_after() -> None:
    model, x, y = steep_regression()
    converted(model, basis="power", refresh=3)
    matrix = model[0].matrix("weight")
    first = torch.optim.Adam([matrix.left, model[0].bias], lr=1e-2)
    second = torch.optim.Adam([matrix.right], lr=1e-2)
    for _ in range(4):
        (model(x) - y).square().mean().backward()
        second.step()
        first.step()
    assert first.state[matrix.left]["step"] == 4
    assert matrix.right not in second.state
    assert matrix.steps == 4


def test_a_gradient_that_is_not_finite_leaves_no_trace_in_the_basis() -> None:
    model, _, _ = steep_regression()
    converted(model, basis="power", refresh=2)
    matrix = model[0].matrix("weight")
    optimizer = torch.optim.SGD([matrix.left, matrix.right], lr=0.0)
    optimizer.step()
    matrix.steps = 1
    matrix.right.grad = torch.full_like(matrix.right, float("nan"))
    matrix.after_step(optimizer)
    assert torch.isfinite(matrix.right).all()
    assert matrix.right.any()


@pytest.mark.parametrize("before", [6, 7], ids=["in between", "just before a refresh"])
def test_a_run_resumes_bit_identically_over_a_refresh(before: int) -> None:
    model, x, y = steep_regression()
    converted(model, basis="power", refresh=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, x, y, optimizer, before)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, x, y, optimizer, 7)

    again, x, y = steep_regression()
    converted(again, basis="power", refresh=4)
    resumed = torch.optim.Adam(again.parameters(), lr=1e-2)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, x, y, resumed, 7)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_settings_that_make_no_sense_are_refused() -> None:
    assert memfit.LowRankGradient(rank=2, basis="power").refresh == 15
    with pytest.raises(ConversionError, match="left"):
        memfit.LowRankGradient(rank=2, basis="power", sides="left")
    with pytest.raises(ConversionError, match="too often"):
        memfit.LowRankGradient(rank=2, basis="power", refresh=1)
