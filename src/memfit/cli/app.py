"""The command ``memfit``, and what becomes of errors: one sentence on standard error and an exit code, no traceback.

Exit codes: 0, done; 2, something about the input; 130 and 143, stopped by Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from memfit.cli.classify import classify
from memfit.cli.console import say
from memfit.cli.demo import demo
from memfit.cli.filter_scan import filter_scan
from memfit.cli.finetune import finetune
from memfit.cli.nvm import nvm
from memfit.cli.personalize import personalize
from memfit.cli.profile import profile
from memfit.cli.transcribe import transcribe
from memfit.errors import MemfitError
from memfit.run.interrupts import InterruptedRun


class _Commands(TyperGroup):
    """Turns the errors that memfit raises on purpose into a sentence; any other is a bug and keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except MemfitError as error:
            say(f"error: {error}")
            raise typer.Exit(2) from None
        except InterruptedRun as stopped:
            say(str(stopped))
            raise typer.Exit(128 + stopped.signal) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="memfit",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(personalize)
app.command()(transcribe)
app.command()(finetune)
app.command()(classify)
app.command()(nvm)
app.command()(profile)
app.command()(filter_scan)
app.command()(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memfit {importlib.metadata.version('memfit')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train the whole model in the memory you have."""


def main() -> None:
    """What the installed command runs."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    warnings.formatwarning = _warning
    app()


_PACKAGE = Path(__file__).parents[1]
_format_of_others = warnings.formatwarning


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One of memfit's own as a sentence; another with where in the code it arose."""
    if Path(filename).is_relative_to(_PACKAGE):
        return f"warning: {message}\n"
    return _format_of_others(message, category, filename, lineno, line)
