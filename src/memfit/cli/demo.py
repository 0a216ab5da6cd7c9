"""``memfit demo``: the main job with nothing at hand, on a synthetic voice that the base recognizer never heard."""

from __future__ import annotations

import csv
import os
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from memfit.cli.console import say, show_table
from memfit.errors import MemfitError, require
from memfit.ledger.report import format_bytes
from memfit.report_page import percent
from memfit.run.results import MODEL, PAGE
from memfit.speech.data import TABLE
from memfit.speech.digits import FEWEST_DIGITS, MOST_DIGITS, WORDS
from memfit.speech.personalize import PersonalizeConfig, personalize
from memfit.speech.synth import speak

_FOLDER = "memfit-demo"
_VOICE = "en-us+m7"
_RATE, _PITCH = 150, 50
_SAMPLE_RATE = 8000
_STRINGS = 60
_SEED = 2020


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help=f"Folder for recordings and results; a new {_FOLDER} here when left out.", metavar="DIR"),
    ] = None,
) -> None:
    """Watch a recognizer adapt to a synthetic voice that it has never heard, in about a minute."""
    require("espeakng_loader", extra="demo")
    folder = _unused_folder() if out is None else out
    _refuse_used(folder)
    recordings, result = folder / "recordings", folder / "low-rank"
    say(f"speaking {_STRINGS} digit strings with the synthetic voice {_VOICE} into {recordings}")
    speak_recordings(recordings)

    config = PersonalizeConfig(recordings=recordings)
    report = personalize(config, result, notify=say, progress=True)
    say("\nthe same with dense Adam, to compare")
    dense = personalize(replace(config, method="adam"), folder / "adam", notify=say, progress=True)

    print(
        f"\nThe recognizer adapted to a synthetic voice ({_VOICE}). Word error rate on {len(report.heard)} strings "
        "that it was not trained on, and memory at the peak of training:\n"
    )
    show_table(
        ["", "low-rank Adam", "dense Adam"],
        [
            ["word error rate before", percent(report.wer_before), percent(dense.wer_before)],
            [f"after {report.steps} steps", percent(report.wer_after), percent(dense.wer_after)],
            ["time of a step", *(f"{each.seconds_per_step:.3f} s" for each in (report, dense))],
            *([line, *(format_bytes(each.peak_bytes[line]) for each in (report, dense))] for line in report.peak_bytes),
        ],
    )
    print(
        "\nOne run of each: word error rates on so few strings differ by some percent from seed to seed\n"
        "(means over seeds and voices are in docs/personalize.md)."
    )
    model, example = shlex.quote(str(result / MODEL)), shlex.quote(str(recordings / "000.wav"))
    print(
        f"\nthe report: {result / PAGE}\n"
        f"to use it:  memfit transcribe --model {model} {example}\n"
        "\nOn a real voice, of the Free Spoken Digit Dataset:\n"
        "  git clone --depth 1 https://github.com/Jakobovski/free-spoken-digit-dataset\n"
        "  memfit personalize --recordings free-spoken-digit-dataset/recordings --speaker theo\n"
        f"Or on your own: audio files with a {TABLE}, as in {recordings}"
    )


def speak_recordings(folder: Path) -> None:
    """Fill a folder with spoken digit strings and the table of what they say, as a user's own folder looks.

    Raises:
        MemfitError: the folder cannot be written.
        MissingExtraError: the synthesizer, or ``soundfile``, is not installed.
    """
    soundfile = require("soundfile", extra="speech")
    generator = torch.Generator().manual_seed(_SEED)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "transcription"])
            for number in range(_STRINGS):
                count = int(torch.randint(FEWEST_DIGITS, MOST_DIGITS + 1, (), generator=generator))
                digits = torch.randint(len(WORDS), (count,), generator=generator).tolist()
                text = " ".join(WORDS[digit] for digit in digits)
                audio = speak(text, voice=_VOICE, rate=_RATE, pitch=_PITCH, sample_rate=_SAMPLE_RATE)
                name = f"{number:03}.wav"
                with (folder / name).open("wb") as recording:
                    soundfile.write(recording, audio.numpy(), _SAMPLE_RATE, format="WAV", subtype="PCM_16")
                table.writerow([name, text])
    except OSError as error:
        raise MemfitError(f"{folder}: the recordings can't be written there ({error.strerror or error}).") from error


def _unused_folder() -> Path:
    """A folder of this name, or with the first number after it, that is not there yet: earlier demos stay."""
    folder, number = Path(_FOLDER), 1
    while os.path.exists(folder):
        number += 1
        folder = Path(f"{_FOLDER}-{number}")
    return folder


def _refuse_used(folder: Path) -> None:
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # making the folder will tell
        if any(folder.iterdir()):
            raise MemfitError(f"{folder}: the folder is not empty, and the demo overwrites nothing: give a new one.")
