"""Folders of recordings: what is read, what is held out, and the sentence for everything that can be wrong with one."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from memfit.errors import DataError
from memfit.speech import digits
from memfit.speech.data import Recordings, load_audio, load_recordings
from memfit.speech.text import ALPHABET, encode, normalize

soundfile = pytest.importorskip("soundfile", reason="needs soundfile (the speech extra)")

HEADER = "file_name,transcription\n"


def _tone(path: Path, seconds: float = 0.5, rate: int = 8000, hertz: float = 440.0, **how: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate), rate, **how)


def _load(folder: Path, **choices: object) -> Recordings:
    return load_recordings(folder, sample_rate=8000, alphabet=ALPHABET, **choices)  # type: ignore[arg-type]


def _table_folder(folder: Path, count: int = 10) -> Path:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "transcription"])
        for index in range(count):
            _tone(folder / f"clips/{index}.wav", hertz=200 + 50 * index)
            table.writerow([f"clips/{index}.wav", f"Number {'x' * (index + 1)}"])
    return folder


def _digit_folder(folder: Path, held_out: int = 10, above: int = 4, speakers: tuple[str, ...] = ("ann",)) -> Path:
    for speaker in speakers:
        for digit in (0, 7):
            for index in [*range(held_out), *range(10, 10 + above)]:
                # The pitch tells each recording from all others.
                _tone(folder / f"{digit}_{speaker}_{index}.wav", 0.3, hertz=500 + 10 * index + 1000 * (digit > 0))
    return folder


# Recordings


@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        ("wav", {"subtype": "PCM_16"}),
        ("wav", {"subtype": "PCM_24"}),
        ("wav", {"subtype": "FLOAT"}),
        ("wav", {"subtype": "DOUBLE"}),
        ("wav", {"subtype": "PCM_U8"}),
        ("flac", {"subtype": "PCM_24"}),
        ("ogg", {}),
    ],
)
@pytest.mark.parametrize("rate", [8000, 44100])
def test_any_format_and_rate_is_heard_the_same(suffix: str, how: dict[str, str], rate: int, tmp_path: Path) -> None:
    _tone(tmp_path / f"tone.{suffix}", rate=rate, **how)
    audio = load_audio(tmp_path / f"tone.{suffix}", 8000)
    assert audio.dtype == torch.float32
    assert len(audio) == pytest.approx(4000, abs=2)
    spectrum = torch.fft.rfft(audio[:4000]).abs()
    assert int(spectrum.argmax()) == 220
    assert float(audio[500:3500].abs().max()) == pytest.approx(0.5, abs=0.03)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left = np.linspace(-0.5, 0.5, 4000, dtype=np.float32)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, np.zeros_like(left)], axis=1), 8000, subtype="FLOAT")
    torch.testing.assert_close(load_audio(tmp_path / "stereo.wav", 8000), torch.from_numpy(left) / 2)


def test_digital_silence_is_a_recording(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(4000), 8000)
    assert not load_audio(tmp_path / "silence.wav", 8000).any()


def _write_nan(path: Path) -> None:
    soundfile.write(path, np.array([0.1, np.nan, 0.2], dtype=np.float32), 8000, subtype="FLOAT")


def _write_infinity(path: Path) -> None:
    soundfile.write(path, np.array([0.1, np.inf, 0.2], dtype=np.float32), 8000, subtype="FLOAT")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no such recording"),
        (lambda path: path.mkdir(), "this is a folder"),
        (lambda path: path.write_bytes(b""), "not a recording that can be read"),
        (lambda path: path.write_text("I am a text."), "not a recording that can be read"),
        (lambda path: soundfile.write(path, np.zeros(0), 8000), "the recording is empty"),
        (lambda path: soundfile.write(path, np.zeros(1), 48000), "too short to be heard"),
        (_write_nan, "not finite"),
        (_write_infinity, "not finite"),
    ],
)
def test_an_unusable_recording_is_refused_by_name(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.wav"
    write(path)
    with pytest.raises(DataError, match=message) as caught:
        load_audio(path, 8000)
    assert str(caught.value).startswith(str(path))


def test_a_recording_without_a_header_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.raw").write_bytes(bytes(4000))
    with pytest.raises(DataError, match=r"x\.raw: .*does not say its sample rate"):
        load_audio(tmp_path / "x.raw", 8000)


def test_a_recording_that_claims_too_many_samples_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: object, **more: object) -> None:
        raise MemoryError

    _tone(tmp_path / "x.wav")
    monkeypatch.setattr(soundfile, "read", read)
    with pytest.raises(DataError, match=r"x\.wav: .*memory"):
        load_audio(tmp_path / "x.wav", 8000)


def test_names_that_are_too_long_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="n" * 300):
        load_audio(tmp_path / ("n" * 300), 8000)
    with pytest.raises(DataError, match="n" * 300):
        _load(tmp_path / ("n" * 300))
    (tmp_path / "metadata.csv").write_text(HEADER + "n" * 300 + ",one\n")
    with pytest.raises(DataError, match="line 2"):
        _load(tmp_path)


# Transcripts


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("Hello, World!", "hello world"),
        ("  two\t words \n", "two words"),
        ("it\N{RIGHT SINGLE QUOTATION MARK}s", "it's"),
        ("twenty-one \N{EM DASH} yes\N{HORIZONTAL ELLIPSIS}", "twenty one yes"),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A}\N{LATIN SMALL LIGATURE FI}", "afi"),
        ('"Quoted" (aside); done:', "quoted aside done"),
    ],
)
def test_transcripts_are_brought_to_the_alphabets_form(written: str, spoken: str) -> None:
    assert normalize(written, ALPHABET, "here") == spoken
    assert [ALPHABET[label] for label in encode(spoken, ALPHABET)] == list(spoken)


def test_characters_of_the_alphabet_are_kept_whatever_they_are() -> None:
    assert normalize("E\N{COMBINING ACUTE ACCENT}!", ("<blank>", "é", "!"), "here") == "é!"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("room 42", "'2' '4'; write numbers as words"),
        ("café", "'é'; respell"),
        ("a & b", "'&'"),
        ("", "empty"),
        (" ?! ", "empty"),
    ],
)
def test_an_unknown_character_is_named(written: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        normalize(written, ALPHABET, "metadata.csv, line 3")
    assert str(caught.value).startswith("metadata.csv, line 3: ")


# Folders with a table


def test_a_table_is_split_the_same_for_every_seed_and_nothing_is_shared(tmp_path: Path) -> None:
    _table_folder(tmp_path)
    first, second = _load(tmp_path, seed=0), _load(tmp_path, seed=1, utterances=3)
    assert len(first.test) == 2
    assert len(first.train) == 8
    assert [u.name for u in first.test] == [u.name for u in second.test]
    assert {u.name for u in first.train} | {u.name for u in first.test} == {f"clips/{i}.wav" for i in range(10)}
    assert len(second.train) == 3
    assert {u.name for u in second.train} < {u.name for u in first.train}
    for utterance in first.train + first.test:
        index = int(utterance.name[len("clips/") : -len(".wav")])
        assert utterance.text == "number " + "x" * (index + 1)
        assert torch.equal(utterance.audio, load_audio(tmp_path / utterance.name, 8000))
    assert _load(tmp_path, utterances=3, seed=0).description.startswith(f"recordings from {tmp_path}: 3 of 8 training")
    names = {tuple(u.name for u in _load(tmp_path, utterances=3, seed=seed).train) for seed in range(5)}
    assert len(names) > 1


def test_a_byte_order_mark_other_columns_and_other_names_for_a_folder_do_no_harm(tmp_path: Path) -> None:
    _table_folder(tmp_path, 4)
    rows = [f'x,./clips/../clips/{index}.wav,"One, two"' for index in range(4)]
    text = "\n".join(["id,file_name,transcription", *rows, ""])
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    recordings = _load(tmp_path)
    assert sorted(u.name for u in recordings.train + recordings.test) == [f"clips/{index}.wav" for index in range(4)]
    assert {u.text for u in recordings.train} == {"one two"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", r"no column file_name and no column transcription; its first line must be file_name,transcription"),
        ("file_name,text\na.wav,one\n", "no column transcription"),
        ("file_name;transcription\na.wav;one\n", "no column file_name"),
        (HEADER, "lists 0 recordings; at least 4 are needed"),
        (HEADER + "a.wav,one\nclips/0.wav,two\n", r"line 2: the recording 'a\.wav' does not exist"),
        (HEADER + "clips/0.wav,one\n,two\n", "line 3: the file_name is empty"),
        (HEADER + "clips/0.wav,one\nclips/1.wav\n", r"line 3 \(clips/1\.wav\): the transcript is empty"),
        (HEADER + "clips/0.wav, \n", r"line 2 \(clips/0\.wav\): the transcript is empty"),
        (HEADER + "clips/0.wav,one\n./clips//0.wav,two\n", "line 3: .* already listed in line 2"),
        (HEADER + "../outside.wav,one\n", "line 2: .* outside of the folder"),
        (HEADER + "clips/../../outside.wav,one\n", "outside of the folder"),
        (HEADER + "/etc/hostname,one\n", "outside of the folder"),
        (HEADER + "C:\\a.wav,one\n", "outside of the folder"),
        (HEADER + "clips/0.wav,channel 5\n", r"line 2 \(clips/0\.wav\): .* '5'; write numbers as words"),
        (HEADER + 'clips/0.wav,"one" two\n', "not a well-formed table"),
        (HEADER + "".join(f"clips/{index}.wav,one\n" for index in range(3)), "lists 3 recordings; at least 4"),
        (HEADER + "clips,one\n", "'clips' does not exist"),
    ],
)
def test_a_wrong_table_is_refused_by_line(table: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    _tone(tmp_path / "outside.wav")
    _table_folder(folder, 4)
    (folder / "metadata.csv").write_text(table, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        _load(folder)
    assert str(caught.value).startswith(str(folder / "metadata.csv"))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_that_is_not_utf8_is_refused(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes((HEADER + "a.wav,café\n").encode(encoding))
    with pytest.raises(DataError, match=r"not UTF-8 text .* save it again as UTF-8"):
        _load(tmp_path)


def test_a_bad_recording_in_a_table_is_refused_by_name(tmp_path: Path) -> None:
    _table_folder(tmp_path)
    (tmp_path / "clips/3.wav").write_text("no audio")
    with pytest.raises(DataError, match=r"3\.wav: not a recording"):
        _load(tmp_path)


def test_other_wrong_folders_and_choices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        _load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="the folder is empty"):
        _load(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing to hear")
    with pytest.raises(DataError, match=r"neither recordings nor a metadata\.csv"):
        _load(tmp_path)
    with pytest.raises(DataError, match="this is a file; give the folder"):
        _load(tmp_path / "notes.txt")
    _tone(tmp_path / "hello.wav")
    with pytest.raises(DataError, match="recordings but no transcripts"):
        _load(tmp_path)
    _table_folder(tmp_path)
    with pytest.raises(DataError, match="no speakers to choose 'ann' from"):
        _load(tmp_path, speaker="ann")
    with pytest.raises(DataError, match="at least 1"):
        _load(tmp_path, utterances=0)


# The digit data set


def _used(utterances: list) -> Counter[str]:
    return Counter(name for utterance in utterances for name in utterance.name.split("+"))


def test_digit_utterances_never_share_a_recording_and_use_each_about_equally(tmp_path: Path) -> None:
    recordings = _load(_digit_folder(tmp_path), utterances=30)
    train, test = _used(recordings.train), _used(recordings.test)
    assert all(int(name.split("_")[2].split(".")[0]) >= 10 for name in train)
    assert set(test) == {path.name for path in tmp_path.iterdir()} - set(train)
    assert max(test.values()) - min(test.values()) <= 1
    assert max(train.values()) - min(train.values()) <= 1
    for utterance in recordings.train + recordings.test:
        names = utterance.name.split("+")
        assert 2 <= len(names) <= 6
        assert utterance.text.split() == [digits.WORDS[int(name[0])] for name in names]
        # The recordings themselves are in the audio, in this order, with silence around each.
        position = 0
        for name in names:
            word = load_audio(tmp_path / name, 8000)
            silence = int((utterance.audio[position:] != 0).nonzero()[0])
            start = position + silence - 1  # a tone starts with a zero
            assert 0.02 * 8000 <= silence <= 0.26 * 8000
            assert torch.equal(utterance.audio[start : start + len(word)], word)
            position = start + len(word)


def test_the_seed_chooses_training_utterances_but_never_test_ones(tmp_path: Path) -> None:
    _digit_folder(tmp_path)
    first, again, other = _load(tmp_path, seed=3), _load(tmp_path, seed=3), _load(tmp_path, seed=4, utterances=7)
    assert len(first.train) == 20
    assert len(other.train) == 7
    assert [u.name for u in first.train] == [u.name for u in again.train]
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(first.train, again.train, strict=True))
    assert [u.name for u in first.train[:7]] != [u.name for u in other.train]
    assert [u.name for u in first.test] == [u.name for u in other.test]
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(first.test, other.test, strict=True))


def test_a_speaker_is_chosen_among_several_and_a_clone_of_the_repository_works(tmp_path: Path) -> None:
    _digit_folder(tmp_path / "recordings", speakers=("ann", "bob"))
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(DataError, match="several speakers; choose one of ann, bob"):
        _load(tmp_path)
    with pytest.raises(DataError, match="no recordings of 'theo'; it has ann, bob"):
        _load(tmp_path, speaker="theo")
    assert all("_bob_" in name for name in _used(_load(tmp_path, speaker="bob").train))


@pytest.mark.parametrize(
    ("held_out", "above", "message"),
    [(10, 0, "to train with: 0 with an index of 10 and above"), (0, 4, "to test with: 0 with an index of 0 to 9")],
)
def test_too_few_digit_recordings_are_counted(held_out: int, above: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        _load(_digit_folder(tmp_path, held_out, above))


def test_an_alphabet_without_the_digits_letters_is_refused(tmp_path: Path) -> None:
    _digit_folder(tmp_path)
    with pytest.raises(DataError, match="does not know"):
        load_recordings(tmp_path, sample_rate=8000, alphabet=("<blank>", " ", "a"))


def test_the_real_data_set_gives_sixty_test_utterances_of_each_speaker(fsdd: Path) -> None:
    recordings = _load(fsdd, speaker="theo")
    assert len(recordings.train) == 20
    assert len(recordings.test) == 60
    used = _used(recordings.test)
    assert len(used) == 100
    assert set(used.values()) <= {2, 3}
    assert not set(used) & set(_used(recordings.train))
    assert "theo" in recordings.description
