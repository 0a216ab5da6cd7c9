"""``memfit filter-scan``: what it prints is what was measured, and bad input gets one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import numpy
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from memfit.cli.app import app
from memfit.vision.models import resnet18

TASK = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def task():
    return net(), torch.randn(2, 3, 9, 9), lambda model, batch: model(batch).square().mean()

def single():
    return nn.Conv2d(3, 4, 3), torch.randn(2, 3, 9, 9), lambda model, batch: model(batch).square().mean()

def vector():
    return net(), torch.randn(2, 3, 9, 9), lambda model, batch: model(batch)

def infinite():
    return net(), torch.randn(2, 3, 9, 9) / 0, lambda model, batch: model(batch).square().mean()

def frozen():
    return net().requires_grad_(False), torch.randn(2, 3, 9, 9), lambda model, batch: model(batch).square().mean()

def dense():
    return nn.Linear(3, 4), torch.randn(2, 3), lambda model, batch: model(batch).square().mean()

def shapes():
    return net(), torch.randn(2, 5, 9, 9), lambda model, batch: model(batch).square().mean()

def takes(classes):
    return task()

def fails():
    raise ValueError("no data here")
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(dedent(TASK), encoding="utf-8")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["filter-scan", *arguments])


def test_it_prints_what_was_measured_and_writes_figures_page_and_picture() -> None:
    outputs = ["--json", "scan.json", "--html", "scan.html", "--png", "scan.png"]
    result = run("net.py:task", "--patch", "2", "--patch", "3", "--rounds", "1", *outputs)
    assert result.exit_code == 0, result.output
    found = json.loads(Path("scan.json").read_text())
    assert found["target"] == "net.py:task"
    assert [layer["name"] for layer in found["layers"]] == ["0", "2"]
    page = Path("scan.html").read_text()
    for layer in found["layers"]:
        assert [each["patch"] for each in layer["filtered"]] == [2, 3]
        for text in (layer["shape"], f"{layer['ms']:.2f} ms"):
            assert text in result.stdout
            assert text in page
        for each in layer["filtered"]:
            assert f"{each['ms']:.2f} ms" in result.stdout
            assert f"{each['weight']['cosine']:.2f} ({each['weight']['norm']:.2f})" in result.stdout
    assert f"{found['ms']:.1f} ms" in result.stdout
    assert ("Leave: " in result.stdout) or ("Filter with patch=" in result.stdout)
    assert page.count("<circle") == 2 * (2 + 2 * 2), "two pictures: a legend, and a dot for each layer and patch"
    assert page.rstrip().endswith("</html>")
    assert Path("scan.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path().glob("*.partial"))


def test_advice_is_written_as_options_that_the_commands_take() -> None:
    result = run("net.py:task", "--patch", "1", "--rounds", "1", "--cosine", "0", "--json", "scan.json")
    assert result.exit_code == 0, result.output
    for layer in json.loads(Path("scan.json").read_text())["layers"]:
        option = f"--convert 'GradientFilter(patch=1)@{layer['name']}'"
        assert (option in result.stdout) == (layer["advised"] is not None)


def test_the_advice_for_taps_apart_is_an_option_too() -> None:
    options = ["--patch", "2", "--taps", "apart", "--rounds", "1", "--cosine", "0", "--json", "scan.json"]
    result = run("net.py:task", *options)
    assert result.exit_code == 0, result.output
    advised = [each["name"] for each in json.loads(Path("scan.json").read_text())["layers"] if each["advised"]]
    for name in advised:
        assert f"""--convert "GradientFilter(patch=2, taps='apart')@{name}\"""" in result.stdout
    assert advised or "As options" not in result.stdout
    result = run("net.py:task", "--taps", "near")
    assert result.exit_code == 2
    assert "taps='near' is not possible: give 'summed', 'planar' or 'apart'." in " ".join(result.stderr.split())


def test_a_model_that_is_one_layer_has_a_name_for_people() -> None:
    result = run("net:single", "--patch", "2", "--rounds", "1", "--png", "scan.png", "--html", "scan.html")
    assert result.exit_code == 0, result.output
    assert "(the model itself)" in result.stdout


