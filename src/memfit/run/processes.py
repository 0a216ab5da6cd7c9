"""Tasks in processes of their own, a few at once: signals reach them all, and none outlives the program."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from memfit.errors import MemfitError
from memfit.run.interrupts import InterruptedRun, Interrupts

_LISTENING = 0.2  # seconds between looks for a signal


class _Ready(NamedTuple):
    """A process is there, and waits for its arguments."""


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
                    connection, process = _start(work)
                    running[connection] = (name, process)
                heard = wait(list(running), _LISTENING)
                for connection in [each for each in running if each in heard]:
                    name, process = running[connection]
                    try:
                        message = connection.recv()
                    except (EOFError, ConnectionResetError):
                        process.join()
                        del running[connection]
                        if process.exitcode and not stopped and failure is None:
                            failure = _Failed(_died(name, process.exitcode), MemfitError)
                        continue
                    if isinstance(message, _Ready):
                        with suppress(BrokenPipeError, ConnectionResetError):  # its end is told of next
                            connection.send(tasks[name])
                    elif isinstance(message, _Failed):
                        failure = failure or message
                    else:
                        on_message(name, message)
        finally:
            for _, process in running.values():  # when what was told has raised, or at the second Ctrl-C
                if not stopped:
                    process.terminate()
                process.join()
    if failure is not None:
        raise failure.kind(failure.said)
    return interrupts.signal


def _died(name: str, status: int) -> str:
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"the process of {name} ended {how}, perhaps for want of memory: give fewer at once."


def _start(work: Callable[..., None]) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_task, args=(theirs, work), daemon=True)
    with _ctrl_c_later():
        process.start()  # with little to hand over: this waits, deaf, until the process takes what is more
    theirs.close()
    return ours, process


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Ctrl-C comes after the block; a process that starts in here never gets it: it is told by SIGTERM."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _task(connection: Connection, work: Callable[..., None]) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        connection.send(_Ready())
        work(connection.send, *connection.recv())
    except MemfitError as error:
        connection.send(_Failed(str(error), type(error)))
    except (InterruptedRun, KeyboardInterrupt, EOFError):
        sys.exit(1)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
