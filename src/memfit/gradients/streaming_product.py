"""Layers' operators whose weight gradient is not made: its terms are added to a running sum in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from memfit.gradients.convolution import Geometry
from memfit.gradients.kronecker_sum import KroneckerSum
from memfit.weights.quantize import quantize


class Operator(Protocol):
    """What a layer computes with its weight, and the gradients of that."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def input_gradient(self, d: Tensor, x: Tensor, weight: Tensor) -> Tensor: ...

    def bias_gradient(self, d: Tensor) -> Tensor: ...

    def add_terms(self, total: KroneckerSum, d: Tensor, x: Tensor, weight: Tensor) -> bool:
        """Add the weight's gradient to ``total``; whether it was finite."""
        ...


class Linear(NamedTuple):
    """x (N, n) -> x W^T + b (N, m): each row is a term."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, d: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return d @ weight

    def bias_gradient(self, d: Tensor) -> Tensor:
        return d.sum(0)

    def add_terms(self, total: KroneckerSum, d: Tensor, x: Tensor, weight: Tensor) -> bool:
        return total.add_rows(d, x)


class Convolution(NamedTuple):
    """A two-dimensional convolution: each pixel of its output is a term, with the patch that it reads."""

    by: Geometry

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self.by.arguments)

    def input_gradient(self, d: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(d, x, weight, (True, False, False))[0]

    def bias_gradient(self, d: Tensor) -> Tensor:
        return d.sum((0, 2, 3))

    def add_terms(self, total: KroneckerSum, d: Tensor, x: Tensor, weight: Tensor) -> bool:
        if total.takes_matrix:  # then the gradient is no larger than a block of terms would be
            return total.add_matrix(self._backward(d, x, weight, (False, True, False))[1].flatten(1))
        finite = True
        for some, patches in self._terms(d, x, (weight.shape[2], weight.shape[3]), total.block):
            finite &= total.add_rows(some, patches)
        return finite

    def _backward(self, d: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(d, x, weight, None, *self.by.arguments, mask)

    def _terms(self, d: Tensor, x: Tensor, kernel: tuple[int, int], block: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(b, C_out) and (b, C_in taps) for up to ``block`` pixels at a time, all of one image."""
        down, across = self.by.padding
        padded = F.pad(x, (across, across, down, down)) if down or across else x
        item, channel, row, pixel = padded.stride()
        (step_down, step_across), (apart_down, apart_across) = self.by.stride, self.by.dilation
        batch, _, height, width = d.shape
        windows = padded.as_strided(
            (batch, height, width, padded.shape[1], *kernel),
            (item, row * step_down, pixel * step_across, channel, row * apart_down, pixel * apart_across),
            padded.storage_offset(),
        )
        pixels = d.permute(0, 2, 3, 1)
        columns, rows = min(width, block), max(1, block // width)
        for image in range(batch):
            for y in range(0, height, rows):
                for x0 in range(0, width, columns):
                    part = (image, slice(y, y + rows), slice(x0, x0 + columns))
                    yield pixels[part].flatten(0, 1), windows[part].flatten(0, 1).flatten(1)


def streaming(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operator: Operator,
    total: KroneckerSum,
    note: Callable[[bool], None],
    gradient_levels: tuple[int, float, float] | None = None,
) -> Tensor:
    """``operator.output(x, weight, bias)``, whose backward adds to ``total`` what would be the weight's gradient.

    Args:
        x: the operator's input.
        weight: is given no gradient; when it does not require one, nothing is added.
        bias: or None.
        operator: what to compute.
        total: of the weight's shape as a matrix.
        note: is told in backward whether the gradient was finite, and added.
        gradient_levels: bits and range to quantize the output's gradient to before anything else is made of it.

    Returns:
        The output, of autocast's dtype where that is on. It can be differentiated once.

    Raises:
        RuntimeError: input and weight are of two dtypes; in backward, when a graph is asked for.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        if x.dtype != weight.dtype:
            raise RuntimeError(f"Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
        return _Streaming.apply(x, weight, bias, operator, total, note, gradient_levels)
    x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _Streaming.apply(x, weight, bias, operator, total, note, gradient_levels)


class _Streaming(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operator: Operator,
        total: KroneckerSum,
        note: Callable[[bool], None],
        gradient_levels: tuple[int, float, float] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rest = operator, total, note, gradient_levels
        ctx.bias_dtype = None if bias is None else bias.dtype
        return operator.output(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a layer of StreamingLowRank has no second derivatives (create_graph=True).")
        if torch.is_autocast_enabled(d.device.type):  # of a backward pass inside of it
            with torch.autocast(d.device.type, enabled=False):
                return _Streaming._gradients(ctx, d)
        return _Streaming._gradients(ctx, d)

    @staticmethod
    def _gradients(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        operator, total, note, gradient_levels = ctx.rest
        dx = dbias = None
        if gradient_levels is not None:
            d = quantize(d, *gradient_levels)
        weight = weight.to(d.dtype)
        if ctx.needs_input_grad[0]:
            dx = operator.input_gradient(d, x, weight)
        if ctx.needs_input_grad[2]:
            dbias = operator.bias_gradient(d).to(ctx.bias_dtype)
        # In a few bits, a sample that the model is sure of has no gradient at all.
        if ctx.needs_input_grad[1] and bool(d.any()):
            note(operator.add_terms(total, d, x, weight))
        return dx, None, dbias, None, None, None, None
