"""What a convolution does to its input before torch's operator: see to its axes, and pad as the operator does not.

And what the operator reads of it: the patch at each pixel of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd


def frozen_pad(x: Tensor, sides: Sequence[int], mode: str) -> Tensor:
    """``F.pad`` that keeps no tensor for backward; torch's reflection and replication keep the input for its shape.

    Args:
        x: (B, C, ...), all axes after the second are padded.
        sides: before and after, last axis first, as for ``F.pad``.
        mode: ``"reflect"``, ``"replicate"``, ``"circular"`` or ``"constant"`` (zeros).
    """
    if mode in ("reflect", "replicate"):
        return _Pad.apply(x, tuple(sides), mode)
    return F.pad(x, tuple(sides), mode=mode)


def checked_axes(layer: _ConvNd, x: Tensor) -> bool:
    """Whether a convolution's input is a single item, without the batch's axis.

    Raises:
        RuntimeError: it has another number of axes, in torch's own words.
    """
    axes = len(layer.kernel_size)
    kind = f"Conv{'Transpose' if layer.transposed else ''}{axes}d"
    if x.dim() not in (axes + 1, axes + 2):
        raise RuntimeError(
            f"Expected {axes + 1}D (unbatched) or {axes + 2}D (batched) input to {kind}, "
            f"but got input of size: {list(x.shape)}"
        )
    return x.dim() == axes + 1


def padded_input(layer: _ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The batch x with the padding that the operator has none for, and the padding that is left to it."""
    none = (0,) * len(layer.kernel_size)
    sides = layer._reversed_padding_repeated_twice  # before and after, last axis first; of "same" too
    if not any(sides):
        return x, none
    if layer.padding_mode != "zeros":
        return frozen_pad(x, sides, layer.padding_mode), none
    if not isinstance(layer.padding, str):
        return x, layer.padding
    extra = [n for before, after in zip(sides[::2], sides[1::2], strict=True) for n in (0, after - before)]
    return (frozen_pad(x, extra, "constant") if any(extra) else x), tuple(sides[-2::-2])


def windows(
    x: Tensor,
    kernel: Sequence[int],
    output: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The patch of x that each pixel of the output reads: a view of x, or of a copy that is padded with zeros.

    Args:
        x: (B, C, H, W).
        kernel: its height and width.
        output: height and width of the output.
        stride, padding, dilation: of H and W.

    Returns:
        (B, H', W', C, kernel's height, kernel's width).
    """
    down, across = padding
    padded = F.pad(x, (across, across, down, down)) if down or across else x
    item, channel, row, pixel = padded.stride()
    return padded.as_strided(
        (len(x), *output, x.shape[1], *kernel),
        (item, row * stride[0], pixel * stride[1], channel, row * dilation[0], pixel * dilation[1]),
        padded.storage_offset(),
    )


class _Pad(torch.autograd.Function):
    """Reflection and replication, whose backward knows of the input its shape alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sides: tuple[int, ...], mode: str) -> Tensor:
        ctx.shape, ctx.sides = x.shape, sides
        ctx.kind = {"reflect": "reflection", "replicate": "replication"}[mode]
        return F.pad(x, sides, mode=mode)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        backward = getattr(torch.ops.aten, f"{ctx.kind}_pad{len(ctx.sides) // 2}d_backward")
        return backward(d, d.new_empty(1).expand(ctx.shape), ctx.sides), None, None
