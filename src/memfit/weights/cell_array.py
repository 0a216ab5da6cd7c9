"""A weight as non-volatile memory holds it: in cells of a few bits, which wear with every write, and drift.

A cell holds one number of ``bits`` bits. It is written only when its level changes, and every write is counted. What is
not written stays as it is, bit for bit, drift included: there is no other way into the cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from memfit.errors import TrainingError
from memfit.weights.quantize import quantize, step_of


class CellArray(nn.Module):
    """Cells for the values of one weight.

    All state is in buffers, so that ``state_dict`` resumes exactly: ``values`` (what is read, of the weight's shape and
    dtype), ``writes`` (int32, of the same shape: writes of each cell since it was made) and ``reads`` (int64, scalar:
    how often the whole array was read, as :meth:`count_read_` was told).

    Args:
        values: the weight, float32 or float64, of any shape; it is quantized. Filling the cells at first is no write:
            it is done once, before the device is used. A Parameter stays this Parameter, which an optimizer may hold.
        bits: of a cell, 1 to 16.
        low: the lowest level.
        high: one step above the highest level; see :mod:`memfit.weights.quantize`.

    Raises:
        ValueError: bits and range have a step that is no power of two; values are not finite, or not floating point.

    Example:
        >>> cells = CellArray(torch.randn(8, 8) / 8)
        >>> cells.write_(cells.values - 0.01 * gradient)    # how many cells had to be written
        12
    """

    values: Tensor
    writes: Tensor
    reads: Tensor

    def __init__(self, values: Tensor, bits: int = 8, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        self.bits, self.low, self.high = bits, low, high
        self.step = step_of(bits, low, high)
        if values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"cells hold float32 or float64 values, not {values.dtype}.")
        if not bool(values.isfinite().all()):
            raise ValueError("the values that cells are to hold are not all finite.")
        quantized = quantize(values.detach(), bits, low, high).contiguous()
        if isinstance(values, nn.Parameter):
            values.data = quantized
            self.values = values
        else:
            self.register_buffer("values", quantized)
        self.register_buffer("writes", torch.zeros_like(quantized, dtype=torch.int32))
        self.register_buffer("reads", torch.zeros((), dtype=torch.int64, device=values.device))

    def extra_repr(self) -> str:
        return f"{tuple(self.values.shape)}, bits={self.bits}, range=[{self.low:g}, {self.high:g})"

    @torch.no_grad()
    def write_(self, values: Tensor, start: int = 0, at_least: int = 1) -> int:
        """Write new values, quantized, to the cells whose level they change.

        Args:
            values: of the cells' shape; fewer along the first axis are for the cells from ``start`` on.
            start: the first of the cells along the first axis.
            at_least: nothing is written when fewer cells would be.

        Returns:
            How many cells were written.

        Raises:
            TrainingError: a value is not a number; nothing is written then. Infinite ones are the range's ends.
        """
        levels, changed, count = self._changes(values, start)
        if count < max(at_least, 1):
            return 0
        held, writes = self._run(self.values, values, start), self._run(self.writes, values, start)
        torch.where(changed, levels.mul_(self.step), held, out=held)
        writes.add_(changed)
        return count

    @torch.no_grad()
    def would_change(self, values: Tensor, start: int = 0) -> int:
        """How many cells :meth:`write_` would write; raises as it does."""
        return self._changes(values, start)[2]

    def count_read_(self, times: int = 1) -> None:
        """Note that all cells were read: a forward pass reads them once, and a backward pass to the input once more."""
        self.reads.add_(times)

    @torch.no_grad()
    def drift_analog_(self, sigma: float, generator: torch.Generator | None = None) -> None:
        """Brownian drift: independent Gaussian noise on every cell, ends of the range kept. No write is counted.

        The cells are then between levels, where they stay until they are written.

        Args:
            sigma: standard deviation, in units of the values.
            generator: on the cells' device; torch's own when None.
        """
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigma={sigma} is not possible: give a number from 0.")
        noise = torch.randn(self.values.shape, generator=generator, dtype=self.values.dtype, device=self.values.device)
        self.values.add_(noise, alpha=sigma).clamp_(self.low, self.high - self.step)

    @torch.no_grad()
    def drift_digital_(self, probability: float, generator: torch.Generator | None = None) -> None:
        """Each bit of every cell's binary code flips with this probability, independently. No write is counted.

        The code counts the levels from the lowest, which is two's complement but for its first bit, inverted: a flip
        changes the value as in two's complement.

        Args:
            probability: from 0 to 1.
            generator: on the cells' device; torch's own when None.
        """
        cells = self.values.numel()
        bits = successes(self.bits * cells, probability, generator, self.values.device)
        touched, place = (bits % cells if cells else bits).unique(return_inverse=True)
        mask = torch.zeros_like(touched).index_add_(0, place, 2 ** (bits // max(cells, 1)))
        lowest = round(self.low / self.step)
        held = quantize(self.values.take(touched), self.bits, self.low, self.high)  # in whatever memory format
        codes = held.div_(self.step).long() - lowest
        self.values.put_(touched, ((codes ^ mask) + lowest).to(self.values.dtype) * self.step)

    @staticmethod
    def _run(whole: Tensor, part: Tensor, start: int) -> Tensor:
        """What ``part`` is for, along the first axis; a shape that does not fit is not seen to here."""
        return whole[start : start + len(part)] if whole.dim() and part.dim() else whole

    def _changes(self, values: Tensor, start: int) -> tuple[Tensor, Tensor, int]:
        """The levels of the values, in steps; where these differ from the cells' levels; and at how many cells."""
        held = self._run(self.values, values, start)
        if values.shape != held.shape:
            raise ValueError(f"values {tuple(values.shape)} are not of the cells' shape {tuple(self.values.shape)}.")
        lowest, highest = self.low / self.step, self.high / self.step - 1
        levels = values.to(self.values.dtype).mul(1 / self.step).round_().clamp_(lowest, highest)
        # A drifted cell lies between levels; rewriting it with the level it is read as would change nothing.
        changed = levels != held.mul(1 / self.step).round_()
        count = int(changed.count_nonzero())
        if count and bool(levels.sum().isnan()):  # which no cell's level is equal to
            raise TrainingError("a weight that is to be written is not a number: lower the learning rate.")
        return levels, changed, count


def successes(
    trials: int, probability: float, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Which of so many independent trials succeed, in time and memory of the successes and not of the trials.

    The gaps between successes are geometric: floor(log U / log(1 - p)) failures each.

    Args:
        trials: how many.
        probability: of each to succeed, from 0 to 1.
        generator: on ``device``; torch's own when None.
        device: of the result.

    Returns:
        Numbers of the successful trials, from 0, in order; int64.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"a probability of {probability} is not possible: give one from 0 to 1.")
    if not trials or not probability:
        return torch.empty(0, dtype=torch.int64, device=device)
    found, last = [], -1.0
    while last < trials:
        expected = (trials - last) * probability
        draws = int(expected + 4 * math.sqrt(expected) + 8)
        uniform = 1 - torch.rand(draws, generator=generator, dtype=torch.float64, device=device)  # never 0
        failures = uniform.log_().div_(math.log1p(-probability) if probability < 1 else -math.inf).floor_()
        found.append(last + (failures + 1).cumsum(0))
        last = float(found[-1][-1])
    numbers = torch.cat(found)
    return numbers[numbers < trials].long()