def arrays(file: str = "images.npz") -> None:
    generator = numpy.random.default_rng(0)
    x, y = generator.integers(0, 256, (12, 16, 16, 3), dtype=numpy.uint8), numpy.arange(12) % 2
    numpy.savez(file, x_train=x, y_train=y, x_test=x, y_test=y)


def test_a_classifier_is_scanned_as_it_would_be_fine_tuned() -> None:
    arrays()
    torch.manual_seed(0)
    save_file(resnet18(2, width=0.125).state_dict(), "weights.safetensors")
    common = ["--data", "images.npz", "--width", "0.125", "--size", "16", "--batch-size", "4", "--rounds", "1"]
    common += ["--weights", "weights.safetensors", "--patch", "2", "--json", "scan.json"]
    result = run(*common)
    assert result.exit_code == 0, result.output
    found = json.loads(Path("scan.json").read_text())
    assert found["target"] == "resnet18 on images.npz"
    assert {layer["name"].partition(".")[0] for layer in found["layers"]} == {"layer4"}
    assert run(*common, "--train", "*", "--where", "layer1.*", "--where", "conv1").exit_code == 0
    found = json.loads(Path("scan.json").read_text())
    assert {layer["name"].partition(".")[0] for layer in found["layers"]} == {"conv1", "layer1"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either a target"),
        (["net.py:task", "--data", "images.npz"], "give either a target"),
        (["net.py:task", "--model", "resnet18"], "--model: such options go with --data"),
        (["net.py:task", "--weights", "a.pth", "--train", "fc"], "--weights, --train: such options go with --data"),
        (["net.py:task", "--width", "1", "--batch-size", "4"], "--width, --batch-size: such options go with --data"),
        (["net.py:task", "--size", "8", "--seed", "0"], "--size, --seed: such options go with --data"),
        (["net.py:takes"], "net.py:takes is called with no argument, and takes (classes)"),
        (["net.py"], "names no function"),
        (["missing.py:task"], "there is no file missing.py"),
        (["net.py:other"], "has no function 'other'"),
        (["net.py:vector"], "must return a scalar tensor, not a tensor of shape (2, 4)"),
        (["net.py:infinite"], "the loss of the batch is nan"),
        (["net.py:frozen"], "is frozen"),
        (["net.py:dense"], "the model has none"),
        (["net.py:fails"], "fails with ValueError: no data here"),
        (["net.py:shapes"], "fails with RuntimeError"),
        (["broken.py:task"], "SyntaxError"),
        (["net.py:task", "--patch", "0"], "patch=0 is not possible"),
        (["net.py:task", "--rounds", "0"], "number of rounds must be 1 or more"),
        (["net.py:task", "--cosine", "2"], "from 0 to 1"),
        (["net.py:task", "--where", "encoder.*"], "encoder.*"),
        (["net.py:task", "--json", "net.py"], "is the target itself"),
        (["net.py:task", "--json", "same", "--html", "same"], "same is given for two outputs"),
        (["net.py:task", "--json", "no/such/folder.json"], "the folder does not exist"),
        (["--data", "missing.npz"], "missing.npz: there is no such folder or file"),
        (["--data", "images.npz", "--model", "vgg"], "there is no model 'vgg'"),
        (["--data", "images.npz", "--batch-size", "0"], "batch size must be 1 or more"),
    ],
)
def test_bad_input_gets_one_sentence_and_nothing_is_written(arguments: list[str], said: str) -> None:
    arrays()
    Path("broken.py").write_text("def task(:\n", encoding="utf-8")
    before = sorted(Path().iterdir())
    result = run(*arguments, *([] if "--json" in arguments else ["--json", "scan.json"]))
    assert result.exit_code == 2
    assert said in result.output
    assert result.output.count("error: ") == 1
    assert "Traceback" not in result.output
    assert [path for path in sorted(Path().iterdir()) if path.name != "__pycache__"] == before
    assert Path("net.py").read_text() == dedent(TASK)


def test_a_bug_of_memfits_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a module of memfit's name: by that, its errors are told from those of the user's code.
    code = "def broken(*_):\n    raise AssertionError('a bug')\n"
    scope = {"__name__": "memfit.vision.scan_kept"}
    exec(compile(code, "scan_kept.py", "exec"), scope)
    monkeypatch.setattr("memfit.vision.filter_scan.kept_by", scope["broken"])
    result = run("net.py:task")
    assert isinstance(result.exception, AssertionError)
