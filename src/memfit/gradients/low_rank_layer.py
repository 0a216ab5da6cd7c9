"""What every layer with low-rank matrices shares, and the simplest of them, Linear."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from memfit.convert import Technique
from memfit.gradients.low_rank_matrix import LowRankMatrix, matrix_shape
from memfit.gradients.matrix_layer import MatrixLayer

if TYPE_CHECKING:
    from memfit.gradients.low_rank import LowRankGradient


def above_rank(layer: nn.Module, weights: list[str], rank: int, inputs_first: bool = False) -> str | None:
    """That a weight has a side below the rank, as the end of a sentence: factors would be larger than it."""
    for name in weights:
        sides = matrix_shape(cast(Tensor, layer._parameters[name]), inputs_first)
        if rank > min(sides):
            return (
                f"has a {name} of {sides[0]} x {sides[1]}, so the rank may be at most {min(sides)}, not {rank}: "
                "lower it, or leave the layer out of where"
            )
    return None


class LowRankLayer(MatrixLayer):
    """A layer whose matrices are :class:`LowRankMatrix`; reading one by its own name makes a new tensor each time."""

    holder = "low_rank"
    low_rank: nn.ModuleDict

    @classmethod
    def unsupported(cls, layer: nn.Module, technique: Technique) -> str | None:
        return above_rank(layer, cls.weight_names(layer), cast("LowRankGradient", technique).rank, cls.inputs_first)

    @classmethod
    def make_matrix(cls, weight: nn.Parameter, technique: Technique, name: str) -> LowRankMatrix:
        return LowRankMatrix(weight, cast("LowRankGradient", technique), name, cls.inputs_first)

    def matrix(self, name: str) -> LowRankMatrix:
        return cast(LowRankMatrix, self.low_rank[name])


class LowRankLinear(LowRankLayer, nn.Linear):
    """``nn.Linear`` trained through low-rank factors."""

    plain_class = nn.Linear

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return ["weight"]

    def forward(self, input: Tensor) -> Tensor:
        return self.matrix("weight").linear(input, self.bias)
