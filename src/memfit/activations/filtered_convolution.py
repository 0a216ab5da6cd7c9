"""Convolution with a filtered backward: the output's gradient is replaced by its mean over patches.

y = conv(x, w), with stride s. Let g be the gradient of y, G its mean over each p x p patch q of y, n_q the patch's
pixels, and X the mean of x over the (p s) x (p s) patch that y's patch reads. With one number for a patch,

    grad_w[o, i, :, :] = sum over q of  n_q G[o, q] X[i, q]          the same for all taps of the kernel
    grad_x on patch q  = 1 / s^2  sum over o of  G[o, q] W[o, i]     where W is the sum of w over its taps
    grad_bias[o]       = sum over q of  n_q G[o, q]                  exact

which are two products of matrices that are p^2 times smaller than the maps, and nine times fewer than the taps of a
3 x 3 kernel. Forward keeps X, and of the kernel what it is: a parameter. Along an axis on which taps lie a patch or
more apart (a dilation of p s or more), they are kept apart: there the products are a small dilated convolution of G, X.

Taps can also read what is where they lie (:mod:`memfit.activations.placed_taps`): the gradients are then those of the
convolution of maps that are constant on patches, whatever its configuration, or of its kernel's nearest plane.

With all of x kept for one image in k, the weight's gradient can be made right on the mean: it is

    sum over all images of F  +  k sum over those of (E - F)

with E and F the exact and the filtered gradient of an image. Every k-th image from a random one on is taken. In the
first sum these count as 1, in the second as -k: their X is kept times 1 - k. As this is right on the mean whatever F
is, F has its taps summed there, and what is said of taps is of the input's gradient.

Source: Yang, Li, Marculescu, "Efficient On-device Training via Gradient Filtering", CVPR 2023, arXiv 2301.00330.
Its formulas are for s = 1 and sum the taps; the factor 1 / s^2, the alignment with uneven padding, taps that read where
they lie and exact images are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from memfit.activations import placed_taps
from memfit.activations.patches import counts, pool, spread
from memfit.activations.plan import Plan, Taps, plan
from memfit.activations.pooled_gradients import input_gradient, weight_gradient
from memfit.activations.tap_reads import Window
from memfit.native import FILTERED, operator, suits


class ExactImages(NamedTuple):
    """Images whose weight gradient is exact: every so many of a batch, from a random one on.

    Attributes:
        every: k; of all, with 1.
        gradient: the exact one of a map of x (b, C_in, H, W), a gradient of y (b, C_out, H, W) and the kernel.
    """

    every: int
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]

    def draw(self, x: Tensor) -> int:
        """The first of them: drawn from torch's random numbers, of which a checkpointed forward gets the same again."""
        return 0 if isinstance(x, FakeTensor) else int(torch.randint(self.every, ()))

    def add(self, filtered: Tensor | None, x: Tensor, g: Tensor, kernel: Tensor) -> Tensor:
        """The gradient of all images, from the filtered one."""
        exact = self.gradient(x, g, kernel).to(kernel.dtype)
        return exact if filtered is None else torch.add(filtered, exact, alpha=self.every, out=exact)


