import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from memfit.cli.app import app
from memfit.speech import model as recognizer_file
from memfit.speech.model import Recognizer, RecognizerConfig

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("jiwer")
pytest.importorskip("soxr")

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 8000
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten recordings of noise with their transcripts: what is learned does not matter here."""
    place = tmp_path / "voice"
    place.mkdir()
    torch.manual_seed(0)
    with (place / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "transcription"])
        for number in range(10):
            soundfile.write(place / f"{number}.wav", (0.1 * torch.randn(RATE // 2)).numpy(), RATE)
            table.writerow([f"{number}.wav", "ab cd"])
    return place


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = Recognizer(RecognizerConfig(features=16, layers=1, hidden=16))
    path = tmp_path / "base.safetensors"
    recognizer_file.save(model, model.config, path)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def personalize(folder: Path, base: Path, out: Path, *more: object):
    return run("personalize", "--recordings", folder, "--base", base, "--rank", 4, "--steps", 3, "--out", out, *more)


def refused(result, *words: str) -> None:
    """One sentence on standard error, exit code 2, nothing on standard output."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0]


def test_personalize_prints_the_outcome_and_where_it_is(folder, base, tmp_path):
    result = personalize(folder, base, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"word error rate: [\d.]+ % before, [\d.]+ % after 3 steps", result.stdout)
    for line in ("weights", "gradients", "optimizer", "activations", "workspace", "total"):
        assert re.search(rf"^{line} .*[KM]iB|^{line} .* B\b", result.stdout, re.MULTILINE)
    assert str(tmp_path / "out/report.html") in result.stdout
    assert "step 3/3" in result.stderr


def test_json_is_the_only_thing_on_standard_output(folder, base, tmp_path):
    result = personalize(folder, base, tmp_path / "out", "--json", "--method", "momentum")
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert report["method"] == "momentum"
    again = personalize(folder, base, tmp_path / "out", "--json", "--method", "momentum", "--resume")
    assert json.loads(again.stdout) == report


def test_transcribe_prints_text_and_json(folder, base):
    one = run("transcribe", "--model", base, folder / "0.wav")
    assert one.exit_code == 0, one.stderr
    assert len(one.stdout.splitlines()) == 1
    two = run("transcribe", "--model", base, folder / "0.wav", folder / "1.wav", "--beam", 4)
    assert [line.split(": ")[0] for line in two.stdout.splitlines()] == [str(folder / "0.wav"), str(folder / "1.wav")]
    values = json.loads(run("transcribe", "--model", base, folder / "0.wav", "--json").stdout)
    assert values == [{"file": str(folder / "0.wav"), "text": one.stdout.strip("\n")}]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are not UTF-8")
def test_a_name_that_is_not_utf8_can_be_printed(folder, base, tmp_path):
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/voice \xff"))
    folder.rename(strange)
    two = run("transcribe", "--model", base, strange / "0.wav", strange / "1.wav")
    assert two.exit_code == 0, two.exception
    assert two.stdout.count("voice \\udcff/") == 2
    (value,) = json.loads(run("transcribe", "--model", base, strange / "0.wav", "--json").stdout)
    assert value["file"] == str(strange / "0.wav")
    result = personalize(strange, base, tmp_path / "out")
    assert result.exit_code == 0, result.exception
    assert json.loads((tmp_path / "out/report.json").read_text("ascii"))["config"]["recordings"] == str(strange)
    assert "voice \\udcff" in (tmp_path / "out/report.html").read_text("utf-8")


def test_a_name_that_is_too_long_is_one_sentence(folder, base, tmp_path):
    name = "n" * 300
    refused(run("transcribe", "--model", base, name), name)
    refused(personalize(Path(name), base, tmp_path / "out"), name)
    refused(personalize(folder, base, tmp_path / name), name)
    refused(personalize(folder, base, tmp_path / name, "--resume"), name)


@pytest.mark.parametrize(
    ("rate", "channels", "subtype", "suffix"),
    [(8000, 2, "PCM_16", "wav"), (44100, 1, "PCM_24", "wav"), (48000, 2, "FLOAT", "wav"), (16000, 1, "PCM_16", "flac")],
)
def test_stereo_and_other_rates_and_formats_simply_work(base, tmp_path, rate, channels, subtype, suffix):
    soundfile.write(tmp_path / f"x.{suffix}", 0.1 * torch.randn(rate, channels).numpy(), rate, subtype=subtype)
    assert run("transcribe", "--model", base, tmp_path / f"x.{suffix}").exit_code == 0


