"""Which line of the user's code is at work."""

from __future__ import annotations

import os
import sys
from types import CodeType
from typing import TypeAlias

Place: TypeAlias = tuple[CodeType, int]
"""A function's code, and a line of it."""

# Frames of these are passed over on the way out: what called them is the user's.
_NOT_THE_USERS = frozenset({"torch", "memfit", *sys.stdlib_module_names})


def user_place() -> Place | None:
    """The innermost running line outside of PyTorch, memfit and Python's own library; None where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "__main__" or name.partition(".")[0] not in _NOT_THE_USERS:
            return frame.f_code, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def describe_place(place: Place | None) -> str:
    """``"model.py:42 in forward"``, the path as from the working directory if it is in there; ``""`` for None."""
    if place is None:
        return ""
    code, line = place
    path = code.co_filename
    folder = os.getcwd() + os.sep
    return f"{path.removeprefix(folder)}:{line} in {code.co_name}"
