import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from memfit.cli.app import app
from memfit.errors import CheckpointError, DataError, MemfitError, MissingExtraError
from memfit.nvm import devices
from memfit.nvm import simulate as module
from memfit.nvm.page import joules, lifetime
from memfit.nvm.schemes import SCHEMES
from memfit.nvm.simulate import NvmConfig, simulate
from memfit.nvm.worlds import WORLDS
from memfit.speech.personalize import InterruptedRun  # the same class for all tasks

pytest.importorskip("matplotlib", reason="the figure is drawn with matplotlib")


def config(data: Path | None, **more: object) -> NvmConfig:
    settings = {"data": data, "samples": 120, "pretraining_steps": 5, "shift_every": 100, **more}
    return NvmConfig(**settings)  # type: ignore[arg-type]


def test_all_worlds_and_schemes_are_reported_on_in_every_form(data, tmp_path):
    report = simulate(config(data), tmp_path)
    assert [(each.world, each.scheme) for each in report.results] == [(w, s) for w in WORLDS for s in SCHEMES]
    values = json.loads((tmp_path / "report.json").read_text())
    assert values == json.loads(report.to_json())
    for result in values["results"]:
        assert 0 <= result["accuracy"] <= 1
        assert [point[0] for point in result["curve"]] == [100, 120]
        assert sum(cells for _, cells in result["writes_per_cell_histogram"]) == result["cells"]
        assert (result["lifetime_years"] is None) == (result["worst_cell_writes"] == 0)
    by_scheme = {result["scheme"]: result for result in values["results"] if result["world"] == "analog"}
    assert by_scheme["inference"]["writes"] == by_scheme["bias"]["writes"] == 0
    assert by_scheme["sgd"]["write_joules"] == pytest.approx(by_scheme["sgd"]["writes"] * 8 * 10.9e-12)
    assert by_scheme["low-rank"]["read_joules"] == pytest.approx(120 * 2 * by_scheme["sgd"]["cells"] * 8 * 1.76e-12)

    ElementTree.parse(tmp_path / "figure.svg")
    page = (tmp_path / "report.html").read_text()
    assert page.count('data-label="scheme"') == 20
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_resumed_simulation_ends_with_the_same_report(data, tmp_path, monkeypatch):
    chosen = {"worlds": ("digital",), "schemes": ("sgd", "low-rank-max-norm"), "samples": 300}
    whole = simulate(config(data, **chosen), tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(learner: object, stream: object, **options: object) -> None:
        if "max-norm" in str(options["checkpoint"]):
            raise Stopped
        return learn_online(learner, stream, **options)  # type: ignore[arg-type, return-value]

    learn_online = devices.learn_online
    monkeypatch.setattr(devices, "learn_online", stop)
    with pytest.raises(Stopped):
        simulate(config(data, **chosen), tmp_path / "cut")
    monkeypatch.undo()
    with pytest.raises(MemfitError, match="--resume"):
        simulate(config(data, **chosen), tmp_path / "cut")
    resumed = simulate(config(data, **chosen), tmp_path / "cut", resume=True)
    for one, other in zip(whole.results, resumed.results, strict=True):
        assert one.curve == other.curve
        assert one.cells == other.cells
    with pytest.raises(CheckpointError, match="period was 8 and is 20"):
        simulate(config(data, **chosen, period=20), tmp_path / "cut", resume=True)


def test_devices_at_once_give_the_same_report_as_one_after_the_other(data, tmp_path):
    chosen = {"worlds": ("analog",), "schemes": ("bias", "low-rank-max-norm", "sgd"), "samples": 200}
    found = [simulate(config(data, **chosen), tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2)]
    for one, other in zip(*(each.results for each in found), strict=True):
        assert one.curve == other.curve
        assert one.cells == other.cells
    more = config(data, **{**chosen, "samples": 300})
    assert simulate(more, tmp_path / "2", jobs=8, resume=True).results[0].samples == 300
    with pytest.raises(MemfitError, match="number of jobs must be 1 or more"):
        simulate(config(data), tmp_path / "none", jobs=0)


@pytest.mark.slow
def test_a_simulation_that_is_killed_goes_on_to_the_same_bits(data, tmp_path):
    def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "from memfit.cli.app import main; main()", "nvm", "--data", str(data)]
        command += ["--world", "analog", "--scheme", "low-rank-max-norm", "--samples", "9000", "--out", str(out)]
        return subprocess.Popen([*command, *more], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    for name in ("online/analog-low-rank-max-norm.safetensors", "checkpoint.safetensors"):
        process, file = start(tmp_path / "cut", "--resume"), tmp_path / "cut" / name
        while not file.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        process.kill()
        process.wait()
    assert start(tmp_path / "cut", "--resume").wait() == 0
    whole, cut = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "cut"))
    for one, other in zip(whole["results"], cut["results"], strict=True):
        del one["seconds"], other["seconds"]
        assert one == other


