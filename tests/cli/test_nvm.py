import json
import os
from pathlib import Path

import numpy
import pytest
from typer.testing import CliRunner

from memfit.cli.app import app

pytest.importorskip("matplotlib", reason="the figure is drawn with matplotlib")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = numpy.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    images = random.integers(0, 256, (100, 8, 8)).astype("uint8")
    numpy.savez(path, x_train=images, y_train=numpy.arange(100) % 3)
    return path


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned offline does not matter here."""
    import memfit.nvm.simulate as module

    pretrain = module.pretrain
    monkeypatch.setattr(module, "pretrain", lambda images, **options: pretrain(images, **{**options, "steps": 3}))


def nvm(*arguments: object):
    return CliRunner().invoke(app, ["nvm", *map(str, arguments)])


def refused(result, *words: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0]


def test_the_outcome_is_printed_and_where_it_is(data, tmp_path):
    out = tmp_path / "out"
    chosen = ("--data", data, "--world", "analog", "--scheme", "sgd", "--scheme", "bias", "--out", out)
    result = nvm(*chosen, "--samples", 200)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("analog") and " SGD " in line for line in lines)
    assert str(out / "figure.svg") in result.stdout
    assert "analog, sgd 200/200" in result.stderr

    refused(nvm(*chosen, "--samples", 200), "--resume")
    again = nvm(*chosen, "--samples", 300, "--resume", "--json")
    assert again.exit_code == 0, again.stderr
    report = json.loads(again.stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert [each["samples"] for each in report["results"]] == [300, 300]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world", "mars"], ["world", "mars"]),
        (["--scheme", "adam"], ["scheme", "adam"]),
        (["--samples", "0"], ["samples"]),
        (["--samples", "1" + 400 * "0"], ["samples", "2^63 - 1"]),
        (["--period", "1" + 400 * "0"], ["period", "2^63 - 1"]),
        (["--memory", "stone"], ["stone", "rram"]),
        (["--model", "nothing_here.py:net"], ["nothing_here.py"]),
        (["--stream", "a:b"], ["stream"]),
        (["--rate", "0"], ["rate"]),
    ],
)
def test_bad_arguments_get_one_sentence_and_leave_nothing(data, tmp_path, arguments, words):
    refused(nvm("--data", data, "--out", tmp_path / "out", *arguments), *words)
    assert not (tmp_path / "out").exists()


def test_bad_data_gets_one_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no such thing")
    refused(nvm("--data", tmp_path / "a.npz", "--out", tmp_path / "out"), "a.npz")
    refused(nvm("--data", tmp_path / "b.npz", "--out", tmp_path / "out"), "b.npz", "no such")
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_folder_that_cannot_be_made_is_told(data, tmp_path):
    (tmp_path / "file").write_text("")
    refused(nvm("--data", data, "--out", tmp_path / "file"), "a file has that name")
