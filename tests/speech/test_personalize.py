import csv
import json
import math
import os
import random
import resource
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
from memfit.speech import model as recognizer_file
from memfit.speech import personalize as module
from memfit.speech.batches import Batches, ctc_loss
from memfit.speech.model import Recognizer, RecognizerConfig
from memfit.speech.personalize import PersonalizeConfig, personalize
from memfit.speech.report import PersonalizeReport

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("jiwer")
pytest.importorskip("soxr")

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(os.environ.get("MEMFIT_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
RATE = 8000
TONES = {"a": 300, "b": 700, "c": 1300, "d": 2100}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PersonalizeConfig:
    """A small base, and 15 recordings of a voice that sings one tone per letter: learned in seconds."""
    folder = tmp_path_factory.mktemp("voice")
    generator = torch.Generator().manual_seed(0)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "transcription"])
        for number in range(15):
            letters = [list(TONES)[int(i)] for i in torch.randint(4, (3,), generator=generator)]
            time = torch.arange(int(0.15 * RATE)) / RATE
            tones = [0.5 * torch.sin(2 * math.pi * TONES[letter] * time) for letter in letters]
            soundfile.write(folder / f"{number:02}.wav", torch.cat(tones).numpy(), RATE)
            table.writerow([f"{number:02}.wav", " ".join(letters)])
    torch.manual_seed(1)
    base = Recognizer(RecognizerConfig(features=16, layers=2, hidden=24))
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    recognizer_file.save(base, base.config, path)
    return PersonalizeConfig(recordings=folder, base=path, rank=4, steps=15, seed=3)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> tuple[Path, PersonalizeReport]:
    """A run that nothing has disturbed; its folder must not be changed."""
    out = tmp_path_factory.mktemp("finished")
    return out, personalize(config, out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_leaves_a_plain_recognizer_and_a_report(config, finished):
    out, report = finished
    assert set(contents(out)) == {"model.safetensors", "report.json", "report.html", "checkpoint.safetensors"}
    base, model = load_file(config.base), load_file(out / "model.safetensors")
    assert {name: tensor.shape for name, tensor in model.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    assert all(not torch.equal(model[name], base[name]) for name in base)  # every matrix and every bias has learned
    assert recognizer_file.load(out / "model.safetensors").config.hidden == 24
    assert PersonalizeReport.from_json((out / "report.json").read_text(), "report.json") == report


def test_the_report_tells_the_run(config, finished):
    _, report = finished
    values = report.to_dict()
    assert (values["method"], values["seed"], values["steps"]) == ("low-rank", 3, 15)
    assert values["config"]["lr"] == config.learning_rate
    assert len(values["losses"]) == 15
    assert values["losses"][-1] < values["losses"][0]
    lines = values["peak_bytes"]
    assert lines["total"] == sum(
        lines[line] for line in ("weights", "gradients", "optimizer", "activations", "workspace")
    )
    assert min(lines["weights"], lines["optimizer"], lines["activations"], values["process_peak_bytes"]) > 0
    assert [step for step, _ in values["wer_curve"]] == [0, 2, 5, 8, 10, 12, 15]
    assert values["wer_curve"][0][1] == values["wer_before"]
    assert values["wer_curve"][-1][1] == values["wer_after"]
    assert len(values["hypotheses"]) == 3


def test_the_same_seed_gives_the_same_model_to_the_bit_and_another_seed_another(config, finished, tmp_path):
    out, _ = finished
    personalize(config, tmp_path / "same")
    personalize(replace(config, seed=4), tmp_path / "other")
    assert same_weights(tmp_path / "same", out)
    assert not same_weights(tmp_path / "other", out)


def test_measuring_on_the_way_changes_nothing(config, finished, tmp_path, monkeypatch):
    out, _ = finished
    monkeypatch.setattr(watch, "_MEASUREMENTS", 1)
    report = personalize(config, tmp_path / "unwatched")
    assert len(report.wer_curve) == 2
    assert same_weights(tmp_path / "unwatched", out)


def test_the_random_numbers_of_the_caller_go_on_as_if_nothing_had_happened(config, tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    personalize(replace(config, steps=1), tmp_path / "out")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "choice", [{"method": "sgd"}, {"method": "momentum"}, {"method": "adam"}, {"sides": "left"}], ids=str
)
def test_every_method_trains(config, tmp_path, choice):
    report = personalize(replace(config, steps=8, **choice), tmp_path / "out")
    assert report.losses[-1] < report.losses[0]
    assert ("rank" in report.config) == ("sides" in choice)


def test_low_rank_adam_takes_less_for_gradients_and_optimizer_than_dense_adam(config, finished, tmp_path):
    _, low_rank = finished
    dense = personalize(replace(config, method="adam", steps=3), tmp_path / "out")
    for line in ("gradients", "optimizer"):
        assert low_rank.peak_bytes[line] < 0.6 * dense.peak_bytes[line]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"steps": 0}, "steps must be 1 or more"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"batch_size": -5}, "batch size must be 1 or more"),
        ({"utterances": 0}, "training utterances must be 1 or more"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"lr": math.nan}, "learning rate must be a positive number, not nan"),
        ({"lr": math.inf}, "learning rate"),
        ({"lr": 0.0}, "learning rate"),
        ({"method": "magic"}, "low-rank, sgd, momentum, adam, not 'magic'"),
        ({"sides": "right"}, "both or left"),
    ],
)
def test_a_setting_out_of_range_is_one_sentence(values, complaint):
    with pytest.raises(MemfitError, match=complaint):
        PersonalizeConfig(recordings=Path("recordings"), **values)


