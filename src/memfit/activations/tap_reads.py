"""Which patches of the input the taps of a kernel read, along one axis.

Let N[j, r, q] be the number of pixels of patch q of the output for which tap j reads a pixel of patch r of the input.
The kernel's values along the axis are written in a basis: functions b of the taps. Then

    T_b[r, q] = sum over j of  b[j] N[j, r, q]

is all that the gradients need of where taps lie. With one function for each tap, 1 there and 0 elsewhere, all of the
kernel counts; with the constant and the slope over the taps, orthonormal, the plane nearest to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from memfit.activations.patches import Cut

_ENTRIES = 1 << 16  # of a table that are laid out at once
_DENSE = 4096  # numbers of a table up to which a product with all of them is quicker than one with those not zero


class Window(NamedTuple):
    """How a convolution reads one spatial axis: in pixels, and ``padding`` before the first, of the ``mode``."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    mode: str = "zeros"


class Axis(NamedTuple):
    """One axis of a convolution, and its patches, of which the first begin at the first pixels.

    Attributes:
        size: pixels of the input.
        outputs: pixels of the output.
        width: pixels of the input in a patch.
        patch: pixels of the output in a patch.
        window: how the one is read for the other.
        is_planar: whether the kernel counts as a constant and a slope over three taps or more.
    """

    size: int
    outputs: int
    width: int
    patch: int
    window: Window
    is_planar: bool

    @property
    def of_input(self) -> int:
        """Patches of the input."""
        return -(-self.size // self.width)

    @property
    def of_output(self) -> int:
        """Patches of the output."""
        return -(-self.outputs // self.patch)

    @property
    def cut_of_input(self) -> Cut:
        """The input, cut into patches."""
        return Cut(self.size, self.width, self.of_input)

    @property
    def cut_of_output(self) -> Cut:
        """The output, cut into patches."""
        return Cut(self.outputs, self.patch, self.of_output)

    @property
    def suits_torch(self) -> bool:
        """Whether torch's operator pads this axis itself, alike on both sides, and reads all of its pixels."""
        kernel, stride, padding, dilation, mode = self.window
        outputs = (self.size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        return mode == "zeros" and outputs == self.outputs and (kernel > 1 or padding > 0 or stride == 1)

    @property
    def keeps_taps(self) -> bool:
        """Whether there is a function for each tap."""
        return not self.is_planar or self.window.kernel <= 2

    @property
    def basis(self) -> list[list[float]]:
        """Functions x taps; of lower degree first."""
        taps = range(self.window.kernel)
        if self.keeps_taps:
            return [[float(tap == place) for tap in taps] for place in taps]
        middle = (len(taps) - 1) / 2
        length = sum((tap - middle) ** 2 for tap in taps) ** 0.5
        return [[len(taps) ** -0.5] * len(taps), [(tap - middle) / length for tap in taps]]

    @property
    def degrees(self) -> list[int]:
        """Of each function: 1 for a slope, 0 for others."""
        return [0] * self.window.kernel if self.keeps_taps else [0, 1]


def gathering(axis: Axis, functions: Sequence[int], like: Tensor) -> Tensor:
    """T of some functions, those of a patch of the input one after the other.

    Returns:
        (patches of the input x functions, patches of the output), of the dtype and device of ``like``; sparse if large.
    """
    return _table(axis, functions, like, (axis.of_input * len(functions), axis.of_output), (len(functions), 1), (1, 0))


def spreading(axis: Axis, functions: Sequence[int], like: Tensor) -> Tensor:
    """T of some functions, those of a patch of the output one after the other.

    Returns:
        (patches of the input, patches of the output x functions), as of :func:`gathering`.
    """
    return _table(axis, functions, like, (axis.of_input, axis.of_output * len(functions)), (1, len(functions)), (0, 1))


def _table(
    axis: Axis,
    functions: Sequence[int],
    like: Tensor,
    shape: tuple[int, int],
    steps: tuple[int, int],
    places: tuple[int, int],
) -> Tensor:
    """T, in which patches are ``steps`` rows and columns apart, and a patch's functions ``places``."""
    basis = axis.basis
    of = [(n, tap, basis[f][tap]) for n, f in enumerate(functions) for tap in range(len(basis[f])) if basis[f][tap]]
    is_sparse = shape[0] * shape[1] > _DENSE and not torch.compiler.is_compiling()
    # In double precision torch adds in the same order each time; on the CPU, as not all devices have it.
    table = torch.zeros(shape, dtype=torch.float64)
    table = table.to_sparse() if is_sparse else table
    count = max(1, _ENTRIES // axis.outputs)
    for start in range(0, len(of), count):
        part = of[start : start + count]
        number, tap = torch.tensor([each[:2] for each in part]).unsqueeze(2).unbind(1)
        read = _pixels_read(axis, tap)
        rows = read.clamp(min=0) // axis.width * steps[0] + number * places[0]
        columns = (torch.arange(axis.outputs) // axis.patch * steps[1] + number * places[1]).expand_as(rows)
        at = torch.stack([rows.flatten(), columns.flatten()])
        values = (torch.tensor([[each[2]] for each in part], dtype=torch.float64) * (read >= 0)).flatten()
        if is_sparse:
            table = (table + torch.sparse_coo_tensor(at, values, shape, check_invariants=False)).coalesce()
        else:
            table.index_put_((at[0], at[1]), values, accumulate=True)
    return table.to(like.dtype).to(like.device)


def _pixels_read(axis: Axis, taps: Tensor) -> Tensor:
    """The pixel of the input that each tap (n, 1) reads for each pixel of the output, (n, outputs); -1 for a zero."""
    size, (_, stride, padding, dilation, mode) = axis.size, axis.window
    read = torch.arange(axis.outputs) * stride + (taps * dilation - padding)
    if mode == "circular":
        return read % size
    if mode == "replicate":
        return read.clamp(0, size - 1)
    if mode == "reflect":
        read = read.abs()
        return torch.where(read < size, read, 2 * (size - 1) - read)
    return torch.where(read < size, read, -1)


@lru_cache(maxsize=512)
def shares(axis: Axis) -> tuple[tuple[float, ...], ...] | None:
    """N of each tap by how many patches the input's is from the output's, where it depends on that alone.

    Returns:
        (taps, 2 s + 1) for a reach of s patches; None where that is long, at the border N is another, or not each tap
        is a function.
    """
    kernel, stride, padding, dilation, mode = axis.window
    is_even = axis.outputs % axis.patch == 0 and axis.width == axis.patch * stride
    if not (axis.keeps_taps and is_even and axis.size == axis.outputs * stride and mode == "zeros"):
        return None
    away = [[(y * stride + tap * dilation - padding) // axis.width for y in range(axis.patch)] for tap in range(kernel)]
    reach = max(abs(each) for row in away for each in row)
    if 2 * reach + 1 > kernel + 2:  # taps that a dilation holds far apart would make a large kernel of mostly zeros
        return None
    return tuple(tuple(float(row.count(step)) for step in range(-reach, reach + 1)) for row in away)
