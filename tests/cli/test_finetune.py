"""``memfit finetune`` and ``memfit classify``: the outcome on standard output, and one sentence for bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from memfit.cli.app import app

image_module = pytest.importorskip("PIL.Image", reason='needs pip install "memfit[vision]"')

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--width", 0.125, "--size", 33, "--steps", 3, "--batch-size", 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of noise, of two classes: what is learned does not matter here."""
    generator = numpy.random.default_rng(0)
    for number in range(10):
        place = tmp_path / "images" / ("ab"[number % 2])
        place.mkdir(parents=True, exist_ok=True)
        image_module.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=numpy.uint8)).save(place / f"{number}.png")
    return tmp_path / "images"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def finetune(folder: Path, out: Path, *more: object) -> Result:
    return run("finetune", "--data", folder, "--out", out, *SMALL, *more)


def refused(result: Result, *words: str) -> None:
    """One sentence on standard error, exit code 2, nothing on standard output."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    *_, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    for word in words:
        assert word in last


def test_the_outcome_is_printed_and_how_to_use_it_works(folder, tmp_path):
    result = finetune(folder, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"accuracy: new classes before, [\d.]+ % after 3 steps \(.*, 2 held-out images\)", result.stdout)
    for line in ("weights", "gradients", "optimizer", "activations", "workspace", "total"):
        assert re.search(rf"^{line} .*(MiB|KiB| B)", result.stdout, re.MULTILINE)
    assert str(tmp_path / "out/report.html") in result.stdout
    assert "step 3/3" in result.stderr

    command = re.search(r"to use it:  memfit (classify --model \S+) IMAGE", result.stdout)
    assert command
    one = run(*command[1].split(), folder / "a/0.png")
    assert re.fullmatch(r"[ab] \(\d+\.\d %\)\n", one.stdout), one.stderr
    two = run(*command[1].split(), folder / "a/0.png", folder / "b/1.png")
    assert [line.split(": ")[0] for line in two.stdout.splitlines()] == [
        str(folder / "a/0.png"),
        str(folder / "b/1.png"),
    ]
    (value,) = json.loads(run(*command[1].split(), folder / "a/0.png", "--json").stdout)
    assert f"{value['class']} ({100 * value['probability']:.1f} %)\n" == one.stdout

    further = finetune(folder, tmp_path / "further", "--weights", tmp_path / "out/model.safetensors")
    before = re.search(r"accuracy: ([\d.]+ %) before", further.stdout)
    assert before
    assert f"{before[1]} after 3 steps" in result.stdout


def test_json_is_the_only_thing_on_standard_output(folder, tmp_path):
    result = finetune(folder, tmp_path / "out", "--json", "--optimizer", "adam")
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert report["config"]["optimizer"] == "adam"
    again = finetune(folder, tmp_path / "out", "--json", "--optimizer", "adam", "--resume")
    assert json.loads(again.stdout) == report


def test_choices_may_be_repeated_and_reach_the_run(folder, tmp_path):
    choices = ["--train", "layer4.*", "--train", "fc", "--no-flip", "--lr", 0.02, "--seed", 9]
    choices += ["--convert", "GradientFilter(patch=2)@layer4.0.*", "--convert", "LowRankGradient(rank=2)@layer4.1.*"]
    result = finetune(folder, tmp_path / "out", "--json", *choices)
    settings = json.loads(result.stdout)["config"]
    assert settings["train"] == ["layer4.*", "fc"]
    assert settings["convert"] == ["GradientFilter(patch=2)@layer4.0.*", "LowRankGradient(rank=2)@layer4.1.*"]
    assert (settings["flip"], settings["lr"], settings["seed"]) == (False, 0.02, 9)


def test_a_net_of_ones_own_says_how_it_is_used(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from torch import nn\n\ndef net(classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, classes))\n"
    )
    result = run("finetune", "--data", folder, "--model", "mine.py:net", "--size", 16, "--steps", 2)
    assert result.exit_code == 0, result.stderr
    command = re.search(r"memfit (classify --model finetuned/model.safetensors --network mine.py:net) ", result.stdout)
    assert command
    assert run(*command[1].split(), folder / "a/0.png").exit_code == 0
    refused(run("classify", "--model", "finetuned/model.safetensors", folder / "a/0.png"), "--network", "mine.py:net")


OWN = """
import torch
from torch import nn

def linear(classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, classes))

class Net(nn.Module):
    def __init__(self, classes, change):
        super().__init__()
        self.net, self.change = linear(classes), change

    def forward(self, x):
        return self.change(self, self.net(x))

def raising(self, scores):
    raise KeyError("scale")

def asserting(self, scores):
    assert len(scores) == 7
    return scores

def dividing(self, scores):
    return scores * (1 / 0)