def test_a_very_short_recording_simply_works(base, tmp_path):
    soundfile.write(tmp_path / "x.wav", torch.zeros(1).numpy(), RATE)
    assert run("transcribe", "--model", base, tmp_path / "x.wav").exit_code == 0


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--steps", 0, "steps"),
        ("--steps", -3, "steps"),
        ("--steps", 10**400, "2^63 - 1"),
        ("--rank", 0, "rank"),
        ("--rank", 1000, "1000"),
        ("--batch-size", 0, "batch size"),
        ("--utterances", 0, "utterances"),
        ("--utterances", -1, "utterances"),
        ("--seed", -1, "seed"),
        ("--seed", 10**30, "seed"),
        ("--lr", "nan", "nan"),
        ("--lr", "inf", "inf"),
        ("--lr", -1, "-1"),
        ("--method", "magic", "magic"),
        ("--sides", "right", "right"),
        ("--speaker", "nobody", "nobody"),
    ],
)
def test_an_option_out_of_range_is_one_sentence(folder, base, tmp_path, option, value, word):
    refused(personalize(folder, base, tmp_path / "out", option, value), word)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--steps", "many"], ["--lr", "fast"], ["--nonsense"]])
def test_a_usage_error_is_exit_code_2(folder, base, tmp_path, arguments):
    assert personalize(folder, base, tmp_path / "out", *arguments).exit_code == 2


def remove_metadata(folder: Path) -> str:
    (folder / "metadata.csv").unlink()
    return str(folder)


def empty_the_folder(folder: Path) -> str:
    for path in folder.iterdir():
        path.unlink()
    return str(folder)


def remove_the_folder(folder: Path) -> str:
    empty_the_folder(folder)
    folder.rmdir()
    return str(folder)


def replace_the_folder_by_a_file(folder: Path) -> str:
    remove_the_folder(folder)
    folder.write_text("not a folder")
    return str(folder)


def transcribe_with_unknown_characters(folder: Path) -> str:
    text = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(text.replace("3.wav,ab cd", "3.wav,ab 7 ß€"))
    return "3.wav"


def transcribe_with_nothing(folder: Path) -> str:
    text = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(text.replace("3.wav,ab cd", "3.wav,"))
    return "3.wav"


def keep_two_recordings(folder: Path) -> str:
    lines = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join(lines[:3]))
    return "metadata.csv"


def write_binary_metadata(folder: Path) -> str:
    (folder / "metadata.csv").write_bytes(bytes(range(256)))
    return "metadata.csv"


def lose_a_recording(folder: Path) -> str:
    (folder / "3.wav").unlink()
    return "3.wav"


def write_noise_that_is_no_audio(folder: Path) -> str:
    (folder / "3.wav").write_bytes(b"not audio at all")
    return "3.wav"


def write_an_empty_file(folder: Path) -> str:
    (folder / "3.wav").write_bytes(b"")
    return "3.wav"


def write_no_samples(folder: Path) -> str:
    soundfile.write(folder / "3.wav", torch.zeros(0).numpy(), RATE)
    return "3.wav"


def write_not_a_number(folder: Path) -> str:
    soundfile.write(folder / "3.wav", torch.full((RATE,), torch.nan).numpy(), RATE, subtype="FLOAT")
    return "3.wav"


def write_too_little_for_its_text(folder: Path) -> str:
    soundfile.write(folder / "3.wav", torch.zeros(10).numpy(), RATE)
    return "3.wav"


@pytest.mark.parametrize(
    "spoil",
    [
        remove_metadata,
        empty_the_folder,
        remove_the_folder,
        replace_the_folder_by_a_file,
        transcribe_with_unknown_characters,
        transcribe_with_nothing,
        keep_two_recordings,
        write_binary_metadata,
        lose_a_recording,
        write_noise_that_is_no_audio,
        write_an_empty_file,
        write_no_samples,
        write_not_a_number,
        write_too_little_for_its_text,
    ],
)
def test_bad_recordings_are_one_sentence_with_the_name_of_the_file(folder, base, tmp_path, spoil):
    name = spoil(folder)
    refused(personalize(folder, base, tmp_path / "out"), name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"", b"x" * 100, "truncated", "foreign"])
def test_a_bad_base_is_one_sentence_with_the_name_of_the_file(folder, base, tmp_path, content):
    whole = base.read_bytes()
    base.unlink()
    if content == "foreign":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(3)}, base)
    elif content is not None:
        base.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    refused(personalize(folder, base, tmp_path / "out"), str(base))
    refused(run("transcribe", "--model", base, folder / "0.wav"), str(base))
    assert not (tmp_path / "out").exists()


