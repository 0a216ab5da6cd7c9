"""The lines of training steps whose memory can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memfit
from memfit.ledger import LINES, Ledger, ledger

needs_blocked_weights = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch is built without oneDNN's blocked weights",
)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def largest(book: Ledger, line: str) -> int:
    return max(getattr(sample.lines, line) for sample in book.timeline)


def last(book: Ledger, line: str) -> int:
    return getattr(book.timeline[-1].lines, line)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(nbytes(*state.values()) for state in optimizer.state.values())


def test_weights_gradients_and_momentum_are_exact() -> None:
    model = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = torch.randn(5, 30)
    size = nbytes(*model.parameters())
    with ledger(model, optimizer) as book:
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    first, final = book.timeline[0].lines, book.timeline[-1].lines
    assert (first.weights, first.gradients, first.optimizer, first.activations) == (size, 0, 0, nbytes(batch))
    assert (book.peak.weights, book.peak.gradients, book.peak.optimizer) == (size, size, size)
    assert (final.weights, final.gradients, final.optimizer, final.workspace) == (size, 0, size, 0)
    assert book.instant.phase == "step"


def test_gradients_and_state_from_before_count_from_the_start() -> None:
    model = nn.Linear(30, 20)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 30)).sum().backward()
    optimizer.step()
    with ledger(model, optimizer) as book:
        pass
    lines = book.timeline[0].lines
    assert lines.gradients == nbytes(*model.parameters())
    assert lines.optimizer == state_bytes(optimizer)
    assert book.peak == lines
    assert book.instant.phase == "start"


def test_an_unnamed_optimizer_is_found_when_it_steps() -> None:
    model = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 30)).sum().backward()
    optimizer.step()
    with ledger(model) as book:
        optimizer.step()
    assert book.timeline[0].lines.optimizer == nbytes(*model.parameters())


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str)
def test_adam_state_made_in_the_first_step_is_on_its_line(options: dict[str, bool]) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    optimizer = torch.optim.Adam(model.parameters(), **options)
    with ledger(model, optimizer) as book:
        model(torch.randn(5, 30)).sum().backward()
        optimizer.step()
    assert largest(book, "optimizer") == last(book, "optimizer") == state_bytes(optimizer)
    assert last(book, "workspace") == 0


def test_every_one_of_several_optimizers_counts() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(model[1].parameters())
    with ledger(model, first, second) as book:
        model(torch.randn(5, 30)).sum().backward()
        first.step()
        second.step()
    assert last(book, "optimizer") == state_bytes(first) + state_bytes(second)
    assert book.modules["0"].optimizer == state_bytes(first)
    assert book.modules["1"].optimizer > 0


def test_a_closure_runs_forward_and_backward_and_not_step() -> None:
    model = nn.Linear(40, 40)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    batch = torch.randn(64, 40)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().sum()
        loss.backward()
        return loss

    with ledger(model, optimizer) as book:
        optimizer.step(closure)
    (state,) = optimizer.state.values()
    held = nbytes(state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"])
    assert last(book, "optimizer") == pytest.approx(held, abs=100)
    # The batch and the layer's output, which the square keeps, and no more: the state is not among the activations.
    assert largest(book, "activations") == pytest.approx(2 * nbytes(batch), abs=100)
    assert largest(book, "gradients") == nbytes(*model.parameters())


def test_an_optimizer_that_keeps_its_state_in_objects_of_its_own() -> None:
    class Projector:
        def __init__(self, size: int) -> None:
            self.basis = torch.zeros(size)

    class Projecting(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter].setdefault("projector", Projector(100))

    model = nn.Linear(3, 3, bias=False)
    optimizer = Projecting(model.parameters(), lr=0.1)
    with ledger(model, optimizer) as book:
        optimizer.step()
    assert book.peak.optimizer == 400
    with ledger(model, optimizer) as book:
        pass
    assert book.peak.optimizer == 400


def test_activations_are_what_backward_needs_and_temporaries_are_not() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = x.exp()  # exp saves its result
            return (kept + 1).sum()  # the sum needs nothing of kept + 1

    model, batch = Net(), torch.randn(100, 10, requires_grad=True)
    with ledger(model) as book:
        loss = model(batch)
        loss.backward()
    forward = max((s.lines for s in book.timeline if s.lines.gradients == 0), key=lambda lines: lines.activations)
    assert (
        forward.activations == nbytes(batch, batch, loss) + 4
    )  # and the gradient of the loss that backward starts with
    assert largest(book, "workspace") >= nbytes(batch)


def test_a_tied_weight_counts_once_and_so_does_its_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(1000, 32)
            self.head = nn.Linear(32, 1000, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    model = Tied()
    size = nbytes(model.head.weight)
    with ledger(model) as book:
        model(torch.randint(0, 1000, (4,))).sum().backward()
    assert largest(book, "weights") == size
    # While the autograd engine adds them up: the two gradients and their sum, none of it workspace.
    assert largest(book, "gradients") == 3 * size
    assert last(book, "gradients") == size
    assert largest(book, "workspace") < size
    assert book.modules["embedding"].weights == size


def test_views_and_in_place_operators_count_once() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return y.view(-1)[:50].t().unsqueeze(0).add_(1).mul_(3).sum()

    batch = torch.randn(10, 10)
    with torch.no_grad(), ledger(Net()) as book:
        Net()(batch)
    assert book.peak.total == nbytes(batch, batch) + 4


def test_gradient_accumulation_holds_two_gradients_of_a_weight_while_it_adds() -> None:
    model = nn.Linear(50, 50, bias=False)
    with ledger(model) as book:
        model(torch.randn(4, 50)).sum().backward()
        once = largest(book, "gradients")
        model(torch.randn(4, 50)).sum().backward()
    assert once == nbytes(model.weight)
    assert largest(book, "gradients") == 2 * nbytes(model.weight)
    assert last(book, "gradients") == nbytes(model.weight)


class Block(nn.Module):
    """A block whose inner activations are four times its output's."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "kept":
            return self.body(x)
        body: Callable[[Tensor], Tensor] = self.body if "module" in self.how else lambda y: self.body(y)
        return checkpoint(body, x, use_reentrant="reentrant" in self.how)


