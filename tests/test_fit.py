"""The loop trains as a plain loop does, resumes exactly, and stops in good order."""

from __future__ import annotations

import io
import math
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import memfit
from memfit import CheckpointError, DataError, TrainingError, checkpoint
from memfit.fit import FitResult, StepRecord, fit

Batch = list[Tensor]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests write hundreds of checkpoints; what a flush is for is tested elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unflatten(1, (2, 6)))[0][:, -1])


class NoisyBatches:
    """Draws from every global generator for each batch, between the model's own draws."""

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(3):
            scale = torch.rand(()) + random.random() + numpy.random.rand()
            yield [torch.randn(5, 12) * scale, torch.randn(5, 3)]


class StatefulBatches:
    """Knows its place, as torchdata's StatefulDataLoader does; must not be asked for batches that were taken."""

    def __init__(self) -> None:
        self.order = list(range(4))
        self.next = 0

    def __iter__(self) -> Iterator[Batch]:
        if self.next in (0, len(self.order)):
            self.next = 0
            self.order = torch.randperm(4).tolist()
        while self.next < len(self.order):
            self.next += 1
            yield [torch.full((5, 12), float(self.order[self.next - 1])), torch.ones(5, 3)]

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "next": self.next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.order, self.next = state_dict["order"], state_dict["next"]


class WideMomentum(torch.optim.Optimizer):
    """Momentum kept in float32 whatever the weights are."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault(
                    "momentum", torch.zeros_like(parameter, dtype=torch.float32)
                )
                momentum.mul_(0.9).add_(parameter.grad.float())
                parameter.add_(momentum.to(parameter.dtype), alpha=-group["lr"])


@dataclass
class Setup:
    """All that a run is made of, made anew."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Any
    scheduler: lr_scheduler.LRScheduler | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def fit(self, **arguments: Any) -> FitResult:
        given = {"scheduler": self.scheduler, "measure": False, **self.more, **arguments}
        return fit(self.model, squared_error, self.batches, self.optimizer, **given)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(22, 12, generator=generator), torch.randn(22, 3, generator=generator))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.4), nn.Tanh(), nn.Linear(16, 3))


def dropout_adam_one_cycle() -> Setup:
    model = perceptron()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = lr_scheduler.OneCycleLR(adam, max_lr=0.05, total_steps=12)
    return Setup(model, adam, DataLoader(data(), batch_size=5, shuffle=True), scheduler)


def lstm_momentum() -> Setup:
    model = Recurrent()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    warm = lr_scheduler.LinearLR(sgd, 0.1, total_iters=3)
    scheduler = lr_scheduler.SequentialLR(sgd, [warm, lr_scheduler.StepLR(sgd, 2)], [3])
    loader = DataLoader(data(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
    return Setup(model, sgd, loader, scheduler, {"max_grad_norm": 0.5})


def batch_norm_fused_adamw() -> Setup:
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True, amsgrad=True)
    return Setup(
        model, adamw, NoisyBatches(), lr_scheduler.ReduceLROnPlateau(adamw, patience=1), {"max_grad_norm": 1.0}
    )


def lbfgs() -> Setup:
    model = perceptron()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, history_size=3, line_search_fn="strong_wolfe")
    return Setup(model, optimizer, DataLoader(data(), batch_size=11), lr_scheduler.ExponentialLR(optimizer, 0.9))


def stateful_adagrad() -> Setup:
    model = perceptron()
    return Setup(model, torch.optim.Adagrad(model.parameters(), lr=0.1), StatefulBatches())


def half_weights_wide_state() -> Setup:
    model = perceptron().bfloat16()
    batches = [[tensor.bfloat16() for tensor in batch] for batch in DataLoader(data(), batch_size=6)]
    return Setup(model, WideMomentum(model.parameters(), lr=0.01), batches)


def converted_with_refresh() -> Setup:
    model = Recurrent()
    memfit.convert_(model, memfit.LowRankGradient(rank=2, refresh=3))
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    return Setup(model, adam, DataLoader(data(), batch_size=5, shuffle=True), lr_scheduler.CosineAnnealingLR(adam, 8))


