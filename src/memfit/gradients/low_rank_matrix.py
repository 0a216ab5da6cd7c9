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

import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memfit.gradients import refresh
from memfit.gradients.basis import moved_coordinates, power_basis, random_basis
from memfit.gradients.low_rank_product import low_rank_linear
from memfit.gradients.matrix_layer import WeightMatrix
from memfit.gradients.steps import Watcher
from memfit.sharding import full, is_sharded, replicated

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from memfit.gradients.low_rank import LowRankGradient


def matrix_shape(weight: Tensor, transposed: bool = False) -> tuple[int, int]:
    """Rows and columns of a weight of two or more dimensions, seen as a matrix."""
    rows, columns = weight.shape[0], weight.shape[1:].numel()
    return (columns, rows) if transposed else (rows, columns)


class LowRankMatrix(WeightMatrix, Watcher):
    """One frozen weight and the factors that train it.

    A weight of more than two dimensions is the matrix of its first one against all others, such as a convolution's
    ``C_out x (C_in kh kw)``; a transposed one, ``weight^T``, is what layers need that store inputs by outputs.

    Attributes:
        base: the weight's own Parameter, of any shape, frozen while it is here. As a matrix it is m x n.
        left: (m, r) Parameter U, zero at the start and after a refresh.
        right: (r, n) Parameter V, frozen with ``sides="left"``.
            Factors are float32 where the weight is of half precision, else of its dtype.
    """

    has_moments = True
    base: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter

    def __init__(self, base: nn.Parameter, technique: LowRankGradient, name: str, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        rows, columns = matrix_shape(base, transposed)
        self.refresh = technique.refresh
        self.basis = technique.basis
        self._seen: Tensor | None = None  # V's gradient, between the two calls around an optimizer's step
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
        refresh.watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, or from a file
        super().__setstate__(state)
        refresh.watch(self)

    @torch.no_grad()
    def _draw(self) -> None:
        """Fill V from the seed and the number of steps taken, the same on every device and after every resume."""
        generator = torch.Generator("cpu").manual_seed(self.seed + self.steps)
        if not self.right.is_meta:
            basis = random_basis(self.right.shape[0], self.right.shape[1], generator)
            self.right.copy_(replicated(basis, self.right))

    def effective(self) -> Tensor:
        """The weight in force, of the base's shape and dtype; differentiable in the factors."""
        base = self.base.detach()
        first, second = (self.right.t(), self.left.t()) if self.transposed else (self.left, self.right)
        with torch.autocast(base.device.type, enabled=False):  # which would round the weight
            product = torch.addmm(base.flatten(1).to(self.left.dtype), first, second)
        return product.to(base.dtype).view(base.shape)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear`` with the effective weight."""
        base = self.base.t() if self.transposed else self.base
        return low_rank_linear(x, base, bias, self.left, self.right)

    @torch.no_grad()
    def merge_(self) -> None:
        """Move U V into the base weight and set U to zero; the effective weight stays."""
        base = self.base
        if base.dtype == self.left.dtype and base.is_contiguous() and not is_sharded(base):
            first, second = (self.right.t(), self.left.t()) if self.transposed else (self.left, self.right)
            base.view(base.shape[0], -1).addmm_(first, second)  # no copy of the weight
        else:
            base.copy_(self.effective())
        self.left.zero_()

    def watched(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.right, self.left

    def restore_(self) -> nn.Parameter:
        """The weight's own Parameter, trained, to be an ordinary one again."""
        self.merge_()
        refresh.unwatch(self)
        self.base.grad = None
        self.base.requires_grad_(True)
        return self.base

    def before_step(self) -> None:
        """Keep the gradient of a power basis V from the optimizer: it tells where V goes at the next refresh.

        V would learn no better by it (docs/bases.md), and the optimizer makes no state for what has no gradient.
        """
        if self.basis == "power" and self.right.grad is not None:
            self._seen = self.right.grad if self._refreshes_after(self.steps + 1) else None
            self.right.grad = None

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Count a step of the optimizer that holds U; when it is time, merge and change the basis.

        With a random V nothing known of U's old coordinates holds in the new ones, so that the moments are reset, as if
        the factors were new parameters. With a power basis the two have much in common, and U's moments are moved;
        where its gradient is missing, zero or not finite, the basis stays until the next time.
        """
        self.steps += 1
        seen, self._seen = self._seen, None
        if not self._refreshes_after(self.steps):
            return
        with torch.autocast(self.base.device.type, enabled=False):  # which would round the basis
            if self.basis == "random":
                self.merge_()
                self._draw()
                refresh.reset_moments(self.left)
                if self.right.requires_grad:
                    refresh.reset_moments(self.right)
                return
            seen = self.right.grad if seen is None else seen  # of an optimizer that has not stepped yet
            if seen is not None and seen.any() and seen.isfinite().all():
                self._turn(full(seen))

    def _turn(self, gradient: Tensor) -> None:
        """Merge, and move a power basis to where V's gradient points, the optimizer's moments with it."""
        self.merge_()
        exact = torch.promote_types(self.right.dtype, torch.float32)
        after = power_basis(gradient.to(exact))
        change = moved_coordinates(full(self.right).to(exact), after)
        self.right.copy_(replicated(after.to(self.right.dtype), self.right))
        refresh.move_moments(self.left, change)

    def _refreshes_after(self, steps: int) -> bool:
        return self.refresh is not None and steps % self.refresh == 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)

    def extra_repr(self) -> str:
        return f"{self.left.shape[0]}, {self.right.shape[1]}, rank={self.left.shape[1]}"
