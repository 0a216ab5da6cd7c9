"""``memfit transcribe``: print what recordings say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.console import show
from memfit.errors import MemfitError
from memfit.speech import model as recognizer_file
from memfit.speech.audio import Utterance, load_audio
from memfit.speech.metrics import transcribe as recognize


def transcribe(
    audio: Annotated[
        list[Path],
        typer.Argument(help="Recordings: WAV, FLAC, OGG, MP3, at any rate, mono or stereo.", metavar="AUDIO..."),
    ],
    model: Annotated[
        Path, typer.Option(help="The recognizer: model.safetensors of a personalization.", metavar="FILE")
    ],
    beam: Annotated[
        int | None, typer.Option(help="Width of a prefix beam search; greedy decoding when left out.", metavar="N")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of {file, text}.")] = False,
) -> None:
    """Print what recordings say: the text alone for one recording, each after its file's name for several."""
    if beam is not None and beam < 1:
        raise MemfitError(f"the beam must be 1 or wider, not {beam}.")
    recognizer = recognizer_file.load(model)
    texts = []
    for path in audio:
        waveform = load_audio(path, recognizer.config.sample_rate)
        (text,) = recognize(recognizer, [Utterance(waveform, "", path.name)], beam=beam)
        texts.append({"file": str(path), "text": text})
        if not as_json:
            show(text if len(audio) == 1 else f"{path}: {text}")
    if as_json:
        print(json.dumps(texts, indent=2))