def converted_one_sided() -> Setup:
    model = perceptron()
    memfit.convert_(model, memfit.LowRankGradient(rank=2, sides="left", refresh=3), where="0")
    return Setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), DataLoader(data(), batch_size=5))


SETUPS = [
    dropout_adam_one_cycle, lstm_momentum, batch_norm_fused_adamw, lbfgs, stateful_adagrad, half_weights_wide_state,
    converted_with_refresh, converted_one_sided,
]  # fmt: skip


def made(setup: Callable[[], Setup], seed: int) -> Setup:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    return setup()


def everything(setup: Setup) -> Any:
    """All state that training changes, random generators too."""
    from memfit.run import random_state

    state = {
        "model": setup.model.state_dict(),
        "optimizer": setup.optimizer.state_dict(),
        "scheduler": setup.scheduler and setup.scheduler.state_dict(),
        "random": random_state.capture(),
        "generator": getattr(getattr(setup.batches, "generator", None), "get_state", lambda: None)(),
    }
    return deepcopy(state)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, types, dtypes and strides included."""
    if isinstance(a, Tensor):
        alike = isinstance(b, Tensor) and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        return alike and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def losses(result: FitResult) -> list[float]:
    return [record.loss for record in result.records]


def killer(after: int) -> Callable[[StepRecord], None]:
    def on_step(record: StepRecord) -> None:
        if record.step == after:
            raise Killed

    return on_step


# Exactness.


@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_killed_after_any_step_resumes_to_the_same_bits(setup: Callable[[], Setup], tmp_path: Path) -> None:
    steps = 11
    whole = made(setup, 1)
    reference = whole.fit(steps=steps, checkpoint=tmp_path / "whole.safetensors")
    final = everything(whole)
    for kill in range(1, steps + 1):
        path = tmp_path / f"{kill}.safetensors"
        with pytest.raises(Killed):
            made(setup, 1).fit(steps=steps, checkpoint=path, every=2, on_step=killer(kill))
        again = made(setup, 2 if kill > 2 else 1)  # another seed: all must come from the checkpoint, if there is one
        result = again.fit(steps=steps, checkpoint=path, every=2, resume=True)
        assert result.resumed_from == (kill - 1) // 2 * 2
        assert losses(result) == losses(reference)
        assert [record.step for record in result.records] == list(range(1, steps + 1))
        assert same(everything(again), final)


@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup is not lbfgs])
def test_training_is_that_of_the_plain_loop(setup: Callable[[], Setup]) -> None:
    ours = made(setup, 1)
    result = ours.fit(steps=9)
    plain = made(setup, 1)
    plain_losses = []
    while len(plain_losses) < 9:
        for batch in plain.batches:
            plain.optimizer.zero_grad()
            loss = squared_error(plain.model, batch)
            loss.backward()
            if "max_grad_norm" in plain.more:
                torch.nn.utils.clip_grad_norm_(plain.model.parameters(), plain.more["max_grad_norm"])
            plain.optimizer.step()
            if isinstance(plain.scheduler, lr_scheduler.ReduceLROnPlateau):
                plain.scheduler.step(loss.item())
            elif plain.scheduler is not None:
                plain.scheduler.step()
            plain_losses.append(loss.item())
            if len(plain_losses) == 9:
                break
    plain.optimizer.zero_grad()
    assert losses(result) == plain_losses
    assert same(everything(ours), everything(plain))


def test_lbfgs_is_given_its_closure() -> None:
    ours = made(lbfgs, 1)
    ours.fit(steps=1, scheduler=None)
    plain = made(lbfgs, 1)
    batch = next(iter(plain.batches))

    def closure() -> Tensor:
        plain.optimizer.zero_grad()
        loss = squared_error(plain.model, batch)
        loss.backward()
        return loss

    plain.optimizer.step(closure)
    assert same(ours.model.state_dict(), plain.model.state_dict())


def test_a_loader_with_workers_resumes_exactly(tmp_path: Path) -> None:
    def setup() -> Setup:
        return replace(dropout_adam_one_cycle(), batches=DataLoader(data(), batch_size=5, shuffle=True, num_workers=1))

    whole = made(setup, 1)
    whole.fit(steps=7)
    with pytest.raises(Killed):
        made(setup, 1).fit(steps=7, checkpoint=tmp_path / "c", every=3, on_step=killer(7))
    again = made(setup, 2)
    again.fit(steps=7, checkpoint=tmp_path / "c", resume=True)
    assert same(everything(again), everything(whole))


SCHEDULERS: list[Callable[[Any], lr_scheduler.LRScheduler]] = [
    lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    lambda o: lr_scheduler.ConstantLR(o),
    lambda o: lr_scheduler.PolynomialLR(o),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]),
    lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_of_torch_resumes_exactly(scheduler: Callable[[Any], Any], tmp_path: Path) -> None:
    def setup() -> Setup:
        model = perceptron()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return Setup(model, sgd, DataLoader(data(), batch_size=5), scheduler(sgd))

    whole = made(setup, 1)
    whole.fit(steps=6)
    with pytest.raises(Killed):
        made(setup, 1).fit(steps=6, checkpoint=tmp_path / "c", every=3, on_step=killer(5))
    again = made(setup, 1)
    again.fit(steps=6, checkpoint=tmp_path / "c", resume=True)
    assert same(everything(again), everything(whole))


def test_a_run_may_be_prolonged(tmp_path: Path) -> None:
    made(stateful_adagrad, 1).fit(steps=3, checkpoint=tmp_path / "c")
    longer = made(stateful_adagrad, 2)
    assert longer.fit(steps=7, checkpoint=tmp_path / "c", resume=True).resumed_from == 3
    whole = made(stateful_adagrad, 1)
    whole.fit(steps=7)
    assert same(longer.model.state_dict(), whole.model.state_dict())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def setup() -> Setup:
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3))
        model[1].weight = model[0].weight
        return Setup(model, torch.optim.Adam(model.parameters()), DataLoader(data(), batch_size=5))

    made(setup, 1).fit(steps=2, checkpoint=tmp_path / "c")
    again = made(setup, 2)
    again.fit(steps=5, checkpoint=tmp_path / "c", resume=True)
    whole = made(setup, 1)
    whole.fit(steps=5)
    assert again.model[1].weight is again.model[0].weight
    assert same(again.model.state_dict(), whole.model.state_dict())


# The rules of resuming.


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    result = made(lstm_momentum, 1).fit(steps=3, checkpoint=tmp_path / "c", resume=True)
    assert (result.resumed_from, len(result.records), result.interrupted) == (0, 3, False)


def test_a_finished_run_is_loaded_and_nothing_is_done(tmp_path: Path) -> None:
    first = made(lstm_momentum, 1)
    result = first.fit(steps=4, checkpoint=tmp_path / "c")
    written = (tmp_path / "c").read_bytes()
    again = made(lstm_momentum, 2)
    seen: list[StepRecord] = []
    repeated = again.fit(steps=4, checkpoint=tmp_path / "c", resume=True, on_step=seen.append)
    assert (repeated.records, repeated.resumed_from, seen) == (result.records, 4, [])
    assert same(everything(again), everything(first))
    assert (tmp_path / "c").read_bytes() == written


def test_an_earlier_checkpoint_stays_until_the_first_new_one(tmp_path: Path) -> None:
    path = tmp_path / "c"
    made(lstm_momentum, 1).fit(steps=4, checkpoint=path)
    written = path.read_bytes()
    with pytest.raises(Killed):
        made(lstm_momentum, 2).fit(steps=4, checkpoint=path, every=3, on_step=killer(3))
    assert path.read_bytes() == written
    with pytest.raises(Killed):
        made(lstm_momentum, 2).fit(steps=4, checkpoint=path, every=3, on_step=killer(4))
    assert path.read_bytes() != written


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "c"
    made(lstm_momentum, 1).fit(steps=2, checkpoint=path, settings={"lr": 0.1, "rank": 4, "where": ("a", "b"), "old": 1})
    before = everything(other := made(lstm_momentum, 2))
    changed = {"lr": 0.2, "rank": 4, "where": ["a", "b"], "new": None}
    with pytest.raises(CheckpointError) as caught:
        other.fit(steps=4, checkpoint=path, resume=True, settings=changed)
    for part in (str(path), "lr was 0.1 and is 0.2", "old was 1 and is not given", "new was not given and is null"):
        assert part in str(caught.value)
    assert "rank" not in str(caught.value)
    assert "where" not in str(caught.value)
    assert same(everything(other), before)


def widened() -> Setup:
    setup = dropout_adam_one_cycle()
    setup.model[0] = nn.Linear(12, 17)
    setup.model[3] = nn.Linear(17, 3)
    return replace(setup, optimizer=torch.optim.Adam(setup.model.parameters()))


def renamed() -> Setup:
    setup = dropout_adam_one_cycle()
    setup.model.append(nn.Linear(3, 3))
    return replace(setup, optimizer=torch.optim.Adam(setup.model.parameters()))


def other_optimizer() -> Setup:
    setup = dropout_adam_one_cycle()
    return replace(setup, optimizer=torch.optim.SGD(setup.model.parameters()))


def fewer_trained() -> Setup:
    setup = dropout_adam_one_cycle()
    return replace(setup, optimizer=torch.optim.Adam(setup.model[3].parameters()))


def double_precision() -> Setup:
    setup = dropout_adam_one_cycle()
    setup.model.double()
    return setup


def no_scheduler() -> Setup:
    return replace(dropout_adam_one_cycle(), scheduler=None)


def converted() -> Setup:
    setup = dropout_adam_one_cycle()
    memfit.convert_(setup.model, memfit.LowRankGradient(rank=2))
    return replace(setup, optimizer=torch.optim.Adam(setup.model.parameters()))


def stateful() -> Setup:
    return replace(dropout_adam_one_cycle(), batches=StatefulBatches())


def fewer_batches() -> Setup:
    return replace(dropout_adam_one_cycle(), batches=DataLoader(data(), batch_size=22))


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (widened, "'0.weight' is float32 16x12 in it and float32 17x12 in the model"),
        (renamed, "it has no '4.weight'"),
        (converted, "the model has no '0.weight', '3.weight'"),
        (double_precision, "'0.bias' is float32 16 in it and float64 16 in the model"),
        (fewer_trained, "the optimizer holds other parameters"),
        (other_optimizer, "with Adam and not with SGD"),
        (no_scheduler, "with OneCycleLR and not with no scheduler"),
        (stateful, "another kind of batches"),
        (fewer_batches, "after batch 2 of an epoch, and an epoch now has 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(
    setup: Callable[[], Setup], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    made(dropout_adam_one_cycle, 1).fit(steps=2, checkpoint=path)
    written = path.read_bytes()
    other = made(setup, 2)
    before = deepcopy((other.model.state_dict(), other.optimizer.state_dict()))
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        other.fit(steps=4, checkpoint=path, resume=True)
    assert message in str(caught.value)
    assert same((other.model.state_dict(), other.optimizer.state_dict()), before)
    assert path.read_bytes() == written


def test_a_checkpoint_that_fit_did_not_write_is_refused(tmp_path: Path) -> None:
    for tree in ({"model": {}}, [1, 2]):
        checkpoint.save(tmp_path / "c", tree)
        with pytest.raises(CheckpointError, match=r"not written by memfit\.fit"):
            made(lstm_momentum, 1).fit(steps=4, checkpoint=tmp_path / "c", resume=True)


def test_a_path_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    setup = made(lstm_momentum, 1)
    before = everything(setup)
    for path in (tmp_path / "missing" / "c", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            setup.fit(steps=4, checkpoint=path)
    assert same(everything(setup), before)
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_the_checkpoint_would_not_have_are_refused(tmp_path: Path) -> None:
    setup = made(dropout_adam_one_cycle, 1)
    setup.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 3))]})
    with pytest.raises(ValueError, match="float32 2x3"):
        setup.fit(steps=1, checkpoint=tmp_path / "c", scheduler=None)
    setup.fit(steps=1, scheduler=None)


def test_an_optimizer_made_before_the_conversion_is_refused() -> None:
    model = perceptron()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    memfit.convert_(model, memfit.LowRankGradient(rank=2))
    batches = DataLoader(data(), batch_size=5)
    with pytest.raises(ValueError, match=r"before memfit\.convert_"):
        Setup(model, early, batches).fit(steps=1)
    Setup(model, torch.optim.SGD(model.parameters(), lr=0.1), batches).fit(steps=1)


def test_a_checkpoint_of_more_steps_than_asked_for_is_refused(tmp_path: Path) -> None:
    made(converted_one_sided, 1).fit(steps=5, checkpoint=tmp_path / "c")
    setup = made(converted_one_sided, 2)
    before = deepcopy(setup.model.state_dict())
    with pytest.raises(CheckpointError, match="has 5 steps, more than the 3 asked for"):
        setup.fit(steps=3, checkpoint=tmp_path / "c", resume=True)
    assert same(setup.model.state_dict(), before)


def test_a_checkpoint_that_cannot_be_looked_at_is_not_started_over(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.symlink_to(path.name)  # a link to itself: neither there nor missing
    with pytest.raises(CheckpointError, match="cannot be read"):
        made(converted_one_sided, 1).fit(steps=1, checkpoint=path, resume=True)


@pytest.mark.parametrize(
    "arguments", [{"steps": -1}, {"steps": 1, "every": 0}, {"steps": 1, "patience": 0}, {"steps": 1, "resume": True}]
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        made(lstm_momentum, 1).fit(**arguments)


def test_batches_that_end_for_good_are_refused() -> None:
    setup = made(dropout_adam_one_cycle, 1)
    with pytest.raises(DataError, match="list"):
        replace(setup, batches=[]).fit(steps=1)
    with pytest.raises(DataError, match="generator"):
        replace(setup, batches=iter(NoisyBatches())).fit(steps=4)


# Numbers that are not finite.


def poisoned(at: set[int], kind: str) -> Callable[[], Setup]:
    """Batch norm, momentum and a scheduler, on batches of which some give no finite loss (or no finite gradient)."""

    def setup() -> Setup:
        model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batches = [[*batch, torch.tensor(1.0)] for batch in DataLoader(data(), batch_size=2)]
        for index in at:
            if kind == "input":
                batches[index][0] = torch.full_like(batches[index][0], math.nan)
            else:
                batches[index][2] = torch.tensor(math.inf if kind == "loss" else -1.0)
        return Setup(model, sgd, batches, lr_scheduler.ExponentialLR(sgd, 0.9))

    return setup


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


def weighted_error(model: nn.Module, batch: Batch) -> Tensor:
    x, y, weight = batch
    output = model(x)
    if weight < 0:
        return (InfiniteGradient.apply(output) - y).square().mean()
    return (output - y).square().mean() * weight


def fit_poisoned(setup: Setup, **arguments: Any) -> FitResult:
    given = {"scheduler": setup.scheduler, "measure": False, **arguments}
    return fit(setup.model, weighted_error, setup.batches, setup.optimizer, **given)


@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("at", [{0}, {0, 1}, {3, 4, 6}], ids=str)
def test_a_bad_batch_leaves_no_trace(kind: str, clip: float | None, at: set[int]) -> None:
    """Weights, batch norm's statistics, momentum and learning rate are those of a run without the bad batches."""
    bad, good = made(poisoned(at, kind), 1), made(poisoned(set(), kind), 1)
    result = fit_poisoned(bad, steps=7, max_grad_norm=clip)
    good.batches = [batch for index, batch in enumerate(good.batches) if index not in at]
    expected = fit_poisoned(good, steps=7 - len(at), max_grad_norm=clip)
    assert same(everything(bad), everything(good))
    assert {record.step - 1 for record in result.records if record.skipped} == at
    assert [record.loss for record in result.records if not record.skipped] == losses(expected)
    assert all(parameter.grad is None for parameter in bad.model.parameters())


