"""Which line of the user's code is at work."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from types import CodeType
from typing import TypeAlias

Place: TypeAlias = tuple[CodeType, int]
"""A function's code, and a line of it."""

# Frames of these are passed over on the way out: what called them is the user's.
_NOT_THE_USERS = frozenset({"torch", "memfit", *sys.stdlib_module_names})


def is_users(module: object) -> bool:
    """Whether code of a module of this name is the user's, or a library's that the user has chosen."""
    name = str(module or "")
    return name == "__main__" or name.partition(".")[0] not in _NOT_THE_USERS


def user_place() -> Place | None:
    """The innermost running line outside of PyTorch, memfit and Python's own library; None where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_globals.get("__name__")):
            return frame.f_code, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def describe_place(place: Place | None) -> str:
    """``"model.py:42 in forward"``, the path as from the working directory if it is in there; ``""`` for None."""
    if place is None:
        return ""
    code, line = place
    path = code.co_filename
    with suppress(FileNotFoundError):  # the working directory may be gone
        path = path.removeprefix(os.getcwd() + os.sep)
    return f"{path}:{line} in {code.co_name}"
