"""Two processes on one machine: DistributedDataParallel reduces the factors' gradients and keeps replicas equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Found = list[dict[str, Any]]
RUNS = [
    "both",
    "both, refresh",
    "both, refresh, micro-batches",
    "both, refresh, in the buckets",
    "both, power, micro-batches",
    "left",
    "left, refresh, micro-batches",
    "lstm, refresh",
    "lstm, left, micro-batches",
]


@pytest.fixture(scope="module")
def found(in_two_processes: Callable[[str], Found]) -> Found:
    """What both processes report of the same runs."""
    return in_two_processes("ddp_worker.py")


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_like_one_on_the_joined_batch(found: Found, run: str) -> None:
    for process in found:
        assert process[run]["moved"] > 1e-2
        assert process[run]["difference"] < 1e-12


@pytest.mark.parametrize("run", RUNS)
def test_both_processes_have_the_same_bits(found: Found, run: str) -> None:
    assert all(process[run]["same everywhere"] for process in found)


@pytest.mark.parametrize("run", RUNS)
def test_one_step_reduces_the_factors_and_vectors_once_and_nothing_else(found: Found, run: str) -> None:
    """Also over micro-batches, of which all but the last are under no_sync; and a frozen basis is not broadcast."""
    dense = found[0]["dense lstm" if run.startswith("lstm") else "dense linear"]["traffic"]["allreduce"]
    for process in found:
        traffic, trained = process[run]["traffic"], process[run]["trained bytes"]
        assert traffic.pop("allreduce") == trained < 0.25 * dense
        # The model's own buffers, which DistributedDataParallel sends along with each forward that synchronizes.
        assert sum(traffic.values()) == process[run]["buffer bytes"]


def test_the_state_has_the_wrappers_prefix_and_the_inner_models_loads_in_the_plain_model(found: Found) -> None:
    assert all(process["prefixed keys"] for process in found)


def test_a_wrapped_model_is_refused(found: Found) -> None:
    """The wrapper has noted which parameters train: it would not reduce the factors' gradients."""
    for process in found:
        assert "convert the model before it is wrapped" in process["refusal"]
