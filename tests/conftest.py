"""What all tests share: Ctrl-C works, also where the suite runs in the background of a shell that ignores it."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that tests start inherit it


def pytest_collection_finish() -> None:
    """What the imports have brought stays: without it each of the ledger's many collections takes a fraction."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For nets so small that threads would only wait for each other, here and in the processes that tests start.

    Other numbers of threads also add in other orders: a run in another process has the same bits with as many.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)
