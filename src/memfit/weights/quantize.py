"""Uniform quantization with a step that is a power of two, as adders and shifters do it.

``bits`` bits over [low, high) give 2^bits levels: low, low + step, ..., high - step, with step = (high - low) / 2^bits.
Zero is a level, and ``high`` itself is not, as in two's complement: 8 bits over [-1, 1) are -1, ..., 127/128.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def step_of(bits: int, low: float, high: float) -> float:
    """The distance between two levels.

    Raises:
        ValueError: it is not a power of two, or zero is not a level of the range.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits={bits} is not possible: give a whole number from 1 to 16.")
    if not low <= 0 < high:
        raise ValueError(f"the range [{low}, {high}) does not hold 0: give low <= 0 < high.")
    step = (high - low) / 2**bits
    if math.frexp(step)[0] != 0.5 or (low / step) % 1:
        raise ValueError(
            f"{bits} bits over [{low}, {high}) have the step {step}: give a range of which it is a power of two, and "
            "low a multiple of it."
        )
    return step


def quantize(x: Tensor, bits: int, low: float, high: float, before: float = 1.0, after: float = 1.0) -> Tensor:
    """The nearest levels, those outside of the range at its ends; of two that are as near, the even one.

    Args:
        x: any shape, floating point. NaN stays NaN.
        bits: of a level, 1 to 16.
        low: the lowest level, 0 or below.
        high: one step above the highest level.
        before: a power of two that ``x`` is multiplied by before.
        after: a power of two that the levels are multiplied by.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: bits or range cannot be had; see :func:`step_of`.
    """
    step = step_of(bits, low, high)
    return x.mul(before / step).round_().clamp_(low / step, high / step - 1).mul_(step * after)


def fake_quantize(x: Tensor, bits: int, low: float, high: float) -> Tensor:
    """:func:`quantize`, through which the gradient passes straight where ``x`` is within the range, and not elsewhere.

    The straight-through estimator of Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through
    Stochastic Neurons for Conditional Computation", arXiv 1308.3432, 2013.
    """
    return _StraightThrough.apply(x, bits, low, high)


def quantize_gradient(x: Tensor, bits: int, low: float, high: float) -> Tensor:
    """``x`` itself, whose gradient is quantized on its way back."""
    return _QuantizedBackward.apply(x, bits, low, high)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, low: float, high: float) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((x >= low) & (x <= high))
        return quantize(x, bits, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


class _QuantizedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, low: float, high: float) -> Tensor:
        ctx.range = (bits, low, high)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return quantize(gradients[0], *ctx.range), None, None, None
