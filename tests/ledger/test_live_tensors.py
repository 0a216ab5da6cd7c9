"""The tensors at the peak: together they are the peak, and each says what it is and which line of code made it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memfit
from memfit.ledger import LINES, Ledger, LiveTensor

HERE = Path(__file__).name


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        wide = torch.cat([hidden] * 40, dim=0) * 2  # the largest
        return self.last(wide)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def measure() -> Ledger:
    model = Wide()
    optimizer = torch.optim.AdamW(model.parameters())
    with memfit.ledger(model, optimizer) as book:
        step(model, optimizer, torch.randn(64, 8))
    return book


def place(text: str) -> str:
    """The line of this file that has the text, as the ledger writes it."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    number = next(number for number, line in enumerate(lines, start=1) if text in line)
    return f"{HERE}:{number}"


def test_they_add_up_to_the_lines() -> None:
    book = measure()
    for line in LINES:
        assert sum(tensor.nbytes for tensor in book.tensors if tensor.line == line) == getattr(book.peak, line)
    sizes = [tensor.nbytes for tensor in book.tensors]
    assert sizes == sorted(sizes, reverse=True)


def test_a_tensor_knows_the_line_that_made_it() -> None:
    largest = max((t for t in measure().tensors if t.line == "activations"), key=lambda tensor: tensor.nbytes)
    assert largest.shape == (64 * 40, 16)
    assert largest.dtype == "float32"
    assert (largest.phase, largest.module, largest.operator) == ("forward", "", "aten.mul.Tensor")
    path, _, function = largest.source.rpartition(" in ")
    assert path.endswith(place("# the " + "largest"))
    assert function == "forward"


def test_one_of_backwards_knows_who_called_it() -> None:
    made = [tensor for tensor in measure().tensors if tensor.phase == "backward"]
    assert made
    assert all(place(".sum().backward" + "()") in tensor.source for tensor in made)


def test_weights_know_their_module_and_have_no_maker() -> None:
    weights = [tensor for tensor in measure().tensors if tensor.line == "weights"]
    assert LiveTensor(4 * 16 * 8, "weights", (16, 8), "float32", "first", "start", "", "") in weights


def test_what_a_library_makes_is_put_down_to_the_line_that_called_it() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU())
    with memfit.ledger(model) as book:
        checkpoint(model, torch.randn(32, 8), use_reentrant=False).sum().backward()
    made = [tensor for tensor in book.tensors if tensor.phase != "start"]
    assert made
    assert all(HERE in tensor.source for tensor in made)
