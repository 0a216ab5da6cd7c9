"""Tasks in processes of their own: what they tell, how they fail, and that they end when the program does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memfit.errors import DataError, MemfitError
from memfit.run.interrupts import InterruptedRun, Interrupts
from memfit.run.processes import run_in_processes

Tell = Callable[[Any], None]


def count(tell: Tell, first: int, last: int) -> None:
    for number in range(first, last):
        tell(number)


def fail(tell: Tell, how: str, folder: Path) -> None:
    if how == "told":
        raise DataError("x.npz: has no images.")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    run_until_stopped(tell, folder / how)


def run_until_stopped(tell: Tell, file: Path) -> None:
    """Goes on until a signal, and leaves a file when it ends in order."""
    with Interrupts() as interrupts:
        tell("runs")
        while interrupts.signal is None:
            time.sleep(0.01)
    file.write_text("in order")
    raise InterruptedRun(interrupts.signal, 1, 2, file)


def test_every_task_is_done_and_what_it_tells_comes_in_order() -> None:
    told: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    tasks = {"a": (0, 3), "b": (3, 5), "c": (5, 5)}
    assert run_in_processes(tasks, count, 2, lambda name, number: told[name].append(number)) is None
    assert told == {"a": [0, 1, 2], "b": [3, 4], "c": []}


def measure(tell: Tell, some: bytes) -> None:
    tell(len(some))


def test_arguments_may_be_larger_than_a_pipe_holds() -> None:
    found: list[int] = []
    run_in_processes({"one": (b"x" * 1_000_000,)}, measure, 1, lambda name, size: found.append(size))
    assert found == [1_000_000]


def say_who_and_run(tell: Tell, file: Path) -> None:
    run_until_stopped(lambda _: tell(os.getpid()), file)


def test_a_task_that_someone_else_stops_is_not_done(tmp_path: Path) -> None:
    with pytest.raises(MemfitError, match="the process of one ended with status 1"):
        run_in_processes(
            {"one": (tmp_path / "one",)}, say_who_and_run, 1, lambda name, process: os.kill(process, signal.SIGTERM)
        )
    assert (tmp_path / "one").read_text() == "in order"


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [("told", DataError, "has no images"), ("killed", MemfitError, "process of second ended by signal 9")],
)
def test_a_task_that_fails_stops_the_others_in_order(
    tmp_path: Path, how: str, kind: type[MemfitError], said: str
) -> None:
    tasks = {"first": ("runs", tmp_path), "second": (how, tmp_path), "third": ("late", tmp_path)}
    with pytest.raises(kind, match=said):
        run_in_processes(tasks, fail, 2, lambda name, message: None)
    assert not (tmp_path / "late").exists()


def test_what_listens_may_fail_and_no_process_stays(tmp_path: Path) -> None:
    def heard(name: str, message: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_in_processes({"one": (tmp_path / "one",)}, run_until_stopped, 1, heard)
    assert (tmp_path / "one").read_text() == "in order"


PROGRAM = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_processes import run_until_stopped
from memfit.run.processes import run_in_processes

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tasks = {{name: (folder / name,) for name in ("a", "b", "c")}}
    print(run_in_processes(tasks, run_until_stopped, 2, lambda name, message: print(name, flush=True)))
"""


@pytest.fixture
def program(tmp_path: Path) -> subprocess.Popen[str]:
    """A program whose two processes run until they are stopped."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    process = subprocess.Popen(
        [sys.executable, str(path), str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert {process.stdout.readline().strip() for _ in range(2)} == {"a", "b"}
    return process


@pytest.mark.parametrize(("number", "group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_signal_to_the_program_or_its_group_stops_all_tasks_in_order(
    tmp_path: Path, program: subprocess.Popen[str], number: int, group: bool
) -> None:
    (os.killpg if group else os.kill)(program.pid, number)
    assert program.communicate(timeout=60)[0].strip() == str(int(number))
    assert sorted(each.name for each in tmp_path.glob("?")) == ["a", "b"]


def test_a_program_that_is_killed_leaves_no_process(program: subprocess.Popen[str]) -> None:
    program.kill()
    program.wait()
    for _ in range(200):
        try:
            os.killpg(program.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process outlived the program")
