"""Numbers of things that a user gives: steps, images, samples."""

from __future__ import annotations

from memfit.errors import MemfitError

MOST = 2**63 - 1
"""More than this no counter of torch's holds."""


def check_count(what: str, value: int | None) -> None:
    """Refuse a number that is no number of things, or that nothing can count to.

    Args:
        what: what there are so many of, for the message: ``"number of steps"``.
        value: the number; None, where nothing was said, is fine.

    Raises:
        MemfitError: it is below 1 or above :data:`MOST`.
    """
    if value is not None and value < 1:
        raise MemfitError(f"the {what} must be 1 or more, not {value}.")
    if value is not None and value > MOST:
        raise MemfitError(f"the {what} must be at most 2^63 - 1, not a number of {len(str(value))} digits.")
