"""A sum of outer products in the memory of a few: the streaming Kronecker-sum approximation.

The weight gradient of a matrix (n x m) is a sum of outer products over samples and positions, G = sum_i d_i a_i^T. Here
it is kept as L R^T with L (n x r) and R (m x r). A block of b more terms makes that a product of q = r + b columns,
whose singular values come out of a q x q matrix:

    [L d] = Q_L T_L,   [R a] = Q_R T_R,   T_L T_R^T = U diag(s) V^T,   L <- Q_L U M,   R <- Q_R V M,

where M (q x r) makes the values fewer (:mod:`memfit.gradients.mixing`). Where a side of the matrix is no longer than q
columns, the matrix itself is no larger than those, and is made and decomposed in their place.

Sources: Gural, Nadeau, Tikekar, Murmann, "Low-Rank Training of Deep Neural Networks for Emerging Memory Technology",
arXiv 2009.03887; Benzing et al., "Optimal Kronecker-Sum Approximation of Real Time Recurrent Learning", ICML 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy
import torch
from torch import Tensor, nn

from memfit.gradients.mixing import NEGLIGIBLE, biased_mixing, random_signs, unbiased_mixing

Mixing = Callable[[Sequence[float]], list[list[float]]]
_LARGEST = 2**15 - 1  # of 16 bits with a sign


def reduce_product(left: Tensor, right: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor] | None:
    """Fewer terms for the sum of outer products ``left^T right``, all of them as rows, as layers have them.

    Args:
        left: (q, n), float32 or float64.
        right: (q, m), of its dtype.
        mixing: gives M (p x r), as rows, for p = min(n, m, q) singular values, largest first.

    Returns:
        (r, n) and (r, m), or None when a number is not finite.
    """
    if min(left.shape[1], right.shape[1]) <= left.shape[0]:
        return reduce_matrix(left.t() @ right, mixing)
    left_basis, left_triangle = torch.linalg.qr(left.t())
    right_basis, right_triangle = torch.linalg.qr(right.t())
    core = (left_triangle @ right_triangle.t()).cpu()  # small, and then quicker there than on a GPU
    try:
        u, values, v = torch.linalg.svd(core)
    except torch.linalg.LinAlgError:  # what torch says of NaN
        return None
    numbers = values.tolist()
    if not math.isfinite(sum(numbers)):
        return None
    mixed = torch.from_numpy(numpy.array(mixing(numbers))).to(core).t()
    return (mixed @ u.t()).to(left.device) @ left_basis.t(), (mixed @ v).to(right.device) @ right_basis.t()


def reduce_matrix(matrix: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor] | None:
    """The same for a matrix (n, m) of which one side is short: p = min(n, m) singular values.

    They are the roots of the eigenvalues of its product with itself, in float64, which is much quicker than its own
    decomposition, and right to 1e-8 of the largest.
    """
    if matrix.shape[0] > matrix.shape[1]:
        factors = reduce_matrix(matrix.t(), mixing)
        return None if factors is None else factors[::-1]
    wide = matrix.double()
    try:
        squares, basis = torch.linalg.eigh((wide @ wide.t()).cpu())
    except torch.linalg.LinAlgError:
        return None
    ascending = squares.tolist()
    if not math.isfinite(sum(ascending)):
        return None
    values = [math.sqrt(max(square, 0.0)) for square in reversed(ascending)]
    rows = mixing(values)
    # Row i of basis^T matrix is s_i v_i^T; values that count as zero have no direction.
    least = NEGLIGIBLE * values[0]
    rows = [row if value > least else [0.0] * len(row) for row, value in zip(rows, values, strict=True)]
    others = [[x / value for x in row] if value > least else row for row, value in zip(rows, values, strict=True)]
    both = numpy.array([row + other for row, other in zip(rows, others, strict=True)][::-1])
    mixed = (basis @ torch.from_numpy(both)).to(matrix).t()
    rank = len(rows[0])
    return mixed[:rank], mixed[rank:] @ matrix


class KroneckerSum(nn.Module):
    """A running sum of outer products, of which a rank-r approximation is kept: r (rows + columns) numbers.

    Unbiased, its expectation is the exact sum. Each addition alone has the least variance that this rank allows; the
    more terms one addition has, the fewer reductions there are, and the less variance in all. Biased, it is after
    each addition the best approximation of what it was and the new terms.

    All state is in ``state_dict``: a sum that is loaded goes on with the same bits, random signs included.

    Args:
        rows: n, of the matrix.
        columns: m, of the matrix.
        rank: r, from 1. From min(n, m) on, the sum is exact.
        unbiased: mix the smallest singular values at random, or drop them.
        bits: 16 keeps the factors as 16-bit integers, each with a range of its own up to its largest element, rounded
            to nearest; None keeps them in ``dtype``.
        block: the most columns that are added at once; with q = rank + block, an addition takes at most
            4 q (rows + columns) + 10 q^2 numbers of float32 in temporaries, and about 3 q (rows + columns) for large
            matrices.
        seed: of the signs.
        dtype: float32 or float64: of the factors, and of the computation.
        device: of the factors.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> total = KroneckerSum(64, 784, rank=4)
        >>> for d, a in samples:                   # (64, b) and (784, b)
        ...     total.add(d, a)
        >>> gradient = total.matrix()

    Source: arXiv 2009.03887; Benzing et al., ICML 2019.
    """

    holds_gradients = True  # so says the ledger of its buffers
    left: Tensor
    right: Tensor
    scales: Tensor | None

    def __init__(
        self,
        rows: int,
        columns: int,
        rank: int,
        *,
        unbiased: bool = True,
        bits: Literal[16] | None = None,
        block: int = 32,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("rows", rows), ("columns", columns), ("rank", rank), ("block", block)):
            if value < 1:
                raise ValueError(f"{name}={value} is not possible: give a whole number of at least 1.")
        if bits not in (None, 16):
            raise ValueError(f"bits={bits} is not possible: give 16, or None for factors of dtype.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype} is not possible: give torch.float32 or torch.float64.")
        self.rank, self.unbiased, self.bits, self.block, self.seed = rank, unbiased, bits, block, seed
        self.dtype = dtype
        self.draws = 0
        stored = torch.int16 if bits else dtype
        # Terms as rows: products with few of them are quicker that way.
        self.register_buffer("left", torch.zeros(rank, rows, dtype=stored, device=device))
        self.register_buffer("right", torch.zeros(rank, columns, dtype=stored, device=device))
        self.register_buffer("scales", torch.zeros(2, dtype=dtype, device=device) if bits else None)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        left, right = self._stored()
        return left.shape[1], right.shape[1]

    @property
    def takes_matrix(self) -> bool:
        """Whether a side of the matrix is so short that the whole matrix is no more than a block of terms."""
        return min(self.shape) <= self.rank + self.block

    def add(self, left: Tensor, right: Tensor) -> bool:
        """Add ``left right^T``.

        Args:
            left: (rows, b), of any floating dtype. More than ``block`` columns are added block by block, unless
                :attr:`takes_matrix`: the sum of all of them is then made first, exactly.
            right: (columns, b).

        Returns:
            Whether everything was added. A block that has a number that is not finite is left out.

        Raises:
            ValueError: the shapes do not fit.
        """
        if left.dim() != 2 or right.dim() != 2 or (left.shape[0], right.shape[0]) != self.shape:
            raise ValueError(
                f"terms of {tuple(left.shape)} and {tuple(right.shape)} do not fit a matrix of {self.shape}: give "
                "(rows, b) and (columns, b)."
            )
        if left.shape[1] != right.shape[1]:
            raise ValueError(f"{left.shape[1]} columns on the left and {right.shape[1]} on the right do not pair.")
        return self.add_rows(left.t(), right.t())

    def add_rows(self, left: Tensor, right: Tensor) -> bool:
        """Add ``left^T right``, for (b, rows) and (b, columns), as layers have them; see :meth:`add`."""
        device = left.device.type
        if torch.is_grad_enabled() or torch.is_autocast_enabled(device):  # which would round products
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return self.add_rows(left, right)
        left, right = left.to(self.dtype), right.to(self.dtype)
        if self.takes_matrix and self.rank + len(left) >= min(self.shape):
            return self.add_matrix(left.t() @ right)
        if len(left) <= self.block:
            return self._add_block(left, right)
        blocks = zip(left.split(self.block), right.split(self.block), strict=True)
        return min([self._add_block(*block) for block in blocks])

    def add_matrix(self, matrix: Tensor) -> bool:
        """Add a whole matrix (rows, columns), for those who have one anyway; see :meth:`add`."""
        device = matrix.device.type
        if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return self.add_matrix(matrix)
        left, right = self._rows()
        total = torch.addmm(matrix.to(self.dtype), left.t(), right)
        return self._keep(reduce_matrix(total, self._mixing(min(total.shape))))

    def _add_block(self, left: Tensor, right: Tensor) -> bool:
        mine, yours = self._rows()
        lefts, rights = torch.cat((mine, left)), torch.cat((yours, right))
        return self._keep(reduce_product(lefts, rights, self._mixing(min(len(lefts), *self.shape))))

    def factors(self) -> tuple[Tensor, Tensor]:
        """L (rows, r) and R (columns, r), of :attr:`dtype`."""
        left, right = self._rows()
        return left.t(), right.t()

    def matrix(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The sum (rows, columns), or some rows of it."""
        left, right = self._rows()
        return left[:, start:stop].t() @ right

    def _rows(self) -> tuple[Tensor, Tensor]:
        left, right = self._stored()
        if self.scales is None:
            return left, right
        of_left, of_right = self.scales.tolist()
        return left.to(self.dtype).mul_(of_left), right.to(self.dtype).mul_(of_right)

    def _stored(self) -> tuple[Tensor, Tensor]:
        # Not by attribute, which is slow in a module.
        left, right = self._buffers["left"], self._buffers["right"]
        assert left is not None
        assert right is not None
        return left, right

    @torch.no_grad()
    def reset(self) -> None:
        """Set the sum to zero."""
        self.left.zero_()
        self.right.zero_()

    def _mixing(self, count: int) -> Mixing:
        if not self.unbiased:
            return partial(biased_mixing, rank=self.rank)
        self.draws += 1
        return partial(unbiased_mixing, rank=self.rank, signs=random_signs(self.seed, self.draws, count))

    def _keep(self, factors: tuple[Tensor, Tensor] | None) -> bool:
        if factors is None:
            return False
        left, right = self._stored()
        if self.scales is not None:
            smallest = torch.finfo(self.dtype).tiny
            largest = [max(float(each), smallest) for each in torch._foreach_norm(factors, math.inf)]
            self.scales.copy_(self.scales.new_tensor(largest).div_(_LARGEST))
            torch._foreach_mul_(factors, [_LARGEST / each for each in largest])
            torch._foreach_round_(factors)
        left.copy_(factors[0])
        right.copy_(factors[1])
        return True

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.draws)

    def set_extra_state(self, state: Tensor) -> None:
        self.draws = int(state)

    def extra_repr(self) -> str:
        kind = "unbiased" if self.unbiased else "biased"
        return f"{self.shape[0]}, {self.shape[1]}, rank={self.rank}, {kind}" + (", 16 bits" if self.bits else "")
