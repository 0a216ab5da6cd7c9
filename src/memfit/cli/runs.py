"""What the commands that train share: how a stopped run is continued, and what a run cost."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

import typer
from rich.console import Console

from memfit.cli.console import say
from memfit.ledger import LINES, Peak
from memfit.ledger.report import format_bytes, table, text
from memfit.run.interrupts import InterruptedRun
from memfit.run.report import TaskReport
from memfit.run.results import CHECKPOINT

R = TypeVar("R")

Resume: TypeAlias = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if it was stopped.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print report.json.")]


def stoppable(run: Callable[[], R], out: Path) -> R:
    """Run; where a signal ends it, say how to go on with what is in the folder, and exit with the signal's code."""
    try:
        return run()
    except (InterruptedRun, KeyboardInterrupt) as stopped:
        say(str(stopped) or "interrupted")
        checkpoint = stopped.checkpoint if isinstance(stopped, InterruptedRun) else out / CHECKPOINT
        if os.path.exists(checkpoint):
            command = [word for word in sys.argv[1:] if word != "--resume"]
            say(f"to go on: {shlex.join(['memfit', *command, '--resume'])}")
        number = stopped.signal if isinstance(stopped, InterruptedRun) else signal.SIGINT
        raise typer.Exit(128 + number) from None


def show_cost(report: TaskReport) -> None:
    """Print the time of a step, and the five lines of memory."""
    print(f"time of a step:  {report.seconds_per_step:.2f} s\n\nmemory at the peak of training:\n")
    peak = Peak(**{line: report.peak_bytes[line] for line in LINES})
    if sys.stdout.isatty():
        Console().print(table(peak))
    else:
        print(text(peak))
    print(f"\nthe process grew by {format_bytes(report.process_peak_bytes)} while it trained")
