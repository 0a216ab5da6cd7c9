"""Convolutions trained through low-rank factors, plain and transposed, of one to three axes.

All of their arguments are as ever: stride, padding (numbers, ``"same"``, ``"valid"``), padding mode, dilation, groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from memfit.convert import Technique
from memfit.convolution_input import checked_axes, padded_input
from memfit.gradients.convolution import (
    Geometry,
    low_rank_conv,
    low_rank_conv_transpose,
)
from memfit.gradients.low_rank_layer import LowRankLayer
from memfit.gradients.low_rank_matrix import matrix_shape

if TYPE_CHECKING:
    from memfit.gradients.low_rank import LowRankGradient


class _LowRankConvolution(LowRankLayer, _ConvNd):
    """What convolutions and transposed ones share."""

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return ["weight"]

    @classmethod
    def unsupported(cls, layer: nn.Module, technique: Technique) -> str | None:
        """With groups, one pair has r channels of each group: that must be fewer than the group has."""
        layer = cast(_ConvNd, layer)
        rank = cast("LowRankGradient", technique).rank
        rows, columns = matrix_shape(layer.weight, cls.inputs_first)
        sides = (rows, columns // layer.groups) if cls.inputs_first else (rows // layer.groups, columns)
        if layer.groups == 1 or rank < min(sides):
            return super().unsupported(layer, technique)
        return (
            f"has {layer.groups} groups with a weight of {sides[0]} x {sides[1]} each, where factors of rank {rank} "
            f"save nothing: leave it out of where"
        )


class _LowRankConv(_LowRankConvolution):
    def forward(self, input: Tensor) -> Tensor:
        single = checked_axes(self, input)
        x, padding = padded_input(self, input.unsqueeze(0) if single else input)
        matrix = self.matrix("weight")
        by = Geometry(self.stride, padding, self.dilation, groups=self.groups)
        y = low_rank_conv(x, matrix.base, self.bias, matrix.left, matrix.right, by)
        return y.squeeze(0) if single else y


class LowRankConv1d(_LowRankConv, nn.Conv1d):
    """``nn.Conv1d`` trained through low-rank factors."""

    plain_class = nn.Conv1d


class LowRankConv2d(_LowRankConv, nn.Conv2d):
    """``nn.Conv2d`` trained through low-rank factors."""

    plain_class = nn.Conv2d


class LowRankConv3d(_LowRankConv, nn.Conv3d):
    """``nn.Conv3d`` trained through low-rank factors."""

    plain_class = nn.Conv3d


class _LowRankConvTranspose(_LowRankConvolution, _ConvTransposeNd):
    """The weight is stored inputs by outputs: V projects the input, and U spreads the projection."""

    inputs_first = True

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        single = checked_axes(self, input)
        axes = len(self.kernel_size)
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]  # torch declares lists and passes tuples
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            axes,
            self.dilation,  # type: ignore[arg-type]
        )
        matrix = self.matrix("weight")
        by = Geometry(
            self.stride, cast(tuple[int, ...], self.padding), self.dilation, True, tuple(output_padding), self.groups
        )
        x = input.unsqueeze(0) if single else input
        y = low_rank_conv_transpose(x, matrix.base, self.bias, matrix.left, matrix.right, by)
        return y.squeeze(0) if single else y


class LowRankConvTranspose1d(_LowRankConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` trained through low-rank factors."""

    plain_class = nn.ConvTranspose1d


class LowRankConvTranspose2d(_LowRankConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` trained through low-rank factors."""

    plain_class = nn.ConvTranspose2d


class LowRankConvTranspose3d(_LowRankConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` trained through low-rank factors."""

    plain_class = nn.ConvTranspose3d
