"""Online learning on a device whose weights are in non-volatile memory, simulated before there is silicon."""

from memfit.weights.cell_array import CellArray

__all__ = ["CellArray"]