def filtered_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    windows: tuple[Window, Window],
    groups: int,
    patch: tuple[int, int],
    taps: Taps = "summed",
    native: bool = False,
    exact: ExactImages | None = None,
) -> Tensor:
    """``forward(x, weight, bias)``, with the filtered backward.

    Args:
        x: (B, C_in, H, W); or (B, C_in, W), a map of one row; either without B.
        weight: (C_out, C_in / groups, kernel of H, kernel of W), or without H as x is.
        bias: (C_out,) or None.
        forward: the convolution itself; called without autograd.
        windows: how it reads H and W; of a single row, any.
        groups: of its channels.
        patch: size of the patches of the output, in pixels of H and W; cut to the map where that is smaller.
        taps: what of the kernel counts.
        native: compute with the C++ operator what that can.
        exact: how many images have an exact weight gradient.

    Returns:
        What ``forward`` gives. It can be differentiated once.
    """
    return _FilteredConvolution.apply(x, weight, bias, forward, windows, groups, patch, taps, native, exact)


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
        taps: Taps,
        native: bool,
        exact: ExactImages | None,
    ) -> Tensor:
        y = forward(x, weight, bias)
        axes, dtype = weight.dim() - 2, y.dtype
        if x.dim() == axes + 1:
            y = y.clone()  # torch's is a view of a batch of one, and views that leave here can't be changed in place
        ctx.x_shape, ctx.x_dtype, ctx.groups = x.shape, x.dtype, groups
        x, rows, columns = _as_maps(x, axes), *_as_maps(y, axes).shape[2:]
        sizes = (x.shape[2], x.shape[3]), (rows, columns)
        ctx.plan_of_x = plan(*sizes, windows, patch, taps)
        # Where some images are exact the weight's gradient is right on the mean: there its taps may as well be summed.
        ctx.plan_of_weight = cut = plan(*sizes, windows, patch, taps if exact is None else "summed")
        is_summed = ctx.plan_of_x.reads is None and not any(cut.shifts)
        ctx.native = native and is_summed and suits(x, weight) and x.dtype == dtype
        ctx.channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        pooled = some = None
        ctx.exact, ctx.first = exact, 0
        if ctx.needs_input_grad[1] and (exact is None or exact.every > 1):
            pooled = operator(FILTERED).pool(x, *cut.inputs) if ctx.native else pool(x, cut.inputs).to(dtype)
        if ctx.needs_input_grad[1] and exact is not None:
            some = x.to(dtype)
            if pooled is not None:
                ctx.first = exact.draw(x)
                some = some[ctx.first :: exact.every].clone()  # of a view the whole map would be kept
                pooled = pooled.clone() if pooled is x else pooled
                pooled[ctx.first :: exact.every] *= 1 - exact.every
        # The kernel itself, a parameter, costs nothing; its sum, or a copy in autocast's dtype, would.
        ctx.save_for_backward(pooled, some, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        pooled, some, weight = ctx.saved_tensors
        cut, wanted = ctx.plan_of_x, (ctx.needs_input_grad[0], pooled is not None, ctx.needs_input_grad[2])
        g, row = _as_maps(g, weight.dim() - 2), weight.dim() == 3
        kernel = weight.unsqueeze(2) if row else weight
        with _no_autocast(g.device.type):
            if ctx.native and suits(g, pooled, kernel):
                cuts, scale = (*cut.inputs, *cut.outputs), 1 / cut.spread_over
                found = operator(FILTERED).backward(
                    g, pooled, kernel, *cuts, ctx.groups, ctx.channels_last, scale, wanted
                )
            else:
                found = _gradients(ctx, g, pooled, kernel, wanted)
            dx, dweight, dbias = found
            if some is not None:
                dweight = ctx.exact.add(dweight, some, g[ctx.first :: ctx.exact.every], kernel)
        if dx is not None and dx.shape != ctx.x_shape:
            dx = dx.view(ctx.x_shape)
        return dx, dweight.squeeze(2) if row and dweight is not None else dweight, dbias, *(None,) * 7


def _gradients(
    ctx: Any, g: Tensor, pooled: Tensor | None, weight: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those wanted of x's, the weight's and the bias's gradients, by torch's operators."""
    cut: Plan = ctx.plan_of_x
    dx = dweight = dbias = None
    # Maps of patches are small: they are summed in the weight's precision.
    means = _as(weight.dtype, pool(g, cut.outputs))
    pixels = cut.pixels or counts(cut.outputs, means)
    full = torch.promote_types(weight.dtype, torch.float32)  # in which tables of taps are exact
    if wanted[0]:
        if cut.reads is None:
            coarse = input_gradient(means, weight, cut.shifts, ctx.groups, 1 / cut.spread_over)
            dx = spread(_as(ctx.x_dtype, coarse), cut.inputs, ctx.channels_last)
        else:
            dx = placed_taps.input_gradient(_as(full, means), _as(full, weight), cut.reads, ctx.groups)
            dx = _as(ctx.x_dtype, dx if ctx.channels_last else dx.contiguous())
    if wanted[1] and pooled is not None:
        pooled, cut = _as(weight.dtype, pooled), ctx.plan_of_weight
        if cut.reads is None:
            dweight = weight_gradient(means, pooled, weight, cut.shifts, ctx.groups, pixels)
        else:
            maps = (_as(full, means), _as(full, pooled))
            dweight = placed_taps.weight_gradient(*maps, _as(full, weight), cut.reads, ctx.groups)
            dweight = _as(weight.dtype, dweight)
    if wanted[2]:
        dbias = (means * pixels).sum((0, 2, 3))
    return dx, dweight, dbias


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a call less, of which small maps have too many


def _as_maps(x: Tensor, axes: int) -> Tensor:
    """(B, C, H, W), of maps with two axes or one, with or without a batch."""
    x = x if x.dim() == axes + 2 else x.unsqueeze(0)
    return x if axes == 2 else x.unsqueeze(2)


def _no_autocast(device: str) -> AbstractContextManager[object]:
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
