import pytest
import torch
from torch import nn

from memfit.gradients.max_norm import max_norm
from memfit.weights.quantize import quantize
from memfit.weights.quantized_sgd import QuantizedSGD


def test_steps_are_those_of_quantizing_after_plain_gradient_descent():
    torch.manual_seed(0)
    ours = [nn.Parameter(quantize(torch.randn(shape), 16, -8, 8)) for shape in (3, 5)]
    plain = [nn.Parameter(each.detach().clone()) for each in ours]
    optimizer, reference = QuantizedSGD(ours, lr=0.1), torch.optim.SGD(plain, lr=0.1)
    for _ in range(10):
        for mine, theirs in zip(ours, plain, strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
        for mine, theirs in zip(ours, plain, strict=True):
            theirs.data.copy_(quantize(theirs.data, 16, -8, 8))
            assert torch.equal(mine, theirs)


def test_what_is_below_half_a_level_is_lost_and_the_ends_hold():
    small, large = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), 7.9))
    optimizer = QuantizedSGD([small, large], lr=1.0)
    for _ in range(100):
        small.grad, large.grad = torch.full((1,), 2**-14.0), torch.full((1,), -1.0)
        optimizer.step()
    assert small.item() == 0
    assert large.item() == 8 - 2**-12


def test_levels_that_no_shifter_makes_are_refused():
    with pytest.raises(ValueError, match="power of two"):
        QuantizedSGD([nn.Parameter(torch.zeros(1))], lr=0.1, bits=8, low=-3, high=3)


def test_gradients_are_divided_by_their_largest_element_or_its_average():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(shape)) for shape in (3, 5)]
    optimizer = QuantizedSGD(weights, lr=0.125, normalize=True)
    expected, averages = [torch.zeros(3), torch.zeros(5)], [0.0, 0.0]
    for number in range(1, 20):
        for index, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight) * 10.0 ** (number % 3)
            divisor, averages[index] = max_norm(float(weight.grad.abs().max()), averages[index], number)
            expected[index] = quantize(expected[index] - 0.125 * weight.grad / divisor, 16, -8, 8)
        optimizer.step()
    state = optimizer.state_dict()
    for weight, wanted in zip(weights, expected, strict=True):
        assert torch.allclose(weight, wanted, atol=2**-12)
    assert [state["state"][index]["average"] for index in range(2)] == averages
