"""One convolution by itself: its exact backward and its filtered ones, side by side on the same tensors."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import cast

import torch
from torch import Tensor, nn

from memfit.activations.gradient_filter import GradientFilter
from memfit.convert import convert_
from memfit.vision.scan_step import Call

_BLOCK = 5
_BLOCK_SECONDS = 0.03


@dataclass(frozen=True)
class Agreement:
    """How an approximation of a gradient lies to the exact one.

    Attributes:
        cosine: of the angle between the two; 1 where they have the same direction.
        norm: the approximation's length, in lengths of the exact one.
    """

    cosine: float
    norm: float


@dataclass(frozen=True)
class Backward:
    """A layer's backward, exact or filtered.

    Attributes:
        seconds: the median; with a filter, what it adds to forward is counted here.
        weight: agreement of the weight's gradient with the exact one; None where that is zero.
        input: the same of the input's gradient; None also where it is not asked for.
    """

    seconds: float
    weight: Agreement | None
    input: Agreement | None


def agreement(exact: Sequence[Tensor], other: Sequence[Tensor]) -> Agreement | None:
    """Compare two gradients, each given in parts of any shape; None where the exact one is zero."""
    norm, other_norm = math.sqrt(_product(exact, exact)), math.sqrt(_product(other, other))
    if norm == 0:
        return None
    if other_norm == 0:
        return Agreement(0.0, 0.0)
    cosine = _product(exact, other) / (norm * other_norm)
    return Agreement(max(-1.0, min(1.0, cosine)), other_norm / norm)


def backwards(
    layer: nn.Module, calls: Sequence[Call], filters: Sequence[GradientFilter], rounds: int
) -> dict[int, Backward]:
    """Time and compare the backwards of a convolution that is plain, by the size of patches; 0 is the exact one.

    All are timed in turn, ``rounds`` times a few calls each. The layer itself is not called and gets no gradients: a
    twin on the same memory does.

    Args:
        layer: an ``nn.Conv1d`` or ``nn.Conv2d``.
        calls: of it, with gradients; what a step spends on all of them is one measurement.
        filters: with patches of different sizes.
        rounds: how many times to go round.
    """
    exact = _twin(layer)
    ways = {0: _Way(exact, calls)}
    for technique in filters:
        ways[technique.patch] = _Way(convert_(copy.copy(exact), technique, where=""), calls)
    # What is compared is the first result of each; it is let go before the clock runs.
    gradients = ways[0].gradients()
    agreements = {patch: _compare(gradients, way.gradients()) for patch, way in ways.items()}
    del gradients
    seconds: dict[int, list[float]] = {patch: [] for patch in ways}
    more: dict[int, list[float]] = {technique.patch: [] for technique in filters}
    for _ in range(rounds):
        for patch, way in ways.items():
            seconds[patch] += _block(way.backward, calls[0].x.device)
            if patch:
                more[patch] += _block(way.more_of_forward, calls[0].x.device)
    return {
        patch: Backward(
            statistics.median(seconds[patch]) + (statistics.median(more[patch]) if patch else 0.0), *agreements[patch]
        )
        for patch in ways
    }


class _Way:
    """A layer whose calls have been made, ready to go backward again and again."""

    def __init__(self, layer: nn.Module, calls: Sequence[Call]) -> None:
        self._layer, self._calls = layer, calls
        self._inputs = [call.x.detach().requires_grad_(call.needs_gradient) for call in calls]
        with torch.enable_grad():
            self._outputs = [self._call(layer, x, call) for x, call in zip(self._inputs, calls, strict=True)]
        self._bare = [_without_convolution(layer, output) for output in self._outputs]
        self._leaves = [each for each in (*self._inputs, *layer.parameters()) if each.requires_grad]

    def backward(self) -> None:
        """Of all calls; the gradients of before are gone."""
        for leaf in self._leaves:
            leaf.grad = None
        for output, call in zip(self._outputs, self._calls, strict=True):
            torch.autograd.backward(output, call.gradient, retain_graph=True)

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of the weight, and of the inputs that need one."""
        self.backward()
        weight = cast(Tensor, self._layer.weight)
        found = [
            [cast(Tensor, each.grad) for each in leaves if each.requires_grad] for leaves in ([weight], self._inputs)
        ]
        for leaf in self._leaves:
            leaf.grad = None
        return found[0], found[1]

    def more_of_forward(self) -> None:
        """What a filtered layer's forward does beside the convolution."""
        with torch.enable_grad():
            for bare, x, call in zip(self._bare, self._inputs, self._calls, strict=True):
                self._call(bare, x, call)

    @staticmethod
    def _call(layer: nn.Module, x: Tensor, call: Call) -> Tensor:
        # forward, and not the layer: a user's hooks have nothing to do with this.
        with _autocast(call):
            return cast(Tensor, layer.forward(x))


def _twin(layer: nn.Module) -> nn.Module:
    """The same layer on the same memory, whose parameters have gradients and hooks of their own."""
    twin = copy.copy(layer)
    parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach(), parameter.requires_grad)
        for name, parameter in layer._parameters.items()
    }
    twin.__dict__["_parameters"] = parameters
    return twin


def _without_convolution(layer: nn.Module, output: Tensor) -> nn.Module:
    """The layer, with memory that nobody writes to in place of the result of its convolution."""
    bare = copy.copy(layer)
    batched = output if output.dim() == 2 + len(cast(nn.Conv2d, bare).kernel_size) else output.unsqueeze(0)
    like = batched.detach()
    bare._conv_forward = lambda *_: torch.empty_like(like)  # type: ignore[assignment]
    return bare


def _autocast(call: Call) -> AbstractContextManager[object]:
    return nullcontext() if call.autocast is None else torch.autocast(call.x.device.type, call.autocast)


def _compare(
    exact: tuple[list[Tensor], list[Tensor]], other: tuple[list[Tensor], list[Tensor]]
) -> tuple[Agreement | None, Agreement | None]:
    return agreement(exact[0], other[0]), agreement(exact[1], other[1])


def _product(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The inner product, summed in double precision."""
    pairs = zip(first, second, strict=True)
    exact_enough = torch.promote_types(first[0].dtype, torch.float32) if first else torch.float32
    return float(sum((a.to(exact_enough) * b.to(exact_enough)).sum(dtype=torch.float64) for a, b in pairs))


def _block(call: Callable[[], None], device: torch.device) -> list[float]:
    """Seconds of a few calls in a row, without the first, which finds caches and free memory as another left them."""
    seconds: list[float] = []
    for _ in range(_BLOCK + 1):
        started = now(device)
        call()
        seconds.append(now(device) - started)
        if len(seconds) > 1 and sum(seconds[1:]) > _BLOCK_SECONDS:
            break
    return seconds[1:]


def now(device: torch.device) -> float:
    """Seconds on a clock, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
