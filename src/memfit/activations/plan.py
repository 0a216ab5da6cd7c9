"""How the maps of a convolution are cut into patches that belong to each other."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

from memfit.activations.patches import Cut, Cuts
from memfit.activations.tap_reads import Axis, Window

Taps = Literal["summed", "planar", "apart"]
"""What of a kernel counts: the sum of its taps, or each where it lies, of the plane nearest to it or of all of it."""


class Plan(NamedTuple):
    """How the maps of one call are cut.

    Attributes:
        inputs: patches of x: one for each of y, or such as cover it where taps are not summed.
        outputs: patches of y.
        shifts: on each axis, by how many patches neighbouring taps lie apart; 0 where taps are summed.
        reads: where taps are not summed, what they read on each axis.
        spread_over: input pixels that share one output pixel's gradient.
        pixels: of y in each patch, or None where patches at the border have fewer.
    """

    inputs: Cuts
    outputs: Cuts
    shifts: tuple[int, int]
    reads: tuple[Axis, Axis] | None
    spread_over: int
    pixels: int | None


@lru_cache(maxsize=512)
def plan(
    x: tuple[int, int], y: tuple[int, int], windows: tuple[Window, Window], patch: tuple[int, int], taps: Taps
) -> Plan:
    """Cut input and output maps of the given sizes (H, W) into patches that belong to each other.

    Args:
        x, y: sizes of the maps.
        windows: how the convolution reads each axis.
        patch: pixels of y in a patch.
        taps: what of the kernel counts.
    """
    axes = list(zip(x, y, windows, patch, strict=True))
    outputs = (_outputs(y[0], patch[0]), _outputs(y[1], patch[1]))
    pixels = prod(cut.width for cut in outputs) if all(cut.size == cut.end for cut in outputs) else None
    if taps != "summed" and any(window.kernel > 1 or window.padding for window in windows):
        (of_rows, rows), (of_columns, columns) = (_read_axis(*each, taps == "planar") for each in axes)
        return Plan((of_rows, of_columns), outputs, (0, 0), (rows, columns), 1, pixels)
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


def _read_axis(size: int, outputs: int, window: Window, patch: int, planar: bool) -> tuple[Cut, Axis]:
    """Patches that cover all of x, and what the taps read."""
    patch = min(patch, outputs)
    every = window.stride if window.kernel == 1 and window.padding == 0 else 1
    pixels = -(-size // every)
    width = min(patch * window.stride // every, pixels)
    is_planar = planar and window.dilation < patch * window.stride  # taps that read other patches are kept apart
    cut = Cut(size, width, -(-pixels // width), every=every)
    return cut, Axis(size, outputs, width * every, patch, window, is_planar)