def training_only(self, scores):
    if self.training:
        raise RuntimeError("not in training")
    return scores

CHANGES = {
    "plain": lambda self, scores: scores,
    "raises": raising,
    "asserts": asserting,
    "divides": dividing,
    "detached": lambda self, scores: scores.detach(),
    "rounded": lambda self, scores: scores.round().long(),
    "training": training_only,
    "nan": lambda self, scores: scores * float("nan"),
}

for name, change in CHANGES.items():
    globals()[name] = lambda classes, change=change: Net(classes, change)

def fails(classes):
    raise KeyError("settings")

def alone():
    return linear(2)
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "raises",
            [
                "raises: the model, given images of shape (1, 3, 16, 16), fails with KeyError: 'scale' (at ",
                "mine.py:17)",
            ],
        ),
        ("asserts", ["asserts fails with AssertionError: no message (at ", "mine.py:20)"]),
        ("divides", ["divides fails with ZeroDivisionError"]),
        ("detached", ["the loss depends on no parameter that trains"]),
        ("rounded", ["rounded: the model, given images of shape (1, 3, 16, 16),", "torch.int64 scores"]),
        ("training", ["training fails with RuntimeError: not in training (at "]),
        ("nan", ["the loss or its gradients are not finite at any step"]),
        ("fails", ["fails fails with KeyError: 'settings' (at "]),
        ("alone", ["alone is called with the number of classes, and takes ()"]),
    ],
)
def test_a_net_of_ones_own_that_fails_is_one_sentence_and_leaves_no_model(folder, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN, encoding="utf-8")
    options = ("finetune", "--data", folder, "--size", 16, "--steps", 2, "--batch-size", 4, "--out", "out")
    refused(run(*options, "--model", f"mine.py:{name}"), *words)
    assert not list(tmp_path.glob("out/*"))


def test_a_net_of_ones_own_that_fails_at_an_image_is_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN, encoding="utf-8")
    options = ("finetune", "--data", folder, "--size", 16, "--steps", 2, "--batch-size", 4, "--out", "out")
    assert run(*options, "--model", "mine.py:plain").exit_code == 0
    for name, words in (
        ("plain", None),
        ("detached", None),  # fine where nothing trains
        ("raises", "fails with KeyError: 'scale' (at "),
        ("asserts", "fails with AssertionError"),
        ("rounded", "torch.int64 scores"),
        ("fails", "fails with KeyError: 'settings'"),
        ("alone", "is called with the number of classes, and takes ()"),
    ):
        command = ("classify", "--model", "out/model.safetensors", "--network", f"mine.py:{name}", folder / "a/0.png")
        if words:
            refused(run(*command), f"mine.py:{name}", words)
        else:
            assert run(*command).exit_code == 0


