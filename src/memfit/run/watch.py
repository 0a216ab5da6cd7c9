"""What is measured beside the training: a rate on held-out data at a few steps, and by how much the process grows.

Both are kept in a small file, so that the report of a run that was killed and resumed tells the whole run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from memfit.ledger import ProcessPeak, process_peak
from memfit.run.report import JSON
from memfit.run.results import CHECKPOINT, write_text

_MEASUREMENTS = 6


class Watch(AbstractContextManager["Watch"]):
    """Watches the training inside the context; what `after` does itself does not count as growth.

    Args:
        path: the file that keeps what was measured.
        steps: of the whole run.
        rate: measures the task's rate; changes neither weights nor random numbers nor modes.
        settings: of the run; a file of other settings is not read.
        resume: whether to read the file, if there is one.

    Attributes:
        process_bytes: the peak resident size of the process, less its size when training began; the largest of the
            processes that the run has taken.
    """

    def __init__(
        self, path: Path, steps: int, rate: Callable[[], float], settings: Mapping[str, JSON], resume: bool
    ) -> None:
        self._path, self._rate, self._settings = path, rate, dict(settings)
        self._due = {round(steps * part / _MEASUREMENTS) for part in range(1, _MEASUREMENTS)} - {0, steps}
        self._rates: dict[int, float] = {}
        self.process_bytes = 0
        self._start: int | None = None
        self._region: ProcessPeak | None = None
        if resume:
            self._read()

    def __enter__(self) -> Watch:
        self._go_on()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pause()
        if kind is not None and not self._path.with_name(CHECKPOINT).exists():
            self._path.unlink(missing_ok=True)  # there is nothing to go on with

    def after(self, step: int) -> None:
        """Measure the rate if this step is one of the few."""
        if step in self._due:
            self._pause()
            self._rates[step] = self._rate()
            kept = {"settings": self._settings, "rates": self._rates, "process_peak_bytes": self.process_bytes}
            write_text(self._path, json.dumps(kept))
            self._go_on()

    def curve(self) -> list[tuple[int, float]]:
        """(step, rate) in the order of the steps, without the beginning and the end."""
        return sorted(self._rates.items())

    def _go_on(self) -> None:
        self._region = process_peak().__enter__()
        if self._start is None:
            self._start = self._region.start

    def _pause(self) -> None:
        if self._region is not None and self._start is not None:
            self._region.__exit__(None, None, None)
            self.process_bytes = max(self.process_bytes, self._region.peak - self._start)
            self._region = None

    def _read(self) -> None:
        # None yet, or a damaged one: that costs figures of the report, and nothing else.
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["settings"] == self._settings:
                self._rates = {
                    step: float(kept["rates"][str(step)]) for step in self._due if str(step) in kept["rates"]
                }
                self.process_bytes = int(kept["process_peak_bytes"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return
