"""The examples run as they stand and reach what they print."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What an example prints; in this process, so that what it imports is imported once."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def accuracy(printed: str) -> float:
    """The last one printed, in percent."""
    return float(re.findall(r"accuracy.* ([0-9.]+)%", printed)[-1])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "plain_loop.py",
        "data_parallel.py",
        "hf_trainer.py",
        "segmentation.py",
        "accumulate_low_rank.py",
    }


def test_plain_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("plain_loop.py", monkeypatch, capsys)
    assert "gradients" in printed
    assert accuracy(printed) > 75
    assert list(torch.load("model.pt", weights_only=True)) == [
        f"{layer}.{name}" for layer in (0, 2, 4) for name in ("weight", "bias")
    ]


def test_accumulate_low_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("accumulate_low_rank.py", monkeypatch, capsys, "--steps", "4", "--batch", "500")
    kept, dense = (
        int(number.replace(",", "")) for number in re.findall(r"([0-9,]+) bytes, in place of ([0-9,]+)", printed)[0]
    )
    assert 5 * kept < dense
    assert accuracy(printed) > 30  # of 16 classes


@pytest.mark.parametrize("arguments", [[], pytest.param(["--shard"], marks=pytest.mark.slow)])
def test_data_parallel(arguments: list[str]) -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / "data_parallel.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert accuracy(process.stdout) > 65


def test_hf_trainer_and_its_resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason='needs pip install "memfit[hf]"')
    pytest.importorskip("accelerate", reason='needs pip install "memfit[hf]"')
    Path("text.txt").write_text("abcdefgh " * 40, encoding="utf-8")
    arguments = ["--text", "text.txt", "--output", "out", "--steps", "45"]
    printed = run("hf_trainer.py", monkeypatch, capsys, *arguments)
    assert "continues the text: 'abcdefgh abcdefgh abcdefgh abcdefgh" in printed
    weights = Path("out/final/model.safetensors").read_bytes()
    assert b"low_rank" not in weights

    for path in Path("out/checkpoint-45").iterdir():  # as if the run had ended after the first checkpoint
        path.unlink()
    Path("out/checkpoint-45").rmdir()
    assert "continues" in run("hf_trainer.py", monkeypatch, capsys, *arguments, "--resume")
    assert Path("out/final/model.safetensors").read_bytes() == weights
    plain = transformers.LlamaForCausalLM.from_pretrained("out/final")
    assert type(plain.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_segmentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL", reason='needs pip install "memfit[vision]"')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    few = ["--images", "60", "--pretrain", "60", "--steps", "40", "--size", "48"]
    printed = run("segmentation.py", monkeypatch, capsys, *few)
    before, exact, filtered = (float(figure) for figure in re.findall(r"mIoU[a-z: ]* ([0-9.]+)%", printed))
    assert min(exact, filtered) > before + 5
    assert len(re.findall(r"^activations +[0-9.]+ [KM]iB", printed, re.MULTILINE)) == 2

    x, y = numpy.zeros((20, 28, 28), numpy.uint8), numpy.arange(20) % 10
    x[:, 8:20, 8:20] = 255
    numpy.savez("digits.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    few = ["--images", "10", "--pretrain", "3", "--steps", "3", "--size", "32"]
    assert run("segmentation.py", monkeypatch, capsys, "--data", "digits.npz", *few).count("mIoU") == 3

    from PIL import Image

    for part, mode in (("images", "RGB"), ("masks", "L")):
        Path("own", part).mkdir(parents=True)
        for number in range(10):
            picture = Image.new(mode, (50, 40), 0)
            picture.paste({"images": (250, 250, 250), "masks": 1}[part], (0, 0, 10 + 3 * number, 20))
            picture.save(Path("own", part, f"{number}.png"))
    assert run("segmentation.py", monkeypatch, capsys, "--data", "own", *few).count("mIoU") == 3
    torch.set_num_threads(threads)
