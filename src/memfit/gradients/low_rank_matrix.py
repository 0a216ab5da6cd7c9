"""Low-rank gradient approximation (LRGA): train a weight through two small factors, never forming its gradient.

A weight W (m x n) is held fixed and moved by a product, W_eff = W + U V with U (m x r), V (r x n). For a batch with
inputs a_i and output gradients d_i, whose dense gradient would be G = sum_i d_i a_i^T, the chain rule gives

    dU = G V^T = sum_i d_i (V a_i)^T          dV = U^T G = sum_i (U^T d_i) a_i^T

so that gradients and optimizer state are r (m + n) numbers in place of m n. U starts at zero (the layer computes what
it computed before) and V at random with E[V^T V] = I.

Source: Gooneratne, Sim, Zadrazil, Kabel, Beaufays, Motta, "Low-rank Gradient Approximation for Memory-Efficient
On-device Training of Deep Neural Network", ICASSP 2020, arXiv 2001.08885.
"""

from __future__ import annotations

import weakref
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from memfit.sharding import copy_full_

if TYPE_CHECKING:
    from memfit.gradients.low_rank import LowRankGradient


def random_basis(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """A Gaussian V (rank x columns), float32 on the CPU, of variance 1/rank, so that E[V^T V] = I."""
    return torch.randn(rank, columns, generator=generator, device="cpu", dtype=torch.float32) / rank**0.5


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
    if torch.is_autocast_enabled(device):
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
        if ctx.needs_input_grad[0] or rows is not None:
            d_narrow = d @ left
            if ctx.needs_input_grad[0]:
                d_rows = torch.addmm(d @ base, d_narrow, right)
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


def matrix_shape(weight: Tensor, transposed: bool = False) -> tuple[int, int]:
    """Rows and columns of a weight of two or more dimensions, seen as a matrix."""
    rows, columns = weight.shape[0], weight.shape[1:].numel()
    return (columns, rows) if transposed else (rows, columns)


class LowRankMatrix(nn.Module):
    """One frozen weight and the factors that train it.

    A weight of more than two dimensions is the matrix of its first one against all others, such as a convolution's
    ``C_out x (C_in kh kw)``; a transposed one, ``weight^T``, is what layers need that store inputs by outputs.

    Attributes:
        base: the weight's own Parameter, of any shape, frozen while it is here. As a matrix it is m x n.
        left: (m, r) Parameter U, zero at the start and after a refresh.
        right: (r, n) Parameter V, frozen with ``sides="left"``.
            Factors are float32 where the weight is of half precision, else of its dtype.
    """

    base: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter

    def __init__(self, base: nn.Parameter, technique: LowRankGradient, name: str, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        rows, columns = matrix_shape(base, transposed)
        self.refresh = technique.refresh
        self.seed = zlib.crc32(f"{technique.seed}/{name}".encode())
        self.steps = 0
        base.requires_grad_(False)
        self.base = base
        dtype = torch.float32 if base.dtype.itemsize < 4 else base.dtype
        self.left = nn.Parameter(torch.zeros(rows, technique.rank, dtype=dtype, device=base.device))
        right = torch.empty(technique.rank, columns, dtype=dtype, device=base.device)
        # Not a buffer: DistributedDataParallel would broadcast it at each forward, and fully_shard would not shard it.
        self.right = nn.Parameter(right, requires_grad=technique.sides == "both")
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """Fill V from the seed and the number of steps taken, the same on every device and after every resume."""
        generator = torch.Generator("cpu").manual_seed(self.seed + self.steps)
        if not self.right.is_meta:
            copy_full_(self.right, random_basis(self.right.shape[0], self.right.shape[1], generator))

    def effective(self) -> Tensor:
        """The weight in force, of the base's shape and dtype; differentiable in the factors."""
        base = self.base.detach()
        first, second = (self.right.t(), self.left.t()) if self.transposed else (self.left, self.right)
        with torch.autocast(base.device.type, enabled=False):  # which would round the weight
            product = torch.addmm(base.flatten(1).to(self.left.dtype), first, second)
        return product.to(base.dtype).view(base.shape)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear`` with the effective weight."""
        self.watch()
        base = self.base.t() if self.transposed else self.base
        return low_rank_linear(x, base, bias, self.left, self.right)

    def watch(self) -> None:
        """Called whenever the factors are used: from then on the optimizer's steps are counted for the refresh."""
        if self.refresh is not None and torch.is_grad_enabled():
            _refreshing.add(self)

    @torch.no_grad()
    def merge_(self) -> None:
        """Move U V into the base weight and set U to zero; the effective weight stays."""
        self.base.copy_(self.effective())
        self.left.zero_()

    def after_step(self, optimizer: Optimizer) -> None:
        """Count a step of the optimizer that holds the factors; when it is time, merge, draw a new V, start anew.

        The moments of the old factors describe another basis: they are reset, as if the factors were new parameters.
        """
        self.steps += 1
        if self.refresh is not None and self.steps % self.refresh == 0:
            self.merge_()
            self._draw()
            for factor in (self.left, self.right):
                if factor.requires_grad:
                    _reset_state(optimizer, factor)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)

    def extra_repr(self) -> str:
        return f"{self.left.shape[0]}, {self.right.shape[1]}, rank={self.left.shape[1]}"


_refreshing: weakref.WeakSet[LowRankMatrix] = weakref.WeakSet()


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """torch calls this after every step of every optimizer: so a refresh needs no call in the user's loop."""
    if not _refreshing:
        return
    matrices = {id(matrix.left): matrix for matrix in _refreshing}
    # In the optimizer's order, the same in all processes: the merge of a sharded weight is a conversation of theirs.
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        if id(parameter) in matrices:
            matrices[id(parameter)].after_step(optimizer)


register_optimizer_step_post_hook(_after_any_step)


def _reset_state(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Bring a parameter's optimizer state to what it was before the first step."""
    if isinstance(optimizer, torch.optim.Adagrad):  # the one optimizer of torch that makes its state at once
        state = optimizer.state[parameter]
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        state["sum"].fill_(group["initial_accumulator_value"])
        state["step"].zero_()
    elif isinstance(optimizer, torch.optim.LBFGS):  # keeps one history of all parameters, under the first one's name
        optimizer.state.clear()
    else:
        optimizer.state.pop(parameter, None)
