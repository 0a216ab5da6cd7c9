"""Layers that learn through a running sum of low rank, with quantization in the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from memfit.convert import Technique
from memfit.convolution_input import checked_axes, padded_input
from memfit.gradients import steps
from memfit.gradients.convolution import Geometry
from memfit.gradients.low_rank_layer import above_rank
from memfit.gradients.matrix_layer import MatrixLayer
from memfit.gradients.steps import Watcher
from memfit.gradients.streaming_matrix import StreamingMatrix
from memfit.gradients.streaming_product import Convolution, Linear, Operator, streaming
from memfit.native import KRONECKER_SUM, operator
from memfit.weights.quantize import fake_quantize, quantize

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from memfit.gradients.streaming_low_rank import StreamingLowRank

# Ranges of the method's paper; those of weights follow the weights.
BIAS_RANGE = (-8.0, 8.0)
ACTIVATION_RANGE = (0.0, 2.0)
GRADIENT_RANGE = (-1.0, 1.0)


class StreamingLayer(MatrixLayer, Watcher):
    """A layer whose weight is a :class:`StreamingMatrix`. Its bias trains densely, and is rounded after each step."""

    holder = "streaming"
    technique: StreamingLowRank
    bias: Any  # a Parameter or None, which torch's layers declare in ways of their own

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return ["weight"]

    @classmethod
    def unsupported(cls, layer: nn.Module, technique: Technique) -> str | None:
        return above_rank(layer, ["weight"], cast("StreamingLowRank", technique).rank)

    @classmethod
    def obstacle(cls, layer: nn.Module, technique: Technique) -> str | None:
        weight = cast(Tensor, layer.weight)
        in_cells = cast("StreamingLowRank", technique).weight_bits is not None
        if in_cells and weight.is_floating_point() and weight.dtype not in (torch.float32, torch.float64):
            return f"has a weight of dtype {weight.dtype}, and cells hold float32 or float64: give weight_bits=None"
        if in_cells and not bool(weight.isfinite().all()):
            return "has a weight that is not finite, which cells do not hold"
        if cast("StreamingLowRank", technique).native:
            operator(KRONECKER_SUM)
        return super().obstacle(layer, technique)

    @classmethod
    def make_matrix(cls, weight: nn.Parameter, technique: Technique, name: str) -> StreamingMatrix:
        return StreamingMatrix(weight, cast("StreamingLowRank", technique), name)

    @classmethod
    def convert_(cls, layer: nn.Module, technique: Technique, name: str) -> None:
        super().convert_(layer, technique, name)
        converted = cast(StreamingLayer, layer)
        if converted.bias is not None and converted.technique.bias_bits is not None:
            converted.round_bias_()
            steps.watch(converted)

    def restore_(self) -> None:
        steps.unwatch(self)
        super().restore_()

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, or from a file
        super().__setstate__(state)
        if self.bias is not None and self.technique.bias_bits is not None:
            steps.watch(self)

    def watched(self) -> tuple[None, nn.Parameter]:
        assert self.bias is not None
        return None, self.bias

    def after_step(self, optimizer: Optimizer) -> None:
        self.round_bias_()

    @torch.no_grad()
    def round_bias_(self) -> None:
        """Bring the bias to its levels: what is below half a step is lost, as in the memory that it stands for."""
        bits = self.technique.bias_bits
        if self.bias is not None and bits is not None:
            self.bias.copy_(quantize(self.bias, bits, *BIAS_RANGE))

    def apply_(self, x: Tensor, operator: Operator) -> Tensor:
        """What ``operator`` computes of x, with the sum as what becomes of the weight's gradient."""
        matrices, bits = cast(nn.ModuleDict, self._modules["streaming"]), self.technique.gradient_bits
        matrix = cast(StreamingMatrix, matrices._modules["weight"])
        levels = None if bits is None else (bits, *GRADIENT_RANGE)
        agreement = matrix.min_agreement is not None
        return streaming(x, matrix.effective(), self.bias, operator, matrix.terms, matrix.note, levels, agreement)

    def quantized(self, x: Tensor) -> Tensor:
        """The input as the layer reads it."""
        bits = self.technique.activation_bits
        return x if bits is None else fake_quantize(x, bits, *ACTIVATION_RANGE)


class StreamingLinear(StreamingLayer, nn.Linear):
    """``nn.Linear`` whose weight is written rarely."""

    plain_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        y = self.apply_(self.quantized(input).reshape(-1, self.in_features), Linear())
        return y if input.dim() == 2 else y.view(*input.shape[:-1], self.out_features)


class StreamingConv2d(StreamingLayer, nn.Conv2d):
    """``nn.Conv2d`` without groups whose weight is written rarely."""

    plain_class = nn.Conv2d

    @classmethod
    def unsupported(cls, layer: nn.Module, technique: Technique) -> str | None:
        groups = cast(nn.Conv2d, layer).groups
        if groups > 1:
            return f"has {groups} groups, of which each would need a sum of its own: leave it out of where"
        return super().unsupported(layer, technique)

    def forward(self, input: Tensor) -> Tensor:
        single = checked_axes(self, input)
        x, padding = padded_input(self, self.quantized(input.unsqueeze(0) if single else input))
        y = self.apply_(x, Convolution(Geometry(self.stride, padding, self.dilation)))
        return y.squeeze(0) if single else y
