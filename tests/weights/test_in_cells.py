import copy

import pytest
import torch
from torch import nn

from memfit.weights.in_cells import CellSGD, put_in_cells_, range_of
from memfit.weights.quantize import quantize


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 4))


def layers(model: nn.Sequential) -> list[nn.Module]:
    return [model[0], model[2]]


def test_steps_are_those_of_quantized_gradient_descent_written_by_hand():
    model = net()
    arrays = put_in_cells_(layers(model), limit=1.0)
    weights = [quantize(layer.weight.detach(), 8, -1, 1) for layer in layers(net())]
    optimizer = CellSGD(layers(model), lr=0.3)
    counts = [torch.zeros_like(weight) for weight in weights]
    for _ in range(5):
        x = torch.rand(1, 1, 4, 4)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        for number, layer in enumerate(layers(model)):
            after = quantize(weights[number] - 0.3 * layer.weight.grad, 8, -1, 1)
            counts[number] += after != weights[number]
            weights[number] = after
        optimizer.step()
        for layer, array, weight, count in zip(layers(model), arrays, weights, counts, strict=True):
            assert torch.equal(layer.weight, weight)
            assert torch.equal(array.writes.float(), count)


def test_the_layer_reads_its_cells_whatever_happens_to_them():
    model = net()
    arrays = put_in_cells_(layers(model))
    arrays[1].drift_analog_(0.5, torch.Generator().manual_seed(0))
    assert torch.equal(model[2].weight, arrays[1].values)
    state = copy.deepcopy(model.state_dict())
    other = net()
    put_in_cells_(layers(other))
    other.load_state_dict(state)
    assert torch.equal(other[2].weight, arrays[1].values)
    assert other[2].weight.data_ptr() == other[2].weight_cells.values.data_ptr()
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(other(x), model(x))


def test_the_range_is_the_smallest_power_of_two_that_holds_the_weights():
    assert [range_of(torch.tensor([each, 0.1])) for each in (0.9, 1.0, 1.01, -5.0, 0.2)] == [1, 1, 2, 8, 0.25]
    assert range_of(torch.zeros(3)) == 1


def test_weights_that_are_not_in_cells_are_refused():
    with pytest.raises(ValueError, match="not in cells"):
        CellSGD([nn.Linear(2, 2)], lr=0.1)
    model = net()
    put_in_cells_(layers(model))
    with pytest.raises(ValueError, match="in cells only"):
        CellSGD(layers(model), lr=0.1).add_param_group({"params": [model[0].bias]})
