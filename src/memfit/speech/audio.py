"""Recordings as tensors: any file that libsndfile reads becomes mono float32 at the recognizer's sample rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memfit.errors import DataError, require
from memfit.files import check_ordinary


@dataclass(frozen=True, eq=False)
class Utterance:
    """Something that was said.

    Attributes:
        audio: mono waveform, float32 of shape ``(samples,)``, full scale at 1.
        text: what is said, in the recognizer's alphabet.
        name: what to call it in messages and reports: its file, or the files it was joined from.
    """

    audio: Tensor
    text: str
    name: str


def load_audio(path: str | Path, sample_rate: int) -> Tensor:
    """Read a recording.

    Several channels are averaged; another sample rate is converted with soxr; 8 to 32 bit and float samples all work.

    Args:
        path: a WAV, FLAC, OGG or MP3 file, or any other that libsndfile reads.
        sample_rate: samples per second of the result.

    Returns:
        float32 of shape ``(samples,)``, at least one sample, all finite.

    Raises:
        DataError: the file is missing, unreadable, empty or too large, or has samples that are not finite.
        MissingExtraError: ``soundfile``, or ``soxr`` where another rate needs it, is not installed.
    """
    path = Path(path)
    soundfile = require("soundfile", extra="speech")
    check_ordinary(path, "recording", DataError)
    try:
        with path.open("rb") as file:
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except OSError as error:
        raise DataError(f"{path}: the recording cannot be read: {error.strerror or error}.") from error
    except soundfile.LibsndfileError as error:
        raise DataError(
            f"{path}: not a recording that can be read ({error.error_string.strip().rstrip('.')})."
        ) from error
    except TypeError as error:  # a file without a header, by its name: its rate and format cannot be known
        raise DataError(f"{path}: a raw recording does not say its sample rate; export it as WAV or FLAC.") from error
    except MemoryError as error:
        raise DataError(
            f"{path}: the recording says that it has more samples than fit into memory; it is damaged, or must be cut."
        ) from error
    if len(samples) == 0:
        raise DataError(f"{path}: the recording is empty; record it again or remove it.")
    audio = torch.from_numpy(samples).mean(dim=1)
    if not bool(audio.isfinite().all()):
        raise DataError(f"{path}: the recording has samples that are not finite (NaN or infinity); export it again.")
    if rate != sample_rate:
        soxr = require("soxr", extra="speech")
        audio = torch.from_numpy(soxr.resample(audio.numpy(), rate, sample_rate))
        if len(audio) == 0:
            raise DataError(f"{path}: the recording is too short to be heard; record it again or remove it.")
    return audio
