"""What the ledger leaves behind: nothing, whatever happened in the region."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizer_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

from memfit.errors import MemfitError
from memfit.ledger import ledger


def installed() -> tuple[object, ...]:
    return (
        len(hooks._global_forward_hooks),
        len(hooks._global_forward_hooks_always_called),
        len(hooks._global_forward_pre_hooks),
        len(optimizer_hooks._global_optimizer_pre_hooks),
        len(optimizer_hooks._global_optimizer_post_hooks),
        _get_current_dispatch_mode(),
        torch.UntypedStorage.resize_,
        "resize_" in torch.UntypedStorage.__dict__,
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 10)).sum().backward()
    optimizer.step()


def test_no_hook_and_no_tensor_outlives_the_region() -> None:
    before = installed()
    model = nn.Sequential(nn.Linear(10, 10), nn.Tanh())
    optimizer = torch.optim.Adam(model.parameters())
    with ledger(model, optimizer) as book:
        assert installed() != before
        step(model, optimizer)
        kept = torch.randn(1000)
    assert installed() == before
    events = len(book.timeline)
    held = [weakref.ref(thing) for thing in (model, optimizer, kept.untyped_storage(), model[0].weight)]
    assert book.peak.total > 0
    del model, optimizer, kept
    gc.collect()
    assert [reference() for reference in held] == [None] * 4
    assert len(book.timeline) == events


def test_the_model_goes_without_the_garbage_collectors_help() -> None:
    model = nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.collect()
    gc.disable()
    try:
        with ledger(model, optimizer) as book:
            step(model, optimizer)
        held = weakref.ref(model.weight)
        del model, optimizer
        assert held() is None
        assert book.peak.total > 0
    finally:
        gc.enable()


def test_nested_tensors_uninitialized_parameters_and_control_flow_run_under_the_ledger() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]])
    with torch.no_grad(), ledger(encoder) as book:
        encoder(torch.randn(2, 5, 16), src_key_padding_mask=padding)
    assert book.peak.weights == sum(p.nbytes for p in encoder.parameters())
    lazy = nn.Sequential(nn.LazyLinear(8))
    with ledger(lazy) as book:
        lazy(torch.randn(2, 3)).sum().backward()
    assert book.timeline[-1].lines.weights == 4 * (3 * 8 + 8)
    with ledger(nn.Linear(4, 4)) as book:
        torch.cond(torch.ones(()) > 0, lambda x: x + 1, lambda x: x - 1, (torch.randn(2, 4),))
    assert book.peak.total > 0


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("in forward")


@pytest.mark.parametrize("where", ["forward", "backward", "step", "closure"])
def test_an_exception_restores_everything_and_the_next_region_works(where: str) -> None:
    before = installed()
    model = nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def fail(*_: object) -> None:
        raise ValueError(f"in {where}")

    def run() -> None:
        if where == "forward":
            nn.Sequential(model, Failing())(torch.randn(4, 10))
        loss = model(torch.randn(4, 10)).sum()
        if where == "backward":
            handle = model.weight.register_hook(fail)
            try:
                loss.backward()
            finally:
                handle.remove()
        loss.backward()
        if where == "step":
            handle = optimizer.register_step_pre_hook(fail)
            try:
                optimizer.step()
            finally:
                handle.remove()
        optimizer.step(fail)

    with pytest.raises(ValueError, match=f"in {where}"), ledger(model, optimizer) as book:
        run()
    assert installed() == before
    assert book.peak.weights == 440

    # The same within one region: an exception that the user catches does not leave the ledger in the wrong phase.
    with ledger(model, optimizer) as book:
        with pytest.raises(ValueError, match=f"in {where}"):
            run()
        step(model, optimizer)
    assert installed() == before
    assert book.timeline[-1].lines.optimizer == 440
    assert max(sample.lines.optimizer for sample in book.timeline) == 440


def test_nested_regions_measure_independently() -> None:
    before = installed()
    model = nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ledger(model, optimizer) as outer:
        step(model, optimizer)
        with ledger(model, optimizer) as inner:
            step(model, optimizer)
        assert installed() != before
        step(model, optimizer)
    assert installed() == before
    assert inner.peak.weights == outer.peak.weights == 440
    assert max(s.lines.total for s in inner.timeline) <= outer.peak.total
    assert len(outer.timeline) > 2 * len(inner.timeline)


def test_a_ledger_is_used_once() -> None:
    model = nn.Linear(2, 2)
    book = ledger(model)
    with book, pytest.raises(MemfitError, match="used already"):
        book.__enter__()
    with pytest.raises(MemfitError, match="used already"):
        book.__enter__()


def test_wrong_arguments_are_refused_in_a_sentence() -> None:
    with pytest.raises(MemfitError, match=r"needs a torch\.nn\.Module first, not function"):
        ledger(step)  # type: ignore[arg-type]
    with pytest.raises(MemfitError, match="as in ledger"):
        ledger(nn.Linear(2, 2), nn.Linear(2, 2))  # type: ignore[arg-type]


def test_figures_can_be_read_while_the_region_is_open() -> None:
    model = nn.Linear(10, 10)
    with ledger(model) as book:
        start = book.peak
        model(torch.randn(400, 10)).sum().backward()
        assert book.peak.total > start.total == 440


def test_training_is_bit_identical_under_the_ledger() -> None:
    results = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 10), nn.Dropout(0.5), nn.Tanh())
        optimizer = torch.optim.Adam(model.parameters())
        if measured:
            with ledger(model, optimizer):
                step(model, optimizer)
                step(model, optimizer)
        else:
            step(model, optimizer)
            step(model, optimizer)
        results.append(model[0].weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_compiled_model_runs_and_is_measured_uncompiled() -> None:
    model = nn.Linear(10, 10)
    compiled = torch.compile(model, backend="eager")
    with ledger(compiled) as book:
        compiled(torch.randn(4, 10)).sum().backward()
    assert book.timeline[-1].lines.gradients == 440


def test_the_ledger_does_not_import_the_compiler() -> None:
    # It is 70 MB that would be in the measured region.
    code = """
import sys, torch
from memfit.ledger import ledger
model = torch.nn.Linear(2, 2)
with ledger(model):
    model(torch.randn(2, 2)).sum().backward()
assert "torch._dynamo" not in sys.modules
assert "rich" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
