"""A synthetic voice for the demo and for augmentation: eSpeak NG through ctypes, nothing else to install than a wheel.

eSpeak keeps the phase of its pitch flutter and its noise generator in static variables, so what it says depends on what
it said before. `speak` therefore loads the library afresh for every call and seeds its noise: the same arguments give
the same samples, in any order and in any process. That costs about 5 ms per call.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from memfit.errors import DataError, MissingExtraError, require

# From espeak-ng/speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_POSITION_CHARACTER = 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

# eSpeak holds the folder of its data in 160 bytes and reads no further.
_LONGEST_DATA_PATH = 150

# One library, one set of static variables: calls from several threads take turns.
_LOCK = threading.Lock()


def speak(
    text: str,
    *,
    voice: str = "en-us+m3",
    rate: int = 175,
    pitch: int = 50,
    pitch_range: int = 50,
    sample_rate: int = 8000,
) -> Tensor:
    """Speak a text with a synthetic voice; the same arguments always give the same samples.

    Args:
        text: what to say, plain text.
        voice: a language of eSpeak, such as ``"en-us"``, ``"en-gb-scotland"`` or ``"de"``, and if wanted a variant
            after a plus sign, such as ``"en-us+f2"``: ``m1`` to ``m8`` are male, ``f1`` to ``f5`` female.
        rate: words per minute, 80 to 450.
        pitch: 0 (deep) to 100 (high).
        pitch_range: 0 (monotone) to 100 (lively).
        sample_rate: of the result, in Hz.

    Returns:
        float32 of shape (samples,), within -1 to 1.

    Raises:
        DataError: there is no such voice, there is nothing to say, or a number is out of its range.
        MissingExtraError: the synthesizer (``memfit[demo]``) or the resampler (``memfit[speech]``) is not installed.

    Example:
        >>> speak("seven four", voice="en-gb+f3").dtype
        torch.float32
    """
    loader = require("espeakng_loader", extra="demo")
    soxr = require("soxr", extra="speech")
    if not text.strip() or "\0" in text:
        raise DataError(f"there is nothing to say in {text!r}: give a text with words in it.")
    for name, value, low, high in (("rate", rate, 80, 450), ("pitch", pitch, 0, 100), ("range", pitch_range, 0, 100)):
        if not low <= value <= high:
            raise DataError(f"the {name} of a synthetic voice is {low} to {high}, not {value}.")
    try:
        data = Path(loader.get_data_path())
        library_path = loader.get_library_path()
    except RuntimeError as error:
        raise MissingExtraError(
            'espeakng-loader has lost its voices: run `pip install --force-reinstall "memfit[demo]"`.'
        ) from error
    _check_variant(voice, data)
    with _LOCK, _fresh_library(library_path) as library, _short_path(data) as folder:
        samples, rate_in = _synthesize(library, folder, text, voice, {_RATE: rate, _PITCH: pitch, _RANGE: pitch_range})
    # A writable copy: from_numpy and frombuffer would warn about the immutable bytes below.
    audio = torch.frombuffer(bytearray(samples), dtype=torch.int16).float() / 32768
    if rate_in != sample_rate:
        audio = torch.from_numpy(soxr.resample(audio.numpy(), rate_in, sample_rate)).clamp_(-1, 1)
    return audio


def _check_variant(voice: str, data: Path) -> None:
    """Refuse an unknown variant, which eSpeak itself takes without a word and ignores."""
    _, plus, variant = voice.partition("+")
    folder = data / "voices" / "!v"
    if plus and (not variant or variant not in {file.name for file in folder.iterdir()}):
        raise DataError(
            f"there is no synthetic voice {voice!r}: the part after the plus sign is one of m1 to m8, f1 to f5, "
            f"or another name in {folder}."
        )


@contextmanager
def _fresh_library(path: str) -> Iterator[ctypes.CDLL]:
    """The library with its static variables as they were built, unloaded afterwards."""
    import _ctypes

    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise MissingExtraError(
            f"the speech synthesizer {path} does not load on this system ({error}): "
            'run `pip install --force-reinstall "memfit[demo]"`.'
        ) from error
    try:
        yield library
    finally:
        if sys.platform == "win32":
            _ctypes.FreeLibrary(library._handle)
        else:
            _ctypes.dlclose(library._handle)


@contextmanager
def _short_path(data: Path) -> Iterator[Path]:
    """A path to the data that is short enough for eSpeak, by way of a link when the environment lies deep."""
    deep = len(os.fsencode(data)) > _LONGEST_DATA_PATH
    with tempfile.TemporaryDirectory() if deep else nullcontext() as folder:
        if folder is None:
            yield data
        else:
            link = Path(folder, data.name)
            link.symlink_to(data, target_is_directory=True)
            yield link


def _synthesize(
    library: ctypes.CDLL, data: Path, text: str, voice: str, parameters: dict[int, int]
) -> tuple[bytes, int]:
    """The samples, 16 bit in the machine's order, and their rate in Hz."""
    rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(data), _DONT_EXIT)
    if rate <= 0:
        raise MissingExtraError(
            f"the speech synthesizer can't read its data in {data}: "
            'run `pip install --force-reinstall "memfit[demo]"`.'
        )
    spoken = bytearray()

    def collect(samples: object, count: int, events: object) -> int:
        if count > 0:
            spoken.extend(ctypes.string_at(samples, 2 * count))  # type: ignore[arg-type]
        return 0

    callback = _CALLBACK(collect)
    try:
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        library.espeak_SetSynthCallback(callback)
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise DataError(
                f"there is no synthetic voice {voice!r}: name a language such as en-us, en-gb-scotland or de, "
                "and if wanted a variant after a plus sign, such as en-us+f2."
            )
        for parameter, value in parameters.items():
            library.espeak_SetParameter(parameter, value, 0)
        content = text.encode() + b"\0"
        size = ctypes.c_size_t(len(content))
        failed = library.espeak_Synth(content, size, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
        if failed or library.espeak_Synchronize() or not spoken:
            raise DataError(f"the synthetic voice {voice!r} could not say {text!r}.")
    finally:
        library.espeak_Terminate()
    return bytes(spoken), rate