def test_a_rank_above_the_matrices_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(ConversionError, match="100"):
        personalize(replace(config, rank=100), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_of_an_earlier_run_are_not_overwritten(config, finished):
    out, _ = finished
    before = contents(out)
    with pytest.raises(MemfitError, match=r"earlier run's report\.json"):
        personalize(config, out)
    assert contents(out) == before


def test_to_resume_a_finished_run_returns_its_report_and_changes_nothing(config, finished):
    out, report = finished
    before = contents(out)
    said = []
    assert personalize(config, out, resume=True, notify=said.append) == report
    assert said == [f"{out} holds this run's results already"]
    assert contents(out) == before


def test_to_resume_with_other_settings_is_refused_by_name(config, finished):
    out, _ = finished
    before = contents(out)
    for other, name in ((replace(config, rank=2), "rank"), (replace(config, steps=16), "steps")):
        with pytest.raises(CheckpointError, match=rf"report\.json.*{name} was"):
            personalize(other, out, resume=True)
    assert contents(out) == before


class Stop(Exception):
    pass


def stop_at(step: int):
    def on_step(record):
        if record.step == step:
            raise Stop

    return on_step


def test_an_unfinished_run_is_not_resumed_with_other_settings_or_other_recordings(config, tmp_path):
    with pytest.raises(Stop):
        personalize(config, tmp_path / "out", on_step=stop_at(12))
    before = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors.*lr"):
        personalize(replace(config, lr=0.1), tmp_path / "out", resume=True)
    with pytest.raises(CheckpointError, match="other recordings: "):
        personalize(replace(config, utterances=5, batch_size=5), tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("step", [5, 15])
def test_a_run_that_stopped_at_any_step_and_is_resumed_ends_the_same(config, finished, tmp_path, step):
    out, expected = finished
    with pytest.raises(Stop):
        personalize(config, tmp_path / "out", on_step=stop_at(step))
    report = personalize(config, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "out", out)
    assert report.losses == expected.losses
    assert report.wer_curve == expected.wer_curve
    assert report.heard == expected.heard


def test_the_callers_random_numbers_go_on_undisturbed(config, tmp_path):
    def draws() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    with pytest.raises(Stop):
        personalize(config, tmp_path / "out", on_step=stop_at(12))
    for generator in (random.seed, numpy.random.seed, torch.manual_seed):
        generator(11)
    expected = draws()
    for generator in (random.seed, numpy.random.seed, torch.manual_seed):
        generator(11)
    personalize(config, tmp_path / "out", resume=True)
    assert draws() == expected


def test_an_interrupted_run_names_the_checkpoint_only_if_there_is_one(tmp_path):
    assert "there is no checkpoint" in str(InterruptedRun(signal.SIGINT, 2, 5, tmp_path / "c"))
    (tmp_path / "c").touch()
    assert f"the last checkpoint: {tmp_path / 'c'}" in str(InterruptedRun(signal.SIGINT, 2, 5, tmp_path / "c"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_and_resume_ends_the_same(config, finished, tmp_path, number):
    out, _ = finished

    def on_step(record):
        if record.step == 13:
            os.kill(os.getpid(), number)

    with pytest.raises(InterruptedRun, match=r"after step 13 of 15; .*checkpoint\.safetensors") as stopped:
        personalize(config, tmp_path / "out", on_step=on_step)
    assert stopped.value.signal == number
    assert set(contents(tmp_path / "out")) == {"checkpoint.safetensors", "watch.json"}
    personalize(config, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "out", out)


def test_a_killed_process_leaves_a_run_that_resumes_to_the_same_model(config, finished, tmp_path):
    out, _ = finished
    code = (
        "import os, signal, sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from memfit.speech.personalize import PersonalizeConfig, personalize\n"
        "recordings, base, out = map(Path, sys.argv[1:])\n"
        "config = PersonalizeConfig(recordings=recordings, base=base, rank=4, steps=15, seed=3)\n"
        "personalize(config, out, on_step=lambda r: r.step == 12 and os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    arguments = [str(config.recordings), str(config.base), str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    personalize(config, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "out", out)


def test_a_run_that_was_killed_before_its_report_gets_it(config, finished, tmp_path, monkeypatch):
    out, _ = finished

    def render(report: PersonalizeReport) -> str:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(module, "render", render)
        with pytest.raises(Stop):
            personalize(config, tmp_path / "out")
    assert not (tmp_path / "out/report.json").exists()
    personalize(config, tmp_path / "out", resume=True)
    assert set(contents(tmp_path / "out")) == set(contents(out))


def test_a_damaged_checkpoint_is_refused_and_left_alone(config, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        personalize(config, out, on_step=stop_at(12))
    whole = (out / "checkpoint.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 1000):
        (out / "checkpoint.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors"):
            personalize(config, out, resume=True)
        assert (out / "checkpoint.safetensors").read_bytes() == damaged


def test_a_damaged_file_of_measurements_costs_only_points_of_the_curve(config, finished, tmp_path):
    with pytest.raises(Stop):
        personalize(config, tmp_path / "out", on_step=stop_at(12))
    (tmp_path / "out/watch.json").write_text('{"settings"')
    report = personalize(config, tmp_path / "out", resume=True)
    assert [step for step, _ in report.wer_curve] == [0, 12, 15]


def test_a_folder_that_cannot_be_written_is_found_out_before_the_training(config, tmp_path):
    (tmp_path / "file").write_text("mine")
    places = [tmp_path / "file", tmp_path / "file/out", Path("/proc/memfit"), tmp_path / ("x" * 300)]
    for place in places:
        with pytest.raises(MemfitError, match="choose another") as refused:
            personalize(config, place, on_step=lambda record: pytest.fail("it trained"))
        assert str(place) in str(refused.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_is_one_sentence_and_the_run_resumes_when_there_is_room(config, finished, tmp_path):
    out, _ = finished
    size = (out / "checkpoint.safetensors").stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors.*(larger|full|disk)"):
            personalize(config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [name for name in contents(tmp_path / "out") if name.endswith((".partial", ".safetensors"))]
    personalize(config, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "out", out)


def test_too_few_recordings_and_unknown_characters_are_refused_by_file(config, tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,transcription\na.wav,ж\n")
    soundfile.write(tmp_path / "a.wav", torch.zeros(RATE).numpy(), RATE)
    with pytest.raises(DataError, match=r"metadata\.csv"):
        personalize(replace(config, recordings=tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_real_voice_is_recognized_better_after_a_few_steps(tmp_path):
    if not (DATA / "fsdd").is_dir():
        pytest.skip(f"needs the Free Spoken Digit Dataset in {DATA / 'fsdd'}")
    config = PersonalizeConfig(recordings=DATA / "fsdd", speaker="theo", steps=20, lr=1e-3)
    report = personalize(config, tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text())["wer_after"] == report.wer_after
    # The words that are wrong are few, and one more or less is chance: the loss on held-out utterances is not.
    base, recordings = module.load(config)
    held_out = next(iter(Batches(recordings.test, base.config, len(recordings.test))))
    with torch.no_grad():
        before = float(ctc_loss(base, held_out))
        after = float(ctc_loss(recognizer_file.load(tmp_path / "out/model.safetensors"), held_out))
    assert after < 0.8 * before


def test_a_small_recognizer_trains_on_one_thread_and_the_callers_number_comes_back(config, tmp_path):
    torch.set_num_threads(2)
    try:
        seen = []
        personalize(
            replace(config, steps=1), tmp_path / "out", on_step=lambda record: seen.append(torch.get_num_threads())
        )
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
