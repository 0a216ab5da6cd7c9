"""The technique of low-rank gradients: its settings, and the layers that it converts.

Source: Gooneratne, Sim, Zadrazil, Kabel, Beaufays, Motta, "Low-rank Gradient Approximation for Memory-Efficient
On-device Training of Deep Neural Network", ICASSP 2020, arXiv 2001.08885.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from memfit.convert import ConvertedLayer, Technique
from memfit.errors import ConversionError
from memfit.gradients.low_rank_attention import LowRankMultiheadAttention
from memfit.gradients.low_rank_conv import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
)
from memfit.gradients.low_rank_embedding import LowRankEmbedding
from memfit.gradients.low_rank_gru import LowRankGRU
from memfit.gradients.low_rank_layer import LowRankLinear
from memfit.gradients.low_rank_lstm import LowRankLSTM

POWER_REFRESH = 15  # steps; see docs/bases.md


@dataclass(frozen=True)
class LowRankGradient(Technique):
    """Train weight matrices through rank-r factors: gradients and optimizer state shrink from m n to r (m + n) numbers.

    The weight itself keeps its full rank: the factors are a vehicle for the update, and ``memfit.restore_`` or
    ``memfit.state_dict`` give the plain weight with the update in it. Vectors (biases, norms) train densely.

    Args:
        rank: r, from 1 to the smaller side of every matrix converted.
        sides: ``"both"`` trains U and V. ``"left"`` trains U alone and keeps V fixed: the layer then saves N x r
            numbers for its weight gradient in place of its N x n input.
        basis: how V is chosen. ``"random"``: Gaussian. ``"power"``: Gaussian at first, and at each refresh the right
            singular vectors of V's own gradient, which lean towards the dense gradient's leading ones. The optimizer
            then moves U alone, keeps nothing for V, and its moments of U move to the new basis. It needs V's gradient,
            and so ``sides="both"``.
        refresh: every so many optimizer steps merge U V into the weight and change V, so that the sum of the updates is
            not bound to one basis. With a random basis the optimizer's moments of the factors are reset. None: never,
            and every 15 steps with a power basis.
        seed: of the bases, together with the layer's name.
        rematerialize: of an LSTM or GRU, keep the outputs in place of the gates, a quarter or third of the size, and
            compute the gates anew in backward, with one more product per matrix.

    Raises:
        ConversionError: a value that is out of range.

    Source: arXiv 2001.08885.

    Example:
        >>> memfit.convert_(model, memfit.LowRankGradient(rank=16), where="encoder.*")
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    """

    rank: int
    sides: Literal["both", "left"] = "both"
    basis: Literal["random", "power"] = "random"
    refresh: int | None = None
    seed: int = 0
    rematerialize: bool = False

    layers: ClassVar[Mapping[type[nn.Module], type[ConvertedLayer]]] = {
        nn.Linear: LowRankLinear,
        nn.Conv1d: LowRankConv1d,
        nn.Conv2d: LowRankConv2d,
        nn.Conv3d: LowRankConv3d,
        nn.ConvTranspose1d: LowRankConvTranspose1d,
        nn.ConvTranspose2d: LowRankConvTranspose2d,
        nn.ConvTranspose3d: LowRankConvTranspose3d,
        nn.Embedding: LowRankEmbedding,
        nn.LSTM: LowRankLSTM,
        nn.GRU: LowRankGRU,
        nn.MultiheadAttention: LowRankMultiheadAttention,
    }

    late_layers: ClassVar[Mapping[str, str]] = {
        "transformers.pytorch_utils.Conv1D": "memfit.gradients.low_rank_transformers.LowRankConv1D",
    }

    def __post_init__(self) -> None:
        for field, value, least in (("rank", self.rank, 1), ("refresh", self.refresh, 1), ("seed", self.seed, 0)):
            optional = field == "refresh" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConversionError(f"{field}={value!r} is not possible: give a whole number of at least {least}.")
        if self.sides not in ("both", "left"):
            raise ConversionError(f'sides={self.sides!r} is not known: choose "both" or "left".')
        if self.basis not in ("random", "power"):
            raise ConversionError(f'basis={self.basis!r} is not known: choose "random" or "power".')
        if self.basis == "power":
            self._check_power()

    def _check_power(self) -> None:
        if self.sides == "left":
            raise ConversionError('basis="power" takes V from its own gradient, which sides="left" does without.')
        if self.refresh is None:
            object.__setattr__(self, "refresh", POWER_REFRESH)
        elif self.refresh < 2:
            raise ConversionError('refresh=1 is too often for basis="power": right after a refresh V has no gradient.')