def test_a_bad_batch_leaves_no_trace_in_lbfgs() -> None:
    def setup() -> Setup:
        return replace(lbfgs(), scheduler=None, batches=list(DataLoader(data(), batch_size=4)))

    bad, good = made(setup, 1), made(setup, 1)
    bad.model[1] = good.model[1] = nn.Identity()
    bad.batches.insert(1, [torch.full((4, 12), math.nan), torch.ones(4, 3)])
    bad.fit(steps=4)
    good.fit(steps=3)
    assert same(bad.model.state_dict(), good.model.state_dict())
    assert same(bad.optimizer.state_dict(), good.optimizer.state_dict())


def test_patience_ends_the_run_and_brings_the_last_checkpoint_back(tmp_path: Path) -> None:
    path = tmp_path / "c"
    stop_at_4 = made(poisoned({4, 5, 6}, "loss"), 1)
    fit_poisoned(stop_at_4, steps=4)
    good = everything(stop_at_4)

    setup = made(poisoned({5, 6}, "loss"), 1)
    with pytest.raises(TrainingError) as caught:
        fit_poisoned(setup, steps=9, checkpoint=path, every=2, patience=2)
    for part in ("2 batches in a row, up to step 7", f"the weights of step 4 are back, from {path}", "learning rate"):
        assert part in str(caught.value)
    again = everything(setup)
    assert same(
        [again[key] for key in ("model", "optimizer", "scheduler")],
        [good[k] for k in ("model", "optimizer", "scheduler")],
    )
    assert checkpoint.load(path)["records"]["loss"].shape == (4,)


