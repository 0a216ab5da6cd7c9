"""``memfit profile``: the figures are the ledger's, from a fresh process, and bad input gets one sentence."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from textwrap import dedent

import pytest
from typer.testing import CliRunner, Result

from memfit.cli.app import app
from memfit.errors import MemfitError
from memfit.ledger import LINES
from memfit.ledger.profile import Profile, main_of_fresh_process
from memfit.ledger.target import ProfileConfig

TASK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512))
        self.head = nn.Linear(512, 10)

    def forward(self, x):
        return self.head(self.encoder(x).repeat(4, 1))

def task():
    print("made")
    return Net(), torch.randn(64, 256), lambda model, batch: model(batch).square().mean()

def vector():
    return Net(), torch.randn(64, 256), lambda model, batch: model(batch)

def pair():
    return Net(), torch.randn(64, 256)

def fails():
    raise ValueError("no data here")

def compiled():
    model, batch, loss = task()
    return torch.compile(model, backend="eager"), batch, loss

def captured():
    model, batch, loss = task()
    return model, batch, lambda _, batch: loss(model, batch)

def frozen():
    return Net().requires_grad_(False), torch.randn(64, 256), lambda model, batch: model(batch).square().mean()

def peeks():
    def loss(model, batch):
        value = model(batch).square().mean()
        return value if value.item() > 0 else -value
    return Net(), torch.randn(4096, 256), loss
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("net.py").write_text(dedent(TASK), encoding="utf-8")


def in_this_process(config: ProfileConfig) -> Profile:
    """What the fresh process would find, without its start."""
    main_of_fresh_process(json.dumps(asdict(config)), "result")
    values = json.loads(Path("result").read_text())
    Path("result").unlink()
    if "error" in values:
        raise MemfitError(values["error"])
    return Profile.from_dict(values)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["profile", *arguments])


def test_it_says_where_the_memory_is_and_what_would_help() -> None:
    result = run("net.py:task", "--json", "found.json")
    assert result.exit_code == 0, result.output
    assert not list(Path().glob("*.partial"))
    found = Profile.from_dict(json.loads(Path("found.json").read_text())["as it is"])
    weights = 4 * (256 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10)
    assert found.peak.weights == weights
    assert found.peak.optimizer >= 2 * weights
    assert found.growth > found.peak.total / 2
    totals = [sum(sample[1:]) for sample in found.timeline]
    assert max(totals) == found.peak.total
    assert sum(lines.total for lines in found.modules.values()) == found.peak.total
    changes = [advice.change for advice in found.advice]
    assert "--convert 'LowRankGradient(rank=16)@*'" in changes
    for line in (*LINES, "total", "encoder.2", "512 x 512 float32", "The peak is in", *changes):
        assert line in result.stdout


def test_advice_holds_when_it_is_taken() -> None:
    assert run("net.py:task", "--json", "before.json").exit_code == 0
    before = Profile.from_dict(json.loads(Path("before.json").read_text())["as it is"])
    (advice,) = [each for each in before.advice if each.change == "--convert 'LowRankGradient(rank=16)@*'"]
    assert run("net.py:task", "--convert", "LowRankGradient(rank=16)@*", "--json", "after.json").exit_code == 0
    after = Profile.from_dict(json.loads(Path("after.json").read_text())["converted"])
    assert advice.before.total == pytest.approx(before.peak.total, rel=0.02)
    assert advice.after.total == pytest.approx(after.peak.total, rel=0.02)


def test_two_conversions_are_compared_with_none() -> None:
    result = run(
        "net:task",  # a module, from the working directory
        "--optimizer",
        "SGD(lr=0.1, momentum=0.9)",
        "--convert",
        "LowRankGradient(rank=4)@encoder.*",
        "--convert",
        "LowRankGradient(rank=2, sides='left')@head",
        "--compare",
        "--json",
        "both.json",
    )
    assert result.exit_code == 0, result.output
    both = {name: Profile.from_dict(found) for name, found in json.loads(Path("both.json").read_text()).items()}
    assert list(both) == ["as it is", "converted"]
    assert both["converted"].peak.gradients < both["as it is"].peak.gradients / 4
    assert both["converted"].peak.total < both["as it is"].peak.total


def test_a_step_that_needs_values_is_profiled_without_advice() -> None:
    result = run("net.py:peeks", "--optimizer", "SGD(lr=0.1)")
    assert result.exit_code == 0, result.output
    assert "No advice" in result.stdout
    assert "net.py:12 in forward" in result.stdout


def test_a_compiled_model_is_profiled_with_a_word_on_what_is_seen() -> None:
    result = run("net.py:compiled", "--optimizer", "SGD(lr=0.1)", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "Part of the step is compiled" in result.stdout


def test_a_loss_that_holds_on_to_the_model_has_no_advice_and_a_reason() -> None:
    result = run("net.py:captured", "--optimizer", "SGD(lr=0.1)", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "No advice: memfit.estimate takes a copy of the model" in result.stdout


def test_an_error_is_put_down_to_the_users_line() -> None:
    Path("shapes.py").write_text("import net\n\ndef task():\n    m, b, l = net.task()\n    return m, b[:, :3], l\n")
    result = run("shapes.py:task")
    assert result.exit_code == 2
    assert "RuntimeError" in result.output
    assert "net.py:12" in result.output
    assert "torch" not in result.output.rpartition("(at ")[2]


def test_page_and_picture_are_written_whole() -> None:
    result = run("net.py:task", "--html", "page.html", "--png", "picture.png", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert Path("page.html").read_text().rstrip().endswith("</html>")
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path().glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["net.py"], "names no function"),
        (["missing.py:task"], "there is no file missing.py"),
        (["nowhere.at.all:task"], "there is no module 'nowhere.at.all'"),
        (["net.py:other"], "has no function 'other'"),
        (["net.py:pair"], "must return (model, batch, loss)"),
        (["net.py:vector"], "must return a scalar tensor, not a tensor of shape (256, 10)"),
        (["net.py:fails"], "fails with ValueError: no data here"),
        (["net.py:task", "--optimizer", "AdamX"], "torch.optim has no optimizer 'AdamX'"),
        (["net.py:task", "--optimizer", "SGD(lr=-1)"], "refuses 'SGD(lr=-1)'"),
        (["net.py:task", "--optimizer", "SGD(0.1)"], "not of the form"),
        (["net.py:task", "--optimizer", "SGD(**{'lr': 1})"], "not of the form"),
        (["net.py:frozen"], "no parameter of the model trains"),
        (["net.py:task", "--json", "net.py"], "is the target itself"),
        (["net.py:task", "--json", "same", "--html", "same"], "same is given for two outputs"),
        (["net.py:task", "--json", "/dev/null"], "is no ordinary file"),
        (["net.py:task", "--convert", "Magic()@*"], "no technique 'Magic'"),
        (["net.py:task", "--convert", "LowRankGradient(size=3)@*"], "does not fit LowRankGradient"),
        (["net.py:task", "--convert", "LowRankGradient(rank=0)"], "rank"),
        (["net.py:task", "--convert", "LowRankGradient(rank=2)@decoder.*"], "decoder"),
        (["net.py:task", "--convert", "LowRankGradient(rank=2)@"], "names no layers"),
        (["net.py:task", "--steps", "0"], "number of steps must be 1 or more"),
        (["net.py:task", "--compare"], "needs a conversion"),
        (["net.py:task", "--json", "no/such/folder.json"], "the folder does not exist"),
    ],
)
def test_bad_input_gets_one_sentence(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfit.cli.profile.measure", in_this_process)
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
    assert list(Path().glob("*.json")) == []
    assert Path("net.py").read_text() == dedent(TASK)


def test_a_file_that_cannot_be_written_in_the_end_does_not_take_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("memfit.files.os.fsync", full)
    result = run("net.py:task", "--steps", "1", "--json", "found.json")
    assert result.exit_code == 2
    assert "found.json: the profile cannot be written: the disk is full" in result.output
    assert "The peak is in" in result.stdout
    assert sorted(path.name for path in Path().iterdir() if path.is_file()) == ["net.py"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM that a program could hear")
def test_sigterm_ends_the_fresh_process_too() -> None:
    Path("slow.py").write_text(
        "import os, time\n\ndef task():\n    print(os.getpid(), flush=True)\n    time.sleep(300)\n"
    )
    command = [sys.executable, "-c", "from memfit.cli.app import main; main()", "profile", "slow.py:task"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert running.stderr.readline() == "profiling it\n"
        child = int(running.stderr.readline())
        running.terminate()
        assert running.wait(60) == 128 + signal.SIGTERM
    for _ in range(100):  # killed, and then reaped by whoever is there
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    state = Path(f"/proc/{child}/stat")
    assert state.exists()
    assert state.read_text().rpartition(")")[2].split()[0] == "Z", "the child runs on"


def test_a_file_that_python_cannot_read_is_named() -> None:
    Path("broken.py").write_text("def task(:\n", encoding="utf-8")
    result = run("broken.py:task")
    assert result.exit_code == 2
    assert "broken.py" in result.output
    assert "SyntaxError" in result.output
