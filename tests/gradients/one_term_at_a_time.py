"""The streaming Kronecker sum as its description reads, one outer product at a time: slow, and easy to believe."""

from __future__ import annotations

import torch
from torch import Tensor


class OneTermAtATime:
    """L R^T of rank r: q = r + 1 columns are decomposed, and one Householder reflection makes them r again."""

    def __init__(self, rows: int, columns: int, rank: int, unbiased: bool, generator: torch.Generator) -> None:
        self.left, self.right = torch.zeros(rows, rank), torch.zeros(columns, rank)
        self.unbiased, self.generator = unbiased, generator

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add the columns of (rows, b) and (columns, b), one after the other."""
        for d, a in zip(left.t(), right.t(), strict=True):
            self.add_term(d, a)

    def add_term(self, d: Tensor, a: Tensor) -> None:
        rank = self.left.shape[1]
        left_basis, left_triangle = torch.linalg.qr(torch.cat((self.left, d.unsqueeze(1)), 1))
        right_basis, right_triangle = torch.linalg.qr(torch.cat((self.right, a.unsqueeze(1)), 1))
        u, values, v = torch.linalg.svd(left_triangle @ right_triangle.t())
        mixed = self.mixing(values) if self.unbiased else values.sqrt().diag()[:, :rank]
        self.left, self.right = left_basis @ u @ mixed, right_basis @ v.t() @ mixed

    def mixing(self, values: Tensor) -> Tensor:
        q = len(values)
        first = next(i for i in range(q - 1) if (q - 1 - i) * values[i] <= values[i:].sum() * (1 + 1e-6))
        k = q - 1 - first
        total = values[first:].sum()
        mixed = torch.zeros(q, q - 1)
        mixed[:first, :first] = values[:first].sqrt().diag()
        if total > 0:
            x0 = (1 - values[first:] * k / total).clamp(min=0).sqrt()
            axis = torch.zeros(k + 1)
            axis[0] = 1.0
            normal = x0 - axis
            if normal.norm() > 1e-6:
                normal = normal / normal.norm()
            reflection = torch.eye(k + 1) - 2 * torch.outer(normal, normal)  # its first column is x0
            signs = torch.randint(0, 2, (k + 1, 1), generator=self.generator) * 2.0 - 1
            mixed[first:, first:] = (total / k).sqrt() * signs * reflection[:, 1:]
        return mixed

    def matrix(self) -> Tensor:
        return self.left @ self.right.t()