def test_without_a_checkpoint_of_its_own_the_run_says_so(tmp_path: Path) -> None:
    setup = made(poisoned({0}, "loss"), 1)
    before = everything(setup)
    fit_poisoned(made(poisoned(set(), "loss"), 3), steps=1, checkpoint=tmp_path / "c")
    for path in (None, tmp_path / "c"):  # the file there is another run's: not what to go back to
        with pytest.raises(TrainingError, match="step 1; there is no checkpoint of this run"):
            fit_poisoned(setup, steps=9, patience=1, checkpoint=path)
        assert same(everything(setup)["model"], before["model"])


@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
def test_a_run_shorter_than_patience_without_one_good_step_is_an_error(kind: str, tmp_path: Path) -> None:
    setup = made(poisoned({0, 1}, kind), 1)
    before = everything(setup)
    with pytest.raises(TrainingError, match="not finite at any step; there is no checkpoint of this run"):
        fit_poisoned(setup, steps=2, patience=3, checkpoint=tmp_path / "c")
    assert same(everything(setup)["model"], before["model"])
    assert not (tmp_path / "c").exists()


def test_a_loss_that_depends_on_nothing_that_trains_is_one_sentence() -> None:
    setup = made(poisoned(set(), "loss"), 1)
    setup.model.register_forward_hook(lambda _module, _inputs, output: output.detach())
    with pytest.raises(TrainingError, match="the loss depends on no parameter that trains"):
        fit_poisoned(setup, steps=2)


