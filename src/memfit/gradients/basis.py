"""Bases V (r x n) for the row space of a gradient G (m x n), scaled so that a dense optimizer's learning rate suits.

The weight moves by ``dU V`` when U moves by dU. An optimizer like Adam moves every number of U by about the learning
rate, so that a number of the weight moves by that times the norm of a column of V, which is 1 on average when the rows
of V have norm sqrt(n / r). A Gaussian V of variance 1/r has such rows, and E[V^T V] = I.

Sources: Gooneratne et al., arXiv 2001.08885 (random factors); Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019,
arXiv 1905.13727 (a power iteration that starts from the last basis); Robert, Safaryan, Modoranu, Alistarh, "LDAdam",
ICLR 2025, arXiv 2410.16103 (moments that move from basis to basis).
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_basis(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """A Gaussian V (rank x columns), float32 on the CPU, of variance 1/rank, so that E[V^T V] = I."""
    return torch.randn(rank, columns, generator=generator, device="cpu", dtype=torch.float32) / rank**0.5


def power_basis(gradient: Tensor) -> Tensor:
    """The leading right singular vectors of V's own gradient as the rows of a new V, of the gradient's shape (r x n).

    U has followed G V^T, so that V's gradient U^T G is the second half of a power iteration on G^T G that started from
    the old V: its rows lean towards G's leading right singular vectors, and no m x n matrix is made or decomposed. That
    they are singular vectors, rather than any basis of the space they span, matters to optimizers that scale each
    number by itself, as Adam does.
    """
    rank, columns = gradient.shape
    # The decomposition of the thin matrix is that of a square one, r x r, and a rotation.
    orthogonal, triangle = torch.linalg.qr(gradient.t())
    return torch.linalg.svd(triangle).U.t() @ orthogonal.t() * (columns / rank) ** 0.5


def moved_coordinates(before: Tensor, after: Tensor) -> Tensor:
    """C (r x r) such that what was ``u`` in the basis ``before`` is about ``u C`` in the basis ``after`` (r x n each).

    With orthogonal rows of norm s, G is G V^T V / s^2 as far as V sees it, and its coordinates in V' are
    (G V^T) (V V'^T) / s^2. Rows that have been trained are orthogonal by and large.
    """
    rank, columns = after.shape
    return before @ after.t() * (rank / columns)
