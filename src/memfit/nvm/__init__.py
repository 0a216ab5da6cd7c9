"""Online learning on a device whose weights are in non-volatile memory, simulated before there is silicon."""

from memfit.weights.cell_array import CellArray
from memfit.weights.cell_report import CellReport, report
from memfit.weights.technology import TECHNOLOGIES, Technology

__all__ = ["TECHNOLOGIES", "CellArray", "CellReport", "Technology", "report"]
