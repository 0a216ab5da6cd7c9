"""What gradient descent writes when it has no buffer for a convolution's gradient: every pixel's term, one by one.

A convolution's weight gradient is a sum over the pixels of its output. Without memory as large as the weight, to add
them up in, each pixel's term goes to the cells by itself: to those whose input and output gradient are both not zero.

Source: Gural et al., arXiv 2009.03887, who count the writes of SGD in this way.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from memfit.convolution_input import padded_input


class PixelWrites(nn.Module):
    """Counts, for each cell of a convolution's weight, the pixels whose term is not zero.

    Args:
        layer: is watched from now on. It has this as its submodule ``pixel_writes``, so that ``state_dict`` resumes it.

    Attributes:
        writes: int32, of the weight's shape.
    """

    writes: Tensor

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("writes", torch.zeros_like(layer.weight, dtype=torch.int32))
        layer.add_module("pixel_writes", self)
        layer.register_forward_hook(self._watch)

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._count, layer, inputs[0].detach()))

    @torch.no_grad()
    def _count(self, layer: Any, x: Tensor, gradient: Tensor) -> None:
        x, padding = padded_input(layer, x)
        read, wrong = (each.ne(0).to(layer.weight.dtype) for each in (x, gradient))
        # The gradient of ones and zeros is the number of pixels at which both are one.
        counts = conv2d_weight(read, layer.weight.shape, wrong, layer.stride, padding, layer.dilation, layer.groups)
        self.writes.add_(counts.to(torch.int32))
