"""Tasks in processes of their own, a few at once: signals reach them all, and none outlives the program."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from memfit.errors import MemfitError
from memfit.run.interrupts import InterruptedRun, Interrupts

_LISTENING = 0.2  # seconds between looks for a signal


class _Failed(NamedTuple):
    """What ends a task before its time."""

    said: str
    kind: type[MemfitError]


def run_in_processes(
    tasks: Mapping[str, tuple[Any, ...]],
    work: Callable[..., None],
    at_once: int,
    on_message: Callable[[str, Any], None],
) -> int | None:
    """Call ``work(tell, *arguments)`` for each task, in a fresh process each; what ``tell`` is told comes back.

    Args:
        tasks: names, and arguments that can be pickled.
        work: a function of a module. It stops in order at SIGTERM, by :class:`InterruptedRun`.
        at_once: how many processes there are at a time.
        on_message: is called with the name of the task and what it told, as it comes.

    Returns:
        the number of the signal that stopped the tasks (Ctrl-C or SIGTERM), or None when all are done.

    Raises:
        MemfitError: the first that a task has raised, when the others have stopped in order; or a process has died.
    """
    waiting, running = list(tasks), dict[Connection, tuple[str, SpawnProcess]]()
    failure: _Failed | None = None
    stopped = False
    with Interrupts() as interrupts:
        try:
            while running or (waiting and not stopped):
                if (interrupts.signal is not None or failure is not None) and not stopped:
                    stopped = True
                    for _, process in running.values():
                        process.terminate()
                while waiting and len(running) < at_once and not stopped:
                    name = waiting.pop(0)
                    connection, process = _start(work, tasks[name])
                    running[connection] = (name, process)
                heard = wait(list(running), _LISTENING)
                for connection in [each for each in running if each in heard]:
                    name, process = running[connection]
                    try:
                        message = connection.recv()
                    except EOFError:
                        process.join()
                        del running[connection]
                        if process.exitcode and not stopped and failure is None:
                            failure = _Failed(_died(name, process.exitcode), MemfitError)
                        continue
                    if isinstance(message, _Failed):
                        failure = failure or message
                    else:
                        on_message(name, message)
        finally:
            for _, process in running.values():  # when what was told has raised, or at the second Ctrl-C
                process.terminate()
                process.join()
    if failure is not None:
        raise failure.kind(failure.said)
    return interrupts.signal


def _died(name: str, status: int) -> str:
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"the process of {name} ended {how}, perhaps for want of memory: fewer at once need less."


def _start(work: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_task, args=(theirs, work, arguments), daemon=True)
    with _ignoring_ctrl_c():
        process.start()
    theirs.close()
    return ours, process


@contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    """A process that starts in here does so for good: it is told by SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _task(connection: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        work(connection.send, *arguments)
    except InterruptedRun:
        pass
    except MemfitError as error:
        connection.send(_Failed(str(error), type(error)))


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
