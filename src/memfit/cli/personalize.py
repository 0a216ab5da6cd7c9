"""``memfit personalize``: adapt a recognizer to one voice."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from memfit.cli import console
from memfit.cli.console import say
from memfit.cli.runs import AsJson, Resume, show_cost, stoppable
from memfit.report_page import change_of_errors, count, percent
from memfit.run.results import MODEL, PAGE
from memfit.speech.personalize import Method, PersonalizeConfig
from memfit.speech.personalize import personalize as run
from memfit.speech.report import PersonalizeReport


def personalize(
    recordings: Annotated[
        Path,
        typer.Option(
            help="Folder of recordings: audio files with a metadata.csv (file_name,transcription), "
            "or the Free Spoken Digit Dataset.",
            metavar="DIR",
        ),
    ],
    speaker: Annotated[
        str | None, typer.Option(help="Whose recordings, where the folder has several speakers.", metavar="NAME")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Recognizer to start from; memfit's own when left out.", metavar="FILE")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How to train; all but low-rank are dense.", metavar="low-rank|sgd|momentum|adam")
    ] = "low-rank",
    rank: Annotated[int, typer.Option(help="Rank of the low-rank gradients.")] = 16,
    sides: Annotated[
        str, typer.Option(help="Factors that train; left saves activations too.", metavar="both|left")
    ] = "both",
    lr: Annotated[float | None, typer.Option(help="Learning rate; the method's own when left out.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Utterances per step.")] = 5,
    utterances: Annotated[
        int | None,
        typer.Option(help="Training utterances; when left out 20 of spoken digits, or all of a metadata.csv."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same model.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for the model and the report; must not hold an earlier run.", metavar="DIR")
    ] = Path("personalized"),
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a speech recognizer to one voice, from a few of its recordings."""
    config = PersonalizeConfig(
        recordings=recordings,
        speaker=speaker,
        base=base,
        # The configuration itself refuses other words, with a sentence.
        method=cast(Method, method),
        rank=rank,
        sides=cast(Literal["both", "left"], sides),
        lr=lr,
        steps=steps,
        batch_size=batch_size,
        utterances=utterances,
        seed=seed,
    )
    report = stoppable(lambda: run(config, out, resume=resume, notify=say, progress=True), out)
    if as_json:
        print(report.to_json(), end="")
    else:
        show(report)
        console.show(f"\nthe report: {out / PAGE}")
        console.show(f"to use it:  memfit transcribe --model {shlex.quote(str(out / MODEL))} AUDIO...")


def show(report: PersonalizeReport) -> None:
    """Print the outcome: the word error rates, and the five lines of memory."""
    before, after = percent(report.wer_before), percent(report.wer_after)
    held_out = count(len(report.heard), "held-out utterance")
    print(
        f"\nword error rate: {before} before, {after} after {report.steps} steps "
        f"({change_of_errors(report.wer_before, report.wer_after)}, {held_out})"
    )
    if report.wer_after > report.wer_before:
        print("It has become worse: try a smaller --lr, or more recordings.")
    show_cost(report)
