"""The folder of a run: what is in it, and what is refused before anything in it changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from memfit.errors import CheckpointError, DataError, MemfitError
from memfit.files import atomic_write, check_writable
from memfit.run.report import JSON, TaskReport, damaged
from memfit.run.state import differing_settings

R = TypeVar("R", bound=TaskReport)

MODEL = "model.safetensors"
REPORT = "report.json"
PAGE = "report.html"
CHECKPOINT = "checkpoint.safetensors"
WATCH = "watch.json"


def refuse_earlier_results(folder: Path) -> None:
    """Leave an earlier run's results alone.

    Raises:
        MemfitError: the folder holds some.
    """
    found = next((name for name in (REPORT, MODEL, PAGE, CHECKPOINT) if os.path.lexists(folder / name)), None)
    if found:
        raise MemfitError(
            f"{folder} holds an earlier run's {found}: give another --out, or --resume to go on with that run."
        )


def finished_report(folder: Path, settings: Mapping[str, JSON], kind: type[R]) -> R | None:
    """The report of the run in a folder, of this kind, or None if there is no finished run with its model.

    Raises:
        CheckpointError: the run had other settings.
        DataError: the report can't be read.
    """
    path = folder / REPORT
    if not os.path.exists(folder / MODEL):
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: the report of the earlier run can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise damaged(kind, str(path)) from error
    report = kind.from_json(text, str(path))
    known = {name: value for name, value in settings.items() if name in report.config}
    listed = differing_settings({name: report.config[name] for name in known}, known)
    if listed:
        raise CheckpointError(f"{path}: the run was made with other settings ({listed}): give those, or another --out.")
    return report


def prepare(folder: Path) -> None:
    """Make the folder and see whether one can write there, before the training rather than after it.

    Raises:
        MemfitError: the folder can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise MemfitError(
            f"{folder}: a file has that name, so it can't be the folder for the results: choose another."
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise MemfitError(f"{folder}: the folder for the results can't be made ({reason}): choose another.") from error
    for name in (CHECKPOINT, MODEL, PAGE, REPORT):
        check_writable(folder / name, "result", MemfitError)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, atomically; what UTF-8 lacks, as the name of a folder may have, is escaped.

    Raises:
        MemfitError: it can't be written; an earlier one is intact.
    """
    with atomic_write(path, "report", MemfitError) as file:
        file.write(text.encode(errors="backslashreplace"))
