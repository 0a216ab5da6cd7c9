"""What happens before the device is sold: the network learns offline, with the quantization that it will run with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import LambdaLR

from memfit.fit import FitResult, StepRecord, fit
from memfit.nvm.augment import elastic
from memfit.nvm.data import Images
from memfit.nvm.model import LIMIT, CharacterNet, weight_layers
from memfit.run.identity import digest
from memfit.weights.quantize import fake_quantize, quantize
from memfit.weights.quantized_activation import QuantizedLogits, QuantizedReLU
from memfit.weights.quantized_sgd import BIASES

STEPS = 2000
_BITS = 8
_BATCH = 64
_LR = 3e-3
_EVERY = 250


class _Quantized(nn.Module):
    """Parametrization: the weight as its cells will hold it."""

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, _BITS, -LIMIT, LIMIT)


class _Batches:
    """Shuffled batches, each image bent anew; all randomness is torch's global generator's."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self._images.train)).split(_BATCH):
            clean = self._images.train[chosen] / 255
            yield elastic(clean, torch.default_generator), self._images.train_labels[chosen]


def pretrain(
    images: Images,
    *,
    seed: int,
    steps: int = STEPS,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
) -> tuple[CharacterNet, FitResult]:
    """Train a network on the images to pretrain on, bent elastically.

    Weights (8 bits in [-1, 1)) and activations are quantized in the loop, gradients are not: a computer does this.
    Torch's global random numbers are seeded.

    Args:
        images: what to learn.
        seed: of the first weights and the order of the images.
        steps: of 64 images each.
        checkpoint, resume, progress, on_step: as in :func:`memfit.fit`, which this is.

    Returns:
        the network, all of whose parameters are quantized, and how the training went. When a signal has ended it
        (``result.signal``), the network is unfinished.
    """
    torch.manual_seed(seed)
    model = CharacterNet(images.size, images.classes)
    _quantize_gradients(model, False)
    layers = [layer for _, layer in weight_layers(model)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Quantized())
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR, fused=True)
    result = fit(
        model,
        _loss,
        _Batches(images),
        optimizer,
        steps=steps,
        scheduler=LambdaLR(optimizer, partial(_cosine, steps=steps)),
        checkpoint=checkpoint,
        every=_EVERY,
        resume=resume,
        settings={"seed": seed, "steps": steps, "data_sha256": digest([images.train, images.train_labels])},
        progress=progress,
        on_step=on_step,
        measure=False,
    )
    _quantize_gradients(model, True)
    with torch.no_grad():
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight")
            if layer.bias is not None:
                layer.bias.copy_(quantize(layer.bias, *BIASES))
    return model, result


def _quantize_gradients(model: nn.Module, wanted: bool) -> None:
    for module in model.modules():
        if isinstance(module, QuantizedReLU | QuantizedLogits):
            module.gradients = wanted


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _cosine(done: int, *, steps: int) -> float:
    """The share of the learning rate for the step after ``done`` steps."""
    return 0.5 * (1 + math.cos(math.pi * done / steps))
