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

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from memfit.errors import MemfitError
from memfit.gradients.mixing import biased_mixing, random_signs, start_of_signs, unbiased_mixing
from memfit.gradients.reduction import Mixing, reduce_matrix, reduce_product
from memfit.native import KRONECKER_SUM, operator, suits

_LARGEST = 2**15 - 1  # of 16 bits with a sign
# Up to so many numbers and terms NumPy is quicker, in one thread, and what it takes is next to nothing.
_SMALL, _FEW = 2**13, 20


_Result = TypeVar("_Result")
_without_warnings = np.errstate(all="ignore")  # numbers that are not finite are told of in words


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
            4 q (rows + columns) + 10 q^2 numbers of float32 in temporaries, about 3 q (rows + columns) for large
            matrices, and some 5 KB of Python's objects. Up to q (rows + columns) = 8192 on the CPU, most of that is in
            NumPy's arrays, which a ledger does not see.
        seed: of the signs.
        dtype: float32 or float64: of the factors, and of the computation.
        device: of the factors.
        native: let a C++ operator do small additions of float32 on the CPU, which are NumPy's otherwise; it is compiled
            on first use, which takes a compiler, ninja and about a minute. The random signs are the same, but those of
            singular vectors are not, so that the sums differ. Where it can't be compiled, a sum that is loaded from a
            file goes on without it.

    Raises:
        ValueError: an argument is out of range.
        ConversionError: the operator can't be compiled.

    Example:
        >>> total = KroneckerSum(64, 784, rank=4)
        >>> for d, a in samples:                   # (64, b) and (784, b)
        ...     total.add(d, a)
        >>> gradient = total.matrix()

    Source: arXiv 2009.03887; Benzing et al., ICML 2019.
    """

    holds_gradients = True  # so says the ledger of its buffers
    native = False
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
        native: bool = False,
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
        self.dtype, self.shape = dtype, (rows, columns)
        self.native = native
        if native:
            operator(KRONECKER_SUM)
        self.draws = 0
        self._least = _LARGEST * torch.finfo(dtype).tiny  # of the largest element: what it is divided by is a number
        stored = torch.int16 if bits else dtype
        # Terms as rows: products with few of them are quicker that way.
        self.register_buffer("left", torch.zeros(rank, rows, dtype=stored, device=device))
        self.register_buffer("right", torch.zeros(rank, columns, dtype=stored, device=device))
        self.register_buffer("scales", torch.zeros(2, dtype=dtype, device=device) if bits else None)

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
        if left.dim() != 2 or right.dim() != 2:
            raise ValueError(f"terms of {tuple(left.shape)} and {tuple(right.shape)} are not matrices.")
        return self.add_rows(left.t(), right.t())

    def add_rows(self, left: Tensor, right: Tensor) -> bool:
        """Add ``left^T right``, for (b, rows) and (b, columns), as layers have them; see :meth:`add`."""
        self._check_rows(left, right)
        return self._exactly(self._add_rows, left, right)

    def add_matrix(self, matrix: Tensor) -> bool:
        """Add a whole matrix (rows, columns), for those who have one anyway; see :meth:`add`."""
        self._check_matrix(matrix)
        return self._exactly(self._add_matrix, matrix)

    def _check_rows(self, left: Tensor, right: Tensor) -> None:
        if left.shape != (len(left), self.shape[0]) or right.shape != (len(right), self.shape[1]):
            raise ValueError(
                f"terms of {tuple(left.shape[1:])} and {tuple(right.shape[1:])} numbers do not fit a matrix of "
                f"{self.shape}."
            )
        if len(left) != len(right):
            raise ValueError(f"{len(left)} terms on the left and {len(right)} on the right do not pair.")

    def _check_matrix(self, matrix: Tensor) -> None:
        if matrix.shape != self.shape:
            raise ValueError(f"a matrix of {tuple(matrix.shape)} does not fit one of {self.shape}.")

    def _exactly(self, work: Callable[..., _Result], *terms: Tensor) -> _Result:
        """Without a graph, and without autocast, which would round products."""
        device = self._stored()[0].device.type
        terms = tuple((each if each.dtype == self.dtype else each.to(self.dtype)).resolve_neg() for each in terms)
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device):
            return work(*terms)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return work(*terms)

    def _add_rows(self, left: Tensor, right: Tensor) -> bool:
        if self.takes_matrix and self.rank + len(left) >= min(self.shape):
            return self._add_matrix(left.t() @ right)
        if len(left) <= self.block:
            return self._add_block(left, right)
        blocks = zip(left.split(self.block), right.split(self.block), strict=True)
        return min([self._add_block(*block) for block in blocks])

    @_without_warnings
    def _add_matrix(self, matrix: Tensor) -> bool:
        least = min(self.shape)
        small = self._is_small(matrix.numel(), least)
        if small and self._is_native(matrix):
            return self._natively("add_matrix", matrix)
        left, right, more = self._arrays(small, matrix)
        return self._keep(reduce_matrix(more + left.T @ right, self._mixing(least)))

    @_without_warnings
    def _add_block(self, left: Tensor, right: Tensor) -> bool:
        count = self.rank + len(left)
        small = self._is_small(count * sum(self.shape), count)
        if small and self._is_native(left, right):
            return self._natively("add_rows", left, right)
        parts = self._arrays(small, left, right)
        join = torch.cat if isinstance(parts[0], Tensor) else np.concatenate
        lefts, rights = join(parts[::2]), join(parts[1::2])
        del parts
        return self._keep(reduce_product(lefts, rights, self._mixing(min(count, *self.shape))))

    def _is_small(self, numbers: int, count: int) -> bool:
        """Whether so many numbers, of so many terms, are too few for torch."""
        return numbers <= _SMALL and count <= _FEW and self._stored()[0].is_cpu

    def _is_native(self, *terms: Tensor) -> bool:
        """Whether the C++ operator is to add these terms, and takes them."""
        if not self.native:
            return False
        held = self._stored()  # of which the last one is of the dtype in which is computed
        return self.dtype == torch.float32 and suits(held[-1], *terms) and all(each.is_contiguous() for each in held)

    def _natively(self, how: str, *terms: Tensor) -> bool:
        start = None
        if self.unbiased:
            self.draws += 1
            start = start_of_signs(self.seed, self.draws)
        added = bool(getattr(operator(KRONECKER_SUM), how)(*self._buffers.values(), *terms, start))
        if added:
            increment_version(self._stored())
        return added

    def _arrays(self, small: bool, *terms: Tensor) -> list[Any]:
        """The factors and more, as what is quicker: NumPy arrays, or tensors where it is much."""
        held = self._stored()
        if not small:
            return [*_rows(*held), *terms]
        return [*_rows(*[each.numpy() for each in held]), *[each.detach().numpy() for each in terms]]

    def factors(self) -> tuple[Tensor, Tensor]:
        """L (rows, r) and R (columns, r), of :attr:`dtype`."""
        left, right = _rows(*self._stored())
        return left.t(), right.t()

    def matrix(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The sum (rows, columns), or some rows of it."""
        left, right = _rows(*self._stored())
        product: Tensor = left[:, start:stop].t() @ right
        return product

    def _stored(self) -> list[Tensor]:
        """The factors, and the scales of 16-bit ones."""
        # Not by attribute, which is slow in a module.
        return [each for each in self._buffers.values() if each is not None]

    def inner_rows(self, left: Tensor, right: Tensor) -> float:
        """The inner product of the sum with ``left^T right``, terms as :meth:`add_rows` takes and refuses them."""
        self._check_rows(left, right)
        return self._exactly(self._inner, left, right)

    def inner_matrix(self, matrix: Tensor) -> float:
        """The inner product of the sum with a matrix (rows, columns)."""
        self._check_matrix(matrix)
        return self._exactly(self._inner, matrix)

    def squared_norm(self) -> float:
        """The inner product of the sum with itself."""
        return self._exactly(self._inner)

    @_without_warnings
    def _inner(self, *terms: Tensor) -> float:
        """That of the sum with itself, with a matrix, or with terms as rows."""
        numbers = max(each.numel() for each in (*self._stored(), *terms))
        left, right, *others = self._arrays(self._is_small(numbers, 1), *terms)
        if len(others) == 1:
            return float(((left @ others[0]) * right).sum())
        of_left, of_right = others or (left, right)
        return float(((of_left @ left.T) * (of_right @ right.T)).sum())

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

    def _keep(self, factors: tuple[Any, Any] | None) -> bool:
        if factors is None:
            return False
        held: list[Any] = self._stored()
        if not isinstance(factors[0], Tensor):
            increment_version(held)  # NumPy does not tell autograd of what it writes
            held = [each.numpy() for each in held]
        for number, factor in enumerate(factors):
            if self.bits:
                largest = max(float(factor.max()), -float(factor.min()), self._least)
                held[2][number] = largest / _LARGEST
                factor = (factor * (_LARGEST / largest)).round()
            held[number][:] = factor
        return True

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, or from a file
        super().__setstate__(state)
        if self.native:
            try:
                operator(KRONECKER_SUM)
            except MemfitError as error:
                warnings.warn(f"a sum goes on without its C++ operator: {error}", RuntimeWarning, stacklevel=2)
                self.native = False

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.draws)

    def set_extra_state(self, state: Tensor) -> None:
        self.draws = int(state)

    def extra_repr(self) -> str:
        kind = "unbiased" if self.unbiased else "biased"
        return f"{self.shape[0]}, {self.shape[1]}, rank={self.rank}, {kind}" + (", 16 bits" if self.bits else "")


def _rows(left: Any, right: Any, scales: Any = None) -> tuple[Any, Any]:
    """The numbers that what is stored stands for."""
    return (left, right) if scales is None else (left * scales[0], right * scales[1])
