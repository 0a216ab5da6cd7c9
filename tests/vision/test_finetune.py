"""A fine-tuning is exact, also when it was stopped, and leaves a plain classifier and a report that tells the run."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from memfit.errors import CheckpointError, ConversionError, DataError, MemfitError
from memfit.run import watch
from memfit.run.interrupts import InterruptedRun
from memfit.vision import classifier
from memfit.vision import finetune as module
from memfit.vision.batches import predict
from memfit.vision.classifier import ClassifierConfig
from memfit.vision.data import load_images
from memfit.vision.finetune import FinetuneConfig, finetune
from memfit.vision.models import resnet18
from memfit.vision.report import FinetuneReport

pytest.importorskip("PIL", reason='needs pip install "memfit[vision]"')

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def config(arrays, tmp_path_factory) -> FinetuneConfig:
    """A small net with a head for the classes of the data, and 24 images: learned in seconds."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    settings = ClassifierConfig("resnet18", CLASSES, 40, 0.125)
    classifier.save(resnet18(3, width=0.125).state_dict(), settings, path)
    return FinetuneConfig(data=arrays, weights=path, width=0.125, size=40, steps=15, batch_size=5, seed=3)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> tuple[Path, FinetuneReport]:
    """A run that nothing has disturbed; its folder must not be changed."""
    out = tmp_path_factory.mktemp("finished")
    return out, finetune(config, out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Stop(Exception):
    pass


def stop_at(step: int):
    def on_step(record):
        if record.step == step:
            raise Stop

    return on_step


def test_a_run_leaves_a_plain_classifier_whose_last_stage_and_head_have_learned(config, finished):
    out, report = finished
    assert set(contents(out)) == {"model.safetensors", "report.json", "report.html", "checkpoint.safetensors"}
    base, model = load_file(config.weights), load_file(out / "model.safetensors")
    assert {name: tensor.shape for name, tensor in model.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    for name in base:
        assert torch.equal(model[name], base[name]) == (not name.startswith(("layer4.", "fc."))), name
    net, found = classifier.load(out / "model.safetensors")
    assert (found.classes, found.size) == (CLASSES, 40)
    test = load_images(config.data, 40).test
    assert float((predict(net, test) == test.labels).double().mean()) == report.accuracy_after
    assert FinetuneReport.from_json((out / "report.json").read_text(), "report.json") == report


def test_the_report_tells_the_run(config, finished):
    _, report = finished
    values = report.to_dict()
    assert (values["model"], values["seed"], values["steps"]) == ("resnet18", 3, 15)
    assert values["config"]["lr"] == config.learning_rate
    assert values["config"]["train"] == ["layer4", "fc"]
    assert len(values["losses"]) == 15
    assert values["losses"][-1] < values["losses"][0]
    lines = values["peak_bytes"]
    assert lines["total"] == sum(
        lines[line] for line in ("weights", "gradients", "optimizer", "activations", "workspace")
    )
    assert min(lines["weights"], lines["optimizer"], lines["activations"]) > 0
    assert [step for step, _ in values["accuracy_curve"]] == [0, 2, 5, 8, 10, 12, 15]
    assert values["accuracy_curve"][0][1] == values["accuracy_before"]
    assert values["accuracy_curve"][-1][1] == values["accuracy_after"]
    assert [each["name"] for each in values["per_class"]] == list(CLASSES)
    assert [each["images"] for each in values["per_class"]] == [4, 4, 4]
    for when in ("before", "after"):
        assert sum(each[when] for each in values["per_class"]) / 12 == pytest.approx(values[f"accuracy_{when}"])
    assert len(values["mistakes"]) == 12 - sum(each["after"] for each in values["per_class"])
    assert all(mistake["label"] != mistake["after"] for mistake in values["mistakes"])


def test_the_same_seed_gives_the_same_model_to_the_bit_and_another_seed_another(config, finished, tmp_path):
    out, _ = finished
    finetune(config, tmp_path / "same")
    finetune(replace(config, seed=4), tmp_path / "other")
    assert same_weights(tmp_path / "same", out)
    assert not same_weights(tmp_path / "other", out)


def test_measuring_on_the_way_changes_nothing(config, finished, tmp_path, monkeypatch):
    out, _ = finished
    monkeypatch.setattr(watch, "_MEASUREMENTS", 1)
    report = finetune(config, tmp_path / "unwatched")
    assert len(report.accuracy_curve) == 2
    assert same_weights(tmp_path / "unwatched", out)


def test_the_random_numbers_of_the_caller_go_on_as_if_nothing_had_happened(config, tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    finetune(replace(config, steps=1), tmp_path / "out")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_optimizer_trains(config, tmp_path, optimizer):
    report = finetune(replace(config, steps=8, optimizer=optimizer), tmp_path / "out")
    assert report.losses[-1] < report.losses[0]


@pytest.mark.parametrize(
    "choice",
    [
        {"convert": ("LowRankGradient(rank=4)@layer4.*",)},
        {"convert": ("GradientFilter(patch=2)@layer4.*",)},
        {"convert": ("GradientFilter(patch=2)@layer4.0.*", "LowRankGradient(rank=4)@layer4.1.*")},
        {"train": ("layer3.1.*", "fc"), "flip": False},
        {"model": "mobilenet_v2", "weights": None, "convert": ("GradientFilter(patch=2)@features.1[0-9].*",)},
    ],
    ids=str,
)
def test_conversions_and_choices_train_and_resume_to_the_same_plain_model(config, tmp_path, choice):
    config = replace(config, steps=5, **choice)
    finetune(config, tmp_path / "whole")
    with pytest.raises(Stop):
        finetune(config, tmp_path / "out", on_step=stop_at(3))
    finetune(config, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    classifier.load(tmp_path / "out/model.safetensors")  # its own keys, and no others


def test_a_filter_keeps_less_for_backward_and_a_frozen_net_has_few_gradients(config, tmp_path):
    config = replace(config, steps=3, size=96, train=("layer3", "layer4", "fc"))
    whole = finetune(replace(config, train=("*",)), tmp_path / "whole").peak_bytes
    exact = finetune(config, tmp_path / "exact").peak_bytes
    filtered = finetune(replace(config, convert=("GradientFilter(patch=2)@layer[34].*",)), tmp_path / "f").peak_bytes
    assert filtered["activations"] < exact["activations"] < 0.7 * whole["activations"]
    assert exact["optimizer"] < whole["optimizer"]


def test_new_classes_get_a_new_head_and_that_is_said(config, folder, tmp_path):
    (folder / "red").rename(folder / "rot")
    said: list[str] = []
    report = finetune(replace(config, data=folder, steps=4), tmp_path / "out", notify=said.append)
    assert any("the head is new" in sentence for sentence in said)
    assert report.accuracy_before is None
    assert [each.name for each in report.per_class] == ["blue", "green", "rot"]
    assert all(each.before is None for each in report.per_class)
    assert report.accuracy_curve[0][0] > 0
    assert "new classes" in (tmp_path / "out/report.html").read_text()


def test_fresh_weights_train_as_a_whole_for_the_epochs_asked_for(config, tmp_path):
    report = finetune(replace(config, weights=None, steps=None, epochs=2), tmp_path / "out")
    assert report.steps == 2 * math.ceil(24 / 5)
    assert report.config["train"] == ["*"]


NETWORK = """
from torch import nn

def net(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 81, classes))

def narrow(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.Flatten(), nn.Linear(9, classes))
"""


def test_a_net_of_ones_own_trains_and_one_that_does_not_suit_the_images_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(NETWORK)
    own = replace(config, model="mine.py:net", weights=None, width=1.0, steps=8)
    report = finetune(own, "out")
    assert report.losses[-1] < report.losses[0]
    net, _ = classifier.load("out/model.safetensors", "mine.py:net")
    test = load_images(config.data, 40).test
    assert float((predict(net, test) == test.labels).double().mean()) == report.accuracy_after
    with pytest.raises(MemfitError, match=r"mine\.py:narrow: the model, given images.*fails with RuntimeError"):
        finetune(replace(own, model="mine.py:narrow"), "other")
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"steps": 0}, "steps must be 1 or more"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"epochs": 1, "steps": 1}, "give one of them"),
        ({"batch_size": -5}, "batch size must be 1 or more"),
        ({"size": 0}, "size must be 1 or more"),
        ({"size": 100_000}, "size must be at most"),
        ({"width": 0.0}, "width must be"),
        ({"width": math.nan}, "width must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"lr": math.nan}, "learning rate must be a positive number, not nan"),
        ({"lr": 0.0}, "learning rate"),
        ({"optimizer": "magic"}, "sgd, momentum, adam, adamw, not 'magic'"),
        ({"train": ()}, "no modules"),
        ({"convert": ("Magic()@fc",)}, "no technique 'Magic'"),
    ],
)
def test_a_setting_out_of_range_is_one_sentence(values, complaint):
    with pytest.raises(MemfitError, match=complaint):
        FinetuneConfig(data=Path("images"), **values)


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"model": "resnet50"}, MemfitError, "no model 'resnet50'"),
        ({"model": "mobilenet_v2"}, DataError, "not the weights of this model"),
        ({"train": ("layer9",)}, MemfitError, "layer9"),
        ({"convert": ("LowRankGradient(rank=4)@conv1",)}, ConversionError, "frozen"),
        ({"convert": ("LowRankGradient(rank=4000)@layer4.0.conv1",)}, ConversionError, "4000"),
        ({"weights": Path("missing.pth")}, DataError, r"missing\.pth"),
        ({"data": Path("missing")}, DataError, "missing"),
        ({"batch_size": 1, "size": 32}, MemfitError, "batch size of 2 or more"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(config, tmp_path, changes, error, complaint):
    with pytest.raises(error, match=complaint):
        finetune(replace(config, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_classes_that_no_file_can_hold_are_refused_before_anything_is_trained(config, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "_MOST_CLASSES", 2)
    with pytest.raises(DataError, match=r"colours\.npz: no classifier .*classes must be from 2 to 2 different names"):
        finetune(replace(config, weights=None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lone_last_image_does_not_upset_batch_norms(config, tmp_path):
    report = finetune(replace(config, size=32, batch_size=23, steps=None, epochs=2), tmp_path / "out")
    assert report.steps == 2  # 24 images: the one that is left over comes in another pass


def test_results_of_an_earlier_run_are_not_overwritten(config, finished):
    out, _ = finished
    before = contents(out)
    with pytest.raises(MemfitError, match=r"earlier run's report\.json"):
        finetune(config, out)
    assert contents(out) == before


def test_to_resume_a_finished_run_returns_its_report_and_changes_nothing(config, finished):
    out, report = finished
    before = contents(out)
    said: list[str] = []
    assert finetune(config, out, resume=True, notify=said.append) == report
    assert said[-1] == f"{out} holds this run's results already"
    assert contents(out) == before


def test_to_resume_with_other_settings_or_data_is_refused_by_name(config, finished, folder, tmp_path):
    out, _ = finished
    shutil.copytree(out, tmp_path / "unfinished")
    for name in ("report.json", "report.html", "model.safetensors"):
        (tmp_path / "unfinished" / name).unlink()
    for place, file in ((out, r"report\.json"), (tmp_path / "unfinished", r"checkpoint\.safetensors")):
        before = contents(place)
        for changes, name in (
            ({"lr": 0.5}, "lr"),
            ({"steps": 16}, "steps"),
            ({"train": ("fc",)}, "train"),
            ({"convert": ("LowRankGradient(rank=4)@layer4.*",)}, "convert"),
            ({"flip": False}, "flip"),
            ({"data": folder}, "other data"),
        ):
            with pytest.raises(CheckpointError, match=rf"{file}.*{name}"):
                finetune(replace(config, **changes), place, resume=True)
        assert contents(place) == before


@pytest.mark.parametrize("step", [5, 15])
def test_a_run_that_stopped_at_any_step_and_is_resumed_ends_the_same(config, finished, tmp_path, monkeypatch, step):
    monkeypatch.setattr(module, "_CHECKPOINT_EVERY", 2)
    out, expected = finished
    with pytest.raises(Stop):
        finetune(config, tmp_path / "out", on_step=stop_at(step))
    report = finetune(config, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "out", out)
    for name in ("losses", "accuracy_curve", "per_class", "mistakes"):
        assert getattr(report, name) == getattr(expected, name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_and_resume_ends_the_same(config, finished, tmp_path, number):
    out, _ = finished

    def on_step(record):
        if record.step == 13:
            os.kill(os.getpid(), number)

    with pytest.raises(InterruptedRun, match=r"after step 13 of 15; .*checkpoint\.safetensors") as stopped:
        finetune(config, tmp_path / "out", on_step=on_step)
    assert stopped.value.signal == number
    assert set(contents(tmp_path / "out")) == {"checkpoint.safetensors", "watch.json"}
    finetune(config, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "out", out)


def test_a_killed_process_leaves_a_run_that_resumes_to_the_same_model(config, finished, tmp_path, monkeypatch):
    out, _ = finished
    code = (
        "import os, signal, sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from memfit.vision import finetune as module\n"
        "module._CHECKPOINT_EVERY = 5\n"
        "data, weights, out = map(Path, sys.argv[1:])\n"
        "config = module.FinetuneConfig(\n"
        "    data=data, weights=weights, width=0.125, size=40, steps=15, batch_size=5, seed=3)\n"
        "module.finetune(config, out, on_step=lambda r: r.step == 12 and os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    arguments = [str(config.data), str(config.weights), str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    said: list[int] = []
    finetune(config, tmp_path / "out", resume=True, on_step=lambda record: said.append(record.step))
    assert said == [11, 12, 13, 14, 15]
    assert same_weights(tmp_path / "out", out)


def test_a_damaged_checkpoint_is_refused_and_left_alone(config, finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    whole = (finished[0] / "checkpoint.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 1000):
        (out / "checkpoint.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors"):
            finetune(config, out, resume=True)
        assert (out / "checkpoint.safetensors").read_bytes() == damaged


def test_a_folder_that_cannot_be_written_is_found_out_before_the_training(config, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file/out", Path("/proc/memfit")):
        with pytest.raises(MemfitError, match="choose another") as refused:
            finetune(config, place, on_step=lambda record: pytest.fail("it trained"))
        assert str(place) in str(refused.value)


def test_a_disk_that_fills_up_is_one_sentence_and_the_run_resumes_when_there_is_room(config, finished, tmp_path):
    out, _ = finished
    size = (out / "checkpoint.safetensors").stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors.*(larger|full|disk)"):
            finetune(config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [name for name in contents(tmp_path / "out") if name.endswith((".partial", ".safetensors"))]
    finetune(config, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "out", out)


def test_a_folder_of_images_and_an_array_of_the_same_pixels_train_alike(config, arrays, tmp_path):
    """Also that images which are read again whenever they are needed give the same weights."""
    image_module = pytest.importorskip("PIL.Image")
    with numpy.load(arrays) as file:
        for part, name in (("train", "train"), ("test", "val")):
            # In the order of the names within each class, so that the two have one order of images.
            for number, (pixels, label) in enumerate(zip(file[f"x_{part}"], file[f"y_{part}"], strict=True)):
                place = tmp_path / "images" / name / CLASSES[label]
                place.mkdir(parents=True, exist_ok=True)
                image_module.fromarray(pixels).save(place / f"{number:02}.png")
        order = {part: numpy.argsort(file[f"y_{part}"], kind="stable") for part in ("train", "test")}
        ordered = {f"{x}_{part}": file[f"{x}_{part}"][order[part]] for part in order for x in "xy"}
    numpy.savez(tmp_path / "ordered.npz", **ordered, classes=list(CLASSES))
    config = replace(config, steps=4)
    first = finetune(replace(config, data=tmp_path / "ordered.npz"), tmp_path / "arrays")
    second = finetune(replace(config, data=tmp_path / "images"), tmp_path / "folder")
    assert first.losses == second.losses
    assert same_weights(tmp_path / "arrays", tmp_path / "folder")


def test_real_photographs_are_told_better_after_a_few_steps(cifar, tmp_path):
    """Two classes of CIFAR-10 from fresh weights: well above the half that chance gives."""
    with numpy.load(cifar) as file:
        chosen = {}
        for part, most in (("train", 240), ("test", 200)):
            found = numpy.isin(file[f"y_{part}"], (0, 6)).nonzero()[0][:most]
            chosen[f"x_{part}"] = file[f"x_{part}"][found]
            chosen[f"y_{part}"] = (file[f"y_{part}"][found] == 6).astype(int)
        names = [str(file["classes"][label]) for label in (0, 6)]
    numpy.savez(tmp_path / "two.npz", **chosen, classes=names)
    config = FinetuneConfig(data=tmp_path / "two.npz", width=0.25, size=32, epochs=4, batch_size=24)
    report = finetune(config, tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text())["accuracy_after"] == report.accuracy_after
    assert report.accuracy_after > 0.75