def test_no_checkpoint_is_written_at_a_bad_batch(tmp_path: Path) -> None:
    steps_saved = []

    def look(record: StepRecord) -> None:
        path = tmp_path / "c"
        steps_saved.append(len(checkpoint.load(path)["records"]["loss"]) if path.exists() else 0)

    fit_poisoned(made(poisoned({2, 3}, "loss"), 1), steps=6, checkpoint=tmp_path / "c", every=1, on_step=look)
    assert steps_saved == [0, 1, 2, 2, 2, 5]


@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
def test_a_run_with_bad_batches_resumes_exactly(kind: str, tmp_path: Path) -> None:
    setup = poisoned({2, 3, 6}, kind)
    whole = made(setup, 1)
    reference = fit_poisoned(whole, steps=8)
    for kill in range(2, 8):
        path = tmp_path / str(kill)
        with pytest.raises(Killed):
            fit_poisoned(made(setup, 1), steps=8, checkpoint=path, every=1, on_step=killer(kill))
        again = made(setup, 1)
        result = fit_poisoned(again, steps=8, checkpoint=path, every=1, resume=True)
        assert same(everything(again), everything(whole))
        assert same(losses(result), losses(reference))
        assert [record.skipped for record in result.records] == [record.skipped for record in reference.records]


@pytest.mark.parametrize("steps", [4, 5])
def test_weights_that_are_not_finite_are_never_saved_nor_returned(steps: int, tmp_path: Path) -> None:
    def explode(setup: Setup) -> Callable[[StepRecord], None]:
        def on_step(record: StepRecord) -> None:
            if record.step == 4:
                with torch.no_grad():
                    next(iter(setup.model.parameters()))[0, 0] = math.inf

        return on_step

    saved = made(dropout_adam_one_cycle, 1)
    saved.fit(steps=3)
    setup = made(dropout_adam_one_cycle, 1)
    with pytest.raises(TrainingError, match=f"not finite after step {steps}; the weights of step 3 are back"):
        setup.fit(steps=steps, checkpoint=tmp_path / "c", every=3, on_step=explode(setup))
    assert same(setup.model.state_dict(), saved.model.state_dict())
    setup = made(dropout_adam_one_cycle, 1)
    with pytest.raises(TrainingError, match="no checkpoint of this run"):
        setup.fit(steps=steps, on_step=explode(setup))


