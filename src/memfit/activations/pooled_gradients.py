"""The two products of a filtered backward, on maps of one number for each patch.

With G the means of the output's gradient, N their sums and X the means of the input over patches q:

    grad X[i, q] = sum over o of  G[o, q] W[o, i]          W = sum of w over its taps
    grad w[o, i] = sum over q of  N[o, q] X[i, q]          at every tap

Where neighbouring taps lie ``shift`` patches apart along an axis, taps of that axis are not summed, and the products
are the gradients of a convolution with that dilation.
"""

from __future__ import annotations

import torch
from torch import Tensor

Shifts = tuple[int, int]


def input_gradient(means: Tensor, weight: Tensor, shifts: Shifts, groups: int) -> Tensor:
    """The gradient that each input patch gets, summed over the taps.

    Args:
        means: (B, C_out, Q, R), of the output's gradient.
        weight: (C_out, C_in / groups, kernel of H, kernel of W).
        shifts: patches between neighbouring taps along H and W; 0 where the taps are summed.
        groups: of the channels.

    Returns:
        (B, C_in, Q, R).
    """
    batch, _, *patches = means.shape
    taps = _sum_taps(weight, shifts)
    if any(shifts):
        like = means.new_empty(1).expand(batch, weight.shape[1] * groups, *patches)
        return _backward(means, like, taps, shifts, groups, (True, False, False))[0]
    rows = _rows(means, groups)
    matrices = taps.reshape(groups, -1, weight.shape[1])
    if matrices.shape[1] == 1:  # one output channel of a group: no product of matrices
        return _maps((rows * matrices.squeeze(1)).flatten(1), batch, patches)
    if groups == 1:
        return _maps(rows.squeeze(1) @ matrices[0], batch, patches)
    return _maps(torch.einsum("mgo,goi->mgi", rows, matrices).flatten(1), batch, patches)


def weight_gradient(sums: Tensor, pooled: Tensor, weight: Tensor, shifts: Shifts, groups: int) -> Tensor:
    """The weight's gradient.

    Args:
        sums: (B, C_out, Q, R), of the output's gradient over patches.
        pooled: (B, C_in, Q, R), means of the input over patches.
        weight: (C_out, C_in / groups, kernel of H, kernel of W), of which shape and layout are used.
        shifts: patches between neighbouring taps along H and W; 0 where all taps get the same.
        groups: of the channels.

    Returns:
        Shaped and laid out in memory as ``weight``, so that autograd keeps it and makes no copy.
    """
    if any(shifts):
        taps = weight[tuple(slice(None) if shift else slice(1) for shift in (1, 1, *shifts))]
        gradient = _backward(sums, pooled, taps, shifts, groups, (False, True, False))[1]
    else:
        n, x = _rows(sums, groups), _rows(pooled, groups)
        if groups == 1:
            gradient = n.squeeze(1).t() @ x.squeeze(1)
        elif n.shape[2] == x.shape[2] == 1:  # depthwise
            gradient = (n * x).sum(0)
        else:
            gradient = torch.einsum("mgo,mgi->goi", n, x)
        gradient = gradient.reshape(*weight.shape[:2], 1, 1)
    return torch.empty_like(weight, memory_format=torch.preserve_format).copy_(gradient)


def _sum_taps(weight: Tensor, shifts: Shifts) -> Tensor:
    """The kernel, summed over the axes without a shift, which keep a size of 1."""
    summed = [axis + 2 for axis, shift in enumerate(shifts) if not shift and weight.shape[axis + 2] > 1]
    if len(summed) < 2:
        return weight.sum(summed, keepdim=True) if summed else weight
    taps = weight.shape[2] * weight.shape[3]
    if weight.is_contiguous():
        total = weight.view(-1, taps) @ weight.new_ones(taps)  # twice as fast as a sum over such a short axis
    else:
        total = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], taps, -1).sum(1)
    return total.view(*weight.shape[:2], 1, 1)


def _backward(
    g: Tensor, x: Tensor, taps: Tensor, shifts: Shifts, groups: int, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a convolution of maps of patches, whose taps lie around each patch."""
    dilation = tuple(max(1, shift) for shift in shifts)
    padding = tuple(step * (size // 2) for step, size in zip(dilation, taps.shape[2:], strict=True))
    return torch.ops.aten.convolution_backward(
        g, x, taps, None, (1, 1), padding, dilation, False, (0, 0), groups, wanted
    )


def _rows(maps: Tensor, groups: int) -> Tensor:
    """(B, C, Q, R) as (B Q R, groups, C / groups); a view with the channels last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, groups, maps.shape[1] // groups)


def _maps(rows: Tensor, batch: int, patches: list[int]) -> Tensor:
    """The way back: (B Q R, C) as (B, C, Q, R), in the channels-last format."""
    return rows.view(batch, *patches, -1).permute(0, 3, 1, 2)
