"""memfit trains the whole model in the memory you have."""

from memfit.convert import convert_, restore_, state_dict
from memfit.errors import (
    CheckpointError,
    ConversionError,
    DataError,
    MemfitError,
    MissingExtraError,
    TrainingError,
)
from memfit.gradients.low_rank import LowRankGradient
from memfit.schedule.allocator import release_freed_memory

__all__ = [
    "CheckpointError",
    "ConversionError",
    "DataError",
    "LowRankGradient",
    "MemfitError",
    "MissingExtraError",
    "TrainingError",
    "convert_",
    "release_freed_memory",
    "restore_",
    "state_dict",
]
