"""What is known of a run: one record per step, and the result."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from memfit.ledger import Peak


@dataclass(frozen=True)
class StepRecord:
    """One step.

    Attributes:
        step: its number, from 1.
        loss: the batch's loss before the update, not finite when the loss was not.
        seconds: wall time of loss, backward and update, without loading the batch and without checkpoints.
        peak: the memory at the step's peak when it was measured, else None.
        skipped: whether no update was made, because the loss or the gradients were not finite.
    """

    step: int
    loss: float
    seconds: float
    peak: Peak | None = None
    skipped: bool = False

    @property
    def measured(self) -> bool:
        """Whether the ledger watched this step, which makes it slower: its time is not typical."""
        return self.peak is not None


@dataclass(frozen=True)
class FitResult:
    """A run.

    Attributes:
        records: of every step since the run's beginning, also of those before a resume.
        peak: the largest peak that was measured, or None.
        resumed_from: the step of the checkpoint that this call started from; 0 when it started at the beginning.
        interrupted: whether a signal ended this call. A checkpoint of its last step is written, unless that step was
            skipped: then the last checkpoint, if there is one, is of an earlier step.
        signal: the number of that signal, or None.
    """

    records: list[StepRecord]
    peak: Peak | None
    resumed_from: int
    interrupted: bool
    signal: int | None = None

    @property
    def seconds_per_step(self) -> float | None:
        """Median time of the steps that the ledger did not slow down; None when there is no such step."""
        times = [record.seconds for record in self.records if not record.measured]
        return median(times) if times else None


def pack(records: list[StepRecord]) -> dict[str, Any]:
    """Records as a tree for a checkpoint; exact, and 17 bytes per step."""
    return {
        "loss": torch.tensor([record.loss for record in records], dtype=torch.float64),
        "seconds": torch.tensor([record.seconds for record in records], dtype=torch.float64),
        "skipped": torch.tensor([record.skipped for record in records], dtype=torch.bool),
        "peaks": {record.step: pack_peak(record.peak) for record in records if record.peak is not None},
    }


def unpack(tree: dict[str, Any]) -> list[StepRecord]:
    """The inverse of :func:`pack`."""
    peaks = {step: unpack_peak(lines) for step, lines in tree["peaks"].items()}
    columns = zip(tree["loss"].tolist(), tree["seconds"].tolist(), tree["skipped"].tolist(), strict=True)
    return [
        StepRecord(step, loss, seconds, peaks.get(step), skipped)
        for step, (loss, seconds, skipped) in enumerate(columns, start=1)
    ]


def pack_peak(peak: Peak) -> dict[str, int]:
    return dataclasses.asdict(peak)


def unpack_peak(lines: dict[str, int]) -> Peak:
    from memfit.ledger import Peak  # here, so that a run that measures nothing does not load the ledger

    return Peak(**lines)
