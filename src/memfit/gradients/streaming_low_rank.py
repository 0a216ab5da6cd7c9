"""The technique of streaming low-rank training: its settings, and the layers that it converts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from memfit.convert import ConvertedLayer, Technique
from memfit.errors import ConversionError
from memfit.gradients.streaming_layer import StreamingConv2d, StreamingLinear
from memfit.gradients.streaming_norm import StreamingBatchNorm1d, StreamingBatchNorm2d


@dataclass(frozen=True)
class StreamingLowRank(Technique):
    """Write weights rarely: gradients of many samples add up at rank r, r (m + n) numbers in place of m n.

    For weights in non-volatile memory, where a write costs energy and wears a cell, and for large batches in the
    memory of one sample. Your loop stays as it is: backward adds the sample's gradient to a sum of low rank (a weight
    has no ``.grad``), and every ``period`` steps of the optimizer that holds the weight, right after its step, the mean
    of the sum is applied to the weight by plain gradient descent with the learning rate of the weight's group, and the
    sum starts anew. All else (biases, norms, layers that are not converted) the optimizer trains at each of its steps.
    Give the weights a group of their own when they need another learning rate. With momentum, weight decay or Adam the
    optimizer does to biases what it always does, and nothing of the kind to the weights. Several backward passes per
    step add up, as gradients do.

    ``nn.Linear``, ``nn.Conv2d`` without groups, and ``nn.BatchNorm1d`` and ``2d``, which then normalize with moving
    averages (eta = 1 - 1 / period) in place of the batch's statistics.

    Args:
        rank: r, from 1 to the smaller side of every matrix converted.
        period: B, steps of the optimizer from write to write; in an online loop, one step is one sample.
        unbiased: keep what the sum has above the rank as noise of mean zero; else the best approximation, of which
            what does not fit is lost. A biased sum that was not written in 100 periods starts anew.
        max_norm: divide the mean by its largest element, or by the moving average of those where that is larger:
            ``lr`` is then by how much the weight that moves most does.
        min_write_density: a share of the weight's cells. When fewer would change, nothing is written and the sum goes
            on for another period. Without ``max_norm`` a mean over n steps is applied with the learning rate times
            sqrt(n / period).
        min_agreement: from -1 to below 1. With the sum S, nothing is written either, and the sum goes on, while twice
            the inner products of each gradient with the sum before it, added up, are less than this share of |S|^2.
            They are 0 on average where nothing but noise is left: at 0 half of such sums are held back, at 0.05 nearly
            all. Of n gradients that are all alike the share is (n - 1) / n. A gradient is that of one use of the layer
            in one backward pass: a layer that is used twice for a sample agrees with itself. None: not asked for.
        weight_bits: of the cells that hold a weight; the conversion rounds it to them. None: not quantized, and always
            written.
        weight_range: weights are in [-range, range), a power of two. None: the smallest that holds the layer's weights.
        bias_bits: biases are rounded to so many bits in [-8, 8) after each step; None: not at all.
        activation_bits: inputs of converted layers are rounded to so many bits in [0, 2), straight-through, as suits
            images and what a ReLU gives; None: not at all.
        gradient_bits: gradients at the outputs of converted layers are rounded to so many bits in [-1, 1); None: not
            at all.
        factor_bits: 16 for factors of 16 bits with a range of their own; None for float32.
        block: the most terms (samples, or pixels of a convolution) that are added to the sum at once: memory for time,
            and for less variance. The workspace is (rank + block) (m + n) numbers, a few times.
        seed: of the random signs, together with the layer's name.
        native: let a C++ operator do small additions on the CPU, such as those of one sample; all else goes the usual
            way. It is compiled on first use, which takes a compiler, ninja and about a minute.

    Raises:
        ConversionError: a value that is out of range; on conversion, the operator can't be compiled.

    Source: Gural, Nadeau, Tikekar, Murmann, "Low-Rank Training of Deep Neural Networks for Emerging Memory Technology",
    arXiv 2009.03887, where all are quantized: ``StreamingLowRank(activation_bits=8, gradient_bits=8)``.

    Example:
        >>> memfit.convert_(model, memfit.StreamingLowRank(rank=4, period=100))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> for x, y in stream:                        # one sample at a time
        ...     optimizer.zero_grad()
        ...     loss(model(x), y).backward()
        ...     optimizer.step()
    """

    rank: int = 4
    period: int = 100
    unbiased: bool = True
    max_norm: bool = True
    min_write_density: float = 0.01
    min_agreement: float | None = None
    weight_bits: int | None = 8
    weight_range: float | None = None
    bias_bits: int | None = 16
    activation_bits: int | None = None
    gradient_bits: int | None = None
    factor_bits: Literal[16] | None = 16
    block: int = 32
    seed: int = 0
    native: bool = False

    layers: ClassVar[Mapping[type[nn.Module], type[ConvertedLayer]]] = {
        nn.Linear: StreamingLinear,
        nn.Conv2d: StreamingConv2d,
        nn.BatchNorm1d: StreamingBatchNorm1d,
        nn.BatchNorm2d: StreamingBatchNorm2d,
    }

    def __post_init__(self) -> None:
        for field, least in (("rank", 1), ("period", 1), ("block", 1), ("seed", 0)):
            value = getattr(self, field)
            if not _is_whole(value) or value < least:
                raise ConversionError(f"{field}={value!r} is not possible: give a whole number of at least {least}.")
        for field in ("weight_bits", "bias_bits", "activation_bits", "gradient_bits"):
            value = getattr(self, field)
            if value is not None and not (_is_whole(value) and 1 <= value <= 16):
                raise ConversionError(f"{field}={value!r} is not possible: give a whole number from 1 to 16, or None.")
        if self.factor_bits not in (16, None):
            raise ConversionError(f"factor_bits={self.factor_bits!r} is not possible: give 16, or None.")
        for field in ("unbiased", "max_norm", "native"):
            if not isinstance(getattr(self, field), bool):
                raise ConversionError(f"{field}={getattr(self, field)!r} is not possible: give True or False.")
        if not (isinstance(self.min_write_density, int | float) and 0 <= self.min_write_density <= 1):
            raise ConversionError(
                f"min_write_density={self.min_write_density!r} is not possible: give a share of the cells, 0 to 1."
            )
        share = self.min_agreement
        if share is not None and (isinstance(share, bool) or not (isinstance(share, int | float) and -1 <= share < 1)):
            raise ConversionError(
                f"min_agreement={share!r} is not possible: give a number from -1 to below 1, or None."
            )
        reach = self.weight_range
        if reach is not None and not (
            isinstance(reach, int | float) and 0 < reach < math.inf and math.frexp(reach)[0] == 0.5
        ):
            raise ConversionError(f"weight_range={reach!r} is not possible: give a power of two, or None.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
