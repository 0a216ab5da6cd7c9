"""The optimizers and the learning rate's course that the tasks train with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerName = Literal["sgd", "momentum", "adam", "adamw"]

_WARMUP_SHARE = 0.1


def make_optimizer(name: OptimizerName, parameters: Sequence[nn.Parameter], lr: float) -> Optimizer:
    """An optimizer by its name over the parameters that train; ``momentum`` is SGD with 0.9.

    Fused in each: the fastest that torch has, and without temporaries as large as the weights.
    """
    if name in ("sgd", "momentum"):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9 if name == "momentum" else 0.0, fused=True)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=lr, fused=True)


def make_schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """The learning rate's course over a run: :func:`warmup_then_cosine`."""
    return LambdaLR(optimizer, partial(warmup_then_cosine, steps=steps))


def warmup_then_cosine(done: int, *, steps: int) -> float:
    """The share of the learning rate for the step after ``done`` steps: a short rise, then a cosine to nearly 0."""
    warmup = max(1, round(_WARMUP_SHARE * steps))
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))