def test_checkpointing_lowers_the_activations_and_recomputation_makes_activations() -> None:
    batch = torch.randn(64, 16, requires_grad=True)
    books = {}
    for how in ("kept", "module", "function", "module, reentrant"):
        model = nn.Sequential(*(Block(how) for _ in range(6)))
        with ledger(model) as book:
            model(batch).sum().backward()
        books[how] = book
        batch.grad = None
    inner, outer = nbytes(batch) * 4, nbytes(batch)
    # Every block keeps its input, the input of its GELU and that of its second layer.
    assert largest(books["kept"], "activations") == pytest.approx(6 * (2 * inner + outer), abs=100)
    for how in ("module", "function", "module, reentrant"):
        # One block's inner activations at a time; recomputation may leave a detached input or output on top.
        assert largest(books[how], "activations") == pytest.approx(2 * inner + 6 * outer, abs=2 * outer + 100), how


class Squared(torch.autograd.Function):
    """Keeps a tensor on the context without `save_for_backward`, and overwrites it in backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.twice = 2 * x
        return x * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return ctx.twice.mul_(grad)


def test_what_a_custom_function_keeps_and_reuses_stays_an_activation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return Squared.apply(x * self.scale).sum()

    batch = torch.randn(1000)
    model = Net()
    with ledger(model) as book:
        model(batch).backward()
    # The batch (the product keeps it) and the tensor on the context.
    assert largest(book, "activations") == pytest.approx(2 * nbytes(batch), abs=20)
    assert last(book, "activations") == pytest.approx(nbytes(batch), abs=20)


def test_the_lstm_kernels_reserve_counts_as_activations() -> None:
    model = nn.LSTM(8, 32, num_layers=2)
    batch = torch.randn(20, 4, 8)
    with ledger(model) as book:
        output, _ = model(batch)
        output.sum().backward()
    # At the least the gates of both layers; the outputs of both; the batch.
    gates, hidden = 2 * 20 * 4 * 4 * 32 * 4, 2 * 20 * 4 * 32 * 4
    assert largest(book, "activations") >= gates + hidden + nbytes(batch)
    assert largest(book, "gradients") == nbytes(*model.parameters())


def test_an_lstm_over_packed_sequences_trains_under_the_ledger() -> None:
    model = nn.LSTM(8, 16)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(6, 3, 8), [6, 4, 2])
    with ledger(model) as book:
        model(packed)[0].data.sum().backward()
    assert largest(book, "weights") == nbytes(*model.parameters())
    assert last(book, "gradients") == nbytes(*model.parameters())


def test_frozen_parameters_are_weights_without_gradients_and_buffers_are_weights() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 5))
    model[0].requires_grad_(False)
    with ledger(model) as book:
        model(torch.randn(8, 20)).sum().backward()
    assert largest(book, "weights") == nbytes(*model.parameters(), *model.buffers())
    assert largest(book, "gradients") == nbytes(*(p for p in model.parameters() if p.requires_grad))


def test_inference_has_temporaries_and_no_gradients() -> None:
    model = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 5))
    batch = torch.randn(8, 20)
    with torch.no_grad(), ledger(model) as book:
        model(batch)
    assert book.peak.gradients == book.peak.optimizer == 0
    assert largest(book, "activations") == nbytes(batch)
    assert largest(book, "workspace") == 2 * 8 * 100 * 4


def test_gradients_of_autograd_grad_are_gradients() -> None:
    model = nn.Linear(30, 30)
    with ledger(model) as book:
        gradients = torch.autograd.grad(model(torch.randn(4, 30)).sum(), list(model.parameters()))
        torch.zeros(1)
        assert last(book, "gradients") == nbytes(*gradients)


def test_an_update_that_runs_in_backward_holds_one_gradient_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(30, 30, bias=False) for _ in range(4)))
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    with ledger(model, *optimizers.values()) as book:
        for _ in range(2):
            model(torch.randn(4, 30)).sum().backward()
    assert largest(book, "gradients") == nbytes(model[0].weight)
    assert last(book, "optimizer") == nbytes(*model.parameters())


def test_sparse_gradients_count_their_indices_and_values() -> None:
    model = nn.Embedding(1000, 8, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    with ledger(model, optimizer) as book:
        model(torch.tensor([1, 2, 3])).sum().backward()
        gradient = model.weight.grad
        assert gradient is not None
        optimizer.step()
    assert largest(book, "gradients") >= nbytes(gradient._indices(), gradient._values())
    assert largest(book, "gradients") < nbytes(model.weight)
    assert last(book, "optimizer") == pytest.approx(2 * nbytes(model.weight), abs=8)


def test_a_sparse_gradients_indices_may_be_the_batch() -> None:
    model, batch = nn.Embedding(1000, 8, sparse=True), torch.arange(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ledger(model, optimizer) as book:
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert last(book, "activations") == nbytes(batch)
    assert last(book, "gradients") == 0


@needs_blocked_weights
def test_a_weight_in_onednns_blocks_counts_until_it_is_freed() -> None:
    model = nn.Linear(2, 2)
    weight = torch.randn(1024, 1024)
    with torch.no_grad(), ledger(model) as book:
        weight.mul_(1)  # it is known from here on
        before = book.timeline[-1].lines.total
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
        torch.ops.mkldnn._linear_pointwise(torch.randn(8, 1024), blocked, None, "none", [], "")
        during = book.timeline[-1].lines.total
        del blocked
        after = book.timeline[-1].lines.total
    assert during - before == 4 * 2**20
    assert after == before
    # On no other line than that of temporaries, where the product and its input come on top.
    assert largest(book, "activations") == nbytes(weight)
    assert largest(book, "workspace") == 4 * 2**20 + 2 * 8 * 1024 * 4


@needs_blocked_weights
def test_a_low_rank_lstms_blocked_weights_are_in_the_total() -> None:
    model = nn.LSTM(512, 512)
    memfit.convert_(model, memfit.LowRankGradient(8))
    batch = torch.randn(4, 8, 512)
    with ledger(model) as book:
        output, _ = model(batch)
        totals = [sample.lines.total for sample in book.timeline]
        output.sum().backward()
    blocked = 4 * 512 * 512 * 4
    # Without blocks the forward has no temporary of this size: its gates are 64 KiB a step.
    steps = [after - before for before, after in pairwise(totals)]
    assert blocked in steps
    assert -blocked in steps
    assert max(totals) >= nbytes(*model.parameters(), batch, output) + blocked


def test_a_resized_storage_counts_at_its_size() -> None:
    model = nn.Linear(2, 2)
    batch = torch.randn(100)
    with ledger(model) as book:
        grown = batch * 2
        grown.resize_(1000)
        sizes = [book.timeline[-1].lines.total]
        grown.untyped_storage().resize_(40)
        sizes.append(book.timeline[-1].lines.total)
        del grown
        sizes.append(book.timeline[-1].lines.total)
    base = nbytes(*model.parameters(), batch)
    assert sizes == [base + 4000, base + 40, base]


def test_a_list_of_batches_counts_from_the_start_and_loaded_batches_when_they_come() -> None:
    model = nn.Linear(50, 50)
    held = [torch.randn(8, 50) for _ in range(3)]
    with ledger(model) as book:
        for batch in held:
            model(batch).sum().backward()
    assert book.timeline[0].lines.activations == 3 * nbytes(held[0])
    del held, batch

    def from_elsewhere() -> Tensor:
        # A storage that no operator makes, as when a loader's worker hands one over.
        return torch.frombuffer(bytearray(8 * 50 * 4), dtype=torch.float32).view(8, 50)

    with ledger(model) as book:
        for _ in range(3):
            batch = from_elsewhere()
            model(batch).sum().backward()
            del batch
    assert book.timeline[0].lines.activations == 8 * 50 * 4


def test_tensors_without_data_have_no_bytes() -> None:
    from torch._subclasses import FakeTensorMode

    model = nn.Linear(50, 50, device="meta")
    with ledger(model) as book:
        model(torch.randn(4, 50, device="meta")).sum().backward()
    assert book.peak.total == 0
    with FakeTensorMode():
        model = nn.Linear(50, 50)
        with ledger(model) as book:
            model(torch.randn(4, 50)).sum().backward()
    assert book.peak.total == 0


def test_a_tensor_made_of_tensors_counts_its_parts() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Linear(50, 20)
    batch = TwoTensor(torch.randn(4, 50), torch.randn(4, 50))
    with ledger(model) as book:
        model(batch).sum().backward()
    assert book.timeline[0].lines.activations == 2 * 4 * 50 * 4
    assert book.timeline[0].lines.weights == nbytes(*model.parameters())


def test_double_backward_runs_under_the_ledger() -> None:
    model = nn.Linear(30, 30)
    batch = torch.randn(4, 30, requires_grad=True)
    with ledger(model) as book:
        (slope,) = torch.autograd.grad(model(batch).square().sum(), batch, create_graph=True)
        slope.square().sum().backward()
    assert last(book, "gradients") == nbytes(*model.parameters(), batch)


def test_autocast_copies_of_the_weights_are_activations() -> None:
    model = nn.Linear(64, 64, bias=False)
    batch = torch.randn(2, 64)
    with ledger(model) as book, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch).sum()
        loss.backward()
    assert largest(book, "weights") == nbytes(model.weight)
    assert largest(book, "activations") >= nbytes(model.weight) // 2


def test_modules_add_up_to_the_peak_and_name_their_owners() -> None:
    model = nn.Sequential(nn.Linear(30, 200), nn.Tanh(), nn.Linear(200, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = torch.randn(5, 30)
    with ledger(model, optimizer) as book:
        model(batch).sum().backward()
        optimizer.step()
    for line in LINES:
        assert sum(getattr(lines, line) for lines in book.modules.values()) == getattr(book.peak, line)
    assert book.modules["0"].weights == book.modules["0"].gradients == nbytes(*model[0].parameters())

    with ledger(model) as book:
        output = model(batch)
    assert output.requires_grad
    assert book.instant.module == "1"
    assert book.modules["0"].workspace == 5 * 200 * 4
    assert book.modules["1"].activations == 5 * 200 * 4
    assert book.modules[""].activations == nbytes(batch)


def test_backward_work_is_the_modules_that_made_it() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Sequential(nn.Linear(10, 3000), nn.Tanh()), nn.Linear(3000, 2))
    with ledger(model) as book:
        model(torch.randn(500, 10)).sum().backward()
    assert book.instant.phase == "backward"
    assert book.instant.module == "1.1"
    assert book.instant.operator == "aten.tanh_backward"
