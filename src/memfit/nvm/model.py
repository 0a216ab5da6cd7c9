"""The method's network: four 3 x 3 convolutions and two dense layers, quantized in the loop.

A layer is ReLU(alpha W a + b), with W in [-1, 1) and alpha the power of two nearest to what He initialization asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from memfit.weights.quantized_activation import QuantizedLogits, QuantizedReLU

_CHANNELS = (8, 8, 16, 16)
_STRIDES = (1, 2, 1, 2)
_HIDDEN = 64
LIMIT = 1.0  # weights are in [-LIMIT, LIMIT)
_SPREAD = 0.5  # standard deviation of the weights at first: they fill the cells' range, and have room


class CharacterNet(nn.Sequential):
    """Images (batch, 1, size, size), 0 to 1, to logits (batch, classes).

    Its layers are plain ``nn.Conv2d`` and ``nn.Linear``; alpha is in the :class:`QuantizedReLU` before each of them.
    Before training, W is Gaussian, and b zero; torch's global random numbers are drawn from.

    Args:
        size: height and width of the images, 8 or more.
        classes: 2 or more.
    """

    def __init__(self, size: int, classes: int) -> None:
        modules: list[nn.Module] = []
        channels = 1
        for width, stride in zip(_CHANNELS, _STRIDES, strict=True):
            modules += _scaled(nn.Conv2d(channels, width, 3, stride=stride, padding=1))
            channels, size = width, -(-size // stride)
        modules.append(nn.Flatten())
        modules += _scaled(nn.Linear(channels * size * size, _HIDDEN))
        modules += _scaled(nn.Linear(_HIDDEN, classes))
        super().__init__(*modules, QuantizedLogits())


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """Layers of a model whose weights go into cells, by name: every ``nn.Conv2d`` and ``nn.Linear``, exactly these."""
    for name, module in model.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            yield name, module


@torch.no_grad()
def _scaled(layer: nn.Conv2d | nn.Linear) -> list[nn.Module]:
    """The layer after its scale."""
    fan_in = layer.weight[0].numel()
    deviation = math.sqrt(2 / fan_in)
    alpha = 2.0 ** round(math.log2(deviation / _SPREAD))
    layer.weight.normal_(0, deviation / alpha).clamp_(-1, 1)
    assert layer.bias is not None
    layer.bias.zero_()
    return [QuantizedReLU(alpha), layer]
