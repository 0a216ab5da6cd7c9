"""How the maps of a convolution are cut into patches that belong to each other."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

from memfit.activations import taps_apart
from memfit.activations.patches import Cut, Cuts


class Window(NamedTuple):
    """How a convolution reads one spatial axis: in pixels, and ``padding`` before the first, of the ``mode``."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    mode: str = "zeros"


class Plan(NamedTuple):
    """How the maps of one call are cut.

    Attributes:
        inputs: patches of x: one for each of y, or with taps apart such as cover it.
        outputs: patches of y.
        shifts: on each axis, by how many patches neighbouring taps lie apart; 0 where taps are summed.
        reads: where taps are apart, for each axis and tap how many pixels of each patch of y read each patch of x.
        spread_over: input pixels that share one output pixel's gradient.
        pixels: of y in each patch, or None where patches at the border have fewer.
    """

    inputs: Cuts
    outputs: Cuts
    shifts: tuple[int, int]
    reads: taps_apart.Reads | None
    spread_over: int
    pixels: int | None


@lru_cache(maxsize=512)
def plan(
    x: tuple[int, int], y: tuple[int, int], windows: tuple[Window, Window], patch: tuple[int, int], apart: bool = False
) -> Plan:
    """Cut input and output maps of the given sizes (H, W) into patches that belong to each other.

    Args:
        x, y: sizes of the maps.
        windows: how the convolution reads each axis.
        patch: pixels of y in a patch.
        apart: keep the kernel's taps apart.
    """
    axes = list(zip(x, y, windows, patch, strict=True))
    outputs = (_outputs(y[0], patch[0]), _outputs(y[1], patch[1]))
    pixels = prod(cut.width for cut in outputs) if all(cut.size == cut.end for cut in outputs) else None
    if apart and any(window.kernel > 1 or window.padding for window in windows):
        (of_rows, rows), (of_columns, columns) = (_read_axis(*each) for each in axes)
        return Plan((of_rows, of_columns), outputs, (0, 0), taps_apart.of_axes(rows, columns), 1, pixels)
    inputs, shifts, strides = zip(*(_plan_axis(*each) for each in axes), strict=True)
    return Plan(inputs, outputs, shifts, None, prod(strides), pixels)


def _outputs(size: int, patch: int) -> Cut:
    patch = min(patch, size)
    return Cut(size, patch, -(-size // patch))


def _plan_axis(size: int, outputs: int, window: Window, patch: int) -> tuple[Cut, int, int]:
    """The patches of x, how many of them neighbouring taps lie apart, and the stride."""
    patch = min(patch, outputs)
    kernel, stride, padding, dilation, _ = window
    every = 1
    if kernel == 1 and padding == 0:  # the pixels between are not read
        every, stride = stride, 1
    width = patch * stride
    # So that both patches have one centre, to the pixel: halves towards 0.
    origin = int((dilation * (kernel - 1) + 1 - stride) / 2 - padding)
    is_wide = kernel % 2 == 1 and kernel > 1 and dilation >= width  # taps that are apart anyway, and far
    return Cut(size, width, -(-outputs // patch), origin, every), round(dilation / width) if is_wide else 0, stride


def _read_axis(size: int, outputs: int, window: Window, patch: int) -> tuple[Cut, taps_apart.Axis]:
    """Patches that cover all of x, and which of them each tap reads."""
    patch = min(patch, outputs)
    kernel, stride, padding, dilation, mode = window
    every = stride if kernel == 1 and padding == 0 else 1
    pixels = -(-size // every)
    width = min(patch * stride // every, pixels)
    positions = [
        [
            taps_apart.position(pixel * stride // every + tap * dilation - padding, pixels, mode)
            for pixel in range(outputs)
        ]
        for tap in range(kernel)
    ]
    cut = Cut(size, width, -(-pixels // width), every=every)
    return cut, taps_apart.reads(pixels, outputs, positions, (patch, width))
