"""Convolution with a filtered backward: the output's gradient is replaced by its mean over patches.

y = conv(x, w), with stride s. Let g be the gradient of y, G its mean over each p x p patch q of y, n_q the patch's
pixels, and X the mean of x over the (p s) x (p s) patch that y's patch reads. With one number for a patch,

    grad_w[o, i, :, :] = sum over q of  n_q G[o, q] X[i, q]          the same for all taps of the kernel
    grad_x on patch q  = 1 / s^2  sum over o of  G[o, q] W[o, i]     where W is the sum of w over its taps
    grad_bias[o]       = sum over q of  n_q G[o, q]                  exact

which are two products of matrices that are p^2 times smaller than the maps, and nine times fewer than the taps of a
3 x 3 kernel. Forward keeps X, and of the kernel what it is: a parameter. Along an axis on which taps lie a patch or
more apart (a dilation of p s or more), they are kept apart: there the products are a small dilated convolution of G, X.

Source: Yang, Li, Marculescu, "Efficient On-device Training via Gradient Filtering", CVPR 2023, arXiv 2301.00330.
Its formulas are for s = 1; the factor 1 / s^2 and the alignment with uneven padding are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memfit.activations.patches import Cut, Cuts, counts, pool, spread
from memfit.activations.pooled_gradients import input_gradient, weight_gradient


class Window(NamedTuple):
    """How a convolution reads one spatial axis: in pixels, and ``padding`` before the first."""

    kernel: int
    stride: int
    padding: int
    dilation: int


class Plan(NamedTuple):
    """How the maps of one call are cut.

    Attributes:
        inputs: patches of x, one for each of y.
        outputs: patches of y.
        shifts: on each axis, by how many patches neighbouring taps lie apart; 0 where taps are summed.
        spread_over: input pixels that share one output pixel's gradient.
    """

    inputs: Cuts
    outputs: Cuts
    shifts: tuple[int, int]
    spread_over: int


@lru_cache(maxsize=4096)
def plan(x: tuple[int, int], y: tuple[int, int], windows: tuple[Window, Window], patch: tuple[int, int]) -> Plan:
    """Cut input and output maps of the given sizes (H, W) into patches that belong to each other."""
    axes = [_plan_axis(*each) for each in zip(x, y, windows, patch, strict=True)]
    inputs, outputs, shifts, strides = zip(*axes, strict=True)
    return Plan(inputs, outputs, shifts, prod(strides))


def _plan_axis(size: int, outputs: int, window: Window, patch: int) -> tuple[Cut, Cut, int, int]:
    patch = min(patch, outputs)
    patches = -(-outputs // patch)
    kernel, stride, padding, dilation = window
    every = 1
    if kernel == 1 and padding == 0:  # the pixels between are not read
        every, stride = stride, 1
    width = patch * stride
    # Centre of what a patch reads, to the pixel: halves towards 0.
    origin = int((dilation * (kernel - 1) + 1 - stride) / 2) - padding
    shift = round(dilation / width) if kernel % 2 and kernel > 1 and dilation >= width else 0
    return Cut(size, width, patches, origin, every), Cut(outputs, patch, patches), shift, stride


def filtered_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    windows: tuple[Window, Window],
    groups: int,
    patch: tuple[int, int],
) -> Tensor:
    """``forward(x, weight, bias)``, with the filtered backward.

    Args:
        x: (B, C_in, H, W).
        weight: (C_out, C_in / groups, kernel of H, kernel of W).
        bias: (C_out,) or None.
        forward: the convolution itself; called without autograd.
        windows: how it reads H and W.
        groups: of its channels.
        patch: size of the patches of the output, in pixels of H and W; cut to the map where that is smaller.

    Returns:
        (B, C_out, H', W'), as ``forward`` gives it. It can be differentiated once.
    """
    return _FilteredConvolution.apply(x, weight, bias, forward, windows, groups, patch)


class _FilteredConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        forward: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        windows: tuple[Window, Window],
        groups: int,
        patch: tuple[int, int],
    ) -> Tensor:
        y = forward(x, weight, bias)
        ctx.plan = cut = plan((x.shape[2], x.shape[3]), (y.shape[2], y.shape[3]), windows, patch)
        ctx.groups, ctx.x_dtype = groups, x.dtype
        ctx.channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        pooled = None
        if ctx.needs_input_grad[1]:
            pooled = pool(x, cut.inputs)
            if pooled is not x and pooled._is_view():
                pooled = pooled.clone()  # else it would keep the whole map
            pooled = pooled.to(y.dtype)
        # The kernel itself, a parameter, costs nothing; its sum, or a copy in autocast's dtype, would.
        ctx.save_for_backward(pooled, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        pooled, weight = ctx.saved_tensors
        cut, groups = ctx.plan, ctx.groups
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        with torch.autocast(g.device.type, enabled=False):
            # Maps of patches are small: they are summed in the weight's precision.
            means = pool(g, cut.outputs).to(weight.dtype)
            if needs_dx:
                coarse = input_gradient(means, weight, cut.shifts, groups)
                if cut.spread_over > 1:
                    coarse = coarse / cut.spread_over
                dx = spread(coarse.to(ctx.x_dtype), cut.inputs, ctx.channels_last)
            if needs_dweight or needs_dbias:
                sums = means * counts(cut.outputs, means)
                if needs_dweight:
                    dweight = weight_gradient(sums, pooled.to(weight.dtype), weight, cut.shifts, groups)
                if needs_dbias:
                    dbias = sums.sum((0, 2, 3))
        return dx, dweight, dbias, None, None, None, None