def test_a_buffer_that_holds_infinities_on_purpose_does_no_harm(tmp_path: Path) -> None:
    setup = made(dropout_adam_one_cycle, 1)
    setup.model.register_buffer("mask", torch.full((3,), -math.inf))
    assert len(setup.fit(steps=2, checkpoint=tmp_path / "c").records) == 2


# Signals.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(number: int, tmp_path: Path) -> None:
    def send(record: StepRecord) -> None:
        if record.step == 3:
            os.kill(os.getpid(), number)

    path = tmp_path / "c"
    handler = signal.getsignal(number)
    result = made(dropout_adam_one_cycle, 1).fit(steps=8, checkpoint=path, on_step=send)
    assert (result.interrupted, result.signal, len(result.records)) == (True, number, 3)
    assert signal.getsignal(number) is handler
    again = made(dropout_adam_one_cycle, 2)
    resumed = again.fit(steps=8, checkpoint=path, resume=True)
    final = everything(again)
    whole = made(dropout_adam_one_cycle, 1)
    whole.fit(steps=8)
    assert (resumed.resumed_from, resumed.interrupted) == (3, False)
    assert same(final, everything(whole))


def test_a_signal_between_two_steps_also_saves(tmp_path: Path) -> None:
    class Sending(NoisyBatches):
        def __iter__(self) -> Iterator[Batch]:
            for index, batch in enumerate(super().__iter__()):
                if index == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    result = replace(made(dropout_adam_one_cycle, 1), batches=Sending()).fit(steps=8, checkpoint=tmp_path / "c")
    assert len(result.records) == 3
    assert len(checkpoint.load(tmp_path / "c")["records"]["loss"]) == 3


