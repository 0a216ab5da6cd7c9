"""Train mode and eval mode of a model's parts, brought back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to the modes, each part of the model has its own again afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The whole model is in eval mode and no gradients are recorded; afterwards each part has its own mode again."""
    with same_modes(model), torch.no_grad():
        model.eval()
        yield