def test_bad_audio_to_transcribe_is_one_sentence_with_the_name_of_the_file(folder, base, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    for path in (tmp_path / "bad.wav", tmp_path / "missing.wav", folder, folder / "metadata.csv"):
        refused(run("transcribe", "--model", base, path), str(path))
    refused(run("transcribe", "--model", base, folder / "0.wav", "--beam", 0), "beam")
    refused(run("transcribe", "--model", folder, folder / "0.wav"), str(folder))


def test_an_earlier_result_and_other_settings_are_one_sentence(folder, base, tmp_path):
    assert personalize(folder, base, tmp_path / "out").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    refused(personalize(folder, base, tmp_path / "out"), str(tmp_path / "out"), "--resume")
    refused(personalize(folder, base, tmp_path / "out", "--resume", "--seed", 5), "report.json", "seed")
    (tmp_path / "out/report.json").unlink()
    refused(personalize(folder, base, tmp_path / "out", "--resume", "--seed", 5), "checkpoint.safetensors", "seed")
    (tmp_path / "out/report.json").write_bytes(before["report.json"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_bad_checkpoint_is_one_sentence_with_the_name_of_the_file(folder, base, tmp_path):
    assert personalize(folder, base, tmp_path / "out").exit_code == 0
    path = tmp_path / "out/checkpoint.safetensors"
    (tmp_path / "out/report.json").unlink()
    for content in (path.read_bytes()[:-100], b"", b"\0" * 64, b'{"a": 1}', base.read_bytes()):
        path.write_bytes(content)
        refused(personalize(folder, base, tmp_path / "out", "--resume"), str(path))
        assert path.read_bytes() == content


def test_an_output_folder_that_cannot_be_made_is_one_sentence(folder, base, tmp_path):
    for out in (base, base / "out", "/proc/memfit"):
        refused(personalize(folder, base, out), str(out))


def test_the_version_and_the_help_are_there():
    assert re.fullmatch(r"memfit \d+\.\d+\.\d+\S*\n", run("--version").stdout)
    for command in ("personalize", "transcribe", "demo"):
        assert command in run("--help").stdout
        assert run(command, "--help").exit_code == 0


def start(*arguments: object, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from memfit.cli.app import main; main()", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=ONE_THREAD, **{**pipes, **options})


def test_the_process_itself_exits_with_2_and_one_line(tmp_path):
    process = start("personalize", "--recordings", tmp_path / "nothing", "--out", tmp_path / "out")
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert re.fullmatch(r"error: .*nothing.*\n", errors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_how_to_go_on_and_gives_its_exit_code(folder, base, tmp_path, number):
    options = ["--recordings", folder, "--base", base, "--rank", 4, "--steps", 100_000, "--out", tmp_path / "out"]
    process = start("personalize", *options)
    checkpoint = tmp_path / "out/checkpoint.safetensors"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert output == ""
    assert "Traceback" not in errors
    assert re.search(r"interrupted after step \d+ of 100000; the last checkpoint: .*checkpoint", errors)
    assert re.search(r"to go on: memfit personalize --recordings .* --resume\n$", errors)


def test_a_reader_that_goes_away_is_no_error(folder, base):
    reader, writer = os.pipe()
    process = start("transcribe", "--model", base, *[folder / f"{i}.wav" for i in range(10)], stdout=writer)
    os.close(writer)
    os.close(reader)
    _, errors = process.communicate()
    assert "Traceback" not in errors
    assert "Exception" not in errors


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_standard_streams_that_are_closed_are_no_error(folder, base, closed):
    command = [sys.executable, "-c", "from memfit.cli.app import main; main()", "transcribe", "--model", base]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *map(str, command), str(folder / "0.wav")]
    assert subprocess.run(shell, env=ONE_THREAD, capture_output=True, check=False).returncode == 0


def test_a_warning_of_ours_is_one_sentence_in_a_command():
    script = (
        "import memfit.cli.app as cli, memfit.native as native, sys; "
        "where = lambda name: warnings.warn_explicit('nothing was written.', RuntimeWarning, name, 1); "
        "import warnings; cli.app = lambda: where(sys.argv[1] or native.__file__); cli.main()"
    )
    found = []
    for name in ("", "theirs.py"):
        command = [sys.executable, "-c", script, name]
        found.append(subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=True).stderr)
    assert found == ["warning: nothing was written.\n", "theirs.py:1: RuntimeWarning: nothing was written.\n"]