def test_a_second_signal_raises_at_once(tmp_path: Path) -> None:
    def send(record: StepRecord) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # Python runs handlers between bytecodes
            pass
        pytest.fail("the second signal did not raise")

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        made(dropout_adam_one_cycle, 1).fit(steps=8, checkpoint=tmp_path / "c", on_step=send)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert list(tmp_path.iterdir()) == []


def test_without_a_checkpoint_ctrl_c_is_pythons_own() -> None:
    with pytest.raises(KeyboardInterrupt):
        made(dropout_adam_one_cycle, 1).fit(steps=3, on_step=lambda record: os.kill(os.getpid(), signal.SIGINT))


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        send = lambda record: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        assert not made(dropout_adam_one_cycle, 1).fit(steps=3, checkpoint=tmp_path / "c", on_step=send).interrupted
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_another_thread_can_train(tmp_path: Path) -> None:
    results: list[FitResult] = []
    setup = made(dropout_adam_one_cycle, 1)
    thread = threading.Thread(target=lambda: results.append(setup.fit(steps=3, checkpoint=tmp_path / "c")))
    thread.start()
    thread.join()
    assert len(results[0].records) == 3


# What is left of a run.


def test_modes_come_back_and_frozen_parts_stay_in_eval_mode(tmp_path: Path) -> None:
    setup = made(batch_norm_fused_adamw, 1)
    setup.model.eval()
    seen = []
    setup.fit(steps=1, on_step=lambda record: seen.append([module.training for module in setup.model.modules()]))
    assert all(seen[0])
    assert not any(module.training for module in setup.model.modules())

    setup.model.train()
    setup.model[1].eval()
    statistics = deepcopy(setup.model[1].state_dict()["running_mean"])
    setup.fit(steps=2)
    assert torch.equal(setup.model[1].running_mean, statistics)
    assert [module.training for module in setup.model] == [True, False, True, True]


def test_no_gradients_are_left() -> None:
    setup = made(lstm_momentum, 1)
    setup.fit(steps=2)
    assert all(parameter.grad is None for parameter in setup.model.parameters())


