"""The Free Spoken Digit Dataset's folder as it is: ``{digit}_{speaker}_{index}.wav``, one spoken digit per file.

Utterances of 2 to 6 digits are built by joining recordings of one speaker with short pauses. Recordings of index 0 to 9
are held out: test utterances are built from them alone and training utterances never touch them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memfit.errors import DataError
from memfit.speech.audio import Utterance, load_audio

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FEWEST_DIGITS = 2
MOST_DIGITS = 6
HELD_OUT_BELOW = 10

_NAME = re.compile(r"(?P<digit>[0-9])_(?P<speaker>[^_]+)_(?P<index>[0-9]+)\.wav", re.IGNORECASE)
_PAUSE_SECONDS = (0.03, 0.25)
# The test utterances must be the same whatever seed a user trains with, or word error rates could not be compared.
_TEST_SEED = 20_000
_TEST_UTTERANCES_PER_RECORDING = 0.6


@dataclass(frozen=True)
class DigitFile:
    """One file of the data set: which digit, who says it, and its number."""

    path: Path
    digit: int
    speaker: str
    index: int

    @property
    def held_out(self) -> bool:
        """Whether the recording is kept for tests."""
        return self.index < HELD_OUT_BELOW


def find(folder: Path) -> list[DigitFile]:
    """The data set's files in a folder, sorted by speaker, digit and index; empty when it has none."""
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_file():
            found.append(DigitFile(path, int(match["digit"]), match["speaker"], int(match["index"])))
    return sorted(found, key=lambda file: (file.speaker, file.digit, file.index))


def load(files: Sequence[DigitFile], sample_rate: int) -> list[Utterance]:
    """Read the files, one utterance of one word each.

    Raises:
        DataError: a file cannot be used.
    """
    return [Utterance(load_audio(file.path, sample_rate), WORDS[file.digit], file.path.name) for file in files]


def join(words: Sequence[Utterance], sample_rate: int, generator: torch.Generator) -> Utterance:
    """Say words one after the other, with a random pause before, between and after them."""
    shortest, longest = (seconds * sample_rate for seconds in _PAUSE_SECONDS)
    pauses = torch.rand(len(words) + 1, generator=generator) * (longest - shortest) + shortest
    parts: list[Tensor] = [torch.zeros(int(pauses[0]))]
    for word, pause in zip(words, pauses[1:], strict=True):
        parts += [word.audio, torch.zeros(int(pause))]
    return Utterance(torch.cat(parts), " ".join(word.text for word in words), "+".join(word.name for word in words))


def build(
    recordings: Sequence[Utterance],
    count: int,
    sample_rate: int,
    generator: torch.Generator,
    digits: tuple[int, int] = (FEWEST_DIGITS, MOST_DIGITS),
) -> list[Utterance]:
    """Join recordings into utterances; every recording is used equally often, give or take one.

    Args:
        recordings: single words of one speaker, at least as many as the fewest digits.
        count: number of utterances.
        sample_rate: samples per second.
        generator: what decides; the same state gives the same utterances.
        digits: fewest and most digits of an utterance.
    """
    stream = _shuffled_forever(len(recordings), generator)
    fewest, most = digits[0], min(digits[1], len(recordings))
    sizes = torch.randint(fewest, most + 1, (count,), generator=generator).tolist()
    return [join([recordings[next(stream)] for _ in range(size)], sample_rate, generator) for size in sizes]


def split(
    files: Sequence[DigitFile], utterances: int, seed: int, sample_rate: int
) -> tuple[list[Utterance], list[Utterance], str]:
    """Training and test utterances of one speaker.

    Args:
        files: all files of the speaker.
        utterances: number of training utterances.
        seed: decides which recordings the training utterances are joined from. The test utterances do not depend on it.
        sample_rate: samples per second of the audio.

    Returns:
        training utterances, test utterances, and a sentence that says what they are.

    Raises:
        DataError: too few recordings on either side, or one that cannot be used.
    """
    speaker, folder = files[0].speaker, files[0].path.parent
    held_out = [file for file in files if file.held_out]
    ours = [file for file in files if not file.held_out]
    for kind, share, indices in (
        ("train", ours, f"{HELD_OUT_BELOW} and above"),
        ("test", held_out, f"0 to {HELD_OUT_BELOW - 1}"),
    ):
        if len(share) < FEWEST_DIGITS:
            raise DataError(
                f"{folder}: too few recordings of {speaker} to {kind} with: {len(share)} with an index of {indices}, "
                f"and at least {FEWEST_DIGITS} are needed."
            )
    train = build(load(ours, sample_rate), utterances, sample_rate, torch.Generator().manual_seed(seed))
    count = max(1, round(_TEST_UTTERANCES_PER_RECORDING * len(held_out)))
    test = build(load(held_out, sample_rate), count, sample_rate, torch.Generator().manual_seed(_TEST_SEED))
    described = (
        f"{speaker}, spoken digits from {folder}: {len(train)} training utterances joined from {len(ours)} recordings, "
        f"{len(test)} test utterances joined from {len(held_out)} held-out ones"
    )
    return train, test, described


def _shuffled_forever(size: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(size, generator=generator).tolist()
