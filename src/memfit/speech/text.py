"""Transcripts as labels: Unicode-normalized characters, numbered by the recognizer's alphabet (0 is the CTC blank)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from memfit.errors import DataError

ALPHABET: tuple[str, ...] = ("<blank>", " ", "'", *"abcdefghijklmnopqrstuvwxyz")

_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u00b4`"), "'")
_MOST_LISTED = 10
_SENTENCE_PUNCTUATION = frozenset('.,!?;:"“”„«»()[]…')


def normalize(text: str, alphabet: Sequence[str], where: str) -> str:
    """Bring a transcript into the alphabet's form.

    The text is NFKC-normalized and lower-cased, typographic apostrophes become ``'``, white space collapses to single
    spaces. Sentence punctuation and dashes that the alphabet lacks count as white space: they are not spoken.

    Args:
        text: the transcript as it was written.
        alphabet: the recognizer's characters; index 0 is the CTC blank.
        where: what the message of an error starts with, such as ``"metadata.csv, line 3"``.

    Raises:
        DataError: the transcript is empty, or has characters that the alphabet lacks (they are named).
    """
    known = frozenset(alphabet[1:])
    written = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower())
    spoken = "".join(" " if _is_silent(character) and character not in known else character for character in written)
    result = " ".join(spoken.split())
    unknown = sorted(set(result) - known)
    if unknown:
        listed = " ".join(repr(character) for character in unknown[:_MOST_LISTED])
        listed += " and others" if len(unknown) > _MOST_LISTED else ""
        advice = "write numbers as words" if any(character.isnumeric() for character in unknown) else "respell the text"
        raise DataError(
            f"{where}: the transcript has characters that the recognizer does not know: {listed}; {advice} with the "
            f"characters that it knows: {''.join(alphabet[1:]).strip()}."
        )
    if not result:
        raise DataError(f"{where}: the transcript is empty; write down what is said, or remove the row.")
    return result


def _is_silent(character: str) -> bool:
    return character in _SENTENCE_PUNCTUATION or unicodedata.category(character) == "Pd"


def encode(text: str, alphabet: Sequence[str]) -> list[int]:
    """Class numbers of a normalized transcript, one per character."""
    number = {character: index for index, character in enumerate(alphabet) if index}
    return [number[character] for character in text]


def frames_needed(labels: Sequence[int]) -> int:
    """Fewest output frames in which CTC can spell the labels: one each, and a blank between two equal neighbours."""
    return len(labels) + sum(first == second for first, second in pairwise(labels))
