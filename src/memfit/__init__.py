"""memfit trains the whole model in the memory you have."""

from memfit.activations.gradient_filter import GradientFilter
from memfit.convert import Technique, convert_, restore_, state_dict
from memfit.errors import (
    CheckpointError,
    ConversionError,
    DataError,
    MemfitError,
    MissingExtraError,
    TrainingError,
)
from memfit.fit import FitResult, StepRecord, fit
from memfit.gradients.low_rank import LowRankGradient
from memfit.gradients.streaming_low_rank import StreamingLowRank
from memfit.ledger import Ledger, Peak, ProcessPeak, estimate, ledger, process_peak
from memfit.schedule.allocator import release_freed_memory

__all__ = [
    "CheckpointError",
    "ConversionError",
    "DataError",
    "FitResult",
    "GradientFilter",
    "Ledger",
    "LowRankGradient",
    "MemfitError",
    "MissingExtraError",
    "Peak",
    "ProcessPeak",
    "StepRecord",
    "StreamingLowRank",
    "Technique",
    "TrainingError",
    "convert_",
    "estimate",
    "fit",
    "ledger",
    "process_peak",
    "release_freed_memory",
    "restore_",
    "state_dict",
]
