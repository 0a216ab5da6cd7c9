"""The rectifier between two quantized layers: activations are quantized on their way on, gradients on their way back.

    a = scale * Q_a(max(z, 0))        dz = Q_g(scale * da)  where z is inside of the range of Q_a, else 0

``scale`` is a power of two, as a shifter does it: that of the layer which reads ``a``, so that the layer's weights fill
the range of their cells whatever its width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from memfit.weights.quantize import quantize, quantize_gradient

ACTIVATIONS = (8, 0.0, 2.0)
GRADIENTS = (8, -1.0, 1.0)


class QuantizedReLU(nn.Module):
    """A rectifier with 8-bit activations in [0, 2) and 8-bit gradients in [-1, 1), straight-through.

    Args:
        scale: a power of two by which the quantized activations are multiplied.

    Attributes:
        gradients: whether gradients are quantized; a computer that trains offline need not.

    Raises:
        ValueError: ``scale`` is no power of two.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if not 0 < scale < math.inf or math.frexp(scale)[0] != 0.5:
            raise ValueError(f"scale={scale} is not a power of two.")
        self.scale = scale
        self.gradients = True

    def forward(self, z: Tensor) -> Tensor:
        return _Rectified.apply(z, self.scale, self.gradients)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class QuantizedLogits(nn.Module):
    """The identity, whose gradient is quantized to 8 bits in [-1, 1) on its way back.

    Attributes:
        gradients: as of :class:`QuantizedReLU`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradients = True

    def forward(self, z: Tensor) -> Tensor:
        return quantize_gradient(z, *GRADIENTS) if self.gradients else z


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: float, gradients: bool) -> Tensor:
        ctx.scale, ctx.gradients = scale, gradients
        ctx.save_for_backward(z)
        return quantize(z, *ACTIVATIONS, after=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (z,), (g,) = ctx.saved_tensors, gradients
        scaled = quantize(g, *GRADIENTS, before=ctx.scale) if ctx.gradients else g * ctx.scale
        # In one operator: zero where z is 0 or less, or the end of the range or more.
        return torch.ops.aten.hardtanh_backward(scaled, z, *ACTIVATIONS[1:]), None, None