def test_a_signal_is_obeyed_after_the_chunk_and_told(data, tmp_path, monkeypatch):
    def told(done: int, words: str) -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module.Meter, "show", lambda self, done, words: told(done, words))
    with pytest.raises(InterruptedRun):
        simulate(config(data, worlds=("control",), schemes=("bias",), samples=500), tmp_path)
    assert (tmp_path / "online/control-bias.safetensors").exists() or (tmp_path / "checkpoint.safetensors").exists()
    monkeypatch.undo()
    report = simulate(config(data, worlds=("control",), schemes=("bias",), samples=500), tmp_path, resume=True)
    assert report.results[0].samples == 500


def own_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


def own_stream() -> list[tuple[torch.Tensor, int]]:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 4, generator=random)
    return [(each, int(each[0] > 0)) for each in inputs]


HERE = str(Path(__file__))


def test_a_model_and_a_stream_of_ones_own_go_the_same_way(tmp_path):
    chosen = NvmConfig(
        model=f"{HERE}:own_model", stream=f"{HERE}:own_stream", samples=400, worlds=("control", "digital")
    )
    report = simulate(chosen, tmp_path)
    assert len(report.results) == 10
    learned = {each.scheme: each.accuracy for each in report.results if each.world == "control"}
    assert learned["sgd"] > learned["inference"]
    assert "own_stream" in report.data
    assert not (tmp_path / "checkpoint.safetensors").exists()


def no_module() -> int:
    return 3


def three_inputs() -> nn.Module:
    return nn.Linear(3, 2)


def one_class() -> nn.Module:
    return nn.Linear(4, 1)


def no_logits() -> nn.Module:
    return nn.Flatten(0)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no_module", "must return a torch.nn.Module"),
        ("three_inputs", r"can't take a sample of shape \(1, 4\)"),
        ("one_class", "has 1 classes"),
        ("no_logits", "to logits"),
        ("missing", "no function 'missing'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_the_run(tmp_path, model, words):
    chosen = NvmConfig(model=f"{HERE}:{model}", stream=f"{HERE}:own_stream", samples=100, worlds=("control",))
    with pytest.raises(MemfitError, match=words):
        simulate(chosen, tmp_path)


def grouped() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 2))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    return nn.Linear(4, 2).requires_grad_(False)


def broken() -> nn.Module:
    model = nn.Linear(4, 2)
    model.weight.data[0, 0] = float("nan")
    return model


def half() -> nn.Module:
    return nn.Linear(4, 2).bfloat16()


def fails() -> nn.Module:
    raise KeyError("settings")


def without_size() -> nn.Module:
    return nn.LazyLinear(2)


def negative() -> list[tuple[torch.Tensor, int]]:
    return [(torch.zeros(4), -1)] * 200


def halves() -> list[tuple[torch.Tensor, float]]:
    return [(torch.zeros(4), 0.5)] * 200


def words() -> list[tuple[torch.Tensor, Any]]:
    return [(torch.zeros(4), "seven")] * 200


MODEL = nn.Linear(4, 2)
_ONE_ITERATOR = iter([(torch.zeros(4), 0)] * 600)


def same_iterator() -> Iterator[tuple[torch.Tensor, int]]:
    return _ONE_ITERATOR


def test_a_stream_that_goes_on_where_it_was_is_refused(tmp_path):
    chosen = NvmConfig(model=f"{HERE}:own_model", stream=f"{HERE}:same_iterator", samples=100, worlds=("control",))
    with pytest.raises(DataError, match="returns the same iterator again"):
        simulate(chosen, tmp_path / "out")


def without_end() -> list[tuple[torch.Tensor, float]]:
    return [(torch.zeros(4), float("inf"))] * 200


def third_class_later() -> list[tuple[torch.Tensor, int]]:
    return [(torch.zeros(4), 2 if number == 150 else 0) for number in range(200)]


def other_shape_later() -> list[tuple[torch.Tensor, int]]:
    return [(torch.zeros(4 if number < 100 else 5), 0) for number in range(200)]


def nan_later() -> list[tuple[torch.Tensor, int]]:
    return [(torch.full((4,), float("nan") if number == 150 else 0.0), 0) for number in range(200)]


@pytest.mark.parametrize(
    ("model", "stream", "words"),
    [
        ("grouped", "own_stream", "scheme 'low-rank' can't take the model .* groups"),
        ("tied", "own_stream", "share one weight"),
        ("frozen", "own_stream", "the weight 'weight' is frozen"),
        ("broken", "own_stream", "parameter 'weight' is not finite"),
        ("half", "own_stream", "can't take a sample|float32"),
        ("without_size", "own_stream", "has parameters without a size"),
        ("own_model", "negative", "-1 is no label"),
        ("own_model", "halves", "0.5 is no label"),
        ("own_model", "without_end", "inf is no label"),
        ("own_model", "third_class_later", "2 is no label"),
        ("own_model", "other_shape_later", r"shape \(5,\) follows samples of shape \(4,\)"),
        ("own_model", "nan_later", "sample 151 of the stream is not finite"),
        ("own_model", "words", "'seven' is no label: labels are whole numbers from 0, not words"),
        ("MODEL", "own_stream", "MODEL is a model, not a function that returns one"),
    ],
)
def test_what_cannot_be_simulated_is_refused_and_leaves_the_folder_to_the_next_run(tmp_path, model, stream, words):
    chosen = {"samples": 200, "worlds": ("control",), "schemes": ("bias", "low-rank")}
    with pytest.raises(MemfitError, match=words):
        simulate(NvmConfig(model=f"{HERE}:{model}", stream=f"{HERE}:{stream}", **chosen), tmp_path)
    if not stream.endswith("later"):
        simulate(NvmConfig(model=f"{HERE}:own_model", stream=f"{HERE}:own_stream", **chosen), tmp_path)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("taken", ["figure.svg", "report.html"])
