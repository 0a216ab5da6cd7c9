"""Batch norm of a stream: moving averages against their definition, and the plain layer at the end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfit
from memfit.gradients.streaming_norm import StreamingBatchNorm1d, StreamingBatchNorm2d

LAYERS = [
    (nn.BatchNorm1d, (3, 4)),
    (nn.BatchNorm1d, (1, 4, 6)),
    (nn.BatchNorm2d, (1, 4, 3, 5)),
    (nn.BatchNorm1d, (1, 4)),
]


def moved(x: Tensor) -> Tensor:
    """Positions by channels."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_statistics_are_moving_averages_of_the_mean_and_of_the_mean_square(kind: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = memfit.convert_(kind(4).double(), memfit.StreamingLowRank(period=10))
    mean, square = torch.zeros(4).double(), torch.ones(4).double()  # of a fresh layer: mean 0, variance 1
    for _ in range(5):
        x = torch.randn(shape).double() * 2 + 3
        y = layer(x)
        mean = 0.9 * mean + 0.1 * moved(x).mean(0)
        square = 0.9 * square + 0.1 * moved(x).square().mean(0)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, square - mean**2)
        expected = (moved(x) - mean) / (square - mean**2 + layer.eps).sqrt()
        torch.testing.assert_close(moved(y), expected)
    assert int(layer.num_batches_tracked) == 5


def test_statistics_are_constants_to_backward_and_later_samples_do_not_disturb_it() -> None:
    layer = memfit.convert_(nn.BatchNorm2d(3), memfit.StreamingLowRank(period=4))
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    y = layer(x)
    scale = (layer.weight / (layer.running_var + layer.eps).sqrt()).detach().clone()
    layer(torch.randn(1, 3, 4, 4))
    d = torch.randn_like(y)
    y.backward(d)
    torch.testing.assert_close(x.grad, d * scale.view(1, 3, 1, 1))
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


def test_eval_mode_and_the_restored_layer_compute_what_was_learned() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4)
    )
    original = copy.deepcopy(model)
    memfit.convert_(model, memfit.StreamingLowRank(rank=2, period=2))
    assert [type(model[1]), type(model[5])] == [StreamingBatchNorm2d, StreamingBatchNorm1d]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        model(torch.rand(1, 1, 5, 5)).square().sum().backward()
        optimizer.step()
    x = torch.rand(2, 1, 5, 5)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = memfit.state_dict(model)
    assert list(plain) == list(original.state_dict())
    original.load_state_dict(plain)
    memfit.restore_(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert set(vars(model[1])) == set(vars(original[1]))
    for other in (model, original.eval()):
        torch.testing.assert_close(other(x), expected)


def test_layers_without_affine_weights_stream_too_and_frozen_ones_are_left_alone() -> None:
    model = nn.ModuleDict({"bare": nn.BatchNorm2d(3, affine=False), "frozen": nn.BatchNorm2d(3).requires_grad_(False)})
    memfit.convert_(model, memfit.StreamingLowRank(), where=lambda name, module: name == "bare")
    assert type(model["bare"]) is StreamingBatchNorm2d
    model["bare"](torch.randn(1, 3, 2, 2))
    with pytest.raises(memfit.ConversionError, match="'frozen' is frozen"):
        memfit.convert_(model, memfit.StreamingLowRank(), where="frozen")
    with pytest.raises(ValueError, match="expected 4D input"):
        model["bare"](torch.randn(3, 2))


def test_an_exact_resume_holds() -> None:
    layers = [memfit.convert_(nn.BatchNorm1d(3), memfit.StreamingLowRank(period=5)) for _ in range(2)]
    layers[0](torch.randn(2, 3))
    layers[1].load_state_dict(copy.deepcopy(layers[0].state_dict()))
    x = torch.randn(2, 3)
    assert torch.equal(layers[0](x), layers[1](x))
    assert torch.equal(layers[0].running_var, layers[1].running_var)
