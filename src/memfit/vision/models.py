"""A small zoo of convolutional nets: ResNet-18 and -34, and MobileNetV2.

Keys and shapes of their state dicts are torchvision's, so that its weight files load (see ``weights``); torchvision
itself is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

_STEM = 64
_STAGES = (64, 128, 256, 512)

# Of MobileNetV2's stages: expansion, channels, blocks, stride of the first block (table 2 of the paper).
_INVERTED_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, and around them the input, projected where its shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, inputs, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        around = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + around)


class ResNet(nn.Module):
    """A residual net of basic blocks; ``layer1`` to ``layer4`` are its stages, ``fc`` its head.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

    Args:
        blocks: of each of the four stages.
        classes: outputs.
        width: multiplies all channels, which are rounded to multiples of 8.
        channels: of the images.
    """

    def __init__(self, blocks: tuple[int, int, int, int], classes: int, width: float, channels: int) -> None:
        super().__init__()
        _check(classes, width, channels)
        inputs = _rounded(_STEM * width)
        self.conv1 = nn.Conv2d(channels, inputs, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for number, (depth, size) in enumerate(zip(blocks, _STAGES, strict=True), start=1):
            outputs = _rounded(size * width)
            first = BasicBlock(inputs, outputs, stride=1 if number == 1 else 2)
            rest = [BasicBlock(outputs, outputs, stride=1) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(batch, channels, height, width)`` to scores ``(batch, classes)``, before any softmax."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """Pointwise to more channels, depthwise, and pointwise to few again; the input is added where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen = [_convolution(inputs, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *widen,
            _convolution(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, inputs, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """Inverted residuals; ``features`` are its 19 layers, ``classifier`` a dropout and the head.

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.

    Args:
        classes: outputs.
        width: multiplies all channels, which are rounded to multiples of 8; below 1 the last layer keeps its 1,280.
        channels: of the images.
    """

    def __init__(self, classes: int, width: float, channels: int) -> None:
        super().__init__()
        _check(classes, width, channels)
        inputs = _rounded(32 * width)
        layers: list[nn.Module] = [_convolution(channels, inputs, 3, stride=2)]
        for expansion, size, depth, stride in _INVERTED_STAGES:
            outputs = _rounded(size * width)
            for number in range(depth):
                layers.append(InvertedResidual(inputs, outputs, 1 if number else stride, expansion))
                inputs = outputs
        last = _rounded(1280 * max(1.0, width))
        self.features = nn.Sequential(*layers, _convolution(inputs, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))
        _initialize(self)
        head = self.classifier[1]
        assert isinstance(head, nn.Linear)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(batch, channels, height, width)`` to scores ``(batch, classes)``, before any softmax."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def resnet18(classes: int, *, width: float = 1.0, channels: int = 3) -> ResNet:
    """ResNet-18: 11.7 million parameters at 1,000 classes.

    Args:
        classes: outputs.
        width: multiplies all channels, which are rounded to multiples of 8.
        channels: of the images.

    Raises:
        ValueError: an argument is below its range.
    """
    return ResNet((2, 2, 2, 2), classes, width, channels)


def resnet34(classes: int, *, width: float = 1.0, channels: int = 3) -> ResNet:
    """ResNet-34: 21.8 million parameters at 1,000 classes; arguments and errors as of :func:`resnet18`."""
    return ResNet((3, 4, 6, 3), classes, width, channels)


def mobilenet_v2(classes: int, *, width: float = 1.0, channels: int = 3) -> MobileNetV2:
    """MobileNetV2: 3.5 million parameters at 1,000 classes; arguments and errors as of :func:`resnet18`."""
    return MobileNetV2(classes, width, channels)


class Builder(Protocol):
    """Makes a net of the zoo."""

    def __call__(self, classes: int, *, width: float = 1.0, channels: int = 3) -> nn.Module: ...


@dataclass(frozen=True)
class Entry:
    """A net of the zoo.

    Attributes:
        build: makes it.
        last_stage: the modules that are fine-tuned when nothing else is said: the stage with the smallest maps, and
            the head.
    """

    build: Builder
    last_stage: tuple[str, ...]


ZOO: Mapping[str, Entry] = {
    "resnet18": Entry(resnet18, ("layer4", "fc")),
    "resnet34": Entry(resnet34, ("layer4", "fc")),
    "mobilenet_v2": Entry(mobilenet_v2, (*(f"features.{number}" for number in range(14, 19)), "classifier")),
}
"""The nets by name."""


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the map's size, but for the stride; batch norm; clipped ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and never less than nine tenths (as in MobileNet's own code)."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _initialize(net: nn.Module) -> None:
    """Convolutions after He et al., "Delving Deep into Rectifiers", ICCV 2015."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _check(classes: int, width: float, channels: int) -> None:
    for name, value in (("classes", classes), ("channels", channels)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    if not 0 < width <= 16:
        raise ValueError(f"width must be above 0 and at most 16, not {width}")
