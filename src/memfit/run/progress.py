"""How a run goes, on stderr: a bar on a terminal, a line at each tenth of the run elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING

from memfit.run.records import StepRecord

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from memfit.ledger import Peak

_RECENT = 20  # steps that the time shown is the median of


class Meter:
    """Shows how far something is that is done in many parts.

    Args:
        title: what the parts are, such as ``"step"``.
        total: of the whole run.
        enabled: whether to show anything.
        done: those already made before this call.
    """

    def __init__(self, title: str, total: int, enabled: bool, done: int = 0) -> None:
        self._title, self._total, self._enabled, self._done = title, total, enabled, done
        self._bar: Bar | None = None

    def __enter__(self) -> Meter:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn(self._title),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._bar.add_task("", total=self._total, completed=self._done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, words: str) -> None:
        """So many parts are done; ``words`` say how it goes."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=words)
        elif self._enabled and 10 * done // self._total > 10 * self._done // self._total:  # at every tenth
            print(f"{self._title} {done}/{self._total}  {words}", file=sys.stderr, flush=True)
        self._done = done


class Progress:
    """Shows step, loss, time per step and the ledger's total at the largest peak so far.

    Args:
        steps: of the whole run.
        done: those already made before this call.
        enabled: whether to show anything.
    """

    def __init__(self, steps: int, done: int, enabled: bool) -> None:
        self._enabled = enabled
        self._times: deque[float] = deque(maxlen=_RECENT)
        self._meter = Meter("step", steps, enabled, done)

    def __enter__(self) -> Progress:
        self._meter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._meter.__exit__(kind, error, trace)

    def show(self, record: StepRecord, peak: Peak | None) -> None:
        """Show a step that has just ended, and the largest peak so far."""
        if not self._enabled:
            return
        if not record.measured:
            self._times.append(record.seconds)
        parts = ["loss not finite, skipped" if record.skipped else f"loss {record.loss:.4g}"]
        if self._times:
            parts.append(f"{median(self._times):.3g} s/step")
        if peak is not None:
            from memfit.ledger.report import format_bytes

            parts.append(format_bytes(peak.total))
        self._meter.show(record.step, "  ".join(parts))