def test_a_bug_of_memfits_keeps_its_traceback(folder, tmp_path, monkeypatch):
    # In a module of memfit's name: by that, its errors are told from those of the user's code.
    scope = {"__name__": "memfit.vision.batches"}
    exec(compile("def broken(*_, **__):\n    raise AssertionError('a bug')\n", "batches.py", "exec"), scope)
    monkeypatch.setattr("memfit.vision.finetune.predict", scope["broken"])
    assert isinstance(finetune(folder, tmp_path / "out").exception, AssertionError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_at_once(folder, tmp_path):
    for name in ("pipe.safetensors", "pipe.pth", "pipe.npz"):
        os.mkfifo(tmp_path / name)
    told = ("this is a device or a pipe, not a",)
    refused(run("classify", "--model", tmp_path / "pipe.safetensors", folder / "a/0.png"), *told)
    for name in ("pipe.safetensors", "pipe.pth"):
        refused(finetune(folder, tmp_path / "out", "--weights", tmp_path / name), name, *told)
    refused(finetune(tmp_path / "pipe.npz", tmp_path / "out"), "pipe.npz", *told)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are not UTF-8")
def test_a_name_that_is_not_utf8_can_be_printed_and_reported(folder, tmp_path):
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/images \xff"))
    folder.rename(strange)
    (strange / "a").rename(Path(os.fsdecode(os.fsencode(strange) + b"/class \xff")))
    result = finetune(strange, tmp_path / "out")
    assert result.exit_code == 0, result.exception
    assert json.loads((tmp_path / "out/report.json").read_text("ascii"))["config"]["data"] == str(strange)
    image = next(strange.glob("class*/*.png"))
    for more in ([], ["--json"]):
        classified = run("classify", "--model", tmp_path / "out/model.safetensors", image, strange / "b/1.png", *more)
        assert classified.exit_code == 0, classified.exception
    assert finetune(strange, tmp_path / "out", "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", 0], ["steps"]),
        (["--epochs", 2], ["epochs and steps"]),
        (["--steps", "1" + 400 * "0"], ["number of steps", "2^63 - 1", "401 digits"]),
        (["--epochs", "9" * 30], ["number of epochs", "2^63 - 1"]),
        (["--batch-size", 0], ["batch size"]),
        (["--size", 0], ["size"]),
        (["--width", -1], ["width"]),
        (["--seed", -1], ["seed"]),
        (["--lr", "nan"], ["nan"]),
        (["--optimizer", "magic"], ["magic"]),
        (["--model", "resnet50"], ["resnet50", "resnet18"]),
        (["--model", "nowhere.py:net"], ["nowhere.py"]),
        (["--train", "layer9"], ["layer9"]),
        (["--convert", "Magic@fc"], ["Magic"]),
        (["--convert", "GradientFilter(patch=4, patch=5)@layer4.*"], ["patch more than once"]),
        (["--convert", "LowRankGradient(rank=2)@layer9"], ["layer9"]),
        (["--weights", "missing.pth"], ["missing.pth"]),
    ],
)
def test_an_option_that_does_not_fit_is_one_sentence(folder, tmp_path, options, words):
    refused(finetune(folder, tmp_path / "out", *options), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--steps", "many"], ["--lr", "fast"], ["--nonsense"]])
def test_a_usage_error_is_exit_code_2(folder, tmp_path, arguments):
    assert finetune(folder, tmp_path / "out", *arguments).exit_code == 2


def test_bad_data_is_one_sentence_with_the_name_of_the_file(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("text")
    numpy.savez(tmp_path / "nan.npz", x_train=numpy.full((2, 4, 4), numpy.nan), y_train=[0, 1], x_test=[], y_test=[])
    for name in ("empty", "text.npz", "nan.npz", "missing", "n" * 300):
        refused(finetune(tmp_path / name, tmp_path / "out"), str(tmp_path / name))
    (folder / "a/4.png").write_bytes(b"")
    refused(finetune(folder, tmp_path / "out"), str(folder / "a/4.png"))
    assert not (tmp_path / "out").exists()


def test_bad_input_to_classify_is_one_sentence_with_the_name_of_the_file(folder, tmp_path):
    model = tmp_path / "out/model.safetensors"
    assert finetune(folder, tmp_path / "out").exit_code == 0
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    for path in (tmp_path / "bad.png", tmp_path / "missing.png", folder):
        refused(run("classify", "--model", model, path), str(path))
    image = folder / "a/0.png"
    for path in (
        folder,
        tmp_path / "missing.safetensors",
        tmp_path / "bad.png",
        tmp_path / "out/checkpoint.safetensors",
    ):
        refused(run("classify", "--model", path, image), str(path))


def test_an_earlier_result_and_other_settings_are_one_sentence(folder, tmp_path):
    assert finetune(folder, tmp_path / "out").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    refused(finetune(folder, tmp_path / "out"), str(tmp_path / "out"), "--resume")
    refused(finetune(folder, tmp_path / "out", "--resume", "--seed", 5), "report.json", "seed")
    report = tmp_path / "out/report.json"
    for text in ("[" * 100_000, '{"a":' * 100_000, "{}", "text"):
        report.write_text(text)
        refused(finetune(folder, tmp_path / "out", "--resume"), "report.json: not a report of memfit finetune")
    report.write_bytes(before["report.json"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_help_is_there():
    for command in ("finetune", "classify"):
        assert command in run("--help").stdout
        assert run(command, "--help").exit_code == 0


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from memfit.cli.app import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_says_how_to_go_on_and_killing_costs_nothing(folder, tmp_path, monkeypatch):
    """One run whole, one that is interrupted, killed and resumed: the same weights."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN, encoding="utf-8")
    options = ["finetune", "--data", folder, "--model", "mine.py:plain", "--size", 33, "--batch-size", 4]
    options += ["--steps", 400]
    assert run(*options, "--out", tmp_path / "whole").exit_code == 0
    checkpoint = tmp_path / "out/checkpoint.safetensors"

    def stopped(number: signal.Signals, *more: object) -> tuple[int, str, str]:
        written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start(*options, "--out", tmp_path / "out", *more)
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > written):
            time.sleep(0.01)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors

    code, output, errors = stopped(signal.SIGINT)
    if code:  # else it was done before the signal came
        assert (code, output) == (130, ""), errors
        assert "Traceback" not in errors
        assert re.search(r"interrupted after step \d+ of 400; the last checkpoint: .*checkpoint", errors)
        assert re.search(r"to go on: memfit finetune --data .* --resume\n$", errors)
        stopped(signal.SIGKILL, "--resume")
        assert run(*options, "--out", tmp_path / "out", "--resume").exit_code == 0
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
