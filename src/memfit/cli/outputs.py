"""Files that a command writes at its end: looked at before anything is measured, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from memfit.errors import MemfitError
from memfit.files import atomic_write, check_writable


def check_outputs(files: Mapping[str, Path | None], target: str | None = None) -> None:
    """Refuse files that could not be written or should not be.

    Args:
        files: by what is to be written there; None for what is not.
        target: the code that is measured, ``file.py:function``.

    Raises:
        MemfitError: a file is the target itself, is given twice, is no ordinary file, or cannot be written.
    """
    taken: list[Path] = []
    source = None if target is None else Path(target.rpartition(":")[0]).resolve()
    for what, file in files.items():
        if file is None:
            continue
        place = file.resolve()
        if place == source:
            raise MemfitError(f"{file} is the target itself: choose another file for the {what}.")
        if place in taken:
            raise MemfitError(f"{file} is given for two outputs: choose a file for each.")
        if place.exists() and not place.is_file() and not place.is_dir():
            raise MemfitError(f"{file} is no ordinary file: choose another for the {what}.")
        check_writable(file, what, MemfitError)
        taken.append(place)


def write_output(path: Path, what: str, content: bytes) -> MemfitError | None:
    """Write a whole file or none; what went wrong, if anything did."""
    try:
        with atomic_write(path, what, MemfitError) as file:
            file.write(content)
    except MemfitError as error:
        return error
    return None
