"""A sum of outer products made shorter: of many terms as few as the rank.

The terms are rows, as layers have them, of NumPy arrays or of tensors: the same code for both. A call of NumPy costs a
third of a call of torch's, which is what the time of small sums goes into; larger ones are not for NumPy, whose threads
are its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memfit.gradients.mixing import NEGLIGIBLE, Matrix

Mixing = Callable[[Sequence[float]], Matrix]
"""Of p singular values, largest first, makes M (p x r)."""


_NAN = (np.linalg.LinAlgError, torch.linalg.LinAlgError)  # what is said of it


def reduce_product(left: Any, right: Any, mixing: Mixing) -> tuple[Any, Any] | None:
    """Fewer terms for the sum of outer products ``left^T right``.

    Args:
        left: (q, n), float32 or float64; a NumPy array, or a tensor.
        right: (q, m), of its kind.
        mixing: is given p = min(n, m, q) singular values.

    Returns:
        (r, n) and (r, m) of the same kind, or None when a number is not finite.
    """
    if min(left.shape[1], right.shape[1]) <= left.shape[0]:
        return reduce_matrix(left.T @ right, mixing)
    left_basis, left_triangle = _qr(left.T)
    right_basis, right_triangle = _qr(right.T)
    core = left_triangle @ right_triangle.T
    try:
        u, values, v = _small(torch.linalg.svd, np.linalg.svd, core)
    except _NAN:
        return None
    numbers = values.tolist()
    if not math.isfinite(sum(numbers)):
        return None
    mixed = mixing(numbers).astype(values.dtype).T
    return _as(mixed @ u.T, left) @ left_basis.T, _as(mixed @ v, right) @ right_basis.T


def reduce_matrix(matrix: Any, mixing: Mixing) -> tuple[Any, Any] | None:
    """The same for a matrix (n, m) of which one side is short: p = min(n, m) singular values.

    They are the roots of the eigenvalues of its product with itself, in float64, which is much quicker than its own
    decomposition, and right to 1e-8 of the largest.
    """
    if matrix.shape[0] > matrix.shape[1]:
        factors = reduce_matrix(matrix.T, mixing)
        return None if factors is None else factors[::-1]
    wide = matrix.double() if isinstance(matrix, Tensor) else matrix.astype(np.float64)
    try:
        squares, basis = _small(torch.linalg.eigh, np.linalg.eigh, wide @ wide.T)
    except _NAN:
        return None
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    numbers = values.tolist()
    if not math.isfinite(sum(numbers)):
        return None
    # Row i of basis^T matrix is s_i v_i^T; values that count as zero have no direction.
    count = sum(number > NEGLIGIBLE * numbers[0] for number in numbers)
    mixed = mixing(numbers)[:count]
    directions = basis[:, : -count - 1 : -1]
    left, right = directions @ mixed, directions @ (mixed / values[:count, None])
    return _as(left.T, matrix), _as(right.T, matrix) @ matrix


def _qr(columns: Any) -> tuple[Any, Any]:
    """Torch's, which for long columns is quicker than NumPy's."""
    if isinstance(columns, Tensor):
        return torch.linalg.qr(columns)
    basis, triangle = torch.linalg.qr(torch.from_numpy(columns))
    return basis.numpy(), triangle.numpy()


def _small(by_torch: Callable[..., Any], by_numpy: Callable[..., Any], matrix: Any) -> list[np.ndarray[Any, Any]]:
    """A decomposition, of a tensor on the CPU, where small ones are quicker than on a GPU; as NumPy arrays."""
    if isinstance(matrix, Tensor):
        return [each.numpy() for each in by_torch(matrix.cpu())]
    return list(by_numpy(matrix))


def _as(array: np.ndarray[Any, Any], like: Any) -> Any:
    """The array, of the kind, dtype and device of another."""
    return torch.from_numpy(array).to(like) if isinstance(like, Tensor) else array.astype(like.dtype, copy=False)
