"""Training the base: never on the test voice or on held-out recordings, and the same again for the same seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memfit.errors import DataError
from memfit.speech import digits, pretrain
from memfit.speech.model import RecognizerConfig, load, load_base
from memfit.speech.pretrain import PretrainConfig

soundfile = pytest.importorskip("soundfile", reason="needs soundfile (the speech extra)")
pytest.importorskip("jiwer", reason="needs jiwer (the speech extra)")

TINY = RecognizerConfig(features=8, layers=1, hidden=8)
QUICK = PretrainConfig(epochs=4, utterances=4, batch_size=8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums over threads are not the same twice; and the command sets their number for the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0)
    made = tmp_path / "digits"
    made.mkdir()
    for speaker in pretrain.SPEAKERS:
        for digit, index in ((1, 0), (2, 1), (1, 10), (2, 11), (3, 12)):
            soundfile.write(made / f"{digit}_{speaker}_{index}.wav", 0.1 * noise.standard_normal(3200), 8000)
    return made


@pytest.mark.parametrize("held_out", ["theo", "lucas"])
def test_the_test_voice_and_held_out_recordings_are_never_trained_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, held_out: str
) -> None:
    read: list[str] = []
    load_files = digits.load

    def watched(files: list[digits.DigitFile], sample_rate: int) -> list:
        read.extend(file.path.name for file in files)
        return load_files(files, sample_rate)

    monkeypatch.setattr(digits, "load", watched)
    pretrain.pretrain(folder, TINY, replace(QUICK, held_out=held_out))
    assert len(read) == 12
    assert not [name for name in read if held_out in name or name.endswith(("_0.wav", "_1.wav"))]


def test_the_same_seed_gives_the_same_weights(folder: Path) -> None:
    lines: list[str] = []
    first = pretrain.pretrain(folder, TINY, QUICK, say=lines.append)
    again = pretrain.pretrain(folder, TINY, QUICK)
    other = pretrain.pretrain(folder, TINY, PretrainConfig(seed=1, epochs=4, utterances=4, batch_size=8))
    assert [line.split(":")[0] for line in lines] == [f"epoch {epoch}/4" for epoch in range(1, 5)]
    assert not first.training
    assert first.config == TINY
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])


def test_the_curriculum_goes_from_single_words_to_whole_utterances() -> None:
    stages = [PretrainConfig(epochs=20).digits(epoch) for epoch in range(20)]
    assert stages[0] == (1, 1)
    assert stages[-1] == (digits.FEWEST_DIGITS, digits.MOST_DIGITS)
    assert stages == sorted(stages)


def test_the_command_writes_the_model_and_each_speakers_error_rate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "base.safetensors"
    assert pretrain.main(["--recordings", str(folder), "--out", str(out), "--epochs", "1", "--threads", "1"]) == 0
    report = json.loads((tmp_path / "base.json").read_text())
    assert set(report["wer"]) == {"george", "jackson", "lucas", "yweweler", "theo"}
    assert report["parameters"] == sum(parameter.numel() for parameter in load(out).parameters())
    assert "theo: WER" in capsys.readouterr().out


def test_a_folder_without_the_speakers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--recordings", str(tmp_path), "--out", str(tmp_path / "base.safetensors")]) == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no such folder"):
        pretrain.training_words(tmp_path / "nowhere", "george", 8000)


def test_the_model_card_quotes_the_measurement() -> None:
    root = Path(__file__).parents[2]
    report = json.loads((root / "benchmarks" / "results" / "pretrain.json").read_text())
    card = (root / "docs" / "model-card.md").read_text()
    for speaker, rate in report["wer"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {speaker} |"))
        assert row.endswith(f"| {100 * rate:.1f} % |")
    assert f"{report['parameters']:,} parameters" in card


def test_the_shipped_recognizer_is_as_good_as_its_model_card_says(fsdd: Path) -> None:
    report = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "pretrain.json").read_text())
    rates = pretrain.error_rates(load_base(), fsdd)
    # Another processor may round one score differently; a word is 0.4 points.
    assert rates == pytest.approx(report["wer"], abs=0.01)
    assert max(rates[speaker] for speaker in PretrainConfig().speakers) < 0.03
