"""Layers of Hugging Face's transformers trained through low-rank factors; imported when a model has one of them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memfit.gradients.low_rank_layer import LowRankLayer


class LowRankConv1D(LowRankLayer, Conv1D):
    """GPT-2's linear layer, whose weight is inputs by outputs, trained through low-rank factors."""

    plain_class = Conv1D
    inputs_first = True

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return ["weight"]

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {self.technique}"

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix("weight").linear(x, self.bias)
