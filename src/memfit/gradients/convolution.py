"""Convolutions with a frozen weight and two factors: neither the weight's gradient nor, for it, the input is kept.

A convolution is one matrix applied to every patch a of its input, y = W a, with W (C_out x C_in/g k). So

    (W + U V) a = W a + U (V a):   conv(x, W) + pointwise(conv(x, V), U)

where V is r filters of the layer's own geometry and U a 1 x 1 convolution. A transposed convolution spreads every
input position a over a patch, y = W^T a with W (C_in x C_out/g k), and with W^T + U V that is

    conv_transpose(x, W) + conv_transpose(pointwise(x, V), U)

With g groups one pair is shared: V gives r channels of each group, g r in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """What ``torch.convolution`` needs beside the tensors; one number for each spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0, 0)
    groups: int = 1

    @property
    def arguments(self) -> tuple[Any, ...]:
        axes = len(self.stride)
        return (*self[:4], self.output_padding[:axes], self.groups)

    def pointwise(self) -> Geometry:
        """Of a 1 x 1 convolution with the same groups."""
        axes = len(self.stride)
        return Geometry((1,) * axes, (0,) * axes, (1,) * axes, groups=self.groups)


def low_rank_conv(x: Tensor, base: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, by: Geometry) -> Tensor:
    """``convolution(x, base + left right, bias)`` without a gradient of the weight's size.

    Args:
        x: (B, C_in, ...), with the spatial axes last.
        base: (C_out, C_in / groups, ...), no gradient.
        bias: (C_out,) or None.
        left: (C_out, r).
        right: (r, C_in / groups * taps). When it has no gradient, autograd keeps the projection (B, groups r, ...) in
            place of x.
        by: stride, padding and so on.

    Returns:
        (B, C_out, ...), of the dtype of ``base``, or of autocast; in the memory format that torch's convolution gives.
    """
    x, base, bias, left, right = _of_one_dtype(x, base, bias, left, right)
    with torch.autocast(x.device.type, enabled=False):
        filters = right.view(-1, *base.shape[1:]).repeat(by.groups, *(1,) * (base.dim() - 1))
        y = frozen_convolution(x, base, bias, by)
        return _AddPointwise.apply(y, _convolution(x, filters, by), left, by.groups)


def low_rank_conv_transpose(
    x: Tensor, base: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, by: Geometry
) -> Tensor:
    """The same for a transposed convolution, of which ``left right`` is the weight's transpose.

    Args:
        x: (B, C_in, ...).
        base: (C_in, C_out / groups, ...), no gradient.
        bias: (C_out,) or None.
        left: (C_out / groups * taps, r).
        right: (r, C_in). When it has no gradient, autograd keeps the projection (B, groups r, ...) in place of x.
        by: stride, padding and so on.

    Returns:
        (B, C_out, ...).
    """
    x, base, bias, left, right = _of_one_dtype(x, base, bias, left, right)
    ones = (1,) * (base.dim() - 2)
    with torch.autocast(x.device.type, enabled=False):
        rank = right.shape[0]
        project = right.view(rank, by.groups, -1).transpose(0, 1).reshape(by.groups * rank, -1, *ones)
        filters = left.t().reshape(rank, *base.shape[1:]).repeat(by.groups, 1, *ones)
        y = frozen_convolution(x, base, bias, by)
        return y.add_(_convolution(_convolution(x, project, by.pointwise()), filters, by))


def frozen_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, by: Geometry) -> Tensor:
    """``torch.convolution`` with a weight that does not train: it keeps the weight and not its input."""
    return _FrozenConvolution.apply(x, weight.detach(), bias, by)


def _of_one_dtype(x: Tensor, base: Tensor, bias: Tensor | None, *factors: Tensor) -> Any:
    """The operands in the dtype to compute in; the base as it is, for it would be a copy that autograd keeps."""
    dtype = base.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
    elif x.dtype != dtype:
        raise RuntimeError(f"Input type ({x.dtype}) and weight type ({dtype}) should be the same")
    return x, base, None if bias is None else bias.to(dtype), *(factor.to(dtype) for factor in factors)


def _convolution(x: Tensor, weight: Tensor, by: Geometry) -> Tensor:
    if weight.requires_grad:
        return torch.convolution(x, weight, None, *by.arguments)
    return frozen_convolution(x, weight, None, by)


