"""Random small models: the ledger's total moves exactly as PyTorch's own allocator says, and its lines add up.

The allocator's side comes from the profiler, which records each allocation in C++ and knows nothing of Python's
tensors, so the two have nothing in common.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from memfit.ledger import LINES, ledger


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        # The state of the random generator, 5 KB, would be a tensor that no operator ever touches.
        return checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.square = x * x
        return ctx.square * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return ctx.square.mul_(3).mul_(grad)


WIDTH = 12

_simple = st.sampled_from(
    [
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
        lambda: Lambda(lambda x: (x + x).relu_()),
        nn.GELU,
        lambda: nn.LayerNorm(WIDTH),
        lambda: nn.BatchNorm1d(WIDTH),
        lambda: nn.Dropout(0.5),
        lambda: Lambda(lambda x: x.t().contiguous().t()),
        lambda: Lambda(lambda x: x.reshape(-1, 2).flip(1).view(x.shape)),
        lambda: Lambda(lambda x: (x + x).sigmoid_()),
        lambda: Lambda(lambda x: torch.cat(x.chunk(3, dim=1)[::-1], dim=1)),
        lambda: Lambda(Cube.apply),
        lambda: Lambda(lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0]),
    ]
)
_wrapped = st.builds(
    lambda wrap, inner: lambda: wrap(nn.Sequential(*(make() for make in inner))),
    st.sampled_from([Residual, Checkpointed]),
    st.lists(_simple, min_size=1, max_size=3),
)
_optimizers = st.sampled_from(
    [
        lambda p: torch.optim.SGD(p, lr=1e-3),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adagrad(p),
    ]
)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    layers = [make() for make in draw(st.lists(st.one_of(_simple, _wrapped), min_size=1, max_size=5))]
    layers.insert(0, nn.Linear(WIDTH, WIDTH))
    if draw(st.booleans()):
        tied = nn.Linear(WIDTH, WIDTH)
        tied.weight = layers[0].weight
        layers.append(tied)
    return nn.Sequential(*layers)


def allocated_at_marks(profile: torch.autograd.profiler.profile) -> list[int]:
    """Bytes that the CPU allocator handed out, less what came back, at each `record_function("mark")`."""

    def flat(nodes: list) -> Iterator:
        for node in nodes:
            yield node
            yield from flat(node.children)

    live, marks = 0, []
    tree = profile.kineto_results.experimental_event_tree()
    for event in sorted(flat(tree), key=lambda event: event.start_time_ns):
        if event.tag == _EventType.Allocation:
            live += event.extra_fields.alloc_size
        elif event.name == "mark":
            marks.append(live)
    return marks


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(model=models(), make_optimizer=_optimizers, micro_batches=st.integers(1, 2), to_none=st.booleans())
def test_totals_follow_the_allocator_and_the_lines_add_up(
    model: nn.Module,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    micro_batches: int,
    to_none: bool,
) -> None:
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    batch = torch.randn(6, WIDTH)
    marks: list[int] = []
    gc.collect()  # what earlier examples left behind must not be freed in the region
    with torch.autograd.profiler.profile(profile_memory=True) as profile, ledger(model, optimizer) as book:

        def mark() -> None:
            marks.append(len(book.timeline) - 1)
            with record_function("mark"):
                pass

        mark()
        for _ in range(2):
            for _ in range(micro_batches):
                output = model(batch)
                mark()
                loss = output.square().mean()
                mark()
                loss.backward()
                mark()
            optimizer.step()
            mark()
            optimizer.zero_grad(set_to_none=to_none)
            mark()
        del output, loss
        mark()

    totals = [sample.lines.total for sample in book.timeline]
    allocated = allocated_at_marks(profile)
    assert [totals[at] - totals[0] for at in marks] == [there - allocated[0] for there in allocated]

    parameters, buffers = list(model.parameters()), list(model.buffers())
    weights = sum(tensor.untyped_storage().nbytes() for tensor in (*parameters, *buffers))
    assert all(sample.lines.weights == weights for sample in book.timeline)
    assert max(totals) == book.peak.total
    final = book.timeline[-1].lines
    assert final.gradients == sum(p.grad.untyped_storage().nbytes() for p in parameters if p.grad is not None)
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert final.optimizer == sum(tensor.untyped_storage().nbytes() for tensor in states)
    assert final.activations == batch.untyped_storage().nbytes()
    assert final.workspace == 0
    for line in LINES:
        assert sum(getattr(lines, line) for lines in book.modules.values()) == getattr(book.peak, line)
