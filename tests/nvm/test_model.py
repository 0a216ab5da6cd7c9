import math

import pytest
import torch
from torch import nn

from memfit.nvm.model import CharacterNet, weight_layers
from memfit.nvm.pretrain import pretrain
from memfit.weights.quantize import quantize
from memfit.weights.quantized_activation import QuantizedLogits, QuantizedReLU


@pytest.mark.parametrize(("size", "classes"), [(8, 2), (28, 10), (13, 5)])
def test_any_size_of_image_leads_to_logits(size, classes):
    model = CharacterNet(size, classes)
    assert model(torch.rand(3, 1, size, size)).shape == (3, classes)
    assert [type(layer) for _, layer in weight_layers(model)] == [nn.Conv2d] * 4 + [nn.Linear] * 2


def test_each_scale_is_the_power_of_two_that_brings_he_initialization_nearest():
    torch.manual_seed(0)
    model = CharacterNet(28, 10)
    scales = [module.scale for module in model if isinstance(module, QuantizedReLU)]
    for scale, (_, layer) in zip(scales, weight_layers(model), strict=True):
        he = math.sqrt(2 / layer.weight[0].numel())
        assert math.log2(scale) == round(math.log2(scale))
        assert abs(math.log2(he / scale) - math.log2(0.5)) <= 0.5 + 1e-9
        if layer.weight.numel() > 500:  # clamped at two of its standard deviations or more
            assert float(layer.weight.detach().std()) == pytest.approx(he / scale, rel=0.15)
        assert float(layer.weight.detach().abs().max()) <= 1


def test_a_quantized_rectifier_is_what_its_equations_say():
    z = torch.tensor([-1.0, 0.003, 0.004, 0.5, 1.999, 7.0], requires_grad=True)
    a = QuantizedReLU(0.25)(z)
    assert (4 * a).tolist() == [0, 0, 1 / 128, 0.5, 255 / 128, 255 / 128]
    a.backward(torch.tensor([1.0, 1.0, 0.3, 0.01, -9.0, 1.0]))
    # A quarter of each, in steps of 1/128 from -1 on, and nothing outside of the range.
    assert z.grad is not None
    assert z.grad.tolist() == [0, 32 / 128, 10 / 128, 0, -1, 0]


def test_gradients_of_logits_are_quantized_and_offline_nothing_is():
    z = torch.tensor([0.1, 0.2], requires_grad=True)
    last = QuantizedLogits()
    last(z).backward(torch.tensor([0.1, 0.5]))
    assert z.grad.tolist() == [13 / 128, 0.5]
    for module in (last, QuantizedReLU()):
        module.gradients = False
        z.grad = None
        module(z).backward(torch.tensor([0.1, 5.0]))
        assert z.grad.tolist() == pytest.approx([0.1, 5.0])


def test_a_scale_that_no_shifter_makes_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        QuantizedReLU(0.3)


def test_pretraining_learns_and_leaves_a_plain_quantized_network(images):
    model, result = pretrain(images, seed=0, steps=150)
    losses = [record.loss for record in result.records]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert set(model.state_dict()) == set(CharacterNet(8, 3).state_dict())
    for _, layer in weight_layers(model):
        assert torch.equal(layer.weight, quantize(layer.weight.detach(), 8, -1, 1))
        assert torch.equal(layer.bias, quantize(layer.bias.detach(), 16, -8, 8))
    assert all(module.gradients for module in model.modules() if isinstance(module, QuantizedReLU | QuantizedLogits))
    with torch.no_grad():
        right = model(images.online / 255).argmax(1) == images.online_labels
    assert float(right.double().mean()) > 0.8
    again, _ = pretrain(images, seed=0, steps=150)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
