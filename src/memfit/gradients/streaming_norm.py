"""Batch norm for a stream of single samples: moving averages in place of the batch's statistics.

    mean <- eta mean + (1 - eta) E[x],    square <- eta square + (1 - eta) E[x^2],    variance = square - mean^2

with expectations over the sample's positions and eta = 1 - 1/B, B being the period between writes of the weights. The
averages are constants to backward. Between samples they are the layer's own running statistics, so that it computes in
eval mode, and when it is restored, what it has learned.

Source: Gural, Nadeau, Tikekar, Murmann, arXiv 2009.03887.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memfit.convert import ConvertedLayer, Technique

if TYPE_CHECKING:
    from memfit.gradients.streaming_low_rank import StreamingLowRank


class _StreamingBatchNorm(ConvertedLayer, _BatchNorm):
    technique: StreamingLowRank
    plain_class: ClassVar[type[nn.Module]]
    takes_weights = False

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return []

    @classmethod
    def unsupported(cls, layer: nn.Module, technique: Technique) -> str | None:
        layer = cast(_BatchNorm, layer)
        if layer.running_mean is None:
            return "keeps no running statistics (track_running_stats=False), which it would stream"
        if layer.affine and not layer.weight.requires_grad:
            return "is frozen (requires_grad=False): its statistics are left alone as well"
        return None

    @classmethod
    def obstacle(cls, layer: nn.Module, technique: Technique) -> str | None:
        if cast("StreamingLowRank", technique).period == 1:
            return (
                "follows the samples with averages of about a period, and with period=1 would know the last one alone: "
                "freeze it, or give a longer period"
            )
        return None

    @classmethod
    def convert_(cls, layer: nn.Module, technique: Technique, name: str) -> None:
        layer.__class__ = cls
        cast(_StreamingBatchNorm, layer).technique = cast("StreamingLowRank", technique)

    def restore_(self) -> None:
        del self.technique
        self.__class__ = self.plain_class  # type: ignore[assignment]

    def plain_state(self, made: dict[nn.Module, Tensor]) -> dict[str, Tensor]:
        own = {**self._parameters, **self._buffers}
        return {name: tensor.detach() for name, tensor in own.items() if tensor is not None}

    @classmethod
    def reading(cls, layer: nn.Module, weight: str) -> Hashable:
        return None

    def tie_(self, weight: str, other: ConvertedLayer, other_weight: str) -> None:
        raise AssertionError("a layer that gives no weight away cannot share one")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if self.training:
            self._follow(input.detach())
        mean, variance = self.running_mean, self.running_var
        assert mean is not None
        assert variance is not None
        # Copies: the next sample changes the averages, maybe before this one's backward.
        return F.batch_norm(input, mean.clone(), variance.clone(), self.weight, self.bias, False, 0.0, self.eps)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        mean, variance, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None
        assert variance is not None
        assert count is not None
        if not x.numel():
            return
        new_variance, new_mean = torch.var_mean(x.to(mean.dtype), (0, *range(2, x.dim())), correction=0)
        if not bool((new_variance + new_mean).isfinite().all()):  # they would stay so for good
            warnings.warn("an input of a batch norm is not finite and was left out.", RuntimeWarning, stacklevel=3)
            return
        share = 1 / self.technique.period
        # Of means of squares, without the cancellation of large squares: the variance of a mixture of the two.
        variance.lerp_(new_variance, share).add_((new_mean - mean).square_(), alpha=share * (1 - share))
        mean.lerp_(new_mean, share)
        count.add_(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.technique}"


class StreamingBatchNorm1d(_StreamingBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with moving averages in place of the batch's statistics."""

    plain_class = nn.BatchNorm1d


class StreamingBatchNorm2d(_StreamingBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with moving averages in place of the batch's statistics."""

    plain_class = nn.BatchNorm2d
