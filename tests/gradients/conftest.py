"""Two processes on loopback, for the tests of data parallelism."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Runs a script of this folder as ranks 0 and 1 of a gloo group; what each prints last is its result, as JSON.

    The script gets the rank and an init method for ``init_process_group`` as its arguments.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")

    def run(script: str) -> list[dict[str, Any]]:
        store = tmp_path_factory.mktemp("group") / "store"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's own name leads to
        command = [sys.executable, str(Path(__file__).with_name(script))]
        workers = [
            subprocess.Popen(
                [*command, rank, f"file://{store}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in "01"
        ]
        try:
            outputs = [worker.communicate(timeout=300) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        for worker, (_, errors) in zip(workers, outputs, strict=True):
            assert worker.returncode == 0, errors
        return [json.loads(printed.splitlines()[-1]) for printed, _ in outputs]

    return run
