"""An estimate from fake tensors is what the ledger measures, and touches nothing."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

import memfit
from memfit.ledger import Ledger, process_peak


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def perceptron() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 64)), torch.randn(32, 96)


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3)
    )
    return layers, torch.randn(4, 3, 20, 20)


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(4, 24, 64)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(200, 48)
        self.head = nn.Linear(48, 200, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.token(tokens).relu())


def tied() -> tuple[nn.Module, Tensor]:
    return Tied(), torch.randint(200, (4, 16))


def low_rank(make: Callable[[], tuple[nn.Module, Tensor]], **arguments: Any) -> tuple[nn.Module, Tensor]:
    model, batch = make()
    return memfit.convert_(model, memfit.LowRankGradient(rank=4, **arguments), where=converted), batch


def converted(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d | nn.LSTM) and not name.endswith("out_proj")


class Recurrent(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def recurrent(hidden: int) -> tuple[nn.Module, Tensor]:
    return Recurrent(hidden), torch.randn(20, 3, 24)


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], Callable[..., Optimizer]]] = {
    "perceptron, AdamW": (perceptron, AdamW),
    "perceptron, fused AdamW": (perceptron, partial(AdamW, fused=True)),
    "perceptron, foreach Adam": (perceptron, partial(Adam, foreach=True)),
    "convolutions, momentum": (convolutions, partial(SGD, lr=0.1, momentum=0.9)),
    "encoder, SGD": (encoder, partial(SGD, lr=0.1)),
    "checkpointed, Adam": (lambda: (Checkpointed(), torch.randn(16, 64)), Adam),
    "tied, AdamW": (tied, AdamW),
    "low-rank perceptron": (partial(low_rank, perceptron), AdamW),
    "low-rank convolutions, left": (partial(low_rank, convolutions, sides="left"), AdamW),
    "low-rank encoder, power": (partial(low_rank, encoder, basis="power"), AdamW),
    "low-rank LSTM": (partial(low_rank, partial(recurrent, 24)), AdamW),
    "low-rank LSTM, rematerialized": (partial(low_rank, partial(recurrent, 24), rematerialize=True), AdamW),
    "low-rank LSTM in oneDNN's blocks": (partial(low_rank, partial(recurrent, 384)), AdamW),
}


def measured(model: nn.Module, batch: Tensor, optimizer: Optimizer) -> Ledger:
    """The ledger of the second step."""
    for _ in range(2):
        with memfit.ledger(model, optimizer) as book:
            optimizer.zero_grad()
            mean_square(model, batch).backward()
            optimizer.step()
    return book


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_ledger_measures(name: str) -> None:
    make, optimizer_of = CASES[name]
    torch.manual_seed(0)
    model, batch = make()
    optimizer = optimizer_of(filter(lambda parameter: parameter.requires_grad, model.parameters()))
    guessed = memfit.estimate(model, batch, mean_square, optimizer)
    found = measured(model, batch, optimizer)
    assert guessed.peak.weights == found.peak.weights
    assert guessed.peak.total == pytest.approx(found.peak.total, rel=0.01)
    assert set(guessed.modules) == set(found.modules)
    assert guessed.instant.phase == found.instant.phase


def test_a_model_on_meta_has_the_same_figures() -> None:
    model, batch = encoder()
    with torch.device("meta"):
        without_data, _ = encoder()
    figures = [
        memfit.estimate(each, batch, mean_square, AdamW(each.parameters())).peak for each in (model, without_data)
    ]
    assert figures[0] == figures[1]


def test_nothing_of_the_models_size_is_allocated() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16384, 16384), nn.ReLU(), nn.Linear(16384, 16384))
    small, x = perceptron()
    memfit.estimate(small, x, mean_square, AdamW(small.parameters()))  # loads the code
    with process_peak() as process:
        book = memfit.estimate(model, torch.empty(8, 16384, device="meta"), mean_square, AdamW(model.parameters()))
    weights = 2 * 16384 * (16384 + 1) * 4
    assert book.peak.weights == weights
    assert book.peak.total > 4 * weights
    assert process.growth < weights / 20


def test_nothing_changes() -> None:
    torch.manual_seed(0)
    model, batch = convolutions()
    optimizer = AdamW(model.parameters())
    state, random = deepcopy(model.state_dict()), torch.get_rng_state()
    memfit.estimate(model, batch, mean_square, optimizer)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_that_needs_values_is_refused() -> None:
    model, batch = perceptron()

    def peeking(model: nn.Module, batch: Tensor) -> Tensor:
        loss = model(batch).square().mean()
        return loss * 2 if loss.item() > 1 else loss

    with pytest.raises(memfit.MemfitError, match=r"memfit\.ledger instead"):
        memfit.estimate(model, batch, peeking, AdamW(model.parameters()))


OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_may_be_new_or_have_stepped(name: str, stepped: bool) -> None:
    model, batch = perceptron()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=torch.tensor(0.01) if name == "Adam" else 0.01)
    if stepped:
        mean_square(model, batch).backward()
        optimizer.step()
    estimated = memfit.estimate(model, batch, mean_square, optimizer)
    assert estimated.peak.total == pytest.approx(measured(model, batch, optimizer).peak.total, rel=0.01)


def test_a_loss_that_holds_on_to_the_model_is_refused_and_leaves_it_alone() -> None:
    model, batch = perceptron()
    mean_square(model, batch).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    with pytest.raises(memfit.MemfitError, match=r"have it use the model that it is called with"):
        memfit.estimate(model, batch, lambda _, batch: mean_square(model, batch), SGD(model.parameters()))
    assert all(p.grad is before for p, before in zip(model.parameters(), gradients, strict=True))
    assert all(type(gradient) is Tensor for gradient in gradients)


def test_an_optimizer_is_needed() -> None:
    model, batch = perceptron()
    with pytest.raises(memfit.MemfitError, match=r"needs a torch\.optim optimizer"):
        memfit.estimate(model, batch, mean_square, AdamW)  # type: ignore[arg-type]
