"""Two processes on one machine: fully_shard (FSDP2) shards weights and factors, and trains as one process does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Found = list[dict[str, Any]]
RUNS = [
    "linear",
    "linear, refresh",
    "linear, left, refresh",
    "linear, power",
    "convolution, refresh",
    "transformer, power",
    "transformer, left",
    "lstm, refresh",
    "lstm, left, rematerialized",
]


@pytest.fixture(scope="module")
def found(in_two_processes: Callable[[str], Found]) -> Found:
    """What both processes report of the same runs."""
    return in_two_processes("fsdp_worker.py")


@pytest.mark.parametrize("run", RUNS)
def test_sharded_training_is_one_processs_on_the_joined_batch(found: Found, run: str) -> None:
    """And memfit.state_dict, gathered, loads in the plain model; refreshes included, also of rows that do not halve."""
    for process in found:
        assert process[run]["sharded"]
        assert process[run]["moved"] > 1e-2
        assert process[run]["difference"] < 1e-9


@pytest.mark.parametrize("run", RUNS)
def test_one_step_reduces_the_gradients_of_factors_and_vectors_once(found: Found, run: str) -> None:
    """Also over micro-batches; of the dense weights' gradients nothing is on the way. Rows are padded to halve."""
    dense = found[0][f"dense {run.split(',')[0]}"]["traffic"]["reduce_scatter_base"]
    for process in found:
        trained = 8 * process[run]["trained numbers"]
        reduced = process[run]["traffic"]["reduce_scatter_base"]
        assert trained <= reduced <= 1.25 * trained
        assert reduced < 0.55 * dense


def test_torchs_distributed_checkpoint_resumes_exactly_and_gathers(found: Found) -> None:
    for process in found:
        assert process["resume"]["resumed"] == 0
        assert process["resume"]["gathered"] < 1e-12


def test_mixed_precision_trains_float32_factors(found: Found) -> None:
    for process in found:
        assert process["mixed precision"]["after"] < 0.7 * process["mixed precision"]["before"]
        assert process["mixed precision"]["dtypes"] == ["torch.float32"]


def test_the_ledger_counts_the_shards_that_a_process_holds(found: Found) -> None:
    """Up to the padding of what does not halve."""
    for process in found:
        account = process["account"]
        assert account["own"] <= account["weights"] < 0.6 * account["all"]


def test_a_sharded_model_is_refused(found: Found) -> None:
    """fully_shard holds on to the parameters that it found, and so to the weights or to the factors."""
    for process in found:
        assert process["convert_"].startswith("ConversionError: layer 'embed' has sharded parameters")
        assert "before fully_shard" in process["convert_"]
        assert process["restore_"].startswith("ConversionError: the model's parameters are sharded")
        assert "memfit.state_dict" in process["restore_"]
