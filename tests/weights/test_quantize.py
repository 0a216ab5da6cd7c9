import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfit.weights.quantize import fake_quantize, quantize, quantize_gradient, step_of

RANGES = [(8, -1.0, 1.0), (16, -8.0, 8.0), (8, 0.0, 2.0), (1, -1.0, 1.0), (3, -0.5, 0.5)]


@given(st.sampled_from(RANGES), st.floats(-20, 20))
def test_the_nearest_level_is_taken_as_a_search_over_all_levels_finds_it(setting, value):
    bits, low, high = setting
    step = (high - low) / 2**bits
    levels = [low + number * step for number in range(2**bits)]
    found = quantize(torch.tensor([value], dtype=torch.float64), bits, low, high).item()
    assert found in levels
    assert abs(found - value) == pytest.approx(min(abs(level - value) for level in levels), abs=1e-12)


@pytest.mark.parametrize("setting", RANGES)
def test_levels_stay_as_they_are_and_zero_is_one(setting):
    bits, low, high = setting
    levels = torch.arange(2**bits) * step_of(bits, low, high) + low
    assert torch.equal(quantize(levels, *setting), levels)
    assert 0 in levels


def test_infinities_are_the_ends_and_nan_stays_nan():
    found = quantize(torch.tensor([math.inf, -math.inf, math.nan]), 8, -1, 1)
    assert found[:2].tolist() == [127 / 128, -1.0]
    assert found[2].isnan()


@pytest.mark.parametrize("setting", [(0, -1, 1), (17, -1, 1), (8, -1.5, 1.5), (8, 1, 3), (2, -1, -1), (2, -0.6, 0.4)])
def test_bits_and_ranges_without_a_power_of_two_are_refused(setting):
    with pytest.raises(ValueError, match=r"bits|range"):
        quantize(torch.zeros(1), *setting)


def test_the_gradient_passes_straight_inside_of_the_range_and_not_outside():
    x = torch.tensor([-3.0, -0.4, 0.3, 5.0], requires_grad=True)
    fake_quantize(x, 4, -1, 1).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 0]


def test_a_gradient_is_quantized_on_its_way_back_and_the_value_is_not():
    x = torch.tensor([0.123, 7.0], requires_grad=True)
    y = quantize_gradient(x, 8, -1, 1)
    assert torch.equal(y, x)
    y.backward(torch.tensor([0.5001, -3.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, -1]
