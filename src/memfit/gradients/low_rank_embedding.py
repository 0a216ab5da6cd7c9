"""``nn.Embedding`` trained through low-rank factors: rows W_i + U_i V, with no gradient of the table's size.

A lookup is a product with one-hot inputs: dU has d V^T in the rows that were looked up, and dV is the sum of U_i^T d.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.convert import Technique
from memfit.gradients.low_rank_layer import LowRankLayer


class LowRankEmbedding(LowRankLayer, nn.Embedding):
    """``nn.Embedding`` trained through low-rank factors.

    With ``sparse=True`` the gradient of U is sparse, with the rows that were looked up; that of V is always dense.
    """

    plain_class = nn.Embedding

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return ["weight"]

    @classmethod
    def unsupported(cls, layer: nn.Module, technique: Technique) -> str | None:
        layer = cast(nn.Embedding, layer)
        if layer.max_norm is not None:
            return "has max_norm, which rewrites rows of the weight in forward, where a converted weight is frozen"
        if layer.scale_grad_by_freq:
            return "has scale_grad_by_freq, which weighs the rows of a gradient that is never formed"
        return super().unsupported(layer, technique)

    def forward(self, input: Tensor) -> Tensor:
        matrix = self.matrix("weight")
        tokens, padding = input.reshape(-1), self.padding_idx
        dtype = matrix.base.dtype
        left = F.embedding(tokens, matrix.left, padding, sparse=self.sparse).to(dtype)
        right = matrix.right.to(dtype)
        with torch.no_grad():
            y = F.embedding(tokens, matrix.base)
        if padding is not None:
            # The padding's row moves with a weight that it is tied to, but gives no gradient, not to V either.
            is_padding = (tokens == padding).unsqueeze(1)
            with torch.no_grad():
                y += is_padding * (matrix.left[padding].unsqueeze(1) * matrix.right).sum(0).to(dtype)
            left = left.masked_fill(is_padding, 0)
        # In place on the rows just gathered, which autograd does not need.
        return y.addmm_(left, right).view(*input.shape, self.embedding_dim)
