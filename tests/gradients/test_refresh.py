"""Steps are counted once each, whoever makes them, and refreshes happen at the same ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfit

SETTINGS: list[dict[str, Any]] = [{"basis": "random"}, {"basis": "power"}, {"basis": "random", "sides": "left"}]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Extended(torch.optim.Adam):
    """An optimizer whose step calls that of the one it extends; torch calls its hooks around both."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=1e-2)

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapping(torch.optim.Optimizer):
    """An optimizer that steps another one, as ZeroRedundancyOptimizer does."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.inner = adam(parameters)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def converted(refresh: int = 3, **settings: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
    memfit.convert_(model, memfit.LowRankGradient(rank=3, refresh=refresh, **settings))
    return model, torch.randn(32, 12)


def trained(model: nn.Module, x: Tensor, make: Make = adam, steps: int = 7, closure: bool = False) -> dict[str, Tensor]:
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (model(x) - 1).square().mean()
        value.backward()
        return value

    for _ in range(steps):
        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    return memfit.state_dict(model)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", [Extended, Wrapping])
def test_an_optimizer_within_an_optimizer_counts_once(make: Make, settings: dict[str, Any]) -> None:
    plain = trained(*converted(**settings))  # from now on torch hooks Adam.step as well
    assert_same(plain, trained(*converted(**settings), make=make))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", [adam, Extended, Wrapping])
def test_a_closure_trains_as_a_loop_does(make: Make, settings: dict[str, Any]) -> None:
    assert_same(trained(*converted(**settings)), trained(*converted(**settings), make=make, closure=True))


def test_an_optimizer_makes_no_state_for_a_power_basis_through_a_closure() -> None:
    model, x = converted(basis="power")
    optimizer = adam(list(model.parameters()))
    for _ in range(4):
        optimizer.step(lambda: (model(x) - 1).square().mean().backward())
    assert not {model[0].matrix("weight").right, model[2].matrix("weight").right} & set(optimizer.state)


def test_a_step_that_raises_is_forgotten() -> None:
    model, x = converted(basis="power")

    def fails() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adam(list(model.parameters())).step(fails)
    assert_same(trained(model, x), trained(*converted(basis="power")))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_compiled_models_are_refreshed_as_eager_ones(settings: dict[str, Any]) -> None:
    eager = trained(*converted(**settings))
    for _ in range(2):  # the second one comes when others are known already
        torch.compiler.reset()
        model, x = converted(**settings)
        compiled = torch.compile(model, backend="aot_eager")
        trained(compiled, x)
        assert model[0].matrix("weight").steps == 7
        for name, value in memfit.state_dict(model).items():
            torch.testing.assert_close(value, eager[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_refreshed_as_well(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = converted(basis="power")
    assert_same(trained(copied(model), x), trained(model, x))


def test_a_layer_that_is_not_used_in_all_steps_resumes_exactly() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            (model(x) if step < 4 or step > 8 else model[0](x)).square().mean().backward()
            optimizer.step()

    whole, x = converted()
    optimizer = adam(list(whole.parameters()))
    run(whole, optimizer, range(5))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    run(whole, optimizer, range(5, 16))
    again, _ = converted()
    again.load_state_dict(saved[0])
    optimizer = adam(list(again.parameters()))
    optimizer.load_state_dict(saved[1])
    run(again, optimizer, range(5, 16))
    assert_same(whole.state_dict(), again.state_dict())


def test_a_power_basis_waits_for_a_gradient_that_can_be_used() -> None:
    model, x = converted(basis="power")
    optimizer = adam(list(model.parameters()))
    matrix = model[2].matrix("weight")
    trained_once = matrix.right.detach().clone()
    for step in range(1, 7):
        optimizer.zero_grad()
        (model(x) if step % 3 else model[0](x)).square().mean().backward()
        optimizer.step()
    assert torch.equal(matrix.right, trained_once)
    assert optimizer.state[matrix.left]["exp_avg"].any()


def test_a_step_inside_of_autocast_rounds_nothing() -> None:
    outside, (model, x) = trained(*converted(basis="power")), converted(basis="power")
    optimizer = adam([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(7):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
    assert_same(outside, memfit.state_dict(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_halved_after_the_conversion_goes_on(dtype: torch.dtype) -> None:
    model, x = converted(basis="power")
    model.to(dtype)
    state = trained(model, x.to(dtype), make=lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=4)
    assert all(value.isfinite().all() for value in state.values())


def test_a_restored_model_is_left_alone() -> None:
    model, x = converted()
    matrix = model[0].matrix("weight")
    optimizer = adam([matrix.left, matrix.right])
    memfit.restore_(model)
    weight = model[0].weight.detach().clone()
    (model(x) - 1).square().mean().backward()
    for _ in range(4):
        optimizer.step()
    assert matrix.steps == 0
    assert torch.equal(model[0].weight, weight)