class _FrozenConvolution(torch.autograd.Function):
    """Convolution whose backward knows of the input its shape alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, by: Geometry) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.by = x.shape, by
        y = torch.convolution(x, weight.to(x.dtype), bias, *by.arguments)
        return y if y.is_contiguous() or y.movedim(1, -1).is_contiguous() else y.contiguous()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            weight = weight.to(d.dtype)
            like = _stand_in(ctx.shape, d, weight)
            mask = (True, False, False)
            dx = torch.ops.aten.convolution_backward(d, like, weight, None, *ctx.by.arguments, mask)[0]
        if ctx.needs_input_grad[2]:
            # Not through the mask: for a bias alone oneDNN computes the weight's gradient too.
            dbias = d.sum((0, *range(2, d.dim())))
        return dx, None, dbias, None


class _AddPointwise(torch.autograd.Function):
    """``y += pointwise(x, weight)`` in place: a second tensor of the output's size would be the peak.

    y is (B, groups m, ...), x (B, groups r, ...), weight (groups m, r).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.channels_last = groups, not y.is_contiguous()
        columns = _columns(x, groups, ctx.channels_last)
        outputs = _columns(y, groups, ctx.channels_last)
        for group, rows in enumerate(weight.view(groups, -1, weight.shape[1])):
            batch = columns.shape[0]
            outputs[:, group].baddbmm_(rows.expand(batch, *rows.shape), columns[:, group])
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        gradients = _columns(d, ctx.groups, ctx.channels_last)
        batch, rank = gradients.shape[0], weight.shape[1]
        if ctx.needs_input_grad[1]:
            parts = [
                torch.bmm(rows.t().expand(batch, *rows.t().shape), gradients[:, group])
                for group, rows in enumerate(weight.view(ctx.groups, -1, rank))
            ]
            dx = _from_columns(parts, x.shape, ctx.channels_last)
        if ctx.needs_input_grad[2]:
            columns = _columns(x, ctx.groups, ctx.channels_last)
            # As many items at a time as make a temporary of at most an eighth of d.
            step = max(1, batch * columns.shape[3] // (8 * rank))
            dweight = torch.cat([_outer(gradients[:, g], columns[:, g], step) for g in range(ctx.groups)])
        return d, dx, dweight, None


def _outer(first: Tensor, second: Tensor, step: int) -> Tensor:
    """Sum over items of ``first second^T``, for (B, m, N) and (B, r, N)."""
    total: Tensor | None = None
    for one, other in zip(first.split(step), second.split(step), strict=True):
        part = torch.bmm(one, other.transpose(1, 2)).sum(0)
        total = part if total is None else total + part
    assert total is not None
    return total


def _columns(x: Tensor, groups: int, channels_last: bool) -> Tensor:
    """(B, groups C, ...) as matrices (B, groups, C, positions), or (1, groups, C, B positions) with channels last.

    A view when x lies in memory that way.
    """
    size = x.shape[1] // groups
    if channels_last:
        return x.movedim(1, -1).contiguous().view(1, -1, groups, size).permute(0, 2, 3, 1)
    return x.contiguous().view(x.shape[0], groups, size, x.shape[2:].numel())


def _from_columns(parts: Sequence[Tensor], shape: torch.Size, channels_last: bool) -> Tensor:
    """The way back from ``_columns``, of the groups one by one."""
    x = parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)
    if channels_last:
        return x.transpose(1, 2).reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return x.view(shape)


def _stand_in(shape: torch.Size, d: Tensor, weight: Tensor) -> Tensor:
    """A tensor of the input's shape, no number of which is read, in the memory format that torch wants it in.

    Of one in another format, or of an expanded number, torch would make a copy. Where d is large enough, it is d.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(d.dim(), torch.contiguous_format)
    is_last = any(each.is_contiguous(memory_format=last) and not each.is_contiguous() for each in (d, weight))
    layout = last if is_last else torch.contiguous_format
    if d.numel() < shape.numel() or not d.is_contiguous(memory_format=layout):
        return torch.empty(shape, dtype=d.dtype, device=d.device, memory_format=layout)
    numbers = d.detach().as_strided((shape.numel(),), (1,))
    return numbers.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if is_last else numbers.view(shape)
