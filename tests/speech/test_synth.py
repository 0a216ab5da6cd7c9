import hashlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from memfit.errors import DataError, MissingExtraError
from memfit.speech.synth import speak

espeakng_loader = pytest.importorskip("espeakng_loader")
pytest.importorskip("soxr")


def test_speech_is_float32_mono_at_the_rate_asked_for_and_loud_enough_to_hear():
    audio = speak("one two three", sample_rate=8000)
    assert audio.dtype == torch.float32
    assert audio.dim() == 1
    assert 0.4 < len(audio) / 8000 < 2.5
    assert 0.1 < audio.abs().max() <= 1
    assert abs(len(speak("one two three", sample_rate=16000)) - 2 * len(audio)) <= 2


@pytest.mark.parametrize("voice", ["en-us", "en-us+m3", "en-us+f2", "en-us+whisper"])
def test_the_same_words_sound_the_same_whatever_was_said_before(voice):
    first = speak("one two three", voice=voice)
    speak("seven eight", voice="en-gb-scotland+croak")
    assert torch.equal(speak("one two three", voice=voice), first)


def test_the_same_words_sound_the_same_in_another_process_and_in_threads():
    first = speak("nine zero", voice="en-us+f2")
    code = (
        "import hashlib; from memfit.speech.synth import speak;"
        "print(hashlib.sha256(speak('nine zero', voice='en-us+f2').numpy().tobytes()).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == hashlib.sha256(first.numpy().tobytes()).hexdigest()
    with ThreadPoolExecutor(4) as pool:
        for audio in pool.map(lambda _: speak("nine zero", voice="en-us+f2"), range(8)):
            assert torch.equal(audio, first)


def test_rate_pitch_and_range_change_the_voice():
    plain = speak("five six")
    assert len(speak("five six", rate=300)) < len(plain)
    for changed in (speak("five six", pitch=90), speak("five six", pitch_range=0)):
        assert changed.shape != plain.shape or not torch.equal(changed, plain)


@pytest.mark.parametrize("voice", ["nosuch", "en-us+nosuch", "en-us+", "en-us+../en_dict", "", "+m3"])
def test_a_voice_that_does_not_exist_is_refused_by_name(voice):
    with pytest.raises(DataError, match="no synthetic voice"):
        speak("one", voice=voice)


@pytest.mark.parametrize(
    "arguments", [{"text": " "}, {"text": "a\0b"}, {"text": "one", "rate": 1}, {"text": "one", "pitch": 101}]
)
def test_what_cannot_be_said_is_refused(arguments):
    with pytest.raises(DataError):
        speak(**arguments)


def test_an_environment_that_lies_deep_is_no_obstacle(tmp_path, monkeypatch):
    expected = speak("one two")
    deep = tmp_path.joinpath(*["a" * 40] * 5)
    shutil.copytree(espeakng_loader.get_data_path(), deep / "espeak-ng-data")
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(deep / "espeak-ng-data"))
    assert torch.equal(speak("one two"), expected)


def test_a_missing_synthesizer_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(MissingExtraError, match=r'pip install "memfit\[demo\]"'):
        speak("one")


def test_a_broken_installation_is_an_error_that_says_how_to_mend_it(monkeypatch, tmp_path):
    monkeypatch.setattr(espeakng_loader, "get_library_path", lambda: str(tmp_path / "nothing.so"))
    with pytest.raises(MissingExtraError, match="force-reinstall"):
        speak("one")
    monkeypatch.undo()
    Path(tmp_path, "voices", "!v").mkdir(parents=True)
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(MissingExtraError, match="force-reinstall"):
        speak("one", voice="en-us")
