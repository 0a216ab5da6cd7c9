"""The product of a layer's input with a weight that is a frozen matrix plus two factors, ``x (W + U V)^T``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def low_rank_linear(x: Tensor, base: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``x (base + left right)^T + bias`` without forming the m x n product, nor a gradient of that size.

    Args:
        x: (..., n).
        base: (m, n), no gradient.
        bias: (m,) or None.
        left: (m, r).
        right: (r, n). When it has no gradient, autograd keeps ``x right^T`` (N x r) in place of x (N x n).

    Returns:
        (..., m), of the dtype of ``F.linear(x, base)``.
    """
    rows = x.reshape(-1, x.shape[-1])
    base = base.detach()  # also when somebody has unfrozen it: its gradient would be the dense one
    device = x.device.type
    if torch.is_autocast_enabled(device) and base.dtype != torch.float64:  # as F.linear
        dtype = torch.get_autocast_dtype(device)
        rows, base = rows.to(dtype), base.to(dtype)
    dtype = base.dtype
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        y = _LowRankLinear.apply(rows, base, bias, left.to(dtype), right.to(dtype))
    # No view: of one that somebody changes in place (a residual's `y += x`), fully_shard would lose sight.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


class _LowRankLinear(torch.autograd.Function):
    """One operator rather than four, for fewer passes over the N x m and N x n tensors and fewer of them at once.

    The bias is one more column of the narrow product, in backward as well.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, base: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        narrow = rows @ right.t()
        y = rows @ base.t()
        if bias is None:
            y.addmm_(narrow, left.t())
        else:
            y.addmm_(_with_ones(narrow), torch.cat((left, bias.unsqueeze(1)), dim=1).t())
        ctx.has_bias = bias is not None
        ctx.save_for_backward(rows if ctx.needs_input_grad[4] else None, narrow, base, left, right)
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        rows, narrow, base, left, right = ctx.saved_tensors
        d_rows = d_bias = d_right = None
        if torch.is_grad_enabled():  # someone wants the gradient's gradient, for which narrow is no constant
            if rows is None:
                raise RuntimeError('sides="left" keeps no input for second derivatives: convert with sides="both".')
            narrow = rows @ right.t()
        if ctx.needs_input_grad[0] or rows is not None:
            d_narrow = d @ left
            if ctx.needs_input_grad[0]:
                d_rows = (d @ base).addmm_(d_narrow, right)
            if rows is not None:
                d_right = d_narrow.t() @ rows
        if ctx.has_bias:
            both = d.t() @ _with_ones(narrow)
            d_left, d_bias = both[:, :-1], both[:, -1]
        else:
            d_left = d.t() @ narrow
        return d_rows, None, d_bias, d_left, d_right


def _with_ones(narrow: Tensor) -> Tensor:
    return torch.cat((narrow, narrow.new_ones(narrow.shape[0], 1)), dim=1)
