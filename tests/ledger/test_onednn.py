"""The models of what oneDNN's operators take for themselves, against what the system reports for single operators."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import memfit
from memfit.ledger import ledger, onednn

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not onednn._channels_per_block(), reason="nothing is modelled for this processor"
)

MEASURE = """
import gc, json, os, sys
import torch
import memfit
from memfit.ledger import onednn, process_peak
from torch.utils._python_dispatch import TorchDispatchMode

memfit.release_freed_memory(1 << 16)
torch.set_num_threads(1)
MODELLED = ("aten.convolution", "aten.mkldnn_rnn_layer")
found = []

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with process_peak() as process:
            result = func(*args, **(kwargs or {}))
            grown = process.growth
        if str(func).startswith(MODELLED):
            outputs = result if isinstance(result, tuple) else (result,)
            kept = onednn.reserve(func, result)
            shown = sum(t.nbytes for t in outputs if t is not None and not (kept and t is kept[0]))
            found.append((str(func), grown - shown - (kept[1] if kept else 0), onednn.hidden_bytes(func, args, result)))
        return result

def step(make):
    layer, x = make()
    y = layer(x)
    (y[0] if isinstance(y, tuple) else y).sum().backward()

gc.freeze()  # what the imports have brought; there is a collection at each operator
for text in sys.argv[1:]:
    if os.fork() == 0:  # each from the same state, in which torch has been loaded and has computed nothing
        make = eval("lambda: " + text, {"torch": torch, "nn": torch.nn})
        step(make)  # code and buffers of the kernels
        with Watch():
            step(make)
        print(json.dumps([text, found]), flush=True)
        os._exit(0)
    os.wait()
"""

LARGE = "torch.randn(24, 32, 64, 64, requires_grad=True)"
LAST = "to(memory_format=torch.channels_last)"


LAYERS = [
    f"(nn.Conv2d(32, 64, 3, padding=1), {LARGE})",
    "(nn.Conv2d(3, 64, 3, padding=1), torch.randn(24, 3, 64, 64))",
    f"(nn.Conv2d(32, 64, 3, padding=1, stride=2), {LARGE})",
    f"(nn.Conv2d(32, 32, 3, padding=1, groups=32), {LARGE})",
    f"(nn.Conv2d(32, 20, 1), {LARGE})",
    f"(nn.Conv2d(32, 64, 3, padding=1).{LAST}, torch.randn(24, 32, 64, 64).{LAST}.requires_grad_())",
    f"(nn.ConvTranspose2d(32, 16, 2, stride=2), {LARGE})",
    "(nn.Conv1d(64, 96, 5, padding=2), torch.randn(16, 64, 2048, requires_grad=True))",
    "(nn.LSTM(80, 512), torch.randn(50, 16, 80))",
    "(nn.LSTM(512, 512), torch.randn(50, 16, 512, requires_grad=True))",
]


@pytest.fixture(scope="module")
def measured() -> dict[str, list[tuple[str, int, int]]]:
    """Of each layer: operator, bytes that it took by the system, bytes by the model."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *LAYERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_models_are_near_what_the_system_reports(
    layer: str, measured: dict[str, list[tuple[str, int, int]]]
) -> None:
    found = measured[layer]
    assert len(found) == 2, "one operator forward and one backward"
    for operator, taken, modelled in found:
        assert modelled == pytest.approx(taken, rel=0.15, abs=1.5 * 2**20), operator


def test_what_an_operator_takes_for_itself_is_workspace_at_its_peak() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(4, 8, 32, 32)
    with ledger(model) as book, torch.no_grad():
        model(x)
    inside = [tensor for tensor in book.tensors if tensor.is_inside]
    assert [(tensor.line, tensor.module, tensor.operator) for tensor in inside] == [
        ("workspace", "", "aten.convolution")
    ]
    assert inside[0].nbytes >= x.nbytes
    assert book.peak.workspace >= inside[0].nbytes
    assert book.timeline[-1].lines.total < book.peak.total, "it has been given back"


def mean_square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)[0].square().mean()


@pytest.mark.parametrize(("hidden", "frames"), [(64, 20), (128, 400)])
def test_the_reserve_of_a_recurrent_layer_counts_as_written_in_ledger_and_estimate(hidden: int, frames: int) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(16, hidden)
    optimizer = torch.optim.SGD(model.parameters())
    x = torch.randn(frames, 4, 16)
    for _ in range(2):
        with ledger(model, optimizer) as book:
            optimizer.zero_grad()
            mean_square(model, x).backward()
            optimizer.step()
    kept = [tensor for tensor in book.tensors if tensor.operator == "aten.mkldnn_rnn_layer" and len(tensor.shape) == 1]
    assert [tensor.nbytes for tensor in kept] == [5 * frames * 4 * hidden * 4]
    assert memfit.estimate(model, x, mean_square, optimizer).peak.total == pytest.approx(book.peak.total, rel=0.01)


def test_another_tensor_on_the_reserve_does_not_make_it_larger() -> None:
    model, x = nn.LSTM(16, 64), torch.randn(200, 4, 16)
    totals = []
    for unpacked in (lambda tensor: tensor, lambda tensor: tensor.detach()):
        with ledger(model) as book, torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), unpacked):
            loss = mean_square(model, x)
        totals.append(book.timeline[-1].lines.total)
        del loss
    reserve = 5 * 200 * 4 * 64 * 4
    assert totals[0] == totals[1] < 2 * reserve
