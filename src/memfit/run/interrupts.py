"""Ctrl-C and SIGTERM as a wish that the loop grants between two steps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRun(Exception):
    """Training was stopped by a signal. What is done is in the checkpoint, but for skipped batches at the end.

    Attributes:
        signal: the number of the signal: SIGINT (Ctrl-C) or SIGTERM.
        step: steps done.
        checkpoint: the file to go on from, where there is one.
    """

    def __init__(self, signal: int, step: int, steps: int, checkpoint: Path) -> None:
        last = f"the last checkpoint: {checkpoint}" if os.path.exists(checkpoint) else "there is no checkpoint yet"
        saved = f"after step {step} of {steps}; {last}"
        super().__init__("interrupted " + (saved if step else "before the first step"))
        self.signal, self.step, self.checkpoint = signal, step, checkpoint


@contextmanager
def stopping_in_order() -> Iterator[None]:
    """While the block runs, SIGTERM ends it by ``SystemExit``, with the status 143, so that it can clean up."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Interrupts:
    """While the block runs, the first SIGINT or SIGTERM is noted, and the second raises ``KeyboardInterrupt`` at once.

    In a process that another has started, the second is the same wish as the first.

    Handlers are installed in the main thread only (Python allows no other), not for a signal that the process ignores
    (a background job of a shell ignores Ctrl-C), and not over a handler that is not Python's. The earlier ones come
    back at the end of the block.

    A signal that goes to the whole process group also ends the worker processes of a DataLoader, whose watch on its
    children would then raise in the middle of the step that is to end in order: it is off once a signal has come.

    Attributes:
        signal: the number of the signal that has come, or None.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.signal: int | None = None
        self._enabled = enabled
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if self._enabled and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and multiprocessing.parent_process() is not None:
            return  # who has started this process says again what its group was told
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = int(number)
        if hasattr(signal, "SIGCHLD") and callable(watch := signal.getsignal(signal.SIGCHLD)):
            self._earlier[signal.SIGCHLD] = watch
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