def test_a_result_that_could_not_be_written_is_told_before_anything_is_learned(data, tmp_path, monkeypatch, own, taken):
    (tmp_path / "out" / taken).mkdir(parents=True)
    monkeypatch.setattr(module, "pretrain", None)
    monkeypatch.setattr(devices, "learn_online", None)
    chosen = {"model": f"{HERE}:own_model", "stream": f"{HERE}:own_stream", "data": None} if own else {"data": data}
    # As for a run that goes on: without resuming, a page that is there is an earlier run's.
    with pytest.raises(MemfitError, match=rf"{taken}: the result cannot be written: a folder has that name"):
        simulate(config(**chosen, worlds=("control",)), tmp_path / "out", resume=True)


def test_what_does_not_fit_leaves_no_folder(tmp_path):
    with pytest.raises(MemfitError, match="has parameters without a size"):
        simulate(
            NvmConfig(model=f"{HERE}:without_size", stream=f"{HERE}:own_stream", worlds=("control",)), tmp_path / "a"
        )
    with pytest.raises(MemfitError, match="groups"):
        simulate(NvmConfig(model=f"{HERE}:grouped", stream=f"{HERE}:own_stream", worlds=("control",)), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_function_that_fails_is_told_of_in_one_sentence(tmp_path):
    command = ["nvm", "--model", f"{HERE}:fails", "--stream", f"{HERE}:own_stream", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert "fails with KeyError: 'settings'" in " ".join(result.output.split())
    assert "Traceback" not in result.output


def another_stream() -> list[tuple[torch.Tensor, int]]:
    return [(-x, y) for x, y in own_stream()]


def test_another_stream_is_another_run(tmp_path):
    chosen = {"model": f"{HERE}:own_model", "worlds": ("control",), "schemes": ("bias",)}
    simulate(NvmConfig(stream=f"{HERE}:own_stream", samples=100, **chosen), tmp_path)
    with pytest.raises(CheckpointError, match="other first samples: "):
        simulate(NvmConfig(stream=f"{HERE}:another_stream", samples=200, **chosen), tmp_path, resume=True)


def test_a_signal_in_the_last_samples_of_a_device_stops_the_simulation(tmp_path, monkeypatch):
    from memfit.nvm.online import _Run

    advance = _Run.advance

    def and_stop(run: _Run, *more: object) -> None:
        advance(run, *more)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_Run, "advance", and_stop)
    chosen = NvmConfig(model=f"{HERE}:own_model", stream=f"{HERE}:own_stream", samples=100, worlds=("control",))
    with pytest.raises(InterruptedRun):
        simulate(chosen, tmp_path)
    assert [each.name for each in (tmp_path / "online").iterdir()] == ["control-inference.safetensors"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 1e39}, "1,000,000"),
        ({"worlds": ("mars",)}, "control, shift, analog, digital"),
        ({"worlds": ()}, "not none"),
        ({"schemes": ("adam",)}, "low-rank-max-norm, not adam"),
        ({"samples": 0}, "number of samples"),
        ({"period": 0}, "period"),
        ({"seed": -1}, "seed"),
        ({"lr": -1.0}, "learning rate"),
        ({"samples_per_second": 0.0}, "positive"),
        ({"memory": "stone"}, "choose from rram"),
        ({"shift_every": 150}, "every 100"),
        ({"stream": "a:b"}, "give one of them"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_sentence(data, change, words):
    with pytest.raises(MemfitError, match=words):
        config(data, **change)


def test_a_stream_of_ones_own_needs_a_model_and_has_no_shift():
    with pytest.raises(MemfitError, match="model of one's own"):
        config(None, stream="a:b")
    with pytest.raises(MemfitError, match="leave it out"):
        config(None, stream="a:b", model="a:c")


def test_without_matplotlib_the_extra_is_named_before_anything_runs(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"memfit\[nvm\]"):
        simulate(config(data), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_energy_and_lifetime_in_units_that_one_reads():
    assert [joules(each) for each in (None, 0.0, 1.5, 0.0123, 4.56e-5, 3e-11)] == [
        "not known",
        "0 J",
        "1.5 J",
        "12.3 mJ",
        "45.6 µJ",
        "30 pJ",
    ]
    assert [lifetime(each) for each in (float("inf"), 12.3, 0.5, 1 / 8766, 1e-9, 3e7)] == [
        "no writes",
        "12.3 years",
        "183 days",
        "1 hour",
        "below a minute",
        "3.0e+07 years",
    ]
