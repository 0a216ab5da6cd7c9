"""Gradient descent on quantized numbers in ordinary memory, as biases are held: b <- Q(b - lr g)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memfit.gradients.max_norm import max_norm
from memfit.weights.quantize import step_of

BIASES = (16, -8.0, 8.0)


class QuantizedSGD(Optimizer):
    """Stochastic gradient descent without momentum, after whose every step the parameters are quantized.

    What is below half a level's distance is lost.

    Args:
        params: float parameters, or groups of them.
        lr: learning rate.
        normalize: divide each gradient by its largest element, or the moving average of those where that is larger; see
            :func:`memfit.gradients.max_norm.max_norm`.
        bits, low, high: the levels; see :mod:`memfit.weights.quantize`. Parameters outside of the range are moved to
            its ends at the first step.

    Raises:
        ValueError: bits and range have a step that is no power of two.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        bits: int = 16,
        low: float = -8.0,
        high: float = 8.0,
        *,
        normalize: bool = False,
    ) -> None:
        self._normalize = normalize
        self._step = step_of(bits, low, high)
        self._lowest, self._highest = low / self._step, high / self._step - 1
        super().__init__(params, {"lr": lr})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move and quantize every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moved:
                continue
            gradients = [parameter.grad for parameter in moved]
            if self._normalize:
                gradients = list(torch._foreach_div(gradients, self._divisors(moved, gradients)))
            torch._foreach_add_(moved, gradients, alpha=-group["lr"])
            torch._foreach_mul_(moved, 1 / self._step)
            torch._foreach_round_(moved)
            torch._foreach_clamp_min_(moved, self._lowest)
            torch._foreach_clamp_max_(moved, self._highest)
            torch._foreach_mul_(moved, self._step)
        return loss

    def _divisors(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> list[float]:
        """What each gradient is divided by."""
        found = []
        largest = torch.stack(torch._foreach_norm(gradients, math.inf)).tolist()
        for parameter, size in zip(parameters, largest, strict=True):
            state = self.state[parameter]
            state["number"] = state.get("number", 0) + 1
            divisor, state["average"] = max_norm(size, state.get("average", 0.0), state["number"])
            found.append(divisor)
        return found