def test_no_steps_do_nothing(tmp_path: Path) -> None:
    setup = made(lstm_momentum, 1)
    before = everything(setup)
    result = setup.fit(steps=0, checkpoint=tmp_path / "c")
    assert (result.records, result.peak, result.seconds_per_step) == ([], None, None)
    assert same(everything(setup), before)
    assert list(tmp_path.iterdir()) == []


class Growing:
    """Five epochs' worth of batches, of 10, 20, 15, 30 and 5 rows."""

    rows = (10, 20, 15, 30, 5)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self.rows:
            yield [torch.ones(rows, 12), torch.ones(rows, 3)]


def test_the_ledger_watches_the_second_step_and_every_larger_batch(tmp_path: Path) -> None:
    watched = replace(made(dropout_adam_one_cycle, 1), batches=Growing(), scheduler=None)
    result = watched.fit(steps=10, checkpoint=tmp_path / "c", measure=True)
    assert [record.step for record in result.records if record.measured] == [2, 4]
    peaks = [record.peak for record in result.records if record.peak is not None]
    assert result.peak == max(peaks, key=lambda peak: peak.total)
    assert result.peak.weights == sum(parameter.nbytes for parameter in watched.model.parameters())
    times = sorted(record.seconds for record in result.records if not record.measured)
    assert result.seconds_per_step == (times[3] + times[4]) / 2

    again = replace(made(dropout_adam_one_cycle, 1), batches=Growing(), scheduler=None)
    resumed = again.fit(steps=15, checkpoint=tmp_path / "c", measure=True, resume=True)
    assert resumed.records[:10] == result.records
    assert not any(record.measured for record in resumed.records[10:])
    assert resumed.peak == result.peak
    plain = replace(made(dropout_adam_one_cycle, 1), batches=Growing(), scheduler=None)
    plain.fit(steps=15)
    assert same(again.model.state_dict(), plain.model.state_dict())


def test_the_ledger_watches_the_only_step(tmp_path: Path) -> None:
    setup = made(dropout_adam_one_cycle, 1)
    result = setup.fit(steps=1, measure=True)
    assert result.records[0].measured
    assert result.seconds_per_step is None
    setup.fit(steps=1, checkpoint=tmp_path / "c")
    assert setup.fit(steps=2, checkpoint=tmp_path / "c", resume=True, measure=True).records[1].measured


def test_a_resume_watches_the_same_step(tmp_path: Path) -> None:
    made(dropout_adam_one_cycle, 1).fit(steps=1, checkpoint=tmp_path / "c")
    result = made(dropout_adam_one_cycle, 2).fit(steps=4, checkpoint=tmp_path / "c", resume=True, measure=True)
    assert [record.step for record in result.records if record.measured] == [2]


def test_progress_on_a_terminal_shows_step_loss_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    made(stateful_adagrad, 1).fit(steps=4, progress=True, measure=True)
    shown = sys.stderr.getvalue()
    assert "4/4" in shown
    assert re.search(r"loss \d.*s/step.*KiB", shown)


def test_progress_elsewhere_than_on_a_terminal_is_ten_lines(capfd: pytest.CaptureFixture[str]) -> None:
    made(stateful_adagrad, 1).fit(steps=30, progress=True)
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 10
    assert lines[0].startswith("step 3/30  loss ")
    assert lines[-1].startswith("step 30/30  loss ")
    assert lines[-1].endswith(" s/step")


def test_without_progress_nothing_is_printed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made(stateful_adagrad, 1).fit(steps=3, checkpoint=tmp_path / "c")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(("make", "released"), [(perceptron, True), (Recurrent, False)])
@pytest.mark.parametrize("converted", [False, True])
def test_freed_memory_is_given_back_unless_torchs_recurrent_layers_would_fault(
    make: Callable[[], nn.Module], released: bool, converted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(sys.modules["memfit.fit"], "release_freed_memory", lambda: calls.append(True))
    model = make()
    if converted:
        memfit.convert_(model, memfit.LowRankGradient(rank=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, squared_error, [[torch.randn(2, 12), torch.randn(2, 3)]], optimizer, steps=1, measure=False)
    assert bool(calls) == (released or converted)
