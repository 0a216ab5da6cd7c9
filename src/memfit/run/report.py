"""What the reports of all tasks have in common: ``report.json``, its reading back, and what the figures depend on."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch

from memfit.errors import DataError
from memfit.ledger import LINES

R = TypeVar("R", bound="TaskReport")
JSON: TypeAlias = "str | int | float | bool | list[JSON] | dict[str, JSON] | None"


class TaskReport(ABC):
    """The outcome of one run of a task; subclasses are frozen dataclasses.

    Attributes:
        command: the command of memfit that writes such reports.
        config: all settings of the run.
        steps: training steps done.
        seconds_per_step: median wall-clock time of a training step, without those that the ledger watched.
        peak_bytes: the ledger's five lines at the peak of training, and their ``total``.
        process_peak_bytes: growth of the process's resident memory during training, by the operating system.
        versions: of memfit, torch and Python, and the platform.
    """

    command: ClassVar[str]
    config: Mapping[str, JSON]
    steps: int
    seconds_per_step: float
    peak_bytes: Mapping[str, int]
    process_peak_bytes: int
    versions: Mapping[str, str]

    @abstractmethod
    def to_dict(self) -> dict[str, JSON]:
        """Plain values in the order in which one reads them."""

    @classmethod
    @abstractmethod
    def from_dict(cls: type[R], values: dict[str, Any]) -> R:
        """The inverse of :meth:`to_dict`; of other values, any of the errors that :meth:`from_json` expects."""

    @abstractmethod
    def rates(self) -> Iterable[float]:
        """The figures of the task itself that this report has."""

    def to_json(self) -> str:
        """The text of ``report.json``: ASCII, for the name of a folder need not be possible in any encoding."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls: type[R], text: str, where: str) -> R:
        """Read what `to_json` wrote.

        Args:
            text: the JSON.
            where: what an error's message begins with, usually the file.

        Raises:
            DataError: this is not such a report.
        """
        try:
            report = cls.from_dict(json.loads(text))
            report._check()
            return report
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise damaged(cls, where) from error

    def _check(self) -> None:
        """Refuse, by the errors that a use would raise, values of other kinds than are written."""
        for mapping in (self.config, self.peak_bytes, self.versions):
            mapping.items()
        peak = [self.peak_bytes[line] for line in (*LINES, "total")]
        figures = (self.steps, self.seconds_per_step, self.process_peak_bytes, *peak, *self.rates())
        if not all(isinstance(figure, int | float) for figure in figures):
            raise TypeError("a figure is not a number")


def damaged(kind: type[TaskReport], where: str) -> DataError:
    """The error for a file that should be a report and is not."""
    return DataError(f"{where}: not a report of memfit {kind.command}, or a damaged one: remove it.")


def finite_or_none(values: Iterable[float]) -> list[JSON]:
    """Numbers for JSON, which has neither NaN nor infinity."""
    return [value if math.isfinite(value) else None for value in values]


def nan_for_none(values: Iterable[float | None]) -> tuple[float, ...]:
    """The inverse of :func:`finite_or_none`."""
    return tuple(math.nan if value is None else float(value) for value in values)


def versions() -> dict[str, str]:
    """What the figures of a report depend on besides its settings."""
    return {
        "memfit": importlib.metadata.version("memfit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
