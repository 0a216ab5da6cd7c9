"""Recordings for the tests of the speech room: made up ones, and the real ones where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fsdd() -> Path:
    """The Free Spoken Digit Dataset's folder."""
    root = Path(__file__).parents[2]
    folder = Path(os.environ.get("MEMFIT_DATA", root.parent / "shared" / "data")) / "fsdd"
    if not folder.is_dir():
        pytest.skip(f"needs the Free Spoken Digit Dataset in {folder} (set MEMFIT_DATA)")
    return folder
