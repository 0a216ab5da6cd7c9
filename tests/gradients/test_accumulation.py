"""Gradient accumulation happens in factor space: k micro-batches are one batch, and no m x n buffer holds their sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import memfit

MICRO_BATCHES = 4


class Net(nn.Module):
    """Linear layers on three-dimensional input around an LSTM; no activation has as many elements as a weight."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.first = nn.Linear(60, 48)
        self.middle = nn.LSTM(48, 48, batch_first=True) if recurrent else nn.Linear(48, 48)
        self.last = nn.Linear(48, 52)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.tanh(self.first(x)))
        return self.last(x[0] if isinstance(x, tuple) else x)


def build(recurrent: bool = False, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return memfit.convert_(Net(recurrent), memfit.LowRankGradient(rank=4, **settings))


def data(batch: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 60, generator=generator), torch.randn(batch, 3, 52, generator=generator)


def accumulate(model: nn.Module, x: Tensor, y: Tensor, parts: int) -> None:
    for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (nn.functional.mse_loss(model(part_x), part_y) / parts).backward()


def gradient_bytes(model: nn.Module) -> int:
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize(("sides", "refresh"), [("both", None), ("left", None), ("both", 3), ("left", 3)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_micro_batches_train_like_the_joined_batch(
    optimizer: str, sides: str, refresh: int | None, recurrent: bool
) -> None:
    joined = build(recurrent, sides=sides, refresh=refresh).double()
    start = {name: weight.clone() for name, weight in memfit.state_dict(joined).items()}
    split = copy.deepcopy(joined)
    x, y = (tensor.double() for tensor in data())
    for model, parts in ((joined, 1), (split, MICRO_BATCHES)):
        steps = OPTIMIZERS[optimizer](model.parameters())
        for _ in range(7):
            steps.zero_grad()
            accumulate(model, x, y, parts)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            steps.step()
    expected, found = memfit.state_dict(joined), memfit.state_dict(split)
    for name, weight in expected.items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(found[name], weight)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("sides", ["both", "left"])
def test_the_ledgers_gradients_are_the_factors_alone_however_many_micro_batches(sides: str, recurrent: bool) -> None:
    model = build(recurrent, sides=sides)
    dense = sum(p.nbytes for p in Net(recurrent).parameters())
    optimizer = torch.optim.Adam(model.parameters())
    x, y = data()
    for parts in (1, MICRO_BATCHES):
        optimizer.zero_grad()
        with memfit.ledger(model, optimizer) as book:
            accumulate(model, x, y, parts)
            kept = gradient_bytes(model)
            optimizer.step()
        assert kept == sum(p.nbytes for p in model.parameters() if p.requires_grad)
        # At no instant more than all factors' gradients and those that come in to be added to them.
        assert kept <= max(sample.lines.gradients for sample in book.timeline) <= 2 * kept < dense / 2


class Sizes(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = torch.utils._pytree.tree_leaves(out)
            self.seen += [(func.__name__, leaf.numel()) for leaf in leaves if isinstance(leaf, Tensor)]
        return out


def largest_made(model: nn.Module) -> int:
    """Elements of the largest tensor that is made in the backward passes of all micro-batches and in the step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    x, y = data()
    sizes = Sizes()
    for part_x, part_y in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
        loss = nn.functional.mse_loss(model(part_x), part_y) / MICRO_BATCHES
        with sizes:
            loss.backward()
    with sizes:
        optimizer.step()
    assert len(sizes.seen) > 40
    return max(count for _, count in sizes.seen)


@pytest.mark.parametrize("sides", ["both", "left"])
def test_no_tensor_of_a_weights_size_is_made_in_backward_or_step(sides: str) -> None:
    smallest = min(p.numel() for p in Net(False).parameters() if p.dim() == 2)
    assert largest_made(Net(False)) >= smallest  # the dense gradients are seen
    assert largest_made(build(sides=sides)) < smallest / 4
