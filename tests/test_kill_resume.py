"""Real processes: killed with SIGKILL, interrupted, out of disk; and resumed to the same bits.

The run is the benchmark's (benchmarks/kill_and_resume.py): low-rank LSTM with refresh, dropout, batch norm, Adam, a
one-cycle schedule, clipping, shuffled data, a state of some megabytes, a checkpoint every two steps.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memfit import checkpoint

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill_and_resume.py"
STEPS = 20

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

_spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The last checkpoint of a run that nobody disturbs."""
    path = tmp_path_factory.mktemp("undisturbed") / "run.safetensors"
    benchmark.finish(path, STEPS)
    return checkpoint.load(path)


def steps_saved(path: Path) -> int:
    """The step of the checkpoint, 0 when there is none; whatever the instant of a kill, the file is whole."""
    return len(checkpoint.load(path)["records"]["loss"]) if path.exists() else 0


def wait_for_saves(path: Path, process: subprocess.Popen[bytes], count: int) -> None:
    """Until so many checkpoints have been written."""
    seen = {modified(path)}
    wait_for(lambda: len(seen.add(modified(path)) or seen) > count, process)  # type: ignore[func-returns-value]


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], interval: float = 0.002) -> None:
    while not condition():
        assert process.poll() is None, f"the run was over too soon: {process.communicate()[1].decode()}"
        time.sleep(interval)


def test_a_run_killed_three_times_ends_with_the_same_bits(reference: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    generator = random.Random(0)

    process = benchmark.start(path, STEPS)
    wait_for_saves(path, process, 1)
    assert benchmark.kill(process, after=generator.uniform(0, 0.1))
    first = steps_saved(path)
    assert first >= 2

    process = benchmark.start(path, STEPS)
    wait_for_saves(path, process, 1)
    wait_for(lambda: benchmark.half_written(tmp_path), process, interval=0)
    assert benchmark.kill(process, after=0)
    second = steps_saved(path)
    assert second > first

    process = benchmark.start(path, STEPS)
    wait_for_saves(path, process, 1)
    assert benchmark.kill(process, after=generator.uniform(0, 0.1))
    assert steps_saved(path) > second

    benchmark.finish(path, STEPS)
    assert benchmark.differences(reference, checkpoint.load(path)) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.safetensors"]


def test_signals_to_a_run_and_its_workers_save_and_resume(reference: Any, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group, a service manager's SIGTERM too: the DataLoader's workers end as well."""
    path = tmp_path / "run.safetensors"
    saved = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = benchmark.start(path, STEPS, workers=1)
        wait_for_saves(path, process, 2)
        os.killpg(process.pid, number)
        errors = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 128 + number, errors
        assert saved + 4 <= steps_saved(path) < STEPS
        saved = steps_saved(path)
    benchmark.finish(path, STEPS)
    assert benchmark.differences(reference, checkpoint.load(path)) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and os.geteuid() == 0
    mounted = (
        mounted and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]).returncode == 0
    )
    if not mounted:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_ends_the_run_with_one_sentence_and_the_earlier_checkpoint(small_disk: Path) -> None:
    path = small_disk / "run.safetensors"
    process = benchmark.start(path, STEPS)
    errors = process.communicate()[1].decode()
    assert process.returncode == 2
    assert errors == (
        f"error: {path}: the checkpoint cannot be written: the disk is full: free some space, or choose a folder on "
        "another disk.\n"
    )
    assert steps_saved(path) >= 2
    assert [entry.name for entry in small_disk.iterdir()] == ["run.safetensors"]
