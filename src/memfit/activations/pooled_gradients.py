"""The two products of a filtered backward, on maps of one number for each patch.

With G the means of the output's gradient, n the pixels of a patch and X the means of the input over patches q:

    grad X[i, q] = sum over o of    G[o, q] W[o, i]          W = sum of w over its taps
    grad w[o, i] = sum over q of  n G[o, q] X[i, q]          at every tap

Where neighbouring taps lie ``shift`` patches apart along an axis, taps of that axis are not summed, and the products
are the gradients of a convolution with that dilation.
"""

from __future__ import annotations

import torch
from torch import Tensor

Shifts = tuple[int, int]
_FEW_CHANNELS = 16  # fewer than which fill no register


def input_gradient(means: Tensor, weight: Tensor, shifts: Shifts, groups: int, scale: float) -> Tensor:
    """The gradient that each input patch gets, summed over the taps.

    Args:
        means: (B, C_out, Q, R), of the output's gradient.
        weight: (C_out, C_in / groups, kernel of H, kernel of W).
        shifts: patches between neighbouring taps along H and W; 0 where the taps are summed.
        groups: of the channels.
        scale: what the result is multiplied by.

    Returns:
        (B, C_in, Q, R).
    """
    batch, channels, *patches = means.shape
    inputs = weight.shape[1]
    taps = _sum_taps(weight, shifts)
    if any(shifts):
        like = means.new_empty(1).expand(batch, inputs * groups, *patches)
        coarse = _backward(means, like, taps, shifts, groups, (True, False, False))[0]
    elif groups == 1:
        coarse = (_rows(means) @ taps.view(channels, inputs)).view(batch, *patches, inputs).permute(0, 3, 1, 2)
    elif channels == groups and inputs == 1:
        coarse = means * taps.view(channels, 1, 1)
    else:
        rows = _rows(means).view(-1, groups, channels // groups)
        coarse = torch.einsum("mgo,goi->mgi", rows, taps.view(groups, -1, inputs))
        coarse = coarse.reshape(batch, *patches, inputs * groups).permute(0, 3, 1, 2)
    return coarse if scale == 1 else coarse.mul_(scale)


def weight_gradient(
    means: Tensor, pooled: Tensor, weight: Tensor, shifts: Shifts, groups: int, pixels: int | Tensor
) -> Tensor:
    """The weight's gradient.

    Args:
        means: (B, C_out, Q, R), of the output's gradient over patches.
        pooled: (B, C_in, Q, R), means of the input over patches.
        weight: (C_out, C_in / groups, kernel of H, kernel of W), of which the shape is used.
        shifts: patches between neighbouring taps along H and W; 0 where all taps get the same.
        groups: of the channels.
        pixels: of the output in each patch: one number, or (Q, R).

    Returns:
        Shaped as ``weight``; where all taps get the same, it may be expanded to them: autograd lays it out when it
        makes, or adds to, the parameter's ``grad``.
    """
    outputs, inputs = weight.shape[:2]
    scale = 1 if isinstance(pixels, Tensor) else pixels
    sums = means * pixels if isinstance(pixels, Tensor) else means
    if any(shifts):
        taps = weight[tuple(slice(None) if shift else slice(1) for shift in (1, 1, *shifts))]
        gradient = _backward(sums, pooled, taps, shifts, groups, (False, True, False))[1]
        return (gradient * scale).expand_as(weight)
    if groups == 1:
        # On the way, the product scales for nothing; BLAS likes a wide result.
        left, right = (_rows(sums), _rows(pooled)) if inputs >= _FEW_CHANNELS else (_rows(pooled), _rows(sums))
        gradient = torch.addmm(sums.new_empty(1), left.t(), right, beta=0, alpha=scale)
        gradient = gradient if inputs >= _FEW_CHANNELS else gradient.t()
        count = weight.shape[2:].numel()
        if count > 1 and weight.is_contiguous():
            # Autograd would copy single numbers to their taps, which takes twice the time of a product.
            return (gradient.reshape(-1, 1) @ gradient.new_ones(1, count)).view(weight.shape)
    elif outputs == groups and inputs == 1:
        gradient = (sums * pooled).sum((0, 2, 3)) * scale
    else:
        n, x = (_rows(each).view(-1, groups, each.shape[1] // groups) for each in (sums, pooled))
        gradient = torch.einsum("mgo,mgi->goi", n, x) * scale
    gradient = gradient.reshape(outputs, inputs, 1, 1)
    return gradient if gradient.shape == weight.shape else gradient.expand_as(weight)


def _sum_taps(weight: Tensor, shifts: Shifts) -> Tensor:
    """The kernel, summed over the axes without a shift, which keep a size of 1."""
    outputs, inputs, height, width = weight.shape
    if any(shifts):
        summed = [axis + 2 for axis, shift in enumerate(shifts) if not shift]
        return weight.sum(summed, keepdim=True) if summed else weight
    if height == width == 1:
        return weight
    if inputs == 1:
        return weight.sum((2, 3), keepdim=True)
    # By products, which are twice as fast as sum.
    if weight.is_contiguous():
        total = weight.view(-1, height * width) @ weight.new_ones(height * width)
    else:
        taps = weight.permute(0, 2, 3, 1).reshape(outputs, height * width, inputs)
        total = weight.new_ones(1, 1, height * width).expand(outputs, -1, -1) @ taps
    return total.view(outputs, inputs, 1, 1)


def _backward(
    g: Tensor, x: Tensor, taps: Tensor, shifts: Shifts, groups: int, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a convolution of maps of patches, whose taps lie around each patch."""
    dilation = tuple(max(1, shift) for shift in shifts)
    padding = tuple(step * (size // 2) for step, size in zip(dilation, taps.shape[2:], strict=True))
    return torch.ops.aten.convolution_backward.default(
        g, x, taps, None, (1, 1), padding, dilation, False, (0, 0), groups, wanted
    )


def _rows(maps: Tensor) -> Tensor:
    """(B, C, Q, R) as (B Q R, C); a view with the channels last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
