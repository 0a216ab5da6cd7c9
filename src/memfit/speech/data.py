"""A folder of recordings as utterances to train on and utterances to test with; the two never share a recording.

Two kinds of folder are read: the Free Spoken Digit Dataset's (see ``digits``), and the common audio-folder convention,
which is any audio files plus a table ``metadata.csv`` with the columns ``file_name`` and ``transcription``.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import torch

from memfit.errors import DataError
from memfit.run.held_out import hold_out
from memfit.speech import digits
from memfit.speech.audio import Utterance, load_audio
from memfit.speech.text import normalize

__all__ = ["Recordings", "Utterance", "load_audio", "load_recordings"]

TABLE = "metadata.csv"
FEWEST_RECORDINGS = 4
_DEFAULT_JOINED_UTTERANCES = 20
_AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".m4a"})


@dataclass(frozen=True)
class Recordings:
    """What a folder holds.

    Attributes:
        train: utterances to train on.
        test: held-out utterances; none of their recordings occurs in ``train``.
        description: a sentence for reports.
    """

    train: list[Utterance]
    test: list[Utterance]
    description: str


def load_recordings(
    folder: str | Path,
    *,
    sample_rate: int,
    alphabet: Sequence[str],
    speaker: str | None = None,
    utterances: int | None = None,
    seed: int = 0,
) -> Recordings:
    """Read a folder of either kind.

    With a ``metadata.csv``, a fifth of its rows (at least one) is held out. Which ones is decided by a hash of the file
    names alone, so it is the same for every seed and hardly moves when recordings are added. In the digit data set the
    recordings of index 0 to 9 are held out.

    Args:
        folder: the folder; for the digit data set also the one above ``recordings``, as ``git clone`` makes it.
        sample_rate: samples per second of the result; recordings at other rates are converted.
        alphabet: the recognizer's characters; transcripts are brought to its form.
        speaker: whose recordings to use; needed when the digit data set has several speakers.
        utterances: number of training utterances: of those that are built from digits (20 unless told), or the most
            that are used of a table (all unless told).
        seed: decides which recordings are used for training. Which are held out does not depend on it.

    Raises:
        DataError: anything is wrong with the folder, its table, a transcript or a recording; the message names it.
        MissingExtraError: ``soundfile`` or ``soxr`` is not installed.
    """
    folder = Path(folder)
    if utterances is not None and utterances < 1:
        raise DataError(f"{utterances} training utterances were asked for; at least 1 is needed.")
    try:
        # Inside: a name that is too long, or a folder above that may not be entered, is an OSError already here.
        if not folder.is_dir():
            raise DataError(
                f"{folder}: " + ("this is a file; give the folder." if folder.exists() else "there is no such folder.")
            )
        if (folder / TABLE).is_file():
            if speaker is not None:
                raise DataError(f"{folder / TABLE}: has no speakers to choose {speaker!r} from; leave the speaker out.")
            return _from_table(folder, sample_rate, alphabet, utterances, seed)
        files = digits.find(folder)
        if not files and (folder / "recordings").is_dir():
            folder = folder / "recordings"
            files = digits.find(folder)
        if files:
            return _from_digits(folder, files, speaker, sample_rate, alphabet, utterances, seed)
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read: {error.strerror or error}.") from error
    if not any(Path(name).suffix.lower() in _AUDIO_SUFFIXES for name in names):
        raise DataError(
            f"{folder}: "
            + (f"has neither recordings nor a {TABLE}" if names else "the folder is empty")
            + f"; put audio files there, and a {TABLE} with the columns file_name,transcription."
        )
    raise DataError(
        f"{folder}: has recordings but no transcripts; add a {TABLE} with the columns file_name,transcription "
        f"(or use the Free Spoken Digit Dataset's file names, such as 7_theo_0.wav)."
    )


def _from_digits(
    folder: Path,
    files: Sequence[digits.DigitFile],
    speaker: str | None,
    sample_rate: int,
    alphabet: Sequence[str],
    utterances: int | None,
    seed: int,
) -> Recordings:
    speakers = sorted({file.speaker for file in files})
    listed = ", ".join(speakers)
    if speaker is None and len(speakers) > 1:
        raise DataError(f"{folder}: has several speakers; choose one of {listed}.")
    if speaker is not None and speaker not in speakers:
        raise DataError(f"{folder}: has no recordings of {speaker!r}; it has {listed}.")
    for word in digits.WORDS:
        normalize(word, alphabet, f"{folder}, spoken digits")
    chosen = [file for file in files if file.speaker == (speaker or speakers[0])]
    count = _DEFAULT_JOINED_UTTERANCES if utterances is None else utterances
    return Recordings(*digits.split(chosen, count, seed, sample_rate))


def _from_table(
    folder: Path, sample_rate: int, alphabet: Sequence[str], utterances: int | None, seed: int
) -> Recordings:
    rows = _read_table(folder, alphabet)
    if len(rows) < FEWEST_RECORDINGS:
        raise DataError(
            f"{folder / TABLE}: lists {len(rows)} recordings; at least {FEWEST_RECORDINGS} are needed to train on some "
            f"and test with others."
        )
    rows.sort()
    train, test = hold_out(rows, [name for name, _ in rows])
    available = len(train)
    if utterances is not None and utterances < available:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()
        train = sorted(train[index] for index in order[:utterances])
    loaded = [
        [Utterance(load_audio(folder / name, sample_rate), text, name) for name, text in share]
        for share in (train, test)
    ]
    described = (
        f"recordings from {folder}: {len(train)} of {available} training utterances and "
        f"{len(test)} held-out test utterances"
    )
    return Recordings(loaded[0], loaded[1], described)


def _read_table(folder: Path, alphabet: Sequence[str]) -> list[tuple[str, str]]:
    """File name (relative, with forward slashes) and normalized transcript of each row."""
    table = folder / TABLE
    try:
        # utf-8-sig drops the byte order mark that spreadsheets write.
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            missing = [name for name in ("file_name", "transcription") if name not in columns]
            if missing:
                raise DataError(
                    f"{table}: has no column {' and no column '.join(missing)}; its first line must be "
                    f"file_name,transcription."
                )
            cells = [(reader.line_num, row["file_name"], row["transcription"]) for row in reader]
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: not UTF-8 text (byte {error.start}); save it again as UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{table}: not a well-formed table of comma-separated values: {error}.") from error

    rows: list[tuple[str, str]] = []
    first_lines: dict[Path, int] = {}
    for line, name, transcription in cells:
        where = f"{table}, line {line}"
        if not name or not name.strip():
            raise DataError(f"{where}: the file_name is empty.")
        relative = os.path.normpath(name.strip())
        # Paths of the other operating system's kind must not slip through either.
        if os.path.isabs(relative) or PureWindowsPath(relative).drive or relative.split(os.sep)[0] == os.pardir:
            raise DataError(
                f"{where}: the file {name!r} lies outside of the folder; move it in and name it relatively."
            )
        path = folder / relative
        if not os.path.isfile(path):
            raise DataError(f"{where}: the recording {name!r} does not exist in {folder}.")
        same = first_lines.setdefault(path.resolve(), line)
        if same != line:
            raise DataError(
                f"{where}: the recording {name!r} was already listed in line {same}; remove one of the rows."
            )
        text = normalize(transcription or "", alphabet, f"{where} ({name})")
        rows.append((Path(relative).as_posix(), text))
    return rows
