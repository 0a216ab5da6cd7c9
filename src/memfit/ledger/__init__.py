"""Where the memory of training goes: the five lines, measured (`ledger`) or without running anything (`estimate`), and
the operating system's view (`process_peak`)."""

from memfit.ledger.account import LINES, Instant, LiveTensor, Peak, Sample
from memfit.ledger.book import Ledger, ledger
from memfit.ledger.estimate import estimate
from memfit.ledger.process import ProcessPeak, process_peak

__all__ = [
    "LINES",
    "Instant",
    "Ledger",
    "LiveTensor",
    "Peak",
    "ProcessPeak",
    "Sample",
    "estimate",
    "ledger",
    "process_peak",
]
