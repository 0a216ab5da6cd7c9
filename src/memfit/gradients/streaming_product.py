"""Layers' operators whose weight gradient is not made: its terms are added to a running sum in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from memfit.convolution_input import windows
from memfit.gradients.convolution import Geometry
from memfit.gradients.kronecker_sum import KroneckerSum
from memfit.weights.quantize import quantize


class Wanted(NamedTuple):
    """Which gradients are wanted, and whether the agreement of the weight's with the sum."""

    of_input: bool
    of_weight: bool
    of_bias: bool
    agreement: bool


class Gradients(NamedTuple):
    """What a backward pass gives.

    Attributes:
        of_input: None where it is not wanted.
        of_bias: the same.
        added: whether the weight's was finite, and so was added to the sum.
        agreement: the inner product of the weight's gradient with the sum before it; 0 where it is not wanted.
    """

    of_input: Tensor | None
    of_bias: Tensor | None
    added: bool = True
    agreement: float = 0.0


class Operator(Protocol):
    """What a layer computes with its weight, and the gradients of that."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def gradients(self, total: KroneckerSum, d: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        """Add the weight's gradient to ``total``, and return the others."""
        ...


class Linear(NamedTuple):
    """x (N, n) -> x W^T + b (N, m): each row is a term."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def gradients(self, total: KroneckerSum, d: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        of_input = d @ weight if wanted.of_input else None
        of_bias = d.sum(0) if wanted.of_bias else None
        if not wanted.of_weight:
            return Gradients(of_input, of_bias)
        agreement = total.inner_rows(d, x) if wanted.agreement else 0.0
        return Gradients(of_input, of_bias, total.add_rows(d, x), agreement)


class Convolution(NamedTuple):
    """A two-dimensional convolution: each pixel of its output is a term, with the patch that it reads."""

    by: Geometry

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self.by.arguments)

    def gradients(self, total: KroneckerSum, d: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        whole = wanted.of_weight and total.takes_matrix  # then the gradient is no larger than a block of terms would be
        mask = (wanted.of_input, whole, wanted.of_bias)
        sizes = [len(weight)] if wanted.of_bias else None
        dx, dweight, dbias = torch.ops.aten.convolution_backward(d, x, weight, sizes, *self.by.arguments, mask)
        if not wanted.of_weight:
            return Gradients(dx, dbias)
        agreement = 0.0
        if whole:
            matrix = dweight.flatten(1)
            agreement = total.inner_matrix(matrix) if wanted.agreement else 0.0
            return Gradients(dx, dbias, total.add_matrix(matrix), agreement)
        if wanted.agreement:
            agreement = self._inner(total, d, x, weight.shape)
        blocks = self._terms(d, x, (weight.shape[2], weight.shape[3]), total.block)
        return Gradients(dx, dbias, min([total.add_rows(*block) for block in blocks], default=True), agreement)

    def _inner(self, total: KroneckerSum, d: Tensor, x: Tensor, shape: torch.Size) -> float:
        """The inner product of the sum L R^T with the gradient: of L^T d and the convolution of x by R.

        Image by image, in 3 r numbers for each pixel of the output.
        """
        left, right = total.factors()
        kernels, products = right.t().reshape(-1, *shape[1:]), 0.0
        for image, of_image in zip(x.split(1), d.split(1), strict=True):
            read = torch.convolution(image.to(total.dtype), kernels, None, *self.by.arguments)
            products += float((read.flatten(2) * (left.t() @ of_image.flatten(2).to(total.dtype))).sum())
        return products

    def _terms(self, d: Tensor, x: Tensor, kernel: tuple[int, int], block: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(b, C_out) and (b, C_in taps) for up to ``block`` pixels at a time, all of one image."""
        batch, _, height, width = d.shape
        read = windows(x, kernel, (height, width), self.by.stride, self.by.padding, self.by.dilation)
        pixels = d.permute(0, 2, 3, 1)
        columns, rows = min(width, block), max(1, block // width)
        for image in range(batch):
            for y in range(0, height, rows):
                for x0 in range(0, width, columns):
                    part = (image, slice(y, y + rows), slice(x0, x0 + columns))
                    yield pixels[part].flatten(0, 1), read[part].flatten(0, 1).flatten(1)


def streaming(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operator: Operator,
    total: KroneckerSum,
    note: Callable[[bool, float], None],
    gradient_levels: tuple[int, float, float] | None = None,
    agreement: bool = False,
) -> Tensor:
    """``operator.output(x, weight, bias)``, whose backward adds to ``total`` what would be the weight's gradient.

    Args:
        x: the operator's input.
        weight: is given no gradient; when it does not require one, nothing is added.
        bias: or None.
        operator: what to compute.
        total: of the weight's shape as a matrix.
        note: is told in backward whether the gradient was finite, and added; and its agreement with the sum before.
        gradient_levels: bits and range to quantize the output's gradient to before anything else is made of it.
        agreement: compute it; else it is 0.

    Returns:
        The output, of autocast's dtype where that is on. It can be differentiated once.

    Raises:
        RuntimeError: input and weight are of two dtypes; in backward, when a graph is asked for.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        if x.dtype != weight.dtype:
            raise RuntimeError(f"Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
        return _Streaming.apply(x, weight, bias, operator, total, note, gradient_levels, agreement)
    x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _Streaming.apply(x, weight, bias, operator, total, note, gradient_levels, agreement)


class _Streaming(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operator: Operator,
        total: KroneckerSum,
        note: Callable[[bool, float], None],
        gradient_levels: tuple[int, float, float] | None,
        agreement: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rest = operator, total, note, gradient_levels, agreement
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
        operator, total, note, gradient_levels, agreement = ctx.rest
        if gradient_levels is not None:
            d = quantize(d, *gradient_levels)
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        # In a few bits, a sample that the model is sure of has no gradient at all.
        wanted = Wanted(of_x, of_weight and bool(d.any()), of_bias, agreement)
        found = operator.gradients(total, d, x, weight.to(d.dtype), wanted)
        note(found.added, found.agreement)
        dbias = None if found.of_bias is None else found.of_bias.to(ctx.bias_dtype)
        return found.of_input, None, dbias, None, None, None, None, None
