import csv
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from memfit.cli import demo
from memfit.cli.app import app
from memfit.speech import model as recognizer_file
from memfit.speech.model import Recognizer, RecognizerConfig
from memfit.speech.personalize import PersonalizeConfig

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("espeakng_loader")
pytest.importorskip("jiwer")
pytest.importorskip("soxr")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of few strings, few steps and a tiny base."""
    torch.manual_seed(0)
    model = Recognizer(RecognizerConfig(features=16, layers=1, hidden=16))
    recognizer_file.save(model, model.config, tmp_path / "base.safetensors")
    monkeypatch.setattr(demo, "_STRINGS", 6)
    config = partial(PersonalizeConfig, base=tmp_path / "base.safetensors", steps=2)
    monkeypatch.setattr(demo, "PersonalizeConfig", config)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small")
def test_the_demo_speaks_personalizes_and_tells_both_memories():
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.stderr
    assert "synthetic voice" in result.stdout
    for expected in (
        "low-rank Adam",
        "dense Adam",
        "word error rate before",
        "activations",
        "git clone",
        "--speaker theo",
    ):
        assert expected in result.stdout
    with Path("memfit-demo/recordings/metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        audio, rate = soundfile.read(Path("memfit-demo/recordings", row["file_name"]))
        assert rate == 8000
        assert len(audio) / rate > 0.2 * len(row["transcription"].split())
    for kind in ("low-rank", "adam"):
        assert Path("memfit-demo", kind, "report.html").is_file()


@pytest.mark.usefixtures("small")
def test_a_second_demo_takes_another_folder_and_leaves_the_first_alone():
    Path("memfit-demo").mkdir()
    Path("memfit-demo/mine.txt").write_text("mine")
    refused = CliRunner().invoke(app, ["demo", "--out", "memfit-demo"])
    assert refused.exit_code == 2
    assert "error: memfit-demo: the folder is not empty" in refused.stderr
    assert [path.name for path in Path("memfit-demo").iterdir()] == ["mine.txt"]
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    assert Path("memfit-demo-2/low-rank/model.safetensors").is_file()


def test_a_demo_that_cannot_write_is_one_sentence():
    result = CliRunner().invoke(app, ["demo", "--out", "/proc/memfit"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: /proc/memfit")


def test_the_recordings_of_the_demo_are_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_STRINGS", 4)
    for name in ("first", "second"):
        demo.speak_recordings(tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
