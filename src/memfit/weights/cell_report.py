"""What the cells of a model went through: how often they were written, what that cost, and how long they will last."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from memfit.weights.cell_array import CellArray
from memfit.weights.technology import Technology

SECONDS_PER_YEAR = 365.25 * 24 * 3600


@dataclass(frozen=True)
class CellReport:
    """Wear and energy of cell arrays, together.

    Attributes:
        cells: how many there are.
        writes: of all cells.
        worst_cell: writes of the cell that was written most.
        histogram: (least writes of a bin, cells in it): bins 0, 1, 2 to 3, 4 to 7, ..., up to the worst cell's.
        bits_written: a write of a cell writes all of its bits.
        bits_read: a read of an array reads all bits of all of its cells.
        technology: what the memory is made of.
    """

    cells: int
    writes: int
    worst_cell: int
    histogram: tuple[tuple[int, int], ...]
    bits_written: int
    bits_read: int
    technology: Technology

    @property
    def write_joules(self) -> float | None:
        """Energy of all writes; None where the technology's is not known."""
        return _joules(self.bits_written, self.technology.write_picojoules)

    @property
    def read_joules(self) -> float | None:
        """Energy of all reads that were counted; None where the technology's is not known."""
        return _joules(self.bits_read, self.technology.read_picojoules)

    def lifetime_seconds(self, samples: int, samples_per_second: float) -> float:
        """How long the worst cell lasts when it is written on as often as so far; infinite when none was written.

        Args:
            samples: seen while the writes were counted.
            samples_per_second: that the device will see.

        Raises:
            ValueError: an argument is not positive.
        """
        if samples < 1 or not samples_per_second > 0:
            raise ValueError(f"samples={samples} and samples_per_second={samples_per_second} must be positive.")
        if not self.worst_cell:
            return math.inf
        return self.technology.endurance * samples / (self.worst_cell * samples_per_second)


def report(arrays: Iterable[CellArray], technology: Technology) -> CellReport:
    """What cell arrays went through; of a model, those in ``model.modules()``.

    Raises:
        ValueError: there is no array.

    Example:
        >>> arrays = [module for module in model.modules() if isinstance(module, CellArray)]
        >>> found = report(arrays, TECHNOLOGIES["rram"])
        >>> print(found.worst_cell, found.write_joules, found.lifetime_seconds(100_000, samples_per_second=1))
    """
    arrays = list(arrays)
    if not arrays:
        raise ValueError("there are no cells to report on: no weight is in a CellArray.")
    counts = torch.cat([array.writes.flatten().cpu() for array in arrays])
    return CellReport(
        cells=counts.numel(),
        writes=int(counts.sum()),
        worst_cell=int(counts.max()) if counts.numel() else 0,
        histogram=write_histogram(counts),
        bits_written=sum(int(array.writes.sum()) * array.bits for array in arrays),
        bits_read=sum(int(array.reads) * array.bits * array.writes.numel() for array in arrays),
        technology=technology,
    )


def write_histogram(counts: Tensor) -> tuple[tuple[int, int], ...]:
    """Cells by their writes: bins of doubling width, 0, 1, 2 to 3, 4 to 7, ..., as (least writes, cells)."""
    if not counts.numel():
        return ()
    # frexp's exponent is the number of binary digits: 0 of 0, 1 of 1, 2 of 2 and 3, and so on.
    digits = torch.frexp(counts.double()).exponent
    cells = torch.bincount(digits).tolist()
    return tuple((2 ** (number - 1) if number else 0, count) for number, count in enumerate(cells))


def _joules(bits: int, picojoules: float | None) -> float | None:
    return None if picojoules is None else bits * picojoules * 1e-12
