"""Errors that a user can act on: each message is one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType


class MemfitError(Exception):
    """Base of every error that memfit raises on purpose; the command line prints it and exits with 2."""


class ConversionError(MemfitError):
    """A technique cannot be applied to a layer: nothing matched, an unsupported layer, a rank that does not fit."""


class DataError(MemfitError):
    """Recordings, transcripts, images, weights or a model file that cannot be used."""


class CheckpointError(MemfitError):
    """A checkpoint that is corrupt, foreign, made with other settings, or that cannot be written."""


class TrainingError(MemfitError):
    """Training cannot go on, for example because the loss is no longer finite."""


class MissingExtraError(MemfitError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency when it is first needed.

    Args:
        module: name of the module, such as ``"soundfile"``.
        extra: the extra of memfit that brings it, such as ``"speech"``.

    Raises:
        MissingExtraError: the module is not installed; the message names the ``pip install`` that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f'{module} is needed here and is not installed: run `pip install "memfit[{extra}]"`.'
        ) from error
